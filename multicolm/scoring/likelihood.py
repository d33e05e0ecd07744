"""How likely an ensemble finds texts that it did not write, under a policy.

    joint     P(X) = prod_t sum_z P(z | X_<t) P_z(X_t | X_<t), the model that texts follow when the
              writer is drawn too. A policy that mixes, or that verifies drafts, has such a model
              as it is; one that selects has it if it gives probabilities of who writes.
    routed    the probability of every token under the model that the policy lets write there.

A policy that writes characters, or rates segments, has neither: what it writes does not follow a
distribution over next tokens.

Texts are read, not written: each model reads each text once, and the policy is asked about all
places of it, as it would be asked while the text is written. All log-probabilities are in nats,
without temperature, top-k and top-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from multicolm.backend.base import ModelOutput
from multicolm.backend.checked import open_session
from multicolm.decoding.choosing import Choosing
from multicolm.decoding.draft import Draft, Positions, Shown
from multicolm.decoding.memory import Memory
from multicolm.decoding.row import Row
from multicolm.decoding.sampling import Noise, Sampling, row_key
from multicolm.decoding.settle import PolicyDesk, Verdict
from multicolm.decoding.text import TextStream
from multicolm.decoding.token_reader import TokenReader
from multicolm.ensemble import Ensemble
from multicolm.errors import CapabilityError, InputError, ModelError, PolicyError
from multicolm.exact.byte_session import ByteSession, span_logprobs
from multicolm.policy.base import Policy, VerifyPolicy
from multicolm.scoring.passages import Passage, PassageReader
from multicolm.scoring.places import Places, ToldPositions
from multicolm.scoring.reading import Text, read_all, refuse_partial
from multicolm.scoring.spans import Spans, to_base_tokens
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.views import View, Views

__all__ = ["KINDS", "Kind", "Likelihood", "LikelihoodReader", "Passage"]

Kind: TypeAlias = Literal["joint", "routed"]
"""Under which model a text is likely; see above."""

KINDS: tuple[Kind, ...] = get_args(Kind)

# Distributions count as the models and the policy give them.
_AS_THEY_ARE = Sampling(temperature=1.0)
# The most numbers that all models' logits may hold while texts are read; 256 MiB.
_MAX_LOGITS = 1 << 26


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a text is.

    Attributes:
        logprob: of the whole text, in nats.
        is_greedy: whether every token is the most likely one at its place, so that greedy decoding
            writes the text.
    """

    logprob: float
    is_greedy: bool


@dataclass(frozen=True)
class _Reading:
    """What one model made of some texts, one after another, token by token of the base model.

    Attributes:
        logits: at the places where a token of the model's own begins.
        hidden: there, if the policy looks at it.
        line: per base token, which of these places its beginning is; -1 for none.
        logprobs: per base token with a place, of all up to the next one, in nats; 0 elsewhere.
        misses: likewise, how many own tokens were not the most likely ones.
        is_exact: whether ``logprobs`` are those of the base tokens themselves, wherever the
            model's own begin.
    """

    logits: Float[Tensor, "places vocab"]
    hidden: Float[Tensor, "places hidden"] | None
    line: Int[Tensor, "positions"]
    logprobs: Float[Tensor, "positions"]
    misses: Float[Tensor, "positions"]
    is_exact: bool = False


class LikelihoodReader(PassageReader):
    """Tells how likely an ensemble finds texts under one policy.

    Attributes:
        kinds: what it can tell, the likelihood that the policy is best known by first; nothing
            for policies that have none, and where not every probability is known.

    Args:
        ensemble: whose models read.
        policy: decides who writes.
        seed: of whatever the policy decides at random.
        batch_tokens: the most tokens of one forward pass.

    Raises:
        CapabilityError: if the policy does not fit the ensemble, or a model's server returns its
            likeliest tokens only.
    """

    def __init__(
        self, ensemble: Ensemble, policy: Policy, *, seed: int = 0, batch_tokens: int = 4096
    ) -> None:
        ensemble.check(policy)
        super().__init__(ensemble, policy)
        self._policy = policy
        self._seed = seed
        self._batch_tokens = batch_tokens
        self._in_bytes = policy.support == "bytes"
        self._vocabulary = ensemble.written_in(policy)
        first_tokens = None if self._vocabulary.is_shared else self._vocabulary.first_tokens
        self._desk = PolicyDesk(
            policy,
            ensemble.models,
            self._vocabulary.starts_word,
            {k: self._embedder(k) for k in range(len(self._models))},
            first_tokens,
            costs=ensemble.costs,
            extends=self._vocabulary.extends,
            text_nll=self._text_nll,
        )
        self._nll: dict[tuple[int, int], Tensor] = {}  # per model and text, by place
        self._choosing = Choosing(self._desk)
        self._memory = Memory(self._desk)
        needs = self._desk.needs
        self._used_at = sorted({*needs.always, *needs.deferred})
        self.kinds: tuple[Kind, ...] = self._kinds()

    def check(self, kind: Kind | None = None) -> Kind:
        """The likelihood that is meant, if it is known under this policy.

        Args:
            kind: one of :attr:`kinds`; the first of them if not given.

        Raises:
            CapabilityError: naming those that are.
        """
        refuse_partial(self._models[k] for k in self._used)
        if not self.kinds:
            raise CapabilityError(
                f"policy '{self._policy.name}' gives no likelihood to a text: what it writes does "
                "not follow a distribution over next tokens; choose another one, or tasks that "
                "have texts written."
            )
        if kind is not None and kind not in self.kinds:
            raise CapabilityError(
                f"policy '{self._policy.name}' has no {kind} likelihood ({_REASONS[kind]}); it has "
                f"the {self.kinds[0]} one."
            )
        return kind or self.kinds[0]

    def likelihoods(
        self, passages: Sequence[Passage], kind: Kind | None = None
    ) -> list[Likelihood]:
        """How likely texts are, in their order.

        Where the models have different vocabularies, a text is likely by stretches whose ends are
        ends of tokens of all of them, as in a score table; a stretch is greedy if the model that
        writes it (of the joint model: that has the greatest part in its probability) would write
        its own tokens greedily.

        Args:
            passages: that every model can read; see :meth:`fitted`.
            kind: one of :attr:`kinds`; the first of them if not given.

        Raises:
            CapabilityError: if that likelihood is not known under this policy.
            InputError: if a model cannot read a text to its end.
            ModelError: if a model gives NaN.
            PolicyError: if the policy broke its contract.
        """
        kind = self.check(kind)
        found: list[Likelihood] = []
        with torch.no_grad():
            for batch in self._batches(passages):
                found += self._likelihoods(batch, kind)
        return found

    def _kinds(self) -> tuple[Kind, ...]:
        if any(self._models[k].max_top_logprobs is not None for k in self._used):
            return ()
        if self._policy.acts == "segment" or self._policy.support == "characters":
            return ()
        if self._memory.updates and not self._vocabulary.is_shared:
            return ()  # what it remembers follows tokens, and texts are read in longer stretches
        if self._policy.acts != "select":
            return ("joint",)
        # Who writes later depends on who wrote before: no product over tokens.
        if self._policy.keeps_state:
            return ("routed",)
        if type(self._policy).model_probs is Policy.model_probs:
            return ("routed",)
        # Whether there are probabilities may hang on the params: asked about a place where no
        # model knows anything.
        width = self._vocabulary.size
        views = {
            k: View(
                torch.zeros(1, width),
                None if self._models[k].hidden_size is None else self._blank(k),
                signals=self._desk.needs.of(k),
                name=self._models[k].name,
                embed=self._embedder(k),
            )
            for k in self._desk.needs.always
        }
        blank = Views(self._ensemble.models, views, n_positions=1, costs=self._ensemble.costs)
        return ("routed",) if self._policy.model_probs(blank) is None else KINDS

    def _blank(self, k: int) -> Tensor:
        return torch.zeros(1, self._models[k].hidden_size or 0)

    def _embedder(self, k: int) -> Callable[[Tensor], Tensor]:
        model, vocabulary = self._models[k], self._ensemble.vocabulary
        return lambda ids: model.embed(vocabulary.own_ids(k, ids)).cpu()

    def _batches(self, passages: Sequence[Passage]) -> Iterator[list[Passage]]:
        """Texts whose logits fit into memory together; one at least."""
        budget = _MAX_LOGITS // (self._vocabulary.size * len(self._used))
        batch: list[Passage] = []
        n_tokens = 0
        for passage in passages:
            n_tokens += len(passage.ids)
            if batch and n_tokens > budget:
                yield batch
                batch, n_tokens = [], len(passage.ids)
            batch.append(passage)
        if batch:
            yield batch

    # --- one batch -------------------------------------------------------------------------------

    def _likelihoods(self, batch: Sequence[Passage], kind: Kind) -> list[Likelihood]:
        texts = [self._outcomes(passage) for passage in batch]
        if self._in_bytes:
            seen = {k: self._read_bytes(k, batch, texts) for k in self._used}
        else:
            seen = {k: self._read(k, batch) for k in self._used}
        if self._policy.likelihoods:
            self._nll = _text_nlls(seen, texts)
        place = Places(self._rows(batch), texts, self._begins(seen, sum(map(len, texts))))
        if self._policy.acts == "select" and kind == "joint":
            logprobs, misses = self._joint(place, seen)
        elif self._policy.acts == "select":
            logprobs, misses = self._routed(place, seen)
        elif self._policy.acts == "mix":
            logprobs, misses = self._mixed(place, seen)
        else:
            logprobs, misses = self._verified(place, seen)
        if bool(logprobs.isnan().any()):
            raise ModelError(
                f"a likelihood under policy '{self._policy.name}' is NaN; try another `dtype` for "
                "the models."
            )
        sums = place.per_text(logprobs).tolist()
        n_misses = place.per_text(misses).tolist()
        return [Likelihood(a, b == 0) for a, b in zip(sums, n_misses, strict=True)]

    def _outcomes(self, passage: Passage) -> list[int]:
        """What is predicted, one after another: tokens, or bytes."""
        return list(b"".join(self._contents(passage)) if self._in_bytes else passage.ids)

    def _rows(self, batch: Sequence[Passage]) -> list[Row]:
        """The texts as a policy is told about them."""
        rows = [
            Row(
                number=number,
                prompt="",
                prompt_ids=passage.prompt_ids,
                key=row_key(self._seed, passage.prompt_ids[self._used[0]]),
                seed=self._seed,
                max_new_tokens=len(passage.ids),
                text=TextStream(()),
                draft_length=1,
                sampling=_AS_THEY_ARE,
                slot=number,
                models=tuple(self._used),
            )
            for number, passage in enumerate(batch)
        ]
        self._read_prompts(rows)
        self._memory.begin(Positions(rows, [0] * len(rows), Noise()))
        return rows

    def _read_prompts(self, rows: Sequence[Row]) -> None:
        """What the policy wants to know of the prompts alone."""
        states = self._policy.prompt_states(self._ensemble.models)
        for row in rows if self._policy.prompts else ():
            row.prompt_mean_nll = [math.nan] * len(self._models)
        for k in self._used if self._policy.prompts else sorted(states):
            model, vocabulary = self._models[k], self._ensemble.vocabulary
            reader = TokenReader(model, k, vocabulary, open_session(model, len(rows)), lambda: 0.0)
            for row in rows:
                reader.start(row)
                if self._policy.prompts:
                    row.prompt_mean_nll[k] = reader.prompt_mean_nll(row)
            if k in states:
                for how, each in reader.prompt_hidden(rows, states[k]).items():
                    for row, state in zip(rows, each, strict=True):
                        row.prompt_hidden[k, how] = state

    def _begins(self, seen: Mapping[int, _Reading], n_positions: int) -> Bool[Tensor, "positions"]:
        """Positions at which all models can go on that the policy looks at or lets write."""
        begins = torch.ones(n_positions, dtype=torch.bool)
        if self._policy.acts != "select":
            return begins
        for k, reading in seen.items():
            if not reading.is_exact or k in self._used_at:
                begins &= reading.line >= 0
        return begins

    def _read(self, k: int, batch: Sequence[Passage]) -> _Reading:
        """Let a model read texts, each token of a text once."""
        hidden = "hidden" in self._desk.needs.of(k)
        vocabulary = self._ensemble.vocabulary
        spans: list[Spans] | None = None
        # What several models write together is read by each as it comes, token by token.
        writer = k if self._policy.acts == "select" else len(self._models)
        own = [list(passage.ids) for passage in batch]
        if self._is_other(k) and self._policy.acts == "select":
            spans = [self._spans(k, passage) for passage in batch]
            own = [list(text.own) for text in spans]
        texts = [
            Text(passage.prompt_ids[k], ids, [writer] * len(ids))
            for passage, ids in zip(batch, own, strict=True)
        ]
        model = self._models[k]
        seen = read_all(model, k, vocabulary, texts, hidden=hidden, batch_tokens=self._batch_tokens)
        gold = torch.tensor([token for ids in own for token in ids])
        logprobs = seen.logits.log_softmax(-1).gather(-1, gold[:, None])[:, 0]
        misses = (seen.logits.argmax(-1) != gold).float()
        if self._policy.acts == "select" and not bool(seen.known.all()):
            raise InputError(
                f"model '{model.name}' cannot read a text to its end, for its context holds "
                f"{model.context_length} tokens; shorten it."
            )
        if spans is None:
            line = torch.arange(len(gold)).masked_fill(~seen.known, -1)
            return _Reading(seen.logits, seen.hidden, line, logprobs, misses)
        ones = torch.ones(len(gold), dtype=torch.uint8)
        columns = to_base_tokens({"gold_logprobs": logprobs, "known": ones}, spans)
        missed = to_base_tokens({"gold_logprobs": misses, "known": ones}, spans)
        line = columns["number"].masked_fill(columns["open"] == 0, -1)
        summed, is_exact = columns["gold_logprobs"], False
        if isinstance(vocabulary, BridgedVocabulary) and vocabulary.is_exact(k):
            summed, is_exact = self._exact(k, batch), True
        return _Reading(seen.logits, seen.hidden, line, summed, missed["gold_logprobs"], is_exact)

    def _exact(self, k: int, batch: Sequence[Passage]) -> Float[Tensor, "positions"]:
        """What a model gives to every base token, summed over all ways to spell the text."""
        found = []
        for passage in batch:
            contents = self._contents(passage)
            ends = list(accumulate(map(len, contents)))
            prompt = passage.prompt_ids[k]
            found.append(span_logprobs(self._models[k], prompt, b"".join(contents), ends).float())
        return torch.cat(found)

    def _read_bytes(
        self, k: int, batch: Sequence[Passage], texts: Sequence[Sequence[int]]
    ) -> _Reading:
        """Let a model read texts byte by byte, all of them side by side."""
        session = ByteSession(self._models[k], len(batch))
        for row, passage in enumerate(batch):
            session.begin(row, passage.prompt_ids[k])
        starts = [0, *accumulate(map(len, texts))]
        logprobs = torch.zeros(starts[-1], self._vocabulary.size)
        for place in range(max(map(len, texts))):
            rows = [row for row, text in enumerate(texts) if len(text) > place]
            at = torch.tensor([starts[row] + place for row in rows])
            logprobs[at] = session.next_byte_logprobs(rows).float()
            session.feed(rows, [bytes([texts[row][place]]) for row in rows])
        gold = torch.tensor([byte for text in texts for byte in text])
        found = logprobs.gather(-1, gold[:, None])[:, 0]
        misses = (logprobs.argmax(-1) != gold).float()
        return _Reading(logprobs, None, torch.arange(starts[-1]), found, misses)

    # --- what the policy says --------------------------------------------------------------------

    def _shown(
        self,
        place: Places,
        seen: Mapping[int, _Reading],
        which: Sequence[int],
        models: Sequence[int] | None = None,
    ) -> dict[int, Shown]:
        """What models show at some of the places; those that it may look at, if none are given."""
        at = place.at[torch.tensor(which, dtype=torch.long)]
        shown = {}
        for k in self._used_at if models is None else models:
            reading = seen[k]
            lines = reading.line[at].tolist()
            shown[k] = Shown(
                ModelOutput(reading.logits, reading.hidden),
                {i: line for i, line in enumerate(lines) if line >= 0},
                frozenset(i for i, line in enumerate(lines) if line < 0),
            )
        return shown

    def _draft(
        self, place: Places, seen: Mapping[int, _Reading], which: Sequence[int]
    ) -> tuple[Draft, ToldPositions]:
        told = ToldPositions(
            [place.rows[place.text[i]] for i in which],
            [place.place[i] for i in which],
            place.noise,
            [place.gold[i] for i in which],
            range(len(which)),
        )
        shown = self._shown(place, seen, which)
        return Draft(told, shown=shown, scores=[None] * len(which)), told

    def _always(self, draft: Draft) -> Views:
        """What the policy is shown before anybody is asked because of it."""
        always = {k: draft.shown[k] for k in self._desk.needs.always}
        return self._desk.views(draft.positions, range(len(draft.positions)), always)

    def _joint(self, place: Places, seen: Mapping[int, _Reading]) -> tuple[Tensor, Tensor]:
        """Log of sum_z pi_z P_z of every stretch, and whether it is the likeliest."""
        draft, _ = self._draft(place, seen, range(len(place)))
        probs = self._policy.model_probs(self._always(draft))
        shape = (len(place), len(self._models))
        if probs is None or probs.shape != shape:
            got = None if probs is None else tuple(probs.shape)
            raise PolicyError(
                f"policy '{self._policy.name}': `model_probs` gave {got}; expected "
                f"[positions, models], here {shape}."
            )
        log_pi = probs.float().cpu().log()[:, self._used]
        parts = log_pi + torch.stack([place.sums(seen[k].logprobs) for k in self._used], dim=1)
        if all(self._vocabulary.groups[k] == 0 for k in self._used):
            mixed = torch.stack(
                [
                    log_pi[:, n, None] + seen[k].logits.log_softmax(-1)
                    for n, k in enumerate(self._used)
                ]
            ).logsumexp(0)
            misses = (mixed.argmax(-1) != torch.tensor(place.gold)).float()
        else:
            missed = torch.stack([place.sums(seen[k].misses) for k in self._used], dim=1)
            misses = missed.gather(1, parts.argmax(-1, keepdim=True))[:, 0]
        return parts.logsumexp(-1), misses

    def _rounds(self, place: Places) -> list[list[int]]:
        """Stretches that the policy can be asked about together."""
        if self._policy.history or self._memory.updates:
            return list(place.one_by_one())
        return [list(range(len(place)))]

    def _routed(self, place: Places, seen: Mapping[int, _Reading]) -> tuple[Tensor, Tensor]:
        """Log-probability of every stretch under who writes it, and whether it is the likeliest."""
        writers = [0] * len(place)
        sums = torch.stack([place.sums(seen[k].logprobs) for k in self._used], dim=1)
        for which in self._rounds(place):
            draft, _ = self._draft(place, seen, which)
            asked, verdict = self._asked(draft), Verdict()
            found: dict[int, int] = {}
            for group in self._groups(draft, asked):
                found |= self._desk.decide(draft, group, verdict)
            found |= verdict.writers
            for i, n in enumerate(which):
                writers[n] = verdict.writers[i] = found.get(i, 0)
                verdict.tokens[i] = place.gold[n]
                verdict.logprobs[i] = float(sums[n, self._used.index(writers[n])])
                if self._policy.history:
                    place.write(n, writers[n])
            self._remember(place, seen, which, draft, asked, verdict)
        at = torch.tensor([self._used.index(writer) for writer in writers])[:, None]
        misses = torch.stack([place.sums(seen[k].misses) for k in self._used], dim=1)
        return sums.gather(1, at)[:, 0], misses.gather(1, at)[:, 0]

    def _groups(self, draft: Draft, asked: Sequence[int]) -> list[list[int]]:
        """Positions at which the policy is asked, by the models that it sees there."""
        if not asked or not self._choosing.by_place:
            return [list(asked)] if asked else []
        self._choosing.always(draft, asked)
        self._choosing.named(draft, asked)
        return self._choosing.split(draft, asked)

    def _text_nll(self, positions: Positions, models: Sequence[int]) -> Tensor:
        """See :attr:`multicolm.views.Views.text_nll`."""
        nats = torch.full((len(positions), len(self._models)), math.nan)
        for line, (row, place) in enumerate(zip(positions.rows, positions.places, strict=True)):
            for k in models:
                nats[line, k] = self._nll[k, row.number][place]
        return nats

    def _asked(self, draft: Draft) -> list[int]:
        """At which positions the policy is asked, as the decode loop asks it."""
        every = list(range(len(draft.positions)))
        if self._policy.assistants != "deferred" or 0 not in self._desk.needs.always:
            return every
        flags = self._desk.defers(self._always(draft))
        return [i for i in every if flags[i]]

    def _remember(
        self,
        place: Places,
        seen: Mapping[int, _Reading],
        which: Sequence[int],
        draft: Draft,
        asked: Sequence[int],
        verdict: Verdict,
    ) -> None:
        """Let a policy that keeps state see its tokens, as the decode loop shows them."""
        if not self._memory.updates:
            return
        ran: dict[int, set[int]] = {k: set(range(len(which))) for k in self._desk.needs.always}
        if self._choosing.by_place:
            ran = {k: {i for i, models in draft.seen.items() if k in models} for k in self._used}
        else:
            for k in self._desk.needs.deferred:
                ran.setdefault(k, set()).update(asked)
        for i, writer in verdict.writers.items():
            if writer < len(self._models):
                ran.setdefault(writer, set()).add(i)
        shown = {}
        for k, whole in self._shown(place, seen, which, sorted(ran)).items():
            lines = {i: line for i, line in whole.line_of.items() if i in ran[k]}
            shown[k] = Shown(whole.output, lines, whole.closed & ran[k])
        self._memory.update(replace(draft, shown=shown), verdict)

    def _mixed(self, place: Places, seen: Mapping[int, _Reading]) -> tuple[Tensor, Tensor]:
        """Log-probability of every token under the policy's mixture."""
        logprobs, misses = torch.zeros(len(place)), torch.zeros(len(place))
        for which in self._rounds(place):
            draft, told = self._draft(place, seen, which)
            asked, verdict = self._asked(draft), Verdict()
            if alone := sorted(set(range(len(which))) - set(asked)):
                self._desk.write(draft, 0, alone, verdict)
            for group in self._groups(draft, asked):
                self._desk.decide(draft, group, verdict)
            self._remember(place, seen, which, draft, asked, verdict)
            for i, n in enumerate(which):
                logprobs[n] = verdict.logprobs[i]
                misses[n] = float(told.likeliest[i] != place.gold[n])
        return logprobs, misses

    def _verified(self, place: Places, seen: Mapping[int, _Reading]) -> tuple[Tensor, Tensor]:
        """Log-probability of every token under the distribution that texts are made to follow."""
        assert isinstance(self._policy, VerifyPolicy)
        logprobs, misses = torch.zeros(len(place)), torch.zeros(len(place))
        for which in self._rounds(place):
            draft, _ = self._draft(place, seen, which)
            probs = torch.zeros(len(which), self._vocabulary.size)
            for group in self._groups(draft, range(len(which))):
                target = self._policy.target_probs(self._desk.seen(draft, group))
                probs[torch.tensor(group)] = target.float().cpu()
            gold = torch.tensor([place.gold[n] for n in which])
            found = probs.gather(-1, gold[:, None])[:, 0].log()
            logprobs[which] = found.float()
            misses[which] = (probs.argmax(-1) != gold).float()
            tokens = dict(enumerate(gold.tolist()))
            writers = dict.fromkeys(tokens, self._policy.replaces(self._ensemble.models))
            verdict = Verdict(writers, tokens, dict(enumerate(found.tolist())))
            self._remember(place, seen, which, draft, list(tokens), verdict)
        return logprobs, misses


def _text_nlls(
    seen: Mapping[int, _Reading], texts: Sequence[Sequence[int]]
) -> dict[tuple[int, int], Tensor]:
    """Per model and text, how unlikely it finds the text before each place of it, in nats."""
    sizes = list(map(len, texts))
    found = {}
    for k, reading in seen.items():
        logprobs_of = torch.split(reading.logprobs.double(), sizes)
        parts = zip(logprobs_of, torch.split(reading.line, sizes), strict=True)
        for number, (logprobs, line) in enumerate(parts):
            # Not by subtraction: there may be infinities.
            before = torch.cat([torch.zeros(1, dtype=torch.float64), logprobs[:-1]]).cumsum(0)
            found[k, number] = (-before).float().masked_fill(line < 0, math.nan)
    return found


_REASONS: dict[Kind, str] = {
    "joint": "it says who writes, and not with what probability",
    "routed": "its models write every token together",
}

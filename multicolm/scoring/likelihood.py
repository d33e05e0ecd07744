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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from multicolm.backend.passes import run_alone
from multicolm.decoding.consulting import Consulting
from multicolm.decoding.decider import Decider
from multicolm.decoding.decision import Decision
from multicolm.decoding.draft import Draft, Positions
from multicolm.decoding.memory import Memory
from multicolm.decoding.readers import Readers
from multicolm.decoding.row import Row
from multicolm.decoding.runner import Runner
from multicolm.decoding.sampling import Noise, Sampling, row_key
from multicolm.decoding.text import TextStream
from multicolm.ensemble import Ensemble
from multicolm.errors import CapabilityError, ModelError, PolicyError
from multicolm.policy.base import Policy
from multicolm.scoring.passages import Passage
from multicolm.scoring.places import Places
from multicolm.scoring.reading import refuse_partial
from multicolm.scoring.whole import KnownTexts, WholeReader, WholeReading, text_nlls
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


class LikelihoodReader(WholeReader):
    """Tells how likely an ensemble finds texts under one policy.

    Attributes:
        kinds: which likelihoods it can give, the one that the policy is best known by first;
            nothing for policies that have none, and where not every probability is known.

    Args:
        ensemble: whose models read.
        policy: decides who writes.
        seed: of whatever the policy decides at random.
        batch_tokens: maximum number of tokens of one forward pass.

    Raises:
        CapabilityError: if the policy does not fit the ensemble, or a model's server returns its
            likeliest tokens only.
    """

    def __init__(
        self, ensemble: Ensemble, policy: Policy, *, seed: int = 0, batch_tokens: int = 4096
    ) -> None:
        ensemble.check(policy)
        super().__init__(ensemble, policy, batch_tokens)
        self._seed = seed
        self._in_bytes = policy.support == "bytes"
        self._decider = Decider(self._plan, self._embed, self._text_nll)
        self._nll: dict[tuple[int, int], Tensor] = {}  # per model and text, by place
        self._memory = Memory(self._decider)
        needs = self._plan.needs
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
        # Whether there are probabilities may depend on the params: asked about a place where no
        # model knows anything.
        width = self._vocabulary.size
        views = {
            k: View(
                torch.zeros(1, width),
                None if self._models[k].hidden_size is None else self._blank(k),
                signals=self._plan.needs.of(k),
                name=self._models[k].name,
                embed=partial(self._embed, k),
            )
            for k in self._plan.needs.always
        }
        blank = Views(self._ensemble.models, views, n_positions=1, costs=self._ensemble.costs)
        return ("routed",) if self._policy.model_probs(blank) is None else KINDS

    def _blank(self, k: int) -> Tensor:
        return torch.zeros(1, self._models[k].hidden_size or 0)

    def _embed(self, k: int, ids: Tensor) -> Tensor:
        return self._models[k].embed(ids).cpu()

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
            seen = {k: self.read_bytes(k, batch, texts) for k in self._used}
        else:
            seen = {k: self.read(k, batch) for k in self._used}
        if self._policy.likelihoods:
            self._nll = text_nlls(seen, texts)
        place = Places(self._rows(batch), texts, self._begins(seen, sum(map(len, texts))))
        if self._policy.acts != "select":
            logprobs, misses = self._mixed(place, seen)
        elif kind == "joint":
            logprobs, misses = self._joint(place, seen)
        else:
            logprobs, misses = self._routed(place, seen)
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
        """The texts as a policy sees them."""
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
        readers = Readers(self._plan, Runner(self._models, len(rows)))
        for row in rows:
            readers.start(row)
        run_alone(readers.read_prompts(rows))
        self._memory.begin(Positions(rows, [0] * len(rows), Noise()))
        return rows

    def _begins(
        self, seen: Mapping[int, WholeReading], n_positions: int
    ) -> Bool[Tensor, "positions"]:
        """Positions at which all models can continue that the policy reads or lets write."""
        begins = torch.ones(n_positions, dtype=torch.bool)
        if self._policy.acts != "select":
            return begins
        for k, reading in seen.items():
            if not reading.is_exact or k in self._used_at:
                begins &= reading.line >= 0
        return begins

    # --- what the policy says --------------------------------------------------------------------

    def _draft(self, place: Places, which: Sequence[int]) -> Draft:
        """Some of the places, whose tokens are known."""
        rows, places = [place.rows[place.text[i]] for i in which], [place.place[i] for i in which]
        return Draft(
            Positions(rows, places, place.noise),
            deferring=[True] * len(which),
            scores=[None] * len(which),
            forced=[place.gold[i] for i in which],
        )

    def _joint(self, place: Places, seen: Mapping[int, WholeReading]) -> tuple[Tensor, Tensor]:
        """Log of sum_z pi_z P_z of every stretch, and whether it is the likeliest."""
        every = range(len(place))
        draft = self._draft(place, every)
        always = dict.fromkeys(self._plan.needs.always, every)
        run_alone(KnownTexts(place, seen, every).show(always, draft))
        views = self._decider.views(draft.positions, every, draft.shown)
        probs = self._policy.model_probs(views)
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

    def _routed(self, place: Places, seen: Mapping[int, WholeReading]) -> tuple[Tensor, Tensor]:
        """Log-probability of every stretch under who writes it, and whether it is the likeliest."""
        logprobs, misses = torch.zeros(len(place)), torch.zeros(len(place))
        sums = {k: place.sums(seen[k].logprobs) for k in self._used}
        missed = {k: place.sums(seen[k].misses) for k in self._used}
        for which in self._rounds(place):
            draft, decision = self._decided(place, seen, which)
            for i, n in enumerate(which):
                writer = decision.writers[i]
                logprobs[n], misses[n] = sums[writer][n], missed[writer][n]
                decision.logprobs[i] = float(sums[writer][n])
            self._note(place, which, draft, decision)
        return logprobs, misses

    def _mixed(self, place: Places, seen: Mapping[int, WholeReading]) -> tuple[Tensor, Tensor]:
        """Log-probability of every token under the distribution that the policy writes from."""
        logprobs, misses = torch.zeros(len(place)), torch.zeros(len(place))
        for which in self._rounds(place):
            draft, decision = self._decided(place, seen, which)
            for i, n in enumerate(which):
                logprobs[n] = decision.logprobs[i]
                misses[n] = float(not decision.greedy[i])
            self._note(place, which, draft, decision)
        return logprobs, misses

    def _note(self, place: Places, which: Sequence[int], draft: Draft, decision: Decision) -> None:
        """Let policies that keep state or look back know what was decided."""
        self._memory.update(draft, decision)
        for i, n in enumerate(which) if self._policy.history else ():
            place.write(n, decision.writers[i])

    def _decided(
        self, place: Places, seen: Mapping[int, WholeReading], which: Sequence[int]
    ) -> tuple[Draft, Decision]:
        """Ask the policy about some places, as the decode loop asks it."""
        draft = self._draft(place, which)
        known, every = KnownTexts(place, seen, which), range(len(which))
        if self._plan.drafts:
            run_alone(known.show({0: every}, draft))
        if self._policy.assistants == "deferred" and self._plan.drafts:
            views = self._decider.views(draft.positions, every, draft.shown)
            draft.deferring = self._decider.defers(views)
        consulting = Consulting(self._plan, self._decider, known)
        return draft, run_alone(consulting.decide(draft))

    def _text_nll(self, positions: Positions, models: Sequence[int]) -> Tensor:
        """See :attr:`multicolm.views.Views.text_nll`."""
        nats = torch.full((len(positions), len(self._models)), math.nan)
        for line, (row, place) in enumerate(zip(positions.rows, positions.places, strict=True)):
            for k in models:
                nats[line, k] = self._nll[k, row.number][place]
        return nats


_REASONS: dict[Kind, str] = {
    "joint": "it says who writes, and not with what probability",
    "routed": "its models write every token together",
}

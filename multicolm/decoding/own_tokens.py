"""What a model makes of given tokens: of prompts, of drafts, and of the text so far."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicolm.backend.base import Model, ModelOutput
from multicolm.backend.checked import CheckedSession
from multicolm.backend.passes import ForwardPass, Passes, TokenQuery
from multicolm.decoding.reader import Reader
from multicolm.decoding.row import Row
from multicolm.tokenizer.vocabulary import TokenAligner, Vocabulary
from multicolm.types import Pooling, Usage

__all__ = ["Last", "OwnTokens"]

_MAX_LOGITS = 1 << 26  # numbers in one pass where a text is scored; 256 MiB
_END = -1  # instead of an own token: the end of a text


@dataclass(frozen=True, slots=True)
class Last:
    """What a model showed last of a row, in case it is asked again.

    Attributes:
        n_own: after how many own tokens.
        output: one prediction, over the ensemble's vocabulary.
    """

    n_own: int
    output: ModelOutput

    def shows(self, hidden: bool) -> bool:
        """Whether that is all that is wanted."""
        return self.output.hidden is not None or not hidden


@dataclass(slots=True)
class _Tally:
    """How unlikely a model finds the own tokens of a text, one after another.

    Attributes:
        n_prompt: how many own tokens the prompt has.
        nats: per number of own tokens of the text, of all of these together.
        pending: what the model showed last, and after how many own tokens, prompt included: one
            prediction over its own vocabulary.
    """

    n_prompt: int
    nats: list[float] = field(default_factory=lambda: [0.0])
    pending: tuple[int, ModelOutput] | None = None

    @property
    def end(self) -> int:
        """How many own tokens, prompt included, are scored."""
        return self.n_prompt + len(self.nats) - 1

    def add(self, place: int, logprob: float) -> None:
        """Score the own token at a place, unless it is scored already."""
        if place == self.end:
            self.nats.append(self.nats[-1] - logprob)

    def cut(self, n_own: int) -> None:
        """Only the first own tokens are as they were."""
        del self.nats[max(0, n_own - self.n_prompt) + 1 :]
        if self.pending is not None and self.pending[0] > n_own:
            self.pending = None


class OwnTokens(Reader):
    """A model that follows texts in its own tokens, and says how likely it finds them.

    Args:
        model: the model.
        index: its index in the ensemble.
        vocabulary: what the ensemble writes in.
        session: one of the model's, in which a row's slot is its row.
        scores: whether it scores the texts, for :meth:`text_nll`.
    """

    def __init__(
        self,
        model: Model,
        index: int,
        vocabulary: Vocabulary,
        session: CheckedSession,
        *,
        scores: bool = False,
    ) -> None:
        self._model = model
        self._index = index
        self._vocabulary = vocabulary
        self._session = session
        self._straight = vocabulary.is_straight(index)
        self._aligners: dict[int, TokenAligner] = {}
        self._last: dict[int, Last] = {}
        self._scores = scores
        self._tallies: dict[int, _Tally] = {}
        self.usage = Usage()

    @property
    def _n_at_once(self) -> int:
        """How many positions are scored at a time."""
        return max(1, _MAX_LOGITS // self._model.tokenizer.n_tokens)

    def start(self, row: Row) -> None:
        """Begin a new text in the row's slot."""
        self._session.truncate(row.slot, 0)
        self._last.pop(row.slot, None)
        prompt = row.prompt_ids[self._index]
        self._aligners[row.slot] = self._vocabulary.follow(self._index, prompt)
        self._tallies[row.slot] = _Tally(len(prompt))

    def rollback(self, row: Row, n_tokens: int) -> None:
        """The text keeps its first ``n_tokens`` tokens; what was read after them is void."""
        self._aligners[row.slot].cut(n_tokens)

    def length(self, row: Row) -> int:
        """How many own tokens the prompt and the text have; the text has been written so far."""
        self._follow(row, len(row.written))
        return len(self._aligners[row.slot].own)

    def read_ahead(self, row: Row, n_tokens: int) -> Passes[bool]:
        """Read so many tokens of a prompt; its last one is left for the first prediction."""
        if self._model.server:  # which reads texts as it likes
            return True
        own, start = self._aligners[row.slot].own, self._session.lengths[row.slot]
        end = min(start + n_tokens, len(own) - 1)
        if end > start:
            yield from self._run([row], [own[start:end]], [1])
        return len(own) - end <= n_tokens

    def logprobs_of(
        self, rows: Sequence[Row], places: Sequence[int], ids: Sequence[Int[Tensor, "_"]]
    ) -> Passes[list[Float[Tensor, "_"]]]:
        """Log-probabilities of given own tokens at places at which it was just run, in nats."""
        lengths = [self._reach(row.slot, place) for row, place in zip(rows, places, strict=True)]
        return (yield from self._query(rows, lengths, [line.tolist() for line in ids]))

    def _query(
        self,
        rows: Sequence[Row],
        lengths: Sequence[int],
        ids: Sequence[Sequence[int]],
        after: Sequence[Sequence[int]] | None = None,
    ) -> Passes[list[Float[Tensor, "_"]]]:
        """Ask a server for the log-probabilities of tokens; see :meth:`Session.logprobs_of`."""
        wanted = sorted({token for line in ids for token in line})
        slots = [row.slot for row in rows]
        [result] = yield [TokenQuery(self._session, slots, lengths, wanted, after)]
        output, seconds = result.output, result.seconds
        self.usage += Usage(output.n_passes, 0, 0, seconds, output.n_calls)
        for row in dict.fromkeys(rows):
            row.usage[self._index] += Usage(1, 0, 0, seconds / len(set(rows)), output.n_calls)
        column = {token: i for i, token in enumerate(wanted)}
        index = [[column[token] for token in line] for line in ids]
        return [line[at] for line, at in zip(output.logits, index, strict=True)]

    def prompt_mean_nll(self, row: Row) -> Passes[float]:
        """How unlikely the model finds the row's prompt, in nats per token of the base model's."""
        own = self._aligners[row.slot].own
        n_at_once = self._n_at_once
        nats = 0.0
        for begin in range(1, len(own), n_at_once):
            part = own[: begin + n_at_once]
            [found] = yield from self._own_logprobs([row], [part], [len(part) - begin])
            nats -= float(found.double().sum())
        return nats / row.prompt_length

    def prompt_hidden(
        self, rows: Sequence[Row], pooling: Collection[Pooling]
    ) -> Passes[dict[Pooling, Float[Tensor, "rows hidden"]]]:
        """The model's last hidden states of the rows' prompts, pooled in the ways asked for.

        What it predicts after them is kept, so that the first prediction costs no pass.
        """
        order = sorted(rows, key=lambda row: row.slot)
        means: dict[int, Tensor] = {}
        if "mean" in pooling:
            for row in order:
                means[row.slot] = yield from self._read_for_mean(row)
        else:
            for row in order:
                last = len(self._aligners[row.slot].own) - 1
                self._session.truncate(row.slot, min(self._session.lengths[row.slot], last))
            yield from self._read_prompts(order, [1] * len(order))
        found: dict[Pooling, Tensor] = {}
        for how in pooling:
            if how == "mean":
                states = [means[row.slot] for row in rows]
            else:
                lasts = [self._last[row.slot].output.hidden for row in rows]
                states = [last[0] for last in lasts if last is not None]
            found[how] = torch.stack([state.float() for state in states])
        return found

    def _read_for_mean(self, row: Row) -> Passes[Float[Tensor, "hidden"]]:
        """Read a prompt in parts whose logits fit into memory, and average its hidden states."""
        n_tokens = len(self._aligners[row.slot].own)
        n_at_once = self._n_at_once
        self._session.truncate(row.slot, 0)
        total: Tensor | float = 0.0
        for begin in range(0, n_tokens, n_at_once):
            part = min(n_at_once, n_tokens - begin)
            states = yield from self._read_prompts([row], [part], begin + part)
            total = total + states.float().sum(0)
        assert isinstance(total, Tensor)
        return total / n_tokens

    def _read_prompts(
        self, rows: Sequence[Row], n_last: Sequence[int], end: int | None = None
    ) -> Passes[Float[Tensor, "positions hidden"]]:
        """Read prompts on, up to ``end`` tokens, and remember what is shown after the last."""
        slots = [row.slot for row in rows]
        fed = [self._aligners[slot].own[self._session.lengths[slot] : end] for slot in slots]
        output = yield from self._run(rows, fed, n_last, hidden=True)
        assert output.hidden is not None
        line = -1
        for slot, n in zip(slots, n_last, strict=True):
            line += n
            n_own = self._session.lengths[slot]
            last = output.at([line])
            shared = self._vocabulary.logits(self._index, last.logits)
            self._last[slot] = Last(n_own, replace(last, logits=shared))
            self._tallies[slot].pending = (n_own, last)
        return output.hidden

    def draft_nll(self, rows: Sequence[Row]) -> Passes[list[tuple[float, int]]]:
        """How unlikely the model finds what follows the written tokens of some rows."""
        ends = self._vocabulary.end_ids(None)
        order = sorted(range(len(rows)), key=lambda i: rows[i].slot)
        asked, own, n_last = [], [], []
        for i in order:
            row, aligner = rows[i], self._aligners[rows[i].slot]
            is_end = row.ids[-1] in ends
            self._follow(row, len(row.ids) - is_end)
            self._forget(row.slot)
            place = len(row.written)
            while (first := aligner.reach(place)) is None:
                place -= 1
            tokens = [*aligner.own, _END] if is_end else aligner.own
            if len(tokens) > first:
                asked.append(i)
                own.append(tokens)
                n_last.append(len(tokens) - first)
        nats = dict.fromkeys(order, (0.0, 0))
        if asked:
            logprobs = yield from self._own_logprobs([rows[i] for i in asked], own, n_last)
            for i, each in zip(asked, logprobs, strict=True):
                nats[i] = (-float(each.sum()), len(each))
        return [nats[i] for i in range(len(rows))]

    def _own_logprobs(
        self, rows: Sequence[Row], own: Sequence[Sequence[int]], n_last: Sequence[int]
    ) -> Passes[list[Float[Tensor, "_"]]]:
        """Log-probabilities of the last own tokens of texts; ``rows`` by ascending slot.

        The last token of all may be ``_END``: any with which the model ends a text.
        """
        if self._model.max_top_logprobs is not None:
            return (yield from self._queried_logprobs(rows, own, n_last))
        slots = [row.slot for row in rows]
        fed = []
        for slot, tokens, n in zip(slots, own, n_last, strict=True):
            first = min(self._session.lengths[slot], len(tokens) - n - 1)
            self._session.truncate(slot, first)
            fed.append(tokens[first:-1])
        output = yield from self._run(rows, fed, n_last)
        # Columns of a padded head belong to no token.
        logprobs = output.logits[:, : self._model.tokenizer.n_tokens].float().log_softmax(-1)
        gold = torch.tensor([t for ids, n in zip(own, n_last, strict=True) for t in ids[-n:]])
        gold = gold.to(logprobs.device)
        ends = logprobs[:, sorted(self._model.tokenizer.end_ids)].logsumexp(-1)
        known = logprobs.gather(-1, gold.clamp_min(0)[:, None])[:, 0]
        chosen = torch.where(gold == _END, ends, known)
        return list(torch.split(chosen.cpu(), list(n_last)))

    def _queried_logprobs(
        self, rows: Sequence[Row], own: Sequence[Sequence[int]], n_last: Sequence[int]
    ) -> Passes[list[Float[Tensor, "_"]]]:
        """The same, of a server that has to be asked about each token by name."""
        ends = sorted(self._model.tokenizer.end_ids)
        asked, lengths, after, gold = [], [], [], []
        for row, tokens, n in zip(rows, own, n_last, strict=True):
            for place in range(len(tokens) - n, len(tokens)):
                held = min(place, self._session.lengths[row.slot])
                asked.append(row)
                lengths.append(held)
                after.append(tokens[held:place])
                gold.append(ends if tokens[place] == _END else [tokens[place]])
        lines = yield from self._query(asked, lengths, gold, after)
        found = [line.logsumexp(-1) for line in lines]
        return list(torch.split(torch.stack(found), list(n_last)))

    def _run(
        self,
        rows: Sequence[Row],
        fed: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> Passes[ModelOutput]:
        """One pass of the model, in its own vocabulary; ``rows`` by ascending slot."""
        slots = [row.slot for row in rows]
        [result] = yield [ForwardPass(self._session, slots, fed, n_last, hidden)]
        self._account(rows, fed, result)
        return result.output

    def _forget(self, slot: int) -> None:
        """What was read and shown after a place where the text has changed is void."""
        kept = self._aligners[slot].pop_stable_prefix()
        if self._session.lengths[slot] > kept:
            self._session.truncate(slot, kept)
        if slot in self._last and self._last[slot].n_own > kept:
            del self._last[slot]
        self._tallies[slot].cut(kept)

    def _follow(self, row: Row, place: int) -> None:
        """Follow the tokens of the text up to a place that were not yet."""
        aligner = self._aligners[row.slot]
        n_known = aligner.n_tokens
        if n_known < place:
            writers = [] if self._straight else [row.writer(p) for p in range(n_known, place)]
            aligner.extend(row.ids[n_known:place], writers)

    def _reach(self, slot: int, place: int) -> int:
        reach = self._aligners[slot].reach(place)
        assert reach is not None, "a model is asked only where it can continue"
        return reach

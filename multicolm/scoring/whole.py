"""Known texts, each read whole by each model, and shown to a policy as if they were written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicolm.backend.base import ModelOutput
from multicolm.backend.passes import Passes
from multicolm.decoding.draft import Draft, Positions, Shown
from multicolm.ensemble import Ensemble
from multicolm.errors import InputError
from multicolm.exact.byte_session import ByteSession, span_logprobs
from multicolm.policy.base import Policy
from multicolm.scoring.passages import Passage, PassageReader
from multicolm.scoring.places import Places
from multicolm.scoring.reading import Text, read_all
from multicolm.scoring.spans import Spans, to_base_tokens
from multicolm.tokenizer.bridged import BridgedVocabulary

__all__ = ["KnownTexts", "WholeReader", "WholeReading", "text_nlls"]


@dataclass(frozen=True)
class WholeReading:
    """What one model made of some texts, one after another, token by token of the base model.

    Attributes:
        logits: at the places where a token of the model's own begins.
        hidden: there, if the policy reads it.
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


class WholeReader(PassageReader):
    """Lets models read texts, each token of a text once.

    Args:
        ensemble: whose models read.
        policy: what it reads is shown.
        batch_tokens: maximum number of tokens of one forward pass.
    """

    def __init__(self, ensemble: Ensemble, policy: Policy, batch_tokens: int) -> None:
        super().__init__(ensemble, policy)
        self._policy = policy
        self._batch_tokens = batch_tokens
        self._plan = ensemble.plan(policy)
        self._vocabulary = self._plan.vocabulary

    def read(self, k: int, batch: Sequence[Passage]) -> WholeReading:
        """Let a model read texts, each token of a text once."""
        hidden = "hidden" in self._plan.needs.of(k)
        vocabulary = self._ensemble.vocabulary
        spans: list[Spans] | None = None
        # What several models write together is read by each token by token.
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
            return WholeReading(seen.logits, seen.hidden, line, logprobs, misses)
        ones = torch.ones(len(gold), dtype=torch.uint8)
        columns = to_base_tokens({"gold_logprobs": logprobs, "known": ones}, spans)
        missed = to_base_tokens({"gold_logprobs": misses, "known": ones}, spans)
        line = columns["number"].masked_fill(columns["open"] == 0, -1)
        summed, is_exact = columns["gold_logprobs"], False
        if isinstance(vocabulary, BridgedVocabulary) and vocabulary.is_exact(k):
            summed, is_exact = self._exact(k, batch), True
        return WholeReading(
            seen.logits, seen.hidden, line, summed, missed["gold_logprobs"], is_exact
        )

    def _exact(self, k: int, batch: Sequence[Passage]) -> Float[Tensor, "positions"]:
        """What a model gives to every base token, summed over all ways to spell the text."""
        found = []
        for passage in batch:
            contents = self._contents(passage)
            ends = list(accumulate(map(len, contents)))
            prompt = passage.prompt_ids[k]
            found.append(span_logprobs(self._models[k], prompt, b"".join(contents), ends).float())
        return torch.cat(found)

    def read_bytes(
        self, k: int, batch: Sequence[Passage], texts: Sequence[Sequence[int]]
    ) -> WholeReading:
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
        return WholeReading(logprobs, None, torch.arange(starts[-1]), found, misses)


class KnownTexts:
    """Shows what models made of texts that have been read.

    Args:
        place: the places of the texts.
        seen: per model index, what it made of them.
        which: the places that the positions of a draft are.
    """

    def __init__(
        self, place: Places, seen: Mapping[int, WholeReading], which: Sequence[int]
    ) -> None:
        self._seen = seen
        self._at = place.at[torch.tensor(which, dtype=torch.long)]

    def show(self, wanted: Mapping[int, Sequence[int]], draft: Draft) -> Passes[None]:
        """See :meth:`multicolm.decoding.consulting.Showing.show`; no pass is wanted."""
        for k, which in wanted.items():
            before, reading = draft.shown.get(k), self._seen[k]
            lines = dict(zip(which, reading.line[self._at[list(which)]].tolist(), strict=True))
            line_of = {i: line for i, line in lines.items() if line >= 0}
            mid_token = lines.keys() - line_of.keys()
            if before is not None:
                line_of, mid_token = {**before.line_of, **line_of}, {*before.mid_token, *mid_token}
            output = ModelOutput(reading.logits, reading.hidden)
            draft.shown[k] = Shown(output, line_of, frozenset(mid_token))
        yield from ()

    def logprobs_of(
        self, k: int, positions: Positions, ids: Sequence[Tensor]
    ) -> Passes[list[Tensor]]:
        """Never asked: all log-probabilities are known."""
        raise NotImplementedError("models that were read show all log-probabilities")

    def find_boundaries(
        self, models: Sequence[int], draft: Draft, which: Sequence[int]
    ) -> list[int]:
        """All models can continue at the places."""
        return list(which)


def text_nlls(
    seen: Mapping[int, WholeReading], texts: Sequence[Sequence[int]]
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

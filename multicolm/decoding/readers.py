"""The models as they follow the texts of one loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from multicolm.backend.base import ModelOutput, PartialOutput
from multicolm.backend.passes import Passes, together
from multicolm.decoding.byte_reader import ByteReader, ExactReader
from multicolm.decoding.character_reader import CharacterReader
from multicolm.decoding.draft import Draft, Positions, Shown
from multicolm.decoding.plan import Plan
from multicolm.decoding.reader import Reader
from multicolm.decoding.row import Row
from multicolm.decoding.runner import Runner
from multicolm.decoding.token_reader import TokenReader
from multicolm.exact.byte_vocabulary import ByteVocabulary
from multicolm.exact.character_vocabulary import CharacterVocabulary
from multicolm.tokenizer.bridged import BridgedVocabulary

__all__ = ["Readers"]


class Readers:
    """The models as they follow the texts of one loop, each through its own tokens.

    Args:
        plan: the policy and its models.
        runner: opens sessions of the models.

    Attributes:
        opened: per model index, its reader; a model that was never run costs no memory.
    """

    def __init__(self, plan: Plan, runner: Runner) -> None:
        self._plan = plan
        self._runner = runner
        self._rows: list[Row] = []
        self.opened: dict[int, Reader] = {}

    def __getitem__(self, k: int) -> Reader:
        """The reader of model ``k``."""
        if k not in self.opened:
            reader = self._open(k)
            for row in self._rows:
                reader.start(row)
            self.opened[k] = reader
        return self.opened[k]

    def _open(self, k: int) -> Reader:
        plan, runner = self._plan, self._runner
        model, vocabulary = plan.models[k], plan.vocabulary
        if isinstance(vocabulary, ByteVocabulary):
            return ByteReader(model, k, runner.slots.n)
        if isinstance(vocabulary, CharacterVocabulary):
            return CharacterReader(model, k, vocabulary, runner.open(k))
        if isinstance(vocabulary, BridgedVocabulary) and plan.follows_bytes(k):
            return ExactReader(model, k, vocabulary, runner.slots.n)
        scores = plan.policy.likelihoods
        return TokenReader(model, k, vocabulary, runner.open(k), scores=scores)

    def start(self, row: Row) -> None:
        """Begin a new text, which has its slot."""
        self._rows.append(row)  # at once: whoever cancels it takes it out again
        for reader in self.opened.values():
            reader.start(row)

    def stop(self, row: Row) -> None:
        """Follow a text no further."""
        self._rows.remove(row)

    def rollback(self, row: Row, n_tokens: int) -> None:
        """A text keeps its first ``n_tokens`` tokens; what was read after them is void."""
        for reader in self.opened.values():
            reader.rollback(row, n_tokens)

    def fits(self, row: Row, *ahead: int) -> bool:
        """Whether every model in use can read the text, its draft, and the tokens ``ahead``."""
        vocabulary = self._plan.vocabulary
        unread = [*row.ids[len(row.written) :], *ahead]
        for k in row.models:
            limit = self._plan.models[k].context_length
            if limit is None:
                continue
            n_more = sum(vocabulary.n_read(k, token) for token in unread)
            if row.lengths[k] + n_more > limit and self._plan.counts_bytes:
                # What others wrote was counted as its bytes, the most tokens that it can be.
                row.lengths[k] = self[k].length(row)
            if row.lengths[k] + n_more > limit:
                return False
        return True

    def text_nll(self, positions: Positions, models: Sequence[int]) -> Tensor:
        """How unlikely some models find the texts before positions: [positions, all models]."""
        nats = torch.full((len(positions), len(self._plan.models)), math.nan, dtype=torch.float64)
        at = list(zip(positions.rows, positions.places, strict=True))
        for k in models:
            found = [self[k].text_nll(row, place) for row, place in at]
            nats[:, k] = torch.tensor(found, dtype=torch.float64)
        return nats.float()

    def read_prompts(self, rows: Sequence[Row]) -> Passes[None]:
        """Note what the policy wants to know of the prompts of new texts."""
        plan = self._plan
        if plan.policy.prompts:
            for row in rows:
                found = yield from together([self[k].prompt_mean_nll(row) for k in plan.used])
                known = dict(zip(plan.used, found, strict=True))
                row.prompt_mean_nll = [known.get(k, math.nan) for k in range(len(plan.models))]
        for k, pooling in sorted(plan.prompt_states.items()):
            states = yield from self[k].prompt_hidden(rows, pooling)
            for how, each in states.items():
                for row, state in zip(rows, each, strict=True):
                    row.prompt_hidden[k, how] = state

    def show(self, wanted: Mapping[int, Sequence[int]], draft: Draft) -> Passes[None]:
        """Run models so that each shows the positions of a draft that are wanted of it."""
        yield from together([self._forward(k, draft, which) for k, which in wanted.items()])

    def _forward(self, k: int, draft: Draft, which: Sequence[int]) -> Passes[None]:
        before = draft.shown.get(k)
        if before is not None:
            which = [i for i in which if not before.knows([i])]
        if before is not None and not which:
            return
        positions, mid_token = draft.positions, draft.mid_token.get(k, set())
        numbers: dict[Row, list[int]] = {}
        for i in which:
            if i not in mid_token:
                numbers.setdefault(positions.rows[i], []).append(i)
        hidden = "hidden" in self._plan.needs.of(k)
        if numbers:
            rows = list(numbers)
            places = [[positions.places[i] for i in numbers[row]] for row in rows]
            output = yield from self[k].forward(rows, places, hidden=hidden)
        else:
            output = self._nothing(k, hidden)
        lines = [i for row_numbers in numbers.values() for i in row_numbers]
        shown = Shown.of(output, lines, mid_token & set(which))
        draft.shown[k] = shown if before is None else before.joined(shown)

    def _nothing(self, k: int, hidden: bool) -> ModelOutput:
        width, device = self._plan.models[k].hidden_size or 0, self._runner.device
        states = torch.zeros(0, width, device=device) if hidden else None
        kind = PartialOutput if k in self._plan.max_known else ModelOutput
        return kind(torch.zeros(0, self._plan.vocabulary.size, device=device), states, 0)

    def logprobs_of(
        self, k: int, positions: Positions, ids: Sequence[Tensor]
    ) -> Passes[list[Tensor]]:
        """Log-probabilities of given own tokens of model ``k`` at positions that it showed."""
        return (yield from self[k].logprobs_of(positions.rows, positions.places, ids))

    def find_boundaries(
        self, models: Sequence[int], draft: Draft, which: Sequence[int]
    ) -> list[int]:
        """Find out where models can continue that have another vocabulary than who writes.

        Where one cannot is noted in the draft.

        Returns:
            Those of the positions that can be decided now; the others wait for another round.
        """
        if not self._plan.has_boundaries:
            return list(which)
        groups = self._plan.vocabulary.groups
        late: dict[Row, int] = {}
        for k in models:
            asked: dict[Row, list[int]] = {}
            for i in which:
                continuation = draft.continuation(i)
                if continuation is not None and groups[continuation[0]] != groups[k]:
                    asked.setdefault(draft.positions.rows[i], []).append(i)
            for row, numbers in asked.items():
                places = [draft.positions.places[i] for i in numbers]
                continuation = draft.continuation(numbers[-1])
                assert continuation is not None
                flags = self[k].can_start_at(row, places, continuation[1], continuation[0])
                mid_token = draft.mid_token.setdefault(k, set())
                mid_token.update(i for i, p in zip(numbers, places, strict=True) if not flags[p])
                unknown = [place for place in places if flags[place] is None]
                late[row] = min([late.get(row, len(row.ids) + 1), *unknown])
        every = draft.positions
        return [i for i in which if every.places[i] < late.get(every.rows[i], every.places[i] + 1)]

"""The decode loop.

The base model drafts a few tokens, the policy is asked about all of them, the row keeps its tokens
up to the first one that another writer changed, and every cache is cut back to what was kept.
``stepwise`` is the same with drafts of one token. A draft changes when models are run and never
what is written.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import ParamSpec, TypeVar
from weakref import WeakMethod

import torch
from torch import Tensor

from multicolm.backend.base import Model, ModelOutput
from multicolm.decoding.byte_reader import ByteReader, ExactReader
from multicolm.decoding.character_reader import CharacterReader
from multicolm.decoding.choosing import Choosing
from multicolm.decoding.draft import Draft, Positions, Shown
from multicolm.decoding.drafter import Drafter
from multicolm.decoding.memory import Memory
from multicolm.decoding.reader import Reader
from multicolm.decoding.row import Row, Written
from multicolm.decoding.sampling import Noise
from multicolm.decoding.segments import SegmentWriter
from multicolm.decoding.settle import PolicyDesk, Verdict, ends_text
from multicolm.decoding.slots import Slots
from multicolm.decoding.token_reader import TokenReader
from multicolm.exact.byte_vocabulary import ByteVocabulary
from multicolm.exact.character_vocabulary import CharacterVocabulary
from multicolm.policy.base import Policy, SegmentPolicy
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.tokenizer.vocabulary import Outcomes, Vocabulary
from multicolm.types import MIXTURE, Piece
from multicolm.views import ModelNames, implied

__all__ = ["Router"]

P = ParamSpec("P")
T = TypeVar("T")


class Router:
    """Writes the texts of some rows, token by token.

    Rows may be added and cancelled at any time, and each draws tokens in its own way. What is
    written in one does not depend on which others there are, nor on when it came.

    Args:
        models: the models, the base model first.
        vocabulary: what they write in.
        policy: decides who writes.
        block_size: the most tokens that the base model drafts in one round; 1 is ``stepwise``.
        slots: places of the rows that are written; others wait until one is free.
        clock: current time in seconds.
        costs: per model, of one forward pass for one text; 1 each if not given.

    Attributes:
        finished: rows in the order in which they were finished, for the caller to take out.

    Raises:
        CapabilityError: if the policy speaks of a model that is not there.
    """

    def __init__(
        self,
        models: Sequence[Model],
        vocabulary: Vocabulary,
        policy: Policy,
        *,
        block_size: int,
        slots: Slots,
        clock: Callable[[], float],
        costs: Sequence[float] | None = None,
    ) -> None:
        self._models = list(models)
        self._names = ModelNames(model.name for model in models)
        self._vocabulary = vocabulary
        # Its parts do not hold the router: its caches are free as soon as nobody else holds it,
        # and not when the garbage collector comes round to a circle.
        embed, reader = _weakly(self._embed), _weakly(self._reader)
        positions, fits = _weakly(self._positions), _weakly(self._fits)
        embeds = {k: partial(embed, k) for k in range(len(models))}
        first_tokens = None if vocabulary.is_shared else vocabulary.first_tokens
        self._desk = PolicyDesk(
            policy,
            self._names,
            vocabulary.starts_word,
            embeds,
            first_tokens,
            {k: m.max_top_logprobs for k, m in enumerate(models) if m.max_top_logprobs is not None},
            costs,
            vocabulary.extends,
            _weakly(self._text_nll),
        )
        self._choosing = Choosing(self._desk)
        self._memory = Memory(self._desk)
        self._policy = policy
        self._noise = Noise()
        self._block_size = block_size
        self._slots = slots
        self._clock = clock
        self._readers: dict[int, Reader] = {}
        self._home: torch.device | None = None
        self._lock = Lock()
        self._ends = [vocabulary.end_ids(k) for k in range(len(models))]
        self._ends.append(vocabulary.end_ids(None))  # of a mixture: any model's
        # Models that the policy cannot use have no say in where a text must end.
        self._used = sorted(policy.uses(self._names))
        needs = self._desk.needs
        involved = {*self._used, *needs.always, *needs.deferred}
        several = len({vocabulary.groups[k] for k in involved}) > 1
        # What is written together is read by everybody as it comes, and has no seams.
        self._is_bridged = several and policy.acts == "select"
        self._has_seams = several and (policy.acts == "select" or policy.seams)
        self._counts_bytes = not vocabulary.is_shared or isinstance(vocabulary, Outcomes)
        self.finished: deque[Row] = deque()
        self._coming: deque[Row] = deque()
        self._active: list[Row] = []
        self._undecided: list[Row] = []  # their drafts have ended, and wait to be decided
        self._enough = self._part_to_wait_for()
        self._pool: ThreadPoolExecutor | None = None
        # A base model that the policy does not look at always has nothing to draft with.
        self._drafter: Drafter | None = None
        self._segments: SegmentWriter | None = None
        if isinstance(policy, SegmentPolicy):
            self._segments = SegmentWriter(
                policy,
                self._used,
                vocabulary,
                reader,
                positions,
                fits,
                self._ends,
                self._memory,
                judges=[k for k in self._used if "token_logprobs" in implied(models[k].shows)],
                partial=[k for k in self._used if models[k].max_top_logprobs is not None],
            )
        elif 0 in self._desk.needs.always or policy.acts == "verify":
            self._drafter = Drafter(
                _weakly(self._look_at_base), self._desk, positions, fits, self._ends[0]
            )

    @property
    def readers(self) -> dict[int, Reader]:
        """Per model index, its reader; models that were never looked at have none."""
        return self._readers

    @property
    def busy(self) -> bool:
        """Whether any row is being written or waits for it."""
        return bool(self._coming or self._active)

    @property
    def has_own_sessions(self) -> bool:
        """Whether models are followed in other sessions than those of the slots, or would be."""
        if isinstance(self._vocabulary, ByteVocabulary):
            return True
        return any(self._goes_on_anywhere(k) for k in self._used)

    def add(self, row: Row) -> None:
        """Let a new row wait until it is written."""
        self._coming.append(row)

    def resume(self, row: Row, written: Sequence[Written]) -> None:
        """Put tokens into a row that is not added yet, as if they had been written in it."""
        for new in written:
            row.write(new)
            for _ in self._show(row):
                pass
            if row.finish_reason is not None:
                return

    def cancel(self, row: Row) -> None:
        """Write no further in a row; its slot is free at once. A row that is done stays done."""
        if row in self._coming:
            self._coming.remove(row)
        elif row in self._active:
            self._release(row)

    def _release(self, row: Row) -> None:
        self._active.remove(row)
        self._slots.give(row.slot)
        if row in self._undecided:
            self._undecided.remove(row)
        if self._drafter is not None:
            self._drafter.drop(row)

    def run(self, rows: Sequence[Row]) -> Iterator[Piece]:
        """Write all rows to their ends, and let out text as it becomes certain.

        Rows are finished in place. A row that is done makes room for the next that waits.
        """
        self._coming.extend(rows)
        while self.busy:
            yield from self.step()

    def step(self) -> list[Piece]:
        """One round: rows draft one token further, or what they have drafted is decided.

        Returns:
            The text that has become certain; nothing where no row is to be written.
        """
        self._admit()
        if not self._active:
            return []
        pieces: list[Piece] = []
        if self._segments is not None:
            pieces += self._write_segments(self._segments)
            self._clear()
            return pieces
        if self._drafter is None:
            decided, draft = list(self._active), self._blank(self._active)
        else:
            ready = [row for row in self._active if row not in self._undecided]
            if self._is_bridged:
                ready = self._go_on(ready, pieces)
                self._clear()
            if ready:
                self._undecided += self._drafter.advance(ready)
            few = len(self._undecided) < self._enough * len(self._active)
            if not self._undecided or (few and ready):
                return pieces
            decided, self._undecided = sorted(self._undecided, key=lambda row: row.slot), []
            draft = self._drafter.take(decided)
        verdict = self._settle(draft)
        self._memory.update(draft, verdict)
        for row in decided:
            pieces += self._commit(row, draft, verdict)
        self._clear()
        return pieces

    def _admit(self) -> None:
        """Give free slots to the rows that wait."""
        new: list[Row] = []
        while self._coming and self._slots.free:
            row = self._coming.popleft()
            row.slot = self._slots.take()
            self._active.append(row)  # at once: whoever cancels it gives its slot back
            new.append(row)
            for reader in self._readers.values():
                reader.start(row)
        if new:
            self._begin(new)

    def _begin(self, rows: Sequence[Row]) -> None:
        """Find out what the policy wants to know of new texts before their first tokens."""
        if self._policy.prompts:
            for row in rows:
                row.prompt_mean_nll = self._prompt_mean_nll(row)
        for k, pooling in sorted(self._policy.prompt_states(self._names).items()):
            states = self._reader(k).prompt_hidden(rows, pooling)
            for how, each in states.items():
                for row, state in zip(rows, each, strict=True):
                    row.prompt_hidden[k, how] = state
        self._memory.begin(self._positions(rows, [0] * len(rows)))

    def _write_segments(self, segments: SegmentWriter) -> Iterator[Piece]:
        """Write the next segment of every row."""
        for row, written in segments.next(self._active):
            for new in written:
                row.write(new)
                yield from self._show(row)
                if row.finish_reason is not None:
                    break

    def _prompt_mean_nll(self, row: Row) -> list[float]:
        """How unlikely each model in use finds the prompt, per token of the base model's."""
        used = set(self._used)
        return [
            self._reader(k).prompt_mean_nll(row) if k in used else math.nan
            for k in range(len(self._models))
        ]

    def _clear(self) -> None:
        """Take out the rows that are done."""
        done = [row for row in self._active if row.finish_reason is not None]
        if done:
            self.finished.extend(done)
            self._active = [row for row in self._active if row.finish_reason is None]
            for row in done:
                self._slots.give(row.slot)

    def _reader(self, k: int) -> Reader:
        """The reader of model ``k``; a model that nobody looks at costs no memory."""
        if k not in self._readers:
            model, vocabulary = self._models[k], self._vocabulary
            reader: Reader
            if isinstance(vocabulary, ByteVocabulary):
                reader = ByteReader(model, k, self._slots.n, self._clock)
            elif isinstance(vocabulary, CharacterVocabulary):
                session = self._slots.open(k)
                reader = CharacterReader(model, k, vocabulary, session, self._clock)
            elif self._goes_on_anywhere(k) and isinstance(vocabulary, BridgedVocabulary):
                reader = ExactReader(model, k, vocabulary, self._slots.n, self._clock)
            else:
                session = self._slots.open(k)
                scores = self._policy.likelihoods
                reader = TokenReader(model, k, vocabulary, session, self._clock, scores=scores)
            for row in self._active:
                reader.start(row)
            self._readers[k] = reader
        return self._readers[k]

    def _goes_on_anywhere(self, k: int) -> bool:
        """Whether a model is followed by bytes, so that it can go on within its own tokens."""
        vocabulary = self._vocabulary
        return (
            self._is_bridged
            and isinstance(vocabulary, BridgedVocabulary)
            and vocabulary.is_exact(k)
            and "hidden" not in self._desk.needs.of(k)
            and not (self._policy.prompts or self._policy.likelihoods)
            and k not in self._policy.prompt_states(self._names)
        )

    def _blank(self, rows: Sequence[Row]) -> Draft:
        """One empty position per row, at its end."""
        positions = self._positions(rows, [len(row.written) for row in rows])
        draft = Draft(positions, deferring=[True] * len(rows), scores=[None] * len(rows))
        if self._is_bridged:
            self._foresee(draft)
        return draft

    def _foresee(self, draft: Draft) -> None:
        """Run those who wrote last: how they would go on tells where others can."""
        behind = [i for i, row in enumerate(draft.positions.rows) if row.written]
        last = {i: draft.positions.rows[i].previous for i in behind}
        for k in sorted(set(last.values())):
            theirs = [i for i in behind if last[i] == k]
            self._forward(k, draft, theirs)
            tokens = draft.positions.at(theirs).draw(draft.shown[k].logits(theirs)).tolist()
            draft.foreseen |= {i: (k, token) for i, token in zip(theirs, tokens, strict=True)}

    def _go_on(self, rows: Sequence[Row], pieces: list[Piece]) -> list[Row]:
        """Let assistants write up to a place where the base model can go on.

        Args:
            rows: that are to be written on.
            pieces: where text that becomes certain is added.

        Returns:
            The rows in which it can do so now.
        """
        groups = self._vocabulary.groups
        behind = [row for row in rows if row.written and not row.n_drafted]
        reader = self._reader(0)
        # Who wrote last is asked how it would go on only where that can matter.
        behind = [
            row
            for row in behind
            if groups[row.previous] != groups[0] and not reader.is_settled(row)
        ]
        if not behind:
            return list(rows)
        draft = self._blank(behind)
        draft.deferring = [False] * len(behind)
        held, verdict = [], Verdict.on(draft)
        for i, row in enumerate(behind):
            place, (writer, token) = len(row.written), draft.foreseen[i]
            if not reader.can_go_on(row, [place], token, writer)[place]:
                held.append(row)
                self._desk.write(draft, writer, [i], verdict)
            reader.rollback(row, place)
        self._memory.update(draft, verdict)
        for row in held:
            pieces += self._commit(row, draft, verdict)
        return [row for row in rows if row not in held]

    def _survey(self, models: Sequence[int], draft: Draft, which: Sequence[int]) -> list[int]:
        """Find out where models can go on that have another vocabulary than who writes.

        Returns:
            Those of the positions that can be decided now; the others wait for another round.
        """
        if not self._has_seams:
            return list(which)
        groups = self._vocabulary.groups
        late: dict[Row, int] = {}
        for k in models:
            asked: dict[Row, list[int]] = {}
            for i in which:
                goes_on = draft.goes_on(i)
                if goes_on is not None and groups[goes_on[0]] != groups[k]:
                    asked.setdefault(draft.positions.rows[i], []).append(i)
            for row, numbers in asked.items():
                places = [draft.positions.places[i] for i in numbers]
                goes_on = draft.goes_on(numbers[-1])
                assert goes_on is not None
                flags = self._reader(k).can_go_on(row, places, goes_on[1], goes_on[0])
                closed = draft.closed.setdefault(k, set())
                closed.update(i for i, p in zip(numbers, places, strict=True) if not flags[p])
                unknown = [place for place in places if flags[place] is None]
                late[row] = min([late.get(row, len(row.ids) + 1), *unknown])
        every = draft.positions
        return [i for i in which if every.places[i] < late.get(every.rows[i], every.places[i] + 1)]

    def _text_nll(self, positions: Positions, models: Sequence[int]) -> Tensor:
        """How unlikely some models find the texts before positions: [positions, all models]."""
        nats = torch.full((len(positions), len(self._models)), math.nan, dtype=torch.float64)
        at = list(zip(positions.rows, positions.places, strict=True))
        for k in models:
            found = [self._reader(k).text_nll(row, place) for row, place in at]
            nats[:, k] = torch.tensor(found, dtype=torch.float64)
        return nats.float()

    def _positions(self, rows: Sequence[Row], places: Sequence[int]) -> Positions:
        return Positions(rows, places, self._noise)

    def _fits(self, row: Row, *ahead: int) -> bool:
        """Whether every model in use can read the row, its draft, and the tokens ``ahead``."""
        unread = [*row.ids[len(row.written) :], *ahead]
        for k in row.models:
            limit = self._models[k].context_length
            if limit is None:
                continue
            n_more = sum(self._vocabulary.n_read(k, token) for token in unread)
            if row.lengths[k] + n_more > limit and self._counts_bytes:
                # What others wrote was counted as its bytes, the most tokens that it can be.
                row.lengths[k] = self._reader(k).length(row)
            if row.lengths[k] + n_more > limit:
                return False
        return True

    def _part_to_wait_for(self) -> float:
        """How large a part of the rows must wait to be decided before they are.

        Deciding each at once runs the assistants for a few rows at a time, waiting for all runs the
        base model for a few rows at a time. A pass costs about the same for few rows and for many,
        so it depends on which is larger. The form was found by counting passes at batch 16.
        """
        base = self._models[0].n_parameters
        others = sum(self._models[k].n_parameters for k in self._used if k > 0)
        return min(1.0, max(0.25, others / (4 * base))) if base else 0.25

    def _look_at_base(self, rows: Sequence[Row], places: Sequence[int]) -> ModelOutput:
        hidden = "hidden" in self._desk.needs.of(0)
        output = self._reader(0).forward(rows, [[place] for place in places], hidden=hidden)
        return self._at_home(output)

    def _embed(self, k: int, shared_ids: Tensor) -> Tensor:
        """Input embeddings of model ``k`` for tokens that it has, where decisions are made."""
        own = self._vocabulary.own_ids(k, shared_ids)
        embedded = self._models[k].embed(own)
        return embedded if self._home is None else embedded.to(self._home)

    def _settle(self, draft: Draft) -> Verdict:
        """Decide writers and tokens at the drafted positions, as far as they can matter."""
        verdict = Verdict.on(draft)
        every = range(len(draft.positions))
        lazily = self._policy.assistants == "deferred"
        asked = [i for i in every if draft.deferring[i]] if lazily else list(every)
        if lazily and (kept := [i for i in every if not draft.deferring[i]]):
            self._desk.write(draft, 0, kept, verdict)
        if not asked:
            return verdict
        needs = self._desk.needs
        drafter = {0} if self._drafter is not None else set()
        looked_at = sorted({*needs.always, *needs.deferred} - drafter)
        now = self._survey(looked_at, draft, asked)
        groups = [now]
        if self._choosing.by_place:
            self._look_at(self._choosing.always(draft, now), draft)
            self._look_at(self._choosing.named(draft, now), draft)
            groups = self._choosing.split(draft, now)
        else:
            self._look_at(dict.fromkeys(looked_at, now), draft)
        waiting: dict[int, int] = {}
        for which in groups:
            self._name_candidates(draft, which)
            waiting |= self._desk.decide(draft, which, verdict)
        self._hear_late_writers(draft, waiting, verdict)
        return verdict

    def _name_candidates(self, draft: Draft, which: Sequence[int]) -> None:
        """Ask servers about tokens that the policy names, where they do not tell of all."""
        draft.candidates = self._desk.candidates(draft, which)
        for k, named in draft.candidates.items():
            shown = draft.shown[k]
            known = shown.output.logits.clone()
            own = self._vocabulary.own_ids(k, named.flatten()).view_as(named)
            unknown: dict[int, Tensor] = {}  # per position number, tokens of the model's
            for i, ids, own_ids in zip(which, named, own, strict=True):
                if i in shown.line_of:
                    new = ids[(known[shown.line_of[i], ids] == -math.inf) & (own_ids >= 0)]
                    unknown |= {i: new} if len(new) else {}
            if not unknown:
                continue
            here = draft.positions.at(list(unknown))
            asked = [self._vocabulary.own_ids(k, ids) for ids in unknown.values()]
            told = self._reader(k).logprobs_of(here.rows, here.places, asked)
            for (i, ids), values in zip(unknown.items(), told, strict=True):
                known[shown.line_of[i], ids] = values.to(known)
            draft.shown[k] = replace(shown, output=replace(shown.output, logits=known))

    def _hear_late_writers(self, draft: Draft, waiting: dict[int, int], verdict: Verdict) -> None:
        """Run writers that were chosen without having been looked at.

        Only at the first such position of each row: behind it the draft is not known to hold.
        """
        first = [
            next(i for i in numbers if i in waiting)
            for numbers in draft.by_row.values()
            if any(i in waiting for i in numbers)
        ]
        wanted = {
            k: self._survey([k], draft, [i for i in first if waiting[i] == k])
            for k in sorted({waiting[i] for i in first})
        }
        self._look_at(wanted, draft)
        for k, theirs in wanted.items():
            for writer in sorted({draft.able(k, i) for i in theirs}):
                able = [i for i in theirs if draft.able(k, i) == writer]
                self._desk.write(draft, writer, able, verdict)

    def _look_at(self, wanted: Mapping[int, Sequence[int]], draft: Draft) -> None:
        """Run models so that each shows the positions that are wanted of it.

        Several servers are asked at once, while the models of this process run.
        """
        away = [k for k in wanted if self._models[k].server]
        if len(away) + (len(away) < len(wanted)) < 2:
            for k, which in wanted.items():
                self._forward(k, draft, which)
            return
        if self._pool is None:
            # Its threads end with it.
            self._pool = ThreadPoolExecutor(len(self._models), "multicolm-server")
        asked = [self._pool.submit(self._forward, k, draft, wanted[k]) for k in away]
        try:
            for k in [k for k in wanted if k not in away]:
                self._forward(k, draft, wanted[k])
        finally:
            wait(asked)
        for done in asked:
            done.result()

    def _forward(self, k: int, draft: Draft, which: Sequence[int]) -> None:
        """Run model ``k`` once so that it shows the positions numbered ``which``."""
        before = draft.shown.get(k)
        if before is not None:
            which = [i for i in which if not before.knows([i])]
        if before is not None and not which:
            return
        positions, closed = draft.positions, draft.closed.get(k, set())
        numbers: dict[Row, list[int]] = {}
        for i in which:
            if i not in closed:
                numbers.setdefault(positions.rows[i], []).append(i)
        hidden = "hidden" in self._desk.needs.of(k)
        if numbers:
            rows = list(numbers)
            places = [[positions.places[i] for i in numbers[row]] for row in rows]
            output = self._at_home(self._reader(k).forward(rows, places, hidden=hidden))
        else:
            width = self._models[k].hidden_size or 0
            states = torch.zeros(0, width) if hidden else None
            output = self._at_home(ModelOutput(torch.zeros(0, self._vocabulary.size), states, 0))
        lines = [i for row_numbers in numbers.values() for i in row_numbers]
        shown = Shown.of(output, lines, closed & set(which))
        draft.shown[k] = shown if before is None else before.joined(shown)

    def _at_home(self, output: ModelOutput) -> ModelOutput:
        """All looks on one device, that of the first: models may be spread over several."""
        with self._lock:  # several models may be looked at at once
            if self._home is None:
                self._home = output.logits.device
        if output.logits.device == self._home:
            return output
        hidden = None if output.hidden is None else output.hidden.to(self._home)
        return replace(output, logits=output.logits.to(self._home), hidden=hidden)

    def _commit(self, row: Row, draft: Draft, verdict: Verdict) -> Iterator[Piece]:
        """Write the row's tokens up to the first one that the draft does not foresee."""
        numbers = draft.by_row[row]
        n_before = n_foreseen = len(row.written)
        for i in numbers:
            if i not in verdict.tokens:
                break
            token, writer = verdict.tokens[i], verdict.writers[i]
            if ends_text(self._policy, row, writer):
                row.finish_reason = "stop"
                yield from _pieces(row, row.text.finish(), self._names)
                break
            foreseen = bool(draft.tokens) and token == draft.tokens[i]
            # What another group wrote is read in another way, though it be the same text.
            foreseen = foreseen and self._same_group(writer)
            if not foreseen:
                row.drop_draft()
            alternatives = verdict.alternatives.get(i, ())
            logprob, score = verdict.logprobs[i], draft.scores[i]
            row.write(Written(token, writer, logprob, score, alternatives))
            n_foreseen += foreseen
            row.n_deferred += draft.deferring[i]
            row.n_changed += draft.deferring[i] and not foreseen
            yield from self._show(row)
            # A policy that looks back was told that the base model wrote the whole draft.
            as_told = writer == 0 or not self._policy.history
            if row.finish_reason is not None or not foreseen or not as_told:
                break
        row.drop_draft()
        for reader in self._readers.values():
            reader.rollback(row, n_foreseen)
        # Draft as much as was foreseen, or twice as much if all of it was.
        n_right = n_foreseen - n_before
        longer = 2 * n_right if n_right == len(numbers) else max(1, n_right)
        row.draft_length = min(self._block_size, longer)

    def _same_group(self, writer: int) -> bool:
        """Whether a writer has the base model's vocabulary."""
        groups = self._vocabulary.groups
        return writer == len(groups) or groups[writer] == groups[0]

    def _show(self, row: Row) -> Iterator[Piece]:
        """Let out the text of the token just written, and see whether the row is done."""
        new = row.written[-1]
        at_end = new.token in self._ends[new.writer]
        if not at_end:
            content = self._vocabulary.token_bytes(new.token)
            if row.meter is not None:
                row.meter.append(content)
            special = "" if content else self._vocabulary.name(new.token)
            yield from _pieces(row, row.text.push(content, new.writer, special), self._names)
        for k in self._used:
            row.lengths[k] += self._vocabulary.n_read(k, new.token)
        if row.text.stopped:
            row.finish_reason = "stop"
        elif at_end:
            row.finish_reason = "eos"
        elif row.n_tokens >= row.max_new_tokens:
            row.finish_reason = "length"
        elif not self._fits(row):
            row.finish_reason = "context"
        if row.finish_reason is not None:
            yield from _pieces(row, row.text.finish(), self._names)


def _pieces(row: Row, shown: Iterable[tuple[str, int]], names: Sequence[str]) -> Iterator[Piece]:
    for text, writer in shown:
        yield Piece(row.number, text, names[writer] if writer < len(names) else MIXTURE)


def _weakly(method: Callable[P, T]) -> Callable[P, T]:
    """A method for parts of its own object, which live no longer than that does."""
    ref = WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        found = ref()
        assert found is not None, "a part outlives its owner"
        return found(*args, **kwargs)

    return call

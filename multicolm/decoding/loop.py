"""The decode loop: it says which forward passes it wants, and whoever drives it runs them.

The base model drafts a few tokens, the policy is asked about all of them, the text keeps its tokens
up to the first one that another writer changed, and every cache is cut back to what was kept.
``stepwise`` is the same with drafts of one token. A draft changes when models are run and never
what is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from multicolm.backend.passes import Passes, together
from multicolm.decoding.committing import Committer
from multicolm.decoding.consulting import Consulting
from multicolm.decoding.decider import Decider
from multicolm.decoding.decision import Decision
from multicolm.decoding.draft import Draft, Positions
from multicolm.decoding.drafter import Drafter
from multicolm.decoding.kinds import write
from multicolm.decoding.memory import Memory
from multicolm.decoding.plan import Plan
from multicolm.decoding.readers import Readers
from multicolm.decoding.row import Row, Written
from multicolm.decoding.runner import Runner
from multicolm.decoding.sampling import Noise
from multicolm.decoding.segments import SegmentWriter
from multicolm.errors import InputError, ModelError
from multicolm.types import Piece

__all__ = ["Loop", "SegmentLoop", "TokenLoop", "loop_for"]


def loop_for(plan: Plan, runner: Runner, block_size: int) -> Loop:
    """The loop that suits the kind of a plan's policy.

    Args:
        plan: the policy and its models.
        runner: runs the models, and has the places for texts.
        block_size: the most tokens that the base model drafts in one round; 1 is ``stepwise``.
    """
    if plan.policy.acts == "segment":
        return SegmentLoop(plan, runner)
    return TokenLoop(plan, runner, block_size)


class Loop(ABC):
    """Writes texts under one policy.

    Texts may be added and cancelled at any time, and each draws tokens in its own way. What is
    written in one does not depend on which others there are, nor on when it came.

    Args:
        plan: the policy and its models.
        runner: runs the models, and has the places for texts.

    Attributes:
        readers: the models as they follow the texts.
        finished: texts in the order in which they were finished, for the caller to take out.
        failed: texts in which a model failed, likewise, and why.
    """

    def __init__(self, plan: Plan, runner: Runner) -> None:
        self._plan = plan
        self._slots = runner.slots
        self._noise = Noise()
        self.readers = Readers(plan, runner)
        self._decider = Decider(plan, runner.embed, self.readers.text_nll)
        self._memory = Memory(self._decider)
        self._committer = Committer(plan, self.readers)
        self.finished: deque[Row] = deque()
        self.failed: deque[tuple[Row, InputError | ModelError]] = deque()
        self._coming: deque[Row] = deque()
        self._active: list[Row] = []
        self._prompt_tokens = runner.prompt_tokens
        self._unread: list[Row] = []  # those among them whose long prompts are read part by part

    @property
    def busy(self) -> bool:
        """Whether any text is being written or waits for it."""
        return bool(self._coming or self._active)

    @property
    def has_own_sessions(self) -> bool:
        """Whether models are followed in other sessions than those of the slots, or would be."""
        return any(self._plan.follows_bytes(k) for k in self._plan.used)

    def add(self, row: Row) -> None:
        """Let a new text wait until it is written."""
        self._coming.append(row)

    def resume(self, row: Row, written: Sequence[Written]) -> None:
        """Put tokens into a text that is not added yet, as if they had been written in it."""
        self._committer.write_all(row, written)

    def cancel(self, row: Row) -> None:
        """Write no further in a text; its slot is free at once. One that is done stays done."""
        if row in self._coming:
            self._coming.remove(row)
        elif row in self._active:
            self._release(row)

    def step(self) -> Passes[list[Piece]]:
        """One round: texts are drafted one token further, or what they have drafted is decided.

        Returns:
            The text that has become certain; nothing where no text is to be written.
        """
        yield from self._admit()
        yield from self._read_ahead()
        pieces: list[Piece] = []
        for row in self._active:
            if row.thinking_is_used_up:
                pieces += self._committer.close_thoughts(row)
        self._take_out()
        if self._active:
            pieces += yield from self._write()
        self._take_out()
        return pieces

    def _take_out(self) -> None:
        """Release the texts that are finished, and those that failed."""
        for row in [row for row in self._active if row.finish_reason or row.error]:
            self._release(row)
            if row.error is None:
                self.finished.append(row)
            else:
                self.failed.append((row, row.error))

    @abstractmethod
    def _write(self) -> Passes[list[Piece]]:
        """Write on in the active texts; returns what became certain."""

    def _admit(self) -> Passes[None]:
        """Give free slots to the texts that wait."""
        new: list[Row] = []
        while self._coming and self._slots.free:
            row = self._coming.popleft()
            row.slot = self._slots.take()
            self._active.append(row)  # at once: whoever cancels it gives its slot back
            new.append(row)
            self.readers.start(row)
        if new:
            yield from self._begin(new)
            self._unread += [row for row in new if self._is_long(row)]

    def _is_long(self, row: Row) -> bool:
        longest = max((len(row.prompt_ids[k]) for k in self._plan.first_run), default=0)
        return self._prompt_tokens is not None and longest > self._prompt_tokens

    def _read_ahead(self) -> Passes[None]:
        """Read a part of the first long prompt in the models that are run at its end."""
        if self._unread and self._prompt_tokens is not None:
            row, n = self._unread[0], self._prompt_tokens
            parts = [self.readers[k].read_ahead(row, n) for k in self._plan.first_run]
            if all((yield from together(parts))):
                self._unread.remove(row)

    def _begin(self, rows: Sequence[Row]) -> Passes[None]:
        """Find out what the policy wants to know of new texts before their first tokens."""
        yield from self.readers.read_prompts(rows)
        self._memory.begin(Positions(rows, [0] * len(rows), self._noise))

    @property
    def _unpaused(self) -> list[Row]:
        return [row for row in self._active if not row.is_paused and row not in self._unread]

    def _release(self, row: Row) -> None:
        self._active.remove(row)
        if row in self._unread:
            self._unread.remove(row)
        self._slots.give(row.slot)
        self.readers.stop(row)


class SegmentLoop(Loop):
    """Models propose segments, all rate all, and the best one is written."""

    def __init__(self, plan: Plan, runner: Runner) -> None:
        super().__init__(plan, runner)
        self._segments = SegmentWriter(plan, self.readers, self._memory, self._noise)

    def _write(self) -> Passes[list[Piece]]:
        """Write the next segment of every text."""
        pieces: list[Piece] = []
        rows = self._unpaused
        for row, written in (yield from self._segments.next(rows)) if rows else []:
            pieces += self._committer.write_all(row, written)
        return pieces


class TokenLoop(Loop):
    """Every token has a writer of its own: the policy selects one, mixes, or verifies a draft.

    Args:
        plan: the policy and its models.
        runner: runs the models, and has the places for texts.
        block_size: the most tokens that the base model drafts in one round.
    """

    def __init__(self, plan: Plan, runner: Runner, block_size: int) -> None:
        super().__init__(plan, runner)
        self._block_size = block_size
        self._consulting = Consulting(plan, self._decider, self.readers)
        # What is drafted one token at a time is decided in the same round, so that models that are
        # wanted there anyway are run with the base model. Those that cost no pass of their own are,
        # too, as long as they are wanted: who has written a token tends to write the next one.
        beside = plan.wanted_beside_base if block_size == 1 else ()
        self._follows_wanted = plan.same_weights if block_size == 1 else frozenset()
        drafter = Drafter(self._decider, self.readers, self._noise, beside)
        # A base model that the policy does not run everywhere has nothing to draft with.
        self._drafter = drafter if plan.drafts else None
        self._drafted: list[Row] = []  # their drafts have ended, and wait to be decided
        self._enough = _verify_batch_fraction(plan)

    def _write(self) -> Passes[list[Piece]]:
        """Draft in texts that are not drafted yet, and decide if enough of them are."""
        ready = [row for row in self._unpaused if row not in self._drafted]
        if not ready and not self._drafted:
            return []
        ready, pieces = yield from self._finish_straddling_tokens(ready)
        draft = yield from self._draft(ready)
        if draft is None:
            return pieces
        decision = yield from self._consulting.decide(draft)
        self._memory.update(draft, decision)
        for row in sorted(draft.by_row, key=lambda row: row.slot):
            pieces += self._commit(row, draft, decision)
        return pieces

    def _release(self, row: Row) -> None:
        super()._release(row)
        # One that is cancelled may have drafted, and wait to be decided.
        if row in self._drafted:
            self._drafted.remove(row)
        if self._drafter is not None:
            self._drafter.drop(row)

    def _draft(self, ready: Sequence[Row]) -> Passes[Draft | None]:
        """Let the base model draft one token further.

        Args:
            ready: texts whose drafts have not ended.

        Returns:
            The drafts that are decided in this round; ``None`` while more are waited for.
        """
        if self._drafter is None:
            return (yield from self._blank(ready))
        if ready:
            self._drafted += yield from self._drafter.advance(ready)
        n_open = sum(row.finish_reason is None for row in self._unpaused)
        few = len(self._drafted) < self._enough * n_open
        if not self._drafted or (few and ready):
            return None
        decided, self._drafted = sorted(self._drafted, key=lambda row: row.slot), []
        return self._drafter.take(decided)

    def _blank(self, rows: Sequence[Row]) -> Passes[Draft]:
        """One empty position per text, at its end."""
        positions = Positions(rows, [len(row.written) for row in rows], self._noise)
        draft = Draft(positions, deferring=[True] * len(rows), scores=[None] * len(rows))
        if self._plan.is_bridged:
            yield from self._predict_next(draft)
        return draft

    def _predict_next(self, draft: Draft) -> Passes[None]:
        """Run those who wrote last: what they would write decides where others can continue."""
        mid = [i for i, row in enumerate(draft.positions.rows) if row.written]
        theirs: dict[int, list[int]] = {}
        for i in mid:
            theirs.setdefault(draft.positions.rows[i].previous, []).append(i)
        yield from self.readers.show(dict(sorted(theirs.items())), draft)
        for k, which in theirs.items():
            tokens = draft.draw(which, draft.shown[k].at(which).logits).tolist()
            draft.predicted |= {i: (k, token) for i, token in zip(which, tokens, strict=True)}

    def _finish_straddling_tokens(
        self, rows: Sequence[Row]
    ) -> Passes[tuple[list[Row], list[Piece]]]:
        """Let assistants write up to a place where the base model can continue.

        Args:
            rows: texts in which the base model is to draft.

        Returns:
            Those in which it can do so now, and the text that became certain.
        """
        if not self._plan.is_bridged or self._drafter is None:
            return list(rows), []
        base = self.readers[0]
        # Who wrote last is asked how it would continue only where that can matter.
        unsettled = [
            row
            for row in rows
            if row.written
            and not row.n_drafted
            and not self._plan.same_group(row.previous)
            and not base.is_settled(row)
        ]
        if not unsettled:
            return list(rows), []
        draft = yield from self._blank(unsettled)
        draft.deferring = [False] * len(unsettled)
        held, decision = [], Decision.on(draft)
        for i, row in enumerate(unsettled):
            place, (writer, token) = len(row.written), draft.predicted[i]
            if not base.can_start_at(row, [place], token, writer)[place]:
                held.append(row)
                write(draft, writer, [i], decision)
            base.rollback(row, place)
        self._memory.update(draft, decision)
        pieces: list[Piece] = []
        for row in held:
            pieces += self._commit(row, draft, decision)
        return [row for row in rows if row not in held], pieces

    def _commit(self, row: Row, draft: Draft, decision: Decision) -> list[Piece]:
        """Write the text's tokens up to the first one that the draft does not hold."""
        numbers = draft.by_row[row]
        pieces: list[Piece] = []
        n_before = n_kept = len(row.written)
        for i in numbers:
            if i not in decision.tokens:
                break
            token, writer = decision.tokens[i], decision.writers[i]
            if self._decider.ends_text(row, writer):
                pieces += self._committer.end(row)
                break
            # What another group wrote is read in another way, though it be the same text.
            kept = bool(draft.tokens) and token == draft.tokens[i] and self._plan.same_group(writer)
            if not kept:
                row.drop_draft()
            alternatives = decision.alternatives.get(i, ())
            new = Written(token, writer, decision.logprobs[i], draft.scores[i], alternatives)
            pieces += self._committer.write(row, new)
            row.beside = self._follows_wanted & {writer, *draft.seen.get(i, ())}
            n_kept += kept
            row.n_deferred += draft.deferring[i]
            row.n_changed += draft.deferring[i] and not kept
            # With `history`, later positions were decided as if the base model had written all.
            other_history = writer != 0 and self._plan.policy.history
            ends = row.finish_reason is not None or row.thinking_is_used_up
            if ends or not kept or other_history:
                break
        row.drop_draft()
        self.readers.rollback(row, n_kept)
        # Draft as much as was kept, or twice as much if all of it was.
        n_right = n_kept - n_before
        longer = 2 * n_right if n_right == len(numbers) else max(1, n_right)
        row.draft_length = min(self._block_size, longer)
        return pieces


def _verify_batch_fraction(plan: Plan) -> float:
    """How large a part of the texts must have whole drafts before these are decided.

    Deciding each at once runs the assistants for a few texts at a time, waiting for all runs the
    base model for a few texts at a time. A pass costs about the same for few and for many, so it
    depends on which is larger. The form was found by counting passes at batch 16.
    """
    base = plan.models[0].n_parameters
    others = sum(plan.models[k].n_parameters for k in plan.used if k > 0)
    return min(1.0, max(0.25, others / (4 * base))) if base else 0.25

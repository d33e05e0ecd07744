"""What comes of a call: text while it is written, and answers when it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace

from multicolm.backend.base import Model
from multicolm.decoding.live import Live
from multicolm.decoding.row import Row
from multicolm.decoding.threads import torch_threads
from multicolm.errors import ServerError
from multicolm.types import Answer, Piece, Usage

__all__ = ["Answers", "GenerateCall", "Stream"]


class Answers(list[Answer]):
    """Finished texts, in the order of their prompts.

    Attributes:
        usage: per model name, what it did for all of them together; forward passes are counted
            once each, however many rows they served.
        seconds: wall-clock time of the whole call.
    """

    usage: Mapping[str, Usage]
    seconds: float


class Stream(Iterator[Piece]):
    """Text while it is being written: iterate over it for :class:`~multicolm.types.Piece`.

    It may be broken off at any time; what was finished by then is in :attr:`answers`. Use it in a
    ``with`` statement, or :meth:`close` it, to give torch its threads back at once.
    """

    def __init__(self, run: GenerateCall, pieces: Generator[Piece, None, None]) -> None:
        self._run = run
        self._pieces = pieces
        # Of a stream that is read in part too, before the interpreter takes modules apart.
        weakref.finalize(self, pieces.close)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Write no further."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def answers(self) -> Answers:
        """The texts that are finished so far, in the order of their prompts."""
        return self._run.answers()

    def token_ids(self, number: int) -> list[int]:
        """Tokens of a text so far, ends included; of bytes and characters, the base model's.

        Args:
            number: of the prompt, from 0.
        """
        row = self._run.rows[number]
        return [new.token for new in row.written] if row.meter is None else list(row.meter.ids)

    def finished(self) -> Iterator[tuple[int, Answer]]:
        """Write on, and give each answer with its prompt's number (from 0) once it is finished.

        An error, or Ctrl-C, comes after the answers that were finished before it.
        """
        try:
            for _ in self._pieces:
                yield from self._done()
        except (Exception, KeyboardInterrupt):
            yield from self._done()
            raise
        yield from self._done()

    def _done(self) -> Iterator[tuple[int, Answer]]:
        done = self._run.live.loop.finished
        while done:
            row = done.popleft()
            yield row.number, self._run.answer(row)


class GenerateCall:
    """One call: its texts, the loop that writes them, and what came of it."""

    def __init__(self, live: Live, rows: Sequence[Row]) -> None:
        self.live = live
        self.rows = rows
        self._answers: dict[int, Answer] = {}
        self.seconds = 0.0

    def write(
        self, models: Sequence[Model], threads: int | None, clock: Callable[[], float]
    ) -> Generator[Piece, None, None]:
        """Write all rows, letting text out as it becomes certain."""
        start = clock()
        try:
            with torch_threads(models, threads):
                for row in self.rows:
                    self.live.add(row)
                while self.live.busy:
                    yield from self.live.step()
        except ServerError as error:
            done = sum(row.finish_reason is not None for row in self.rows)
            n_open = sum(len(row.written) for row in self.rows if row.finish_reason is None)
            error.keeping(
                f"Finished and kept: {done} of {len(self.rows)} answers; {n_open} tokens of others "
                "were written."
            )
            raise
        finally:
            self.seconds = clock() - start

    def answers(self) -> Answers:
        """What is finished so far, in the order of the prompts."""
        answers = Answers(self.answer(row) for row in self.rows if row.finish_reason is not None)
        answers.seconds = self.seconds
        answers.usage = {
            name: replace(read, tokens_written=sum(a.usage[name].tokens_written for a in answers))
            for name, read in self.live.usage.items()
        }
        return answers

    def answer(self, row: Row) -> Answer:
        """The answer of a row that is finished; made once."""
        if row.number not in self._answers:
            self._answers[row.number] = self.live.answer(row)
        return self._answers[row.number]

"""What comes of a call: text while it is written, and answers when it is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from multicolm.backend.base import Model
from multicolm.decoding.router import Router
from multicolm.decoding.row import Row, Written
from multicolm.decoding.threads import torch_threads
from multicolm.tokenizer.incremental import IncrementalEncoder
from multicolm.tokenizer.vocabulary import Vocabulary
from multicolm.types import MIXTURE, Answer, Piece, Trace, TracedToken, Usage
from multicolm.views import ModelNames

__all__ = ["Answers", "Run", "Stream"]


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

    def __init__(self, run: Run, pieces: Generator[Piece, None, None]) -> None:
        self._run = run
        self._pieces = pieces

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

    def finished(self) -> Iterator[tuple[int, Answer]]:
        """Write on, and give each answer with its prompt's number (from 0) once it is finished."""
        done = self._run.router.finished
        for _ in self._pieces:
            while done:
                row = done.popleft()
                yield row.number, self._run.answer(row)
        while done:
            row = done.popleft()
            yield row.number, self._run.answer(row)


class Run:
    """One call: its rows, the router that writes them, and what came of it."""

    def __init__(
        self,
        router: Router,
        rows: Sequence[Row],
        models: ModelNames,
        vocabulary: Vocabulary,
        policy: str,
        *,
        written_in: Vocabulary,
    ) -> None:
        self.router = router
        self._written_in = written_in
        self.rows = rows
        self._models = models
        self._vocabulary = vocabulary
        self._policy = policy
        self._answers: dict[int, Answer] = {}
        self.seconds = 0.0

    def write(
        self, models: Sequence[Model], threads: int | None, clock: Callable[[], float]
    ) -> Generator[Piece, None, None]:
        """Write all rows, letting text out as it becomes certain."""
        start = clock()
        try:
            with torch_threads(models, threads):
                yield from self.router.run(self.rows)
        finally:
            self.seconds = clock() - start

    def answers(self) -> Answers:
        """What is finished so far, in the order of the prompts."""
        answers = Answers(self.answer(row) for row in self.rows if row.finish_reason is not None)
        answers.seconds = self.seconds
        answers.usage = self._usage(answers)
        return answers

    def answer(self, row: Row) -> Answer:
        """The answer of a row that is finished; made once."""
        if row.number not in self._answers:
            self._answers[row.number] = self._answer(row)
        return self._answers[row.number]

    def _answer(self, row: Row) -> Answer:
        assert row.finish_reason is not None
        names = [*self._models, MIXTURE]
        n_written = [0] * len(names)
        tokens = []
        for new in row.written if row.meter is None else self._as_tokens(row, row.meter):
            n_written[new.writer] += 1
            name = self._vocabulary.name(new.token)
            tokens.append(TracedToken(new.token, name, names[new.writer], new.logprob, new.score))
        usage = {
            name: replace(row.usage[k], tokens_written=n_written[k])
            for k, name in enumerate(self._models)
        }
        return Answer(
            prompt=row.prompt,
            text=row.text.text,
            trace=Trace(tuple(tokens)),
            usage=usage,
            finish_reason=row.finish_reason,
            policy=self._policy,
            seed=row.seed if self.router.noise_used else None,
        )

    def _as_tokens(self, row: Row, meter: IncrementalEncoder) -> list[Written]:
        """A text of bytes or characters as tokens of the base model.

        Each has the probability of what was written since the one before; what ends within a
        token counts to it.
        """
        sizes = [len(self._written_in.token_bytes(new.token)) for new in row.written]
        ends = list(accumulate(sizes))
        tokens, first = [], 0
        for token, end in zip(meter.ids, meter.ends, strict=True):
            last = max(first, bisect_right(ends, end))
            logprob = sum(new.logprob for new in row.written[first:last])
            writer = row.written[min(last, len(row.written)) - 1].writer
            tokens.append(Written(token, writer, logprob, None))
            first = last
        end_ids = self._vocabulary.end_ids(0) or self._vocabulary.end_ids(None)
        text_ends = self._written_in.end_ids(None)
        for new in row.written[first:]:
            if new.token in text_ends and end_ids:
                tokens.append(replace(new, token=min(end_ids)))
        return tokens

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Usage]:
        usage = {}
        for k, name in enumerate(self._models):
            readers = self.router.readers
            read = readers[k].usage if k in readers else Usage()
            n_written = sum(answer.usage[name].tokens_written for answer in answers)
            usage[name] = replace(read, tokens_written=n_written)
        return usage

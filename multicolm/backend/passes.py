"""Forward passes that somebody wants run, and computations that want some.

A computation over models is a generator: it yields the passes that it needs, is sent their outputs,
and ends with its result. Whoever drives it decides when each pass is run, and with which others.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from multicolm.backend.base import ModelOutput
from multicolm.backend.checked import CheckedSession
from multicolm.errors import ModelError

__all__ = ["ForwardPass", "PassResult", "Passes", "TokenQuery", "Wanted", "run_alone", "together"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class ForwardPass:
    """Tokens that a model is to read, and where its predictions are wanted.

    Attributes:
        session: the texts; passes over one session can be run as one.
        rows: distinct row numbers of the session, ascending.
        tokens: per row, at least one token of the model's own vocabulary.
        n_last: per row, after how many of these tokens a prediction is wanted.
        hidden: whether hidden states are wanted.
    """

    session: CheckedSession
    rows: Sequence[int]
    tokens: Sequence[Sequence[int]]
    n_last: Sequence[int]
    hidden: bool = False

    @property
    def n_read(self) -> int:
        """How many tokens it reads."""
        return sum(map(len, self.tokens))


@dataclass(frozen=True, slots=True, eq=False)
class TokenQuery:
    """A question for the log-probabilities of named tokens; see :meth:`Session.logprobs_of`.

    Attributes:
        session: the texts.
        rows: row numbers; one may come several times.
        lengths: per row number, how many of its tokens come before.
        ids: tokens of the model's own vocabulary.
        after: per row number, tokens that follow these, for this question only.
    """

    session: CheckedSession
    rows: Sequence[int]
    lengths: Sequence[int]
    ids: Sequence[int]
    after: Sequence[Sequence[int]] | None = None


Wanted: TypeAlias = ForwardPass | TokenQuery


@dataclass(frozen=True, slots=True)
class PassResult:
    """What came of a pass.

    Attributes:
        output: the predictions. Those of a row that failed are even: all tokens are equally likely.
        seconds: what it took; of a pass that was run with others, its share.
        errors: by number among the rows of the pass, why the row failed.
        again: numbers of the rows whose text another model read in the same forward pass, which is
            counted there.
    """

    output: ModelOutput
    seconds: float
    errors: Mapping[int, ModelError]
    again: frozenset[int] = frozenset()


Passes: TypeAlias = Generator[Sequence[Wanted], Sequence[PassResult], T]
"""A computation that wants passes run, and ends with a ``T``."""


def together(parts: Sequence[Passes[T]]) -> Passes[list[T]]:
    """Several computations as one: what they want next is wanted at the same time.

    Args:
        parts: that do not depend on each other.

    Returns:
        The result of each.
    """
    if not parts:
        return []
    if len(parts) == 1:
        return [(yield from parts[0])]
    results: dict[int, T] = {}
    wanted: dict[int, Sequence[Wanted]] = {}
    outputs: dict[int, Sequence[PassResult] | None] = dict.fromkeys(range(len(parts)))
    while outputs:
        for number, ran in outputs.items():
            try:
                wanted[number] = next(parts[number]) if ran is None else parts[number].send(ran)
            except StopIteration as end:
                results[number] = end.value
        outputs.clear()
        if wanted:
            ran_all = iter((yield [each for some in wanted.values() for each in some]))
            outputs |= {n: [next(ran_all) for _ in some] for n, some in wanted.items()}
            wanted.clear()
    return [results[number] for number in range(len(parts))]


def run_alone(steps: Passes[T]) -> T:
    """Run a computation to its end, each pass as soon as it is wanted.

    Raises:
        ModelError: if a prediction is no distribution.
    """
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send([_run(each) for each in wanted])
    except StopIteration as end:
        result: T = end.value
        return result


def _run(wanted: Wanted) -> PassResult:
    start = time.perf_counter()
    model = wanted.session.model
    if isinstance(wanted, TokenQuery):
        output = wanted.session.logprobs_of(wanted.rows, wanted.lengths, wanted.ids, wanted.after)
    else:
        output = wanted.session.feed(
            wanted.rows, wanted.tokens, wanted.n_last, hidden=wanted.hidden
        )
    model.synchronize()
    return PassResult(output, time.perf_counter() - start, {})

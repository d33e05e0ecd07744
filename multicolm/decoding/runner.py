"""Runs the forward passes that decode loops want, those of several loops as one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Generic, TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicolm.backend.base import Model, ModelOutput
from multicolm.backend.checked import CheckedSession, RowPool, open_session
from multicolm.backend.passes import ForwardPass, Passes, PassResult, TokenQuery, Wanted
from multicolm.decoding.slots import Slots
from multicolm.errors import ModelError

__all__ = ["Runner"]

T = TypeVar("T")
_Ran: TypeAlias = dict[Wanted, PassResult | Exception]
_Groups: TypeAlias = dict[RowPool, list[Wanted]]


class Runner:
    """The models at work for one or several loops.

    What loops want of models of this process that have the same weights is run as one forward pass,
    and those of different weights one after another; servers are asked side by side, and put
    requests together themselves.

    Args:
        models: the ensemble's.
        n_slots: how many texts can be written at a time.
        clock: current time in seconds.
        prompt_tokens: how many tokens of a long prompt a loop reads in a round, so that others'
            texts grow meanwhile; ``None`` reads prompts whole.

    Attributes:
        models: the ensemble's.
        slots: places of the texts of all loops.
        prompt_tokens: as given.
        device: on which decisions are made: that of the first result. All others are moved there.
    """

    def __init__(
        self,
        models: Sequence[Model],
        n_slots: int,
        clock: Callable[[], float] = time.perf_counter,
        prompt_tokens: int | None = None,
    ) -> None:
        self.models = tuple(models)
        self.slots = Slots(n_slots)
        self.prompt_tokens = prompt_tokens
        self.device: torch.device | None = None
        self._clock = clock
        self._order = {model.name: k for k, model in enumerate(models)}
        self._sessions: dict[int, CheckedSession] = {}
        self._row_pools: dict[object, RowPool] = {}
        self._pool: ThreadPoolExecutor | None = None

    def open(self, k: int) -> CheckedSession:
        """A session of model ``k`` whose rows are the slots; of a model here, one for all loops."""
        model = self.models[k]
        if model.server:
            return open_session(model, self.slots.n)
        if k not in self._sessions:
            pool = self._row_pools.setdefault(model.weights, RowPool())
            self._sessions[k] = open_session(model, self.slots.n, pool)
        return self._sessions[k]

    def embed(self, k: int, ids: Int[Tensor, "positions"]) -> Float[Tensor, "positions width"]:
        """Input embeddings of model ``k`` for its own tokens, where decisions are made."""
        embedded = self.models[k].embed(ids)
        return embedded if self.device is None else embedded.to(self.device)

    def run(self, computations: Sequence[Passes[T]]) -> list[T]:
        """Run some computations to their ends.

        A pass that breaks raises its error in every computation that wanted it.

        Returns:
            The result of each.
        """
        tasks = [_Task(each) for each in computations]
        asked: dict[Future[_Ran], RowPool] = {}
        try:
            for task in tasks:
                task.advance()
            while at_work := [task for task in tasks if not task.done]:
                ran = self._run_next([w for task in at_work for w in task.missing], asked)
                for task in at_work:
                    task.take(ran)
                    if not task.missing:
                        task.advance()
        finally:
            wait(asked)
        return [task.result for task in tasks]

    def _run_next(self, wanted: Sequence[Wanted], asked: dict[Future[_Ran], RowPool]) -> _Ran:
        """Ask all servers, and run the first model of this process that is wanted.

        Policies ask for models in ascending order, so that a model is run about once in a round of
        all loops, however many they are. Where there is no such model, wait for a server.
        """
        groups: _Groups = {}
        order: dict[RowPool, int] = {}  # of those that have no server
        for each in wanted:
            model, pool = each.session.model, each.session.pool
            groups.setdefault(pool, []).append(each)
            if not model.server:
                number = self._order[model.name]
                order[pool] = min(order.get(pool, number), number)
        local = [pool for pool in groups if pool in order]
        busy = set(asked.values())
        away = [pool for pool in groups if pool not in order and pool not in busy]
        if len(away) == 1 and not local and not asked:  # the usual case of one server
            return self._moved(self._pass(away[0], groups[away[0]]))
        if away and self._pool is None:
            self._pool = ThreadPoolExecutor(len(self.models), "multicolm-server")
        for pool in away:
            assert self._pool is not None
            asked[self._pool.submit(self._pass, pool, groups[pool])] = pool
        ran: _Ran = {}
        if local:
            first = min(order.values())
            for pool in local:
                if order[pool] == first:
                    ran |= self._pass(pool, groups[pool])
        else:
            for done in wait(asked, return_when=FIRST_COMPLETED).done:
                del asked[done]
                ran |= done.result()
        return self._moved(ran)

    def _pass(self, pool: RowPool, wanted: Sequence[Wanted]) -> _Ran:
        """Run what is wanted of the rows of one pool, forward passes as one."""
        passes = [each for each in wanted if isinstance(each, ForwardPass)]
        try:
            ran: _Ran = dict(zip(passes, self._forward(pool, passes), strict=True))
            for each in wanted:
                if isinstance(each, TokenQuery):
                    ran[each] = self._query(each)
            return ran
        except Exception as error:
            # What its caches hold is unknown. Other loops' texts are read anew.
            pool.reset()
            return dict.fromkeys(wanted, error)

    def _forward(self, pool: RowPool, passes: Sequence[ForwardPass]) -> list[PassResult]:
        if not passes:
            return []
        start = self._clock()
        if len(passes) == 1:
            [each] = passes
            output, errors = each.session.feed_each(
                each.rows, each.tokens, each.n_last, hidden=each.hidden
            )
            each.session.model.synchronize()
            return [PassResult(output, self._clock() - start, errors)]
        lines = _lines(passes)
        output, errors = pool.feed_each(
            [row for row, _, _ in lines],
            [passes[number].tokens[i] for _, number, i in lines],
            [passes[number].n_last[i] for _, number, i in lines],
            hidden=any(each.hidden for each in passes),
        )
        passes[0].session.model.synchronize()
        return list(_divided(passes, lines, output, errors, self._clock() - start))

    def _query(self, query: TokenQuery) -> PassResult:
        start = self._clock()
        output = query.session.logprobs_of(query.rows, query.lengths, query.ids, query.after)
        return PassResult(output, self._clock() - start, {})

    def _moved(self, ran: _Ran) -> _Ran:
        """Outputs on one device: models may be spread over several."""
        for wanted, result in ran.items():
            if isinstance(result, PassResult):
                output = result.output
                if self.device is None:
                    self.device = output.logits.device
                ran[wanted] = replace(result, output=output.to(self.device))
        return ran


@dataclass(eq=False, slots=True)
class _Task(Generic[T]):
    """A computation on its way.

    Attributes:
        wanted: the passes that it waits for.
        ran: outputs of those that were run.
    """

    computation: Passes[T]
    wanted: Sequence[Wanted] = ()
    ran: _Ran = field(default_factory=dict)
    done: bool = False
    _result: list[T] = field(default_factory=list)

    @property
    def missing(self) -> list[Wanted]:
        return [each for each in self.wanted if each not in self.ran]

    @property
    def result(self) -> T:
        return self._result[0]

    def take(self, ran: _Ran) -> None:
        """Keep what was wanted here."""
        for each in self.wanted:
            if each in ran:
                self.ran[each] = ran.pop(each)

    def advance(self) -> None:
        """Go on to the next passes that are wanted, or to the end."""
        ran = [self.ran.pop(each) for each in self.wanted]
        outputs = [each for each in ran if isinstance(each, PassResult)]
        failed = next((each for each in ran if isinstance(each, Exception)), None)
        # An error holds this frame: no circle, or caches would wait for the garbage collector.
        del ran
        try:
            if failed is not None:
                self.wanted = self.computation.throw(failed)
            elif self.wanted:
                self.wanted = self.computation.send(outputs)
            else:
                self.wanted = next(self.computation)
        except StopIteration as end:
            self.wanted, self.done = (), True
            self._result.append(end.value)
        finally:
            del failed


def _lines(passes: Sequence[ForwardPass]) -> list[tuple[int, int, int]]:
    """The rows of several passes as those of one: in the pool, whose pass, and which row there."""
    return sorted(
        (each.session.first_row + row, number, i)
        for number, each in enumerate(passes)
        for i, row in enumerate(each.rows)
    )


def _divided(
    passes: Sequence[ForwardPass],
    lines: Sequence[tuple[int, int, int]],
    output: ModelOutput,
    errors: dict[int, ModelError],
    seconds: float,
) -> Iterator[PassResult]:
    """What each of several passes gets of the one that was run for all."""
    places: dict[tuple[int, int], range] = {}
    failed: list[dict[int, ModelError]] = [{} for _ in passes]
    calls: list[list[int]] = [[] for _ in passes]  # a pass's rows ascend among all
    first = 0
    for line, (_, number, i) in enumerate(lines):
        n = passes[number].n_last[i]
        places[number, i] = range(first, first + n)
        first += n
        if line in errors:
            failed[number][i] = errors[line]
        if output.calls_of:
            calls[number].append(output.calls_of[line])
    n_read = sum(each.n_read for each in passes)
    seen: set[int] = set()
    for number, each in enumerate(passes):
        index = [at for i in range(len(each.rows)) for at in places[number, i]]
        part = output.at(index)
        part = replace(
            part,
            hidden=part.hidden if each.hidden else None,
            n_passes=0 if number else output.n_passes,  # each pass counts once
            n_calls=0 if number else output.n_calls,
            calls_of=tuple(calls[number]),
        )
        again = frozenset(i for i, row in enumerate(each.rows) if row in seen)
        seen.update(each.rows)
        yield PassResult(part, seconds * each.n_read / n_read, failed[number], again)

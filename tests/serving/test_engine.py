"""The engine: places, cancellations, failures and its end, with models that wait for a gate."""

from __future__ import annotations

import gc
import queue
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
from serving_worlds import SECONDS, Gate

from multicolm.config import GenerationConfig
from multicolm.decoding.live import Live
from multicolm.decoding.row import Row
from multicolm.decoding.token_reader import TokenReader
from multicolm.errors import BusyError, ClosedError, InputError
from multicolm.serving.catalog import Catalog, Choice
from multicolm.serving.engine import _LOG, Engine
from multicolm.serving.events import Begun, Ended, Event, Failed, GenerationRequest, Grown
from multicolm.serving.workers import Handle

SHORT = GenerationConfig(max_new_tokens=3)
ENDLESS = GenerationConfig(max_new_tokens=1_000_000)


class Desk:
    """An engine of few places, and what it says."""

    def __init__(self, gate: Gate, **places: int) -> None:
        self.gate = gate
        ensemble = gate.ensemble()
        self.catalog = Catalog(ensemble, "duo")
        self.engine = Engine(ensemble, **{"max_concurrent": 2, "max_waiting": 2, **places})
        self.news: dict[int, queue.Queue[Event]] = {}

    def ask(
        self,
        settings: GenerationConfig = SHORT,
        policy: str = "default",
        prompt: str = "a",
        choice: Choice | None = None,
    ) -> Handle:
        request = GenerationRequest(
            prompt, choice or self.catalog.choose("duo", policy), settings, seed=0
        )
        news: queue.Queue[Event] = queue.Queue()
        [handle] = self.engine.submit([request], [news.put])
        self.news[handle.number] = news
        return handle

    def next(self, handle: Handle) -> Event:
        return self.news[handle.number].get(timeout=SECONDS)

    def end(self, handle: Handle) -> Ended | Failed:
        while True:
            event = self.next(handle)
            if isinstance(event, Ended | Failed):
                return event


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "that does not come true"
        time.sleep(0.005)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk(Gate())
    with desk.engine:
        yield desk
        desk.gate.open.set()


def test_a_text_begins_grows_and_ends(desk: Desk) -> None:
    desk.gate.open.set()
    handle = desk.ask()
    assert desk.next(handle) == Begun(1)
    grown: list[Grown] = []
    while isinstance(event := desk.next(handle), Grown):
        grown.append(event)
    assert isinstance(event, Ended)
    assert tuple(token for e in grown for token in e.tokens) == event.answer.trace.tokens
    assert "".join(piece.text for e in grown for piece in e.pieces) == event.answer.text
    assert event.answer.finish_reason == "length"
    assert desk.news[handle.number].empty()


def test_there_are_as_many_places_as_it_says_and_a_request_gets_all_or_none(desk: Desk) -> None:
    first = desk.ask(ENDLESS)
    rest = [desk.ask() for _ in range(2)]
    request = GenerationRequest("a", desk.catalog.choose("duo"), SHORT, seed=0)
    with pytest.raises(BusyError, match="3 of 4 places are taken") as caught:
        desk.engine.submit([request, request], [print, print])
    assert caught.value.retry_after >= 1
    last = desk.ask()
    # One or both of the slots: the first pass may have begun before the second text came.
    until(lambda: desk.engine.stats().active in (1, 2))
    stats = desk.engine.stats()
    assert stats.active + stats.waiting == 4
    desk.gate.open.set()
    for handle in (*rest, last):
        assert isinstance(desk.end(handle), Ended)
    desk.engine.cancel(first)
    until(lambda: desk.engine.stats().active == 0)
    assert desk.engine.stats().outcomes == {"finished": 3, "cancelled": 1, "failed": 0}


@pytest.mark.parametrize("policy", ["default", "average"])
def test_who_leaves_frees_the_place_for_who_waits(desk: Desk, policy: str) -> None:
    writing = [desk.ask(ENDLESS, policy) for _ in range(2)]
    gone, waits = desk.ask(ENDLESS, policy), desk.ask(SHORT, policy)
    desk.gate.open.set()
    desk.engine.cancel(gone)  # which has waited
    until(lambda: desk.engine.stats().outcomes["cancelled"] == 1)
    until(lambda: desk.engine.stats().active == 2)
    desk.engine.cancel(writing[0])  # which is being written
    assert isinstance(desk.end(waits), Ended)
    desk.engine.cancel(writing[0])  # once more: nothing happens
    desk.engine.cancel(waits)
    desk.engine.cancel(writing[1])
    until(lambda: desk.engine.stats().active == 0)
    assert desk.engine.stats().outcomes == {"finished": 1, "cancelled": 3, "failed": 0}


def test_texts_of_several_policies_are_written_at_the_same_time(desk: Desk) -> None:
    desk.gate.open.set()
    endless = desk.ask(ENDLESS, "default")
    assert isinstance(desk.end(desk.ask(SHORT, "average")), Ended)
    desk.engine.cancel(endless)


def test_clients_that_all_want_other_thresholds_are_served_at_once_from_the_same_caches() -> None:
    desk = Desk(Gate(), max_concurrent=8, max_waiting=4)
    with desk.engine:
        desk.gate.open.set()
        wanted = [desk.catalog.choose(f"duo:confidence@0.{i}") for i in range(1, 8)]
        endless = [desk.ask(ENDLESS, choice=choice) for choice in wanted]
        until(lambda: desk.engine.stats().active == 7)
        for handle in endless:
            assert isinstance(desk.next(handle), Begun) and isinstance(desk.next(handle), Grown)
        assert desk.gate.n_opened == 2  # one session of each model
        for handle in endless:
            desk.engine.cancel(handle)


def test_policies_that_need_caches_of_their_own_do_not_multiply_them() -> None:
    desk = Desk(Gate(tokens=("a", "b", ".")), max_concurrent=8, max_waiting=4)
    wanted = [
        desk.catalog.choose("duo", "byte-mixture", {"weights": [1.0, float(i)]})
        for i in range(1, 8)
    ]
    most = 0

    def with_caches() -> int:
        workers = desk.engine._workers.values()
        return sum(bool(w.active or w.live.loop.readers.opened) for w in workers)

    with desk.engine:
        desk.gate.open.set()
        endless = [desk.ask(ENDLESS, choice=choice) for choice in wanted]
        until(lambda: desk.engine.stats().active == 4)
        late = desk.ask(choice=wanted[0])  # its policy is at work, and others came before
        for done, handle in enumerate(endless):
            # Who waits for a policy that has caches keeps these: three others are at work then.
            until(lambda n=done: desk.engine.stats().active >= min(3, len(wanted) - n))
            most = max(most, with_caches())
            assert isinstance(desk.next(handle), Begun) and isinstance(desk.next(handle), Grown)
            desk.engine.cancel(handle)
        assert isinstance(desk.end(late), Ended)
        assert max(most, with_caches()) == 4
        assert isinstance(desk.end(desk.ask()), Ended)


def test_a_prompt_that_cannot_be_read_costs_nobody_else_anything(desk: Desk) -> None:
    wrong, right = desk.ask(prompt="zzz"), desk.ask()
    desk.gate.open.set()
    failed = desk.end(wrong)
    assert isinstance(failed, Failed) and isinstance(failed.error, InputError)
    assert isinstance(desk.end(right), Ended)


def test_a_model_that_breaks_costs_those_it_was_writing_and_nobody_else(desk: Desk) -> None:
    desk.gate.errors.append(RuntimeError("out of memory"))
    writing = [desk.ask(), desk.ask()]
    waiting = [desk.ask(), desk.ask(policy="average")]
    until(lambda: desk.engine.stats().active == 2)
    desk.gate.open.set()
    for handle in writing:
        failed = desk.end(handle)
        assert isinstance(failed, Failed) and str(failed.error) == "out of memory"
    for handle in waiting:
        assert isinstance(desk.end(handle), Ended)
    assert desk.engine.stats().outcomes == {"finished": 2, "cancelled": 0, "failed": 2}
    assert isinstance(desk.end(desk.ask()), Ended)


def test_whoever_keeps_an_error_keeps_no_caches_with_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_LOG, "disabled", True)  # pytest keeps what is logged
    desk.gate.open.set()
    gc.disable()
    try:
        assert isinstance(desk.end(desk.ask(policy="average")), Ended)
        held = [weakref.ref(session.inner) for session in desk.engine._runner._sessions.values()]
        desk.gate.errors.append(RuntimeError("out of memory"))
        failed = desk.end(desk.ask(policy="average"))
        assert isinstance(failed, Failed)
        assert isinstance(desk.end(desk.ask()), Ended)
        assert [ref() is None for ref in held] == [True, False]
    finally:
        gc.enable()


def test_a_policy_that_cannot_be_opened_once_more_fails_all_who_wait_for_it_and_nobody_else(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [desk.ask(ENDLESS, "average") for _ in range(3)]
    until(lambda: desk.engine.stats().active == 2)
    live = desk.engine.ensemble.live

    def no_room(*_: object, **__: object) -> object:
        monkeypatch.setattr(desk.engine.ensemble, "live", live)
        raise MemoryError("no room")

    monkeypatch.setattr(desk.engine.ensemble, "live", no_room)
    desk.gate.errors.append(RuntimeError("out of memory"))
    desk.gate.open.set()
    for handle, kind in zip(broken, (RuntimeError, RuntimeError, MemoryError), strict=True):
        event = desk.end(handle)
        assert isinstance(event, Failed) and isinstance(event.error, kind)
    assert isinstance(desk.end(desk.ask()), Ended)
    assert desk.engine.stats().active == desk.engine.stats().waiting == 0


@pytest.mark.parametrize("method", ["answer", "tokens"])
def test_a_text_that_cannot_be_told_costs_its_round_and_not_the_engine(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def breaks(*_: object) -> object:
        raise RuntimeError("a token without a name")

    with monkeypatch.context() as patch:
        patch.setattr(Live, method, breaks)
        wrong = desk.ask()
        desk.gate.open.set()
        failed = desk.end(wrong)
    assert isinstance(failed, Failed) and isinstance(failed.error, RuntimeError)
    assert isinstance(desk.end(desk.ask()), Ended)


def test_a_text_that_cannot_be_begun_keeps_no_place(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise MemoryError("no room")

    desk.gate.open.set()
    assert isinstance(desk.end(desk.ask()), Ended)  # now there are readers
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(TokenReader, "start", breaks)
            failed = desk.end(desk.ask())
        assert isinstance(failed, Failed) and str(failed.error) == "no room"
    assert all(isinstance(desk.end(handle), Ended) for handle in [desk.ask() for _ in range(3)])
    until(lambda: desk.engine.stats().active == 0)
    assert desk.engine._runner.slots.free == [0, 1]


def test_a_listener_that_breaks_costs_nobody_anything(desk: Desk) -> None:
    def broken(_: Event) -> None:
        raise ValueError("not listening")

    desk.gate.open.set()
    request = GenerationRequest("a", desk.catalog.choose("duo"), SHORT, seed=0)
    desk.engine.submit([request], [broken])
    assert isinstance(desk.end(desk.ask()), Ended)
    until(lambda: desk.engine.stats().outcomes["finished"] == 2)


def test_closing_finishes_what_there_is_and_takes_nothing_new() -> None:
    desk = Desk(Gate())
    desk.engine.start()
    handles = [desk.ask() for _ in range(4)]
    desk.gate.open.set()
    closing = desk.engine.close(grace=SECONDS)
    assert all(isinstance(desk.end(handle), Ended) for handle in handles)
    assert closing.finished <= 4 and closing.broken_off == 0
    with pytest.raises(ClosedError, match="shutting down"):
        desk.ask()


def test_what_is_not_finished_in_time_is_told_so() -> None:
    desk = Desk(Gate())
    desk.engine.start()
    desk.gate.open.set()
    handles = [desk.ask(ENDLESS) for _ in range(4)]
    until(lambda: desk.engine.stats().active == 2)
    closing = desk.engine.close(grace=0.2)
    assert (closing.finished, closing.broken_off) == (0, 4)
    for handle in handles:
        failed = desk.end(handle)
        assert isinstance(failed, Failed) and isinstance(failed.error, ClosedError)
    assert not desk.engine.is_open


def test_an_engine_that_never_began_can_be_closed() -> None:
    desk = Desk(Gate())
    with pytest.raises(ClosedError):
        desk.ask()
    assert desk.engine.close().broken_off == 0


def test_nothing_of_a_text_is_kept(desk: Desk) -> None:
    desk.gate.open.set()
    policies = ["default", "average", *(f"confidence@{n / 10}" for n in range(9))]
    for policy in policies:
        name, _, number = policy.partition("@")
        choice = desk.catalog.choose(f"duo:{name}@{number}" if number else f"duo:{name}")
        news: queue.Queue[Event] = queue.Queue()
        left: queue.Queue[Event] = queue.Queue()
        handles = desk.engine.submit(
            [GenerationRequest("a", choice, SHORT, 0), GenerationRequest("a", choice, ENDLESS, 0)],
            [news.put, left.put],
        )
        while not isinstance(news.get(timeout=SECONDS), Ended):
            pass
        desk.engine.cancel(handles[1])
        until(lambda: desk.engine.stats().active == 0)
    del handles
    forwards = desk.engine.stats().models["base"].forwards
    assert forwards >= 3 * len(policies)  # those of policies that are closed are still counted
    assert len(desk.engine._workers) <= 4
    # A text that ends while the loop turns may be a local variable there until it turns again.
    assert isinstance(desk.end(desk.ask()), Ended)
    gc.collect()
    assert sum(type(thing) is Row for thing in gc.get_objects()) <= 1


@pytest.mark.parametrize(
    ("places", "said"),
    [({"max_concurrent": 0}, "must be 1 or more"), ({"max_waiting": -1}, "must be 0 or more")],
)
def test_one_text_at_least_is_written_and_none_has_to_wait(
    places: dict[str, int], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        Desk(Gate(), **places)

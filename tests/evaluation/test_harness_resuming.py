"""``multicolm eval`` that is stopped within a row of a task goes on at the next request."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import forked
import pytest
from fake_vllm import FakeVllm
from harness_worlds import Request, records, without_times, write_tasks
from remote_worlds import ensemble, local, remote

import multicolm
from multicolm import Ensemble
from multicolm.errors import ArtefactError, ModelError, ServerError
from multicolm.evaluation.harness import Progress, evaluate_tasks
from multicolm.evaluation.harness_ledger import RowRequests
from multicolm.evaluation.harness_results import HarnessFigure
from multicolm.evaluation.ledger import Ledger

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

ROW = {"choice": "unite", "rolling": "cosd-rule", "answer": "cosd-rule"}
# Texts that are read at a time, in the place of 128.
CHUNK = 3


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions, one of them twice, one too long for a context and one for a window."""
    data = records(6)
    data[2] = {**data[2], "prompt": "word " * 600 + data[2]["prompt"]}
    data[4] = {**data[4], "text": data[4]["text"] * 40}
    return write_tasks(tmp_path_factory.mktemp("tasks"), [*data, data[0]])


class Passes:
    """Counts the passes of an ensemble's models together, and lets one of them fail."""

    def __init__(self, tiny: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        self.fail_at: int | None = None
        self.error: BaseException = KeyboardInterrupt()
        for model in tiny.backends:
            monkeypatch.setattr(model, "open", self._counted(model.open))

    def _counted(self, plain: Callable[[int], Any]) -> Callable[[int], Any]:
        def open_(n_rows: int) -> Any:
            session = plain(n_rows)
            feed = session.feed

            def counted(*args: Any, **more: Any) -> Any:
                if self.n == self.fail_at:
                    raise self.error
                self.n += 1
                return feed(*args, **more)

            session.feed = counted
            return session

        return open_

    def start(self, fail_at: int | None = None) -> None:
        self.n, self.fail_at = 0, fail_at


@pytest.fixture(scope="module")
def tiny() -> Ensemble:
    return multicolm.load("tiny")


@pytest.fixture
def passes(tiny: Ensemble, monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(tiny, monkeypatch)


@pytest.fixture
def judge(
    tiny: Ensemble, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Sequence[HarnessFigure]]:
    """Runs one row of one task, one text at a time."""
    monkeypatch.setattr("multicolm.evaluation.harness_model._CHUNK", CHUNK)

    def run(task: str, out: Path | None, **more: Any) -> Sequence[HarnessFigure]:
        params = {"top_k": 1} if ROW[task] == "unite" else {}
        policy = tiny.resolve({"kind": ROW[task], "params": params})
        settings: dict[str, Any] = {"include_path": [tasks], "alone": False, "batch_size": 1}
        return evaluate_tasks(
            tiny, [policy], [f"tiny_{task}"], out=out, **{**settings, **more}
        ).figures

    return run


def part(out: Path) -> Path:
    """The ledger of the row at work."""
    [path] = out.glob("lm_eval.requests/*/ledger.jsonl")
    return path


def n_kept(out: Path) -> int:
    lines = [json.loads(line) for line in part(out).read_text().splitlines()[1:]]
    return len({line["key"] for line in lines} - {"seconds"})


@pytest.mark.parametrize("task", list(ROW))
def test_a_run_that_is_stopped_again_and_again_asks_for_the_rest_and_comes_to_the_same(
    task: str, judge: Any, passes: Passes, tmp_path: Path
) -> None:
    # How many passes had been run when so many requests were answered.
    at = {0: 0}
    whole = judge(task, None, progress=lambda step: at.setdefault(step.done, passes.n))
    n_whole, n_requests = passes.n, max(at)
    if task == "answer":  # which is told of a little later than it is there
        for n in range(1, n_requests):
            passes.start()
            judge(task, None, limit=n)
            at[n] = passes.n
    assert (task == "rolling") or whole[0].n_cut > 0
    assert (task != "choice") or whole[0].n_impossible > 0
    out = tmp_path / "out"
    steps = sorted(at)
    longest = max(at[b] - at[a] for a, b in pairwise(steps))
    n_before, n_stops = 0, 0
    while True:
        told: list[Progress] = []
        # So many that each sitting answers something, and stops within something else.
        passes.start(fail_at=longest + 1)
        try:
            found = judge(task, out, progress=told.append)
        except KeyboardInterrupt:
            n_stops += 1
            n_now = n_kept(out)
            assert n_before < n_now < n_requests
            assert at[n_now] - at[n_before] <= passes.n
            assert told[-1].done == n_now
            n_before = n_now
            continue
        break
    assert n_stops >= 2
    assert passes.n == n_whole - at[n_before]
    assert n_before in [step.done for step in told]
    assert without_times(found) == without_times(whole)
    # The row is done: its requests are in no file and, next time, in no memory.
    assert not (out / "lm_eval.requests").exists()
    assert len((out / "lm_eval.jsonl").read_text().splitlines()) == 2
    passes.start(fail_at=0)
    assert judge(task, out) == found


@pytest.mark.parametrize("sizes", [(1, 2), (4, 7)])
def test_what_is_read_together_does_not_hang_on_what_is_kept(
    sizes: tuple[int, int], tiny: Ensemble
) -> None:
    from multicolm.evaluation.harness_model import EnsembleLM

    asked = [Request(r["prompt"], r["completion"]) for r in records(9)]
    want = EnsembleLM(tiny, "average", batch_tokens=40).loglikelihood(asked)
    kept: dict[str, Any] = {}
    assert EnsembleLM(tiny, "average", batch_tokens=40, kept=kept).loglikelihood(asked) == want
    whole = dict(kept)
    assert len(whole) == len(asked)
    for number, key in enumerate(whole):
        if number in sizes:
            del kept[key]
    again = EnsembleLM(tiny, "average", batch_tokens=40, kept=kept)
    assert again.loglikelihood(asked) == want  # to the last bit
    assert kept == whole


def test_long_texts_are_kept_a_few_at_a_time(tiny: Ensemble) -> None:
    from multicolm.evaluation.harness_model import EnsembleLM

    text = Request(records(1)[0]["text"] * 20)
    told: list[tuple[int, int]] = []
    lm = EnsembleLM(tiny, "single", batch_tokens=64, progress=lambda *step: told.append(step))
    lm.loglikelihood_rolling([text] * 3)
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_an_answer_that_is_drawn_several_times_is_drawn_as_it_would_have_been(
    tiny: Ensemble, passes: Passes
) -> None:
    from multicolm.evaluation.harness_model import EnsembleLM

    settings = {"max_gen_toks": 20, "do_sample": True, "temperature": 2.0}
    other = {**settings, "temperature": 1.5}
    asked = [Request("Question: What", s) for s in (settings, other, settings, settings)]
    want = EnsembleLM(tiny, "single", batch_size=1).generate_until(asked)
    assert len(set(want)) == 4
    n_all, kept = passes.n, {}
    passes.start(fail_at=n_all // 2)
    with pytest.raises(KeyboardInterrupt):
        EnsembleLM(tiny, "single", batch_size=1, kept=kept).generate_until(asked)
    assert 0 < len(kept) < 4
    passes.start()
    assert EnsembleLM(tiny, "single", batch_size=1, kept=kept).generate_until(asked) == want
    assert passes.n < n_all
    passes.start(fail_at=0)
    assert EnsembleLM(tiny, "single", kept=kept).generate_until(asked) == want


def test_a_model_that_keeps_nothing_asks_every_time(tiny: Ensemble, passes: Passes) -> None:
    from multicolm.evaluation.harness_model import EnsembleLM

    lm = EnsembleLM(tiny, "single")
    asked = [Request("12 * 13", " = 156.")]
    want = lm.loglikelihood(asked)
    n_once = passes.n
    assert (lm.loglikelihood(asked), passes.n) == (want, 2 * n_once)


def test_an_error_says_where_it_came_and_what_is_kept(
    judge: Any, passes: Passes, tmp_path: Path
) -> None:
    passes.start(fail_at=40)
    passes.error = ModelError("the weights are gone.")
    with pytest.raises(ModelError) as caught:
        judge("answer", tmp_path)
    assert str(caught.value) == (
        "task 'tiny_answer', row 'cosd-rule': the weights are gone. Kept in "
        f"{tmp_path}: rows of tasks that are done, 0; answered requests of this one, "
        f"{n_kept(tmp_path)}. Repeat the command to resume."
    )
    passes.start(fail_at=40)
    passes.error = ModelError("the weights are gone.")
    with pytest.raises(ModelError, match=r"'cosd-rule': the weights are gone\.$"):
        judge("answer", None)


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with FakeVllm(local("facts"), "facts") as fake:
        yield fake


@pytest.mark.parametrize("task", ["tiny_answer", "tiny_choice"])
def test_a_server_that_fails_at_its_last_request_is_asked_for_that_one_again(
    task: str, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multicolm.evaluation.harness_model._CHUNK", 4)
    folder = write_tasks(tmp_path / "tasks", records(3))
    together = ensemble(remote(fake, retries=0))
    settings: dict[str, Any] = {"include_path": [folder], "alone": False, "batch_size": 1}
    together.generate("1", max_new_tokens=1)  # it is found out what the server can do
    fake.requests.clear()
    want = evaluate_tasks(together, ["max-confidence"], [task], **settings).figures
    asked = [request["prompt"] for request in fake.requests]
    n_all = len(asked)
    fake.requests.clear()
    fake.before_answer = lambda: fake.go_wrong("500") if len(fake.requests) == n_all - 2 else None
    settings["out"] = tmp_path / "out"
    with pytest.raises(ServerError) as caught:
        evaluate_tasks(together, ["max-confidence"], [task], **settings)
    kept = n_kept(tmp_path / "out")
    assert kept == {"tiny_answer": 2, "tiny_choice": 8}[task]
    assert f"answered requests of this one, {kept}." in str(caught.value)
    assert "Finished and kept" not in str(caught.value)
    assert caught.value.server == fake.url
    fake.before_answer = lambda: None
    fake.requests.clear()
    found = evaluate_tasks(together, ["max-confidence"], [task], **settings).figures
    # One more finds out whether the server is still the same.
    again = [request["prompt"] for request in fake.requests]
    assert [prompt for prompt in again if prompt in asked] == asked[-1:]
    assert len(again) == 2
    assert without_times(found) == without_times(want)


# --- the ledger of a row -------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_seconds_of_all_sittings_are_summed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clock = tmp_path / "ledger.jsonl", Clock()
    synced: list[float] = []
    monkeypatch.setattr(Ledger, "sync", lambda self: synced.append(clock.now))
    with Ledger.open(path, {}) as ledger:
        first = RowRequests(ledger, clock)
        synced.clear()
        for number in range(6):
            clock.now += 2.0
            first[f"k{number}"] = number
        assert synced == [106.0, 112.0]  # not at every one
        assert (len(first), first.seconds) == (6, 12.0)
        clock.now += 1.0  # and then it is killed
    clock.now = 500.0
    with Ledger.open(path, {}) as ledger:
        second = RowRequests(ledger, clock)
        assert (len(second), second.seconds, second.get("k3")) == (6, 12.0, 3)
        clock.now += 3.0
        second.sync()
    with Ledger.open(path, {}) as ledger:
        assert RowRequests(ledger, clock).seconds == 15.0


def test_seconds_of_a_row_are_those_of_its_sittings(
    judge: Any, passes: Passes, tmp_path: Path
) -> None:
    passes.start(fail_at=40)
    with pytest.raises(KeyboardInterrupt):
        judge("answer", tmp_path)
    lines = part(tmp_path).read_text().splitlines()
    before = json.loads(lines[-1])
    assert before["key"] == "seconds" and before["record"] > 0
    # As if it had taken an hour.
    lines[-1] = json.dumps({"key": "seconds", "record": 3600.0})
    part(tmp_path).write_text("\n".join(lines) + "\n")
    passes.start()
    assert 3600 < judge("answer", tmp_path)[0].seconds < 4000


def test_requests_of_a_row_whose_end_was_the_last_that_was_done_are_forgotten(
    judge: Any, passes: Passes, tmp_path: Path
) -> None:
    passes.start(fail_at=40)
    with pytest.raises(KeyboardInterrupt):
        judge("answer", tmp_path)
    path, kept = part(tmp_path), part(tmp_path).read_bytes()
    passes.start()
    found = judge("answer", tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(kept)
    passes.start(fail_at=0)
    assert judge("answer", tmp_path) == found
    assert not (tmp_path / "lm_eval.requests").exists()


def test_requests_are_kept_for_each_row_apart(
    judge: Any, tiny: Ensemble, tasks: Path, passes: Passes, tmp_path: Path
) -> None:
    passes.start(fail_at=40)
    with pytest.raises(KeyboardInterrupt):
        judge("answer", tmp_path)
    kept = part(tmp_path)
    before = kept.read_bytes()
    passes.start()
    evaluate_tasks(
        *(tiny, ["average"], ["tiny_answer"]),
        **{"include_path": [tasks], "alone": False, "batch_size": 1, "out": tmp_path},
    )
    assert part(tmp_path) == kept
    assert kept.read_bytes() == before


def test_a_damaged_ledger_of_requests_is_named(judge: Any, passes: Passes, tmp_path: Path) -> None:
    passes.start(fail_at=60)
    with pytest.raises(KeyboardInterrupt):
        judge("answer", tmp_path)
    lines = part(tmp_path).read_text().splitlines()
    part(tmp_path).write_text("\n".join([lines[0], "{", *lines[2:]]) + "\n")
    with pytest.raises(ArtefactError, match=r"ledger\.jsonl:2: this line is damaged"):
        judge("answer", tmp_path)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_command_that_was_stopped_goes_on_within_a_row(number: int, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks", records(40))
    out = tmp_path / "out"
    command = ["eval", "tiny", "--tasks", "tiny_answer", "--policy", "cosd-rule", "--no-alone"]
    command += ["--batch-size", "1", "--include-path", str(folder), "--out", str(out)]
    process = forked.start(command, tmp_path)
    while not list(out.glob("lm_eval.requests/*/ledger.jsonl")) or n_lines(part(out)) < 5:
        assert not process.has_ended, process.end()
        time.sleep(0.02)
    os.kill(process.pid, number)
    done = process.end()
    n = n_kept_whole(out)
    assert 3 <= n < 40 and not (out / "lm_eval.json").exists()
    if number == signal.SIGINT:
        assert done.returncode == 130
        assert f"What was finished is kept in {out}; repeat the command to resume." in done.stderr
        assert done.stderr.strip().endswith("Interrupted.") and "Traceback" not in done.stderr
    else:
        assert done.returncode == -number
    before = part(out).read_bytes()
    settings: dict[str, Any] = {"include_path": [folder], "alone": False, "batch_size": 1}
    tiny, told = multicolm.load("tiny"), []
    found = evaluate_tasks(
        *(tiny, ["cosd-rule"], ["tiny_answer"]),
        **{**settings, "out": out, "progress": told.append},
    )
    # It went on at the next one.
    assert before.count(b"generate_until") in (n, n + 1)
    assert [step.done for step in told if not step.finished] == list(range(n, 41))
    whole = evaluate_tasks(tiny, ["cosd-rule"], ["tiny_answer"], **settings)
    assert without_times(found.figures) == without_times(whole.figures)


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def n_kept_whole(out: Path) -> int:
    """Requests in whole lines: the last one may be half written by who was killed."""
    lines = part(out).read_bytes().splitlines(keepends=True)
    keys = {json.loads(line)["key"] for line in lines[1:] if line.endswith(b"\n")}
    return len(keys - {"seconds"})

"""Builds the whole tiny world in a folder: first the questions, then each model in a process.

A model appears in the folder only once it is finished, so a build that was stopped goes on where it
stopped.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Final

from transformers.utils.logging import disable_progress_bar

from embedded.training import PLANS, train
from multicolm.tiny.world import SPLITS, World, build_world

MARK: Final = "build.json"
"""Stands in every folder made here, with its seed. A folder without it is never touched."""
_REPORT_EVERY_STEPS: Final = 20


class BuildError(Exception):
    """The folder cannot be built in, or a worker failed. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Report:
    """How far one model is; the loss is in nats per token, smoothed over some 50 steps."""

    model: str
    step: int
    steps: int
    loss_nats: float


def prepare(out: Path, world: World) -> None:
    """Makes the folder, its mark and the question files.

    Args:
        out: new, empty, or the folder of an earlier build with the same seed.
        world: what is built.

    Raises:
        BuildError: if the folder holds anything else.
    """
    mark = out / MARK
    if mark.is_file():
        seed = json.loads(mark.read_text(encoding="utf-8"))["seed"]
        if seed != world.seed:
            raise BuildError(
                f"{out} was built with seed {seed}, not {world.seed}; "
                "give that --seed or another --out"
            )
    elif out.exists() and any(out.iterdir()):
        raise BuildError(
            f"{out} is not empty and was not made by this command, so it is left as it is; "
            "give another --out"
        )
    (out / "questions").mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"seed": world.seed}) + "\n", encoding="utf-8")
    for split in SPLITS:
        lines = [json.dumps(question.as_record()) + "\n" for question in world.questions(split)]
        (out / "questions" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def missing(out: Path) -> list[str]:
    """The models of `PLANS` that are not finished in a folder, the slowest first."""
    return [name for name in PLANS if not (out / name / "model.safetensors").is_file()]


def build(world: World, out: Path, workers: int = 2, steps: int | None = None) -> Iterator[Report]:
    """Trains what is missing in a prepared folder and reports on the way.

    Args:
        world: what the models are trained for.
        out: made by `prepare`.
        workers: processes at one time, each with one torch thread.
        steps: fewer than planned, for a trial.

    Raises:
        BuildError: if a worker fails; what other workers finished stays.
    """
    spawn = multiprocessing.get_context("spawn")
    reports: Queue[Report] = spawn.Queue()
    waiting, running = missing(out), dict[str, SpawnProcess]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                arguments = (name, world.seed, out, reports, steps)
                running[name] = spawn.Process(target=_work, args=arguments, daemon=True)
                running[name].start()
            yield from _drain(reports)
            for name in [name for name, process in running.items() if not process.is_alive()]:
                code = running.pop(name).exitcode
                if code != 0:
                    raise BuildError(f"the training of {name} ended with exit code {code}")
        yield from _drain(reports)
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _drain(reports: Queue[Report], patience_s: float = 0.2) -> Iterator[Report]:
    """What has been reported within some time."""
    until = time.monotonic() + patience_s
    while (left_s := until - time.monotonic()) > 0:
        try:
            yield reports.get(timeout=left_s)
        except queue.Empty:
            return


def _work(name: str, seed: int, out: Path, reports: Queue[Report], steps: int | None) -> None:
    """Trains one model beside its place and moves it there when it is whole."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    disable_progress_bar()  # type: ignore[no-untyped-call]
    planned = PLANS[name].steps if steps is None else steps

    def report(step: int, loss_nats: float) -> None:
        if step % _REPORT_EVERY_STEPS == 0 or step == planned:
            reports.put(Report(name, step, planned, loss_nats))

    beside = out / f".{name}.unfinished"
    shutil.rmtree(beside, ignore_errors=True)
    train(name, build_world(seed), beside, planned, report)
    shutil.rmtree(out / name, ignore_errors=True)
    beside.rename(out / name)

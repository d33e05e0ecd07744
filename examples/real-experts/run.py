"""Three experts of pretrained weights: trained, scored, routed and compared.

    python examples/real-experts/run.py [FOLDER] [--small] [--dry-run]

It fetches SmolLM2-135M-Instruct, makes up medicines, trains adapters on statements about them and
on arithmetic, and then calls the README's commands. It says first how long that will take. Repeat
the command to resume: finished steps are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Final

from plan import FULL, SMALL, TEXTS, Plan, Size
from table import write_table
from world import KINDS, World, write_questions

HERE: Final = Path(__file__).parent
FILES: Final = ("chat.jinja", "ensemble.yaml", "rival.yaml", "task.yaml", "rival-merged.yaml")
BASE: Final = "smollm2"
ROWS: Final = 14
"""Systems that answer the test questions; oracles are computed."""
PROMPT_TOKENS: Final = 190
ANSWER_TOKENS: Final = 20
COPIES_GIB: Final = {"float32": 0.5, "bfloat16": 0.25}
"""One model's weights."""

JOINT: Final = (
    *("--train-base", "lora"),
    *("--option", "batch_size=8", "--option", "lr=0.0005", "--option", "epochs=3"),
)
"""How a base model learns from some dozens of chats; the defaults are for thousands."""

Execute = Callable[[Sequence[str]], None]
"""Runs `multicolm` with these arguments; raises if it fails."""


def commands(place: Path, size: Size) -> Iterator[tuple[str, list[str]]]:
    """What is called after the adapters are there: a title, and the arguments of `multicolm`."""
    ensemble, rival, task = (str(place / name) for name in FILES[1:4])
    chats = str(place / "questions" / "train-chats.jsonl")
    scores, made = str(place / "scores"), place / "policies"
    yield (
        "every model reads the training chats",
        ["score", ensemble, chats, "--hidden", "--out", scores],
    )
    for policy in ("co-llm", "mlp-router", "cosd-tree"):
        train = ["train", ensemble, scores, "--policy", policy, "--out", str(made / policy)]
        yield f"{policy} learns from that", train
    yield (
        "co-llm learns together with the base model",
        [
            *("train", ensemble, scores, "--policy", "co-llm", *JOINT),
            *("--out", str(made / "co-llm-lora")),
        ],
    )
    yield (
        "query-router learns from what every model answers alone",
        [
            *("train", ensemble, "--task", task, "--policy", "query-router"),
            *("--out", str(made / "query-router")),
        ],
    )
    batch = ["--batch-size", str(TEXTS)]
    for policy, grid in size.grid.items():
        values = [word for each in grid for word in ("--grid", each)]
        out = str(made / policy)
        yield (
            f"{policy} is tuned on other questions",
            ["tune", ensemble, "--policy", policy, "--task", task, *values, *batch, "--out", out],
        )
    learned = [str(made / p) for p in ("co-llm", "mlp-router", "cosd-tree", "query-router")]
    rules = [*(str(made / policy) for policy in size.grid), "average"]
    plain = ["--sweep", "0", "--no-random", "--traces", "6", *batch]
    yield (
        "all of them answer the test questions",
        [
            *("compare", ensemble, "--task", task, *plain, "--out", str(place / "comparison")),
            *("--policies", ",".join(learned + rules)),
        ],
    )
    yield (
        "so does the base model that was trained with its router",
        [
            *("compare", str(made / "co-llm-lora"), "--task", task, *plain, "--no-oracle"),
            *("--no-alone", "--out", str(place / "comparison-lora")),
            *("--policies", f"{made / 'co-llm-lora'},single"),
        ],
    )
    yield (
        "so does the one adapter that read all statements",
        [
            *("compare", rival, "--task", task, *plain, "--no-oracle", "--no-alone"),
            *("--out", str(place / "comparison-rival"), "--policies", "single"),
        ],
    )
    merged, chatting = str(place / "rival-merged.yaml"), str(made / "rival-chats")
    yield (
        "the rival, its adapter merged, reads the training chats",
        ["score", merged, chats, "--out", str(place / "scores-rival")],
    )
    yield (
        "and learns from them as the base model did",
        [
            *("train", merged, str(place / "scores-rival"), "--policy", "single"),
            *JOINT,
            *("--out", chatting),
        ],
    )
    yield (
        "so it has seen all that the ensemble has, and answers the test questions",
        [
            *("compare", chatting, "--task", task, *plain, "--no-oracle", "--no-alone"),
            *("--out", str(place / "comparison-rival-chats"), "--policies", "single"),
        ],
    )


def prepare(place: Path, size: Size, base: Path, seed: int, dtype: str) -> None:
    """The folder of a run: its files, questions, and a link to the base model."""
    place.mkdir(parents=True, exist_ok=True)
    mine = json.dumps({"size": asdict(size), "seed": seed, "dtype": dtype}, indent=2) + "\n"
    mark = place / "run.json"
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) != json.loads(mine):
        raise SystemExit(f"{place} holds another run ({mark}); choose another folder.")
    mark.write_text(mine, encoding="utf-8")
    for name in FILES:
        text = (HERE / name).read_text(encoding="utf-8")
        (place / name).write_text(
            text.replace("dtype: float32", f"dtype: {dtype}"), encoding="utf-8"
        )
    if not (place / "base").exists():
        (place / "base").symlink_to(base.absolute(), target_is_directory=True)
    write_questions(World(seed, size.medicines), place / "questions", size.per_kind)


def train_adapters(place: Path, size: Size, seed: int, dtype: str, workers: int) -> None:
    """Every adapter in a process of its own, `workers` at a time; finished ones are kept."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def train(name: str) -> None:
        words = [sys.executable, str(HERE / "adapters.py"), name, "--base", str(place / "base")]
        words += ["--out", str(place / "adapters" / name), "--dtype", dtype, "--seed", str(seed)]
        words += ["--medicines", str(size.medicines), "--steps", str(size.steps[name])]
        if name == "everything":
            words += ["--merged", str(place / "merged")]
        subprocess.run(words, check=True, env=environment)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(train, size.steps))


def multicolm(arguments: Sequence[str]) -> None:
    """One command in a process of its own."""
    words = [sys.executable, "-m", "multicolm", *arguments]
    subprocess.run(words, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def run(place: Path, size: Size, execute: Execute, note: Sequence[str] = ()) -> None:
    """Everything after the adapters."""
    for title, arguments in commands(place, size):
        print(f"\n# {title}\nmulticolm {' '.join(arguments)}", flush=True)
        execute(arguments)
    print("\n" + write_table(place, note))
    print(f"{place / 'table.md'}\nopen {place / 'comparison' / 'report.html'}")


def minutes(size: Size, speed: Mapping[str, float], workers: int) -> dict[str, float]:
    """How long the parts will take, by a measured speed; see `estimate.Speed`."""
    plan = Plan(0)
    trained = sum(size.steps.values()) * plan.rows * plan.row_tokens / speed["trained"]
    n_questions = {split: len(KINDS) * n for split, n in size.per_kind.items()}
    values = sum(math.prod(each.count(",") + 1 for each in grid) for grid in size.grid.values())
    # One model reads a question that it answers alone, two or three read a routed one.
    answer_s = 2 * (PROMPT_TOKENS / speed["read"] + ANSWER_TOKENS * speed["step_s"] / TEXTS)
    answers = (
        3 * n_questions["train"] / 2 + values * n_questions["dev"] + ROWS * n_questions["test"]
    )
    scored = 3 * n_questions["train"] * (PROMPT_TOKENS + ANSWER_TOKENS) / speed["read"]
    joint = 3 * n_questions["train"] * (PROMPT_TOKENS + ANSWER_TOKENS) / speed["trained"]
    return {
        "adapters": trained / workers / 60,
        "scores and training": (scored + joint) / 60,
        "answers": answers * answer_s / 60,
    }


def fetched() -> Path:
    """The folder of SmolLM2-135M-Instruct, which the other example fetches."""
    fetch = runpy.run_path(str(HERE.parent / "real-models" / "fetch.py"))["fetch"]
    folder: Path = fetch(converted=(BASE,), models=(BASE,)) / BASE
    return folder


def notes(size: Size, seed: int, dtype: str) -> list[str]:
    """How the table was measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    n = len(KINDS) * size.per_kind["test"]
    return [
        f"{n} held-out questions, {n // len(KINDS)} of each kind; {size.medicines} medicines; "
        f"seed {seed}; {dtype}; {versions}; Python {platform.python_version()}.",
    ]


def choose(base: Path, mark: Path) -> tuple[str, Mapping[str, float]]:
    """The dtype of a run that was begun, else the faster one here; and how fast that is."""
    words = [sys.executable, str(HERE / "estimate.py"), str(base)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    speeds: dict[str, dict[str, float]] = json.loads(done.stdout)
    if mark.exists():
        dtype: str = json.loads(mark.read_text(encoding="utf-8"))["dtype"]
    else:
        dtype = max(speeds, key=lambda name: speeds[name]["trained"])
    return dtype, speeds[dtype]


def main() -> None:
    """Say how long it takes, then do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/real-experts"))
    parser.add_argument("--small", action="store_true", help="fewer medicines and questions")
    parser.add_argument("--dry-run", action="store_true", help="say how long it takes, and stop")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the adapters")
    parser.add_argument("--workers", type=int, default=2, help="adapters trained at one time")
    given = parser.parse_args()
    size = SMALL if given.small else FULL
    base = fetched()
    print("measuring this machine", flush=True)
    dtype, speed = choose(base, given.folder / "run.json")
    parts = minutes(size, speed, given.workers)
    memory = COPIES_GIB[dtype] * max(3, given.workers) + 1.5
    said = ", ".join(f"{part} {time:.0f}" for part, time in parts.items())
    print(
        f"{dtype}: about {sum(parts.values()):.0f} minutes ({said}) if the machine is free, "
        f"{memory:.1f} GiB of memory. After Ctrl-C, repeat the command to resume.",
        flush=True,
    )
    if given.dry_run:
        return
    try:
        prepare(given.folder, size, base, given.seed, dtype)
        train_adapters(given.folder, size, given.seed, dtype, given.workers)
        run(given.folder, size, multicolm, notes(size, given.seed, dtype))
    except KeyboardInterrupt:
        raise SystemExit("\nStopped; repeat the command to resume.") from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"\n{error} Repeat the command to resume.") from None


if __name__ == "__main__":
    main()

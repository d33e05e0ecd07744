"""The example with pretrained experts, its whole way on an embedded model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from transformers import AutoTokenizer

# PEFT asks transformers 5 by a name that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "real-experts"
MODULES = ("adapters", "estimate", "picture", "plan", "run", "table", "world")


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    """The example's modules by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
        for name in MODULES:
            sys.modules.pop(name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded generalist; it reads the chats' markers as plain text, so they are long."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(ROOT / "registry" / "tiny" / "generalist", folder, dirs_exist_ok=True)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"max_position_embeddings": 2048}
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_the_same_command_resumes_and_another_run_is_refused(
    example: Any, base: Path, tmp_path: Path
) -> None:
    example.run.prepare(tmp_path, example.plan.SMALL, base, 0, "float32")
    example.run.prepare(tmp_path, example.plan.SMALL, base, 0, "float32")
    with pytest.raises(SystemExit, match="holds another run"):
        example.run.prepare(tmp_path, example.plan.SMALL, base, 1, "float32")


@pytest.mark.slow
def test_the_script_goes_from_statements_to_a_table(example: Any, base: Path, tmp_path: Path):
    size = example.plan.Size(
        medicines=10,
        steps={"facts": 40, "maths": 40, "everything": 40},
        per_kind={"train": 6, "dev": 1, "test": 1},
        grid={"cosd-rule": ("alpha=0.5", "beta=0.5"), "confidence": ("threshold=0.5",)},
    )
    example.run.prepare(tmp_path, size, base, 0, "float32")
    for name in size.steps:
        out, plan = tmp_path / "adapters" / name, example.plan.Plan(40, warm_up=5)
        world = example.world.World(0, size.medicines)
        example.adapters.train(name, base, out, world, plan, torch.float32, "cpu")
    example.adapters.merge(base, out, tmp_path / "merged")

    def execute(arguments: list[str]) -> None:
        done = forked.command(arguments, ROOT)
        assert done.returncode == 0, done.stderr

    example.run.run(tmp_path, size, execute, ["measured by a test"])
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows[2:] == [
        "talker alone",
        "facts alone",
        "maths alone",
        "co-llm",
        "mlp-router",
        "cosd-tree",
        "query-router",
        "cosd-rule",
        "confidence",
        "average",
        "co-llm, base trained too",
        "trained base alone",
        "one adapter: all statements",
        "one adapter: all statements, then the chats",
        "per-question oracle",
        "token oracle",
    ]
    assert table.endswith("measured by a test\n")
    example.picture.draw(tmp_path / "comparison", "co-llm", tmp_path / "trace.svg")
    assert "co-llm:" in (tmp_path / "trace.svg").read_text(encoding="utf-8")


def test_a_training_that_was_stopped_ends_with_the_same_adapter(
    example: Any, base: Path, tmp_path: Path
):
    plan = example.plan.Plan(4, rows=2, row_tokens=32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    batches = list(
        islice(
            example.adapters.batches(example.world.World(0, 10).facts("test"), tokenizer, plan), 4
        )
    )

    def training() -> Any:
        return example.adapters.Training(base, plan, torch.float32, "cpu")

    through, stopped, resumed = training(), training(), training()
    losses = [through.learn(batch) for batch in batches]
    for batch in batches[:2]:
        stopped.learn(batch)
    stopped.save(tmp_path / "state")
    resumed.load(tmp_path / "state")
    assert [resumed.learn(batch) for batch in batches[2:]] == losses[2:]
    for one, other in zip(through.used, resumed.used, strict=True):
        assert torch.equal(one, other)


def test_more_of_everything_takes_longer(example: Any):
    plan, speed = example.plan, {"trained": 300.0, "read": 600.0, "step_s": 0.1}
    small, full = (example.run.minutes(size, speed, 2) for size in (plan.SMALL, plan.FULL))
    assert all(0 < small[part] < full[part] for part in small)


def test_no_medicine_and_no_sum_is_asked_in_two_splits(example: Any):
    world = example.world.World(0, 20)
    names = [{medicine.name for medicine in world.medicines[s]} for s in example.world.SPLITS]
    assert sum(map(len, names)) == len(set.union(*names)) == 20
    asked = [
        {q["question"] for q in world.questions(split, 30) if q["kind"] == "sum"}
        for split in example.world.SPLITS
    ]
    assert not asked[0] & asked[2] and not asked[1] & asked[2]


def test_an_expert_learns_what_follows_a_name_or_an_equals_sign(example: Any, base: Path):
    world = example.world.World(0, 10)
    for statement in islice(world.statements("everything"), 20):
        learned = statement.text[statement.given :]
        if "=" in statement.text:
            sides, result = statement.text.split("=")
            assert eval(sides.strip()) == int(result.strip(" ."))
            assert learned == result
        else:
            assert statement.text[statement.given - 1].isupper()

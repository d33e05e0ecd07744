"""Numbers that tracking libraries are given."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from multicolm.cli.tracking import tracked


def test_a_library_that_is_missing_is_said_before_anything_is_read(run, monkeypatch) -> None:
    monkeypatch.setattr("multicolm.cli.tracking.find_spec", lambda name: None)
    asked = ("train", "nowhere.yaml", "nothing", "--policy", "co-llm", "--out", "o")
    result = run(*asked, "--track", "wandb")
    assert (result.code, result.err) == (
        2,
        "Error: --track wandb needs the library wandb: pip install wandb.\n",
    )


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_run_is_begun_logged_and_finished_even_if_it_fails(
    monkeypatch, library: str, tmp_path
) -> None:
    calls: list[object] = []
    module = types.ModuleType(library)
    module.init = lambda **how: calls.append(how)  # type: ignore[attr-defined]
    module.log = lambda numbers, step: calls.append((numbers, step))  # type: ignore[attr-defined]
    module.finish = lambda: calls.append("finished")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, library, module)
    with pytest.raises(KeyError), tracked(library, tmp_path / "run", {"seed": 0}) as log:
        log({"loss": 0.5}, 3)
        raise KeyError
    begun = {"project": "multicolm", "name": "run", "config": {"seed": 0}}
    assert calls == [begun, ({"loss": 0.5}, 3), "finished"]


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracked("tensorboard", tmp_path, {"seed": 0}) as log:
        for step, loss in enumerate((0.5, 0.25)):
            log({"loss": loss}, step)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.5), (1, 0.25)]


def test_a_tuning_is_tracked_value_by_value(run, monkeypatch, tmp_path) -> None:
    import multicolm
    from multicolm.backend.table import TableModel
    from multicolm.ensemble import Ensemble

    seen: list[tuple[dict[str, float], int]] = []
    module = types.ModuleType("trackio")
    module.init = lambda **how: None  # type: ignore[attr-defined]
    module.log = lambda numbers, step: seen.append((numbers, step))  # type: ignore[attr-defined]
    module.finish = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr("multicolm.cli.tracking.find_spec", lambda name: module)
    tables = {"ann": {"": {"x": 0.6, "y": 0.4}}, "bob": {"": {"y": 1.0}}}
    models = [TableModel(n, ["x", "y", "<end>"], table, ["<end>"]) for n, table in tables.items()]
    monkeypatch.setattr(multicolm, "load", lambda source: Ensemble(models))
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": "y"}) + "\n" for p in "xy"))
    asked = ("tune", "tiny", "--policy", "confidence", "--data", str(data), "--grid")
    asked += ("threshold=0.1,0.9", "--out", str(tmp_path / "out"), "--track", "trackio")
    assert run(*asked).code == 0
    assert [step for _, step in seen] == [0, 1]
    assert [numbers["threshold"] for numbers, _ in seen] == [0.1, 0.9]
    assert {"quality", "cost", "share"} <= seen[0][0].keys()

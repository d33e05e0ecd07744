"""Files that are damaged, hostile or too large are a sentence, and never a traceback."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from score_worlds import records, tables, write

import multicolm
from multicolm.cli import main
from multicolm.config import ModelConfig, load_ensemble, validate
from multicolm.errors import ArtefactError, ConfigError, ModelError
from multicolm.files import read_json, write_whole
from multicolm.policy.resolve import resolve_policy
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import load_table
from multicolm.training.provenance import read_provenance

TINY = Path(__file__).parents[1] / "registry" / "tiny"
DEEP = "[" * 100_000


def test_deep_json_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text(DEEP)
    for read in (
        lambda: read_provenance(tmp_path),
        lambda: read_json(tmp_path / "provenance.json"),
    ):
        with pytest.raises(
            ArtefactError, match=r"provenance\.json is damaged \(nested too deeply\)"
        ):
            read()


def model_folder(path: Path, **settings: Any) -> Path:
    """The embedded facts model with something else in its config."""
    path.mkdir()
    for file in (TINY / "facts").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))
    return path


def test_a_config_that_is_nested_too_deeply_is_a_sentence(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "config.json").write_text('{"a": ' + DEEP)
    (tmp_path / "e.yaml").write_text("base_model: m\nmodels: {m: {model: ./m}}\n")
    assert any("config.json" in line for line in validate(str(tmp_path / "e.yaml")).errors)
    with pytest.raises(ModelError, match="cannot load the"):
        multicolm.load(tmp_path / "e.yaml")


@pytest.mark.parametrize("settings", [{"hidden_size": "wide"}, {"num_hidden_layers": [3]}])
def test_a_config_that_transformers_refuses_is_a_sentence(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model_folder(tmp_path / "m", **settings)
    (tmp_path / "e.yaml").write_text("base_model: m\nmodels: {m: {model: ./m}}\n")
    with pytest.raises(ModelError, match=r"^model 'm': cannot load the"):
        multicolm.load(tmp_path / "e.yaml")


@pytest.mark.parametrize("text", ["x" * 5000, "./" + "x" * 300, "./" + "ab/" * 2000])
def test_a_path_that_is_too_long_is_a_sentence(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (
        lambda: load_ensemble(text),
        lambda: resolve_policy(text),
        lambda: ModelConfig(model=text).resolved,
        lambda: ModelConfig(model="tiny-facts", adapter=text).resolved,
    ):
        with pytest.raises(ConfigError, match="is longer than files' are; expected a"):
            output()
    assert main(["generate", text, "x"]) == 2
    error = capsys.readouterr().err
    assert len(error) < 300 and error.count("\n") == 1


@pytest.mark.parametrize("n", [1_001, 20_000])
def test_a_policy_file_of_thousands_of_tasks_is_refused_at_once(n: int, tmp_path: Path) -> None:
    tasks = {f"task-{i}": {"threshold": 0.5} for i in range(n)}
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump({"kind": "confidence", "tasks": tasks}))
    start = time.process_time()
    with pytest.raises(ConfigError, match="at most"):
        resolve_policy(tmp_path)
    assert time.process_time() - start < 5


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    corpus = open_corpus(write(tmp_path / "texts.jsonl", records(4)))
    score(tables("p", "q"), corpus, tmp_path / "scores")
    return tmp_path / "scores"


def test_an_index_cannot_name_folders_elsewhere_or_hold_impossible_numbers(scores: Path) -> None:
    index = json.loads((scores / "index.json").read_text())
    for damage in (
        {"name": "../../.."},
        {"name": "a/b"},
        {"name": "text"},
        {"name": ""},
        {"cost": float("inf")},
        {"cost": float("nan")},
        {"cost": -1.0},
    ):
        models = [index["models"][0], {**index["models"][1], **damage}]
        (scores / "index.json").write_text(json.dumps({**index, "models": models}))
        with pytest.raises(ArtefactError, match=r"index\.json is damaged \("):
            load_table(scores)
    (scores / "index.json").write_text(json.dumps({**index, "n_positions": -1}))
    with pytest.raises(ArtefactError, match="a count is negative"):
        load_table(scores)


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(tmp_path / "a.json", "{}")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_is_read_in_part_ends_silently_with_the_interpreter() -> None:
    program = (
        "import multicolm\n"
        "from multicolm.backend.table import TableModel\n"
        "model = TableModel('m', ['a'], {'': {'a': 1.0}})\n"
        "stream = multicolm.Ensemble([model]).stream(['a'], max_new_tokens=9)\n"
        "print(next(stream).text)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout

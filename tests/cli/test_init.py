"""What `init` writes works, and `env` says nothing private."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from multicolm.config import load_ensemble
from multicolm.evaluation.task import load_task

MODELS = ("--base", "tiny-generalist", "--assistant", "tiny-facts", "--assistant", "tiny-math")


def test_what_init_writes_is_an_ensemble_a_task_and_a_policy_that_write(
    run, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("init", "mine", *MODELS)
    assert (result.code, result.err) == (0, "")
    assert load_ensemble("mine/ensemble.yaml").names == (
        "tiny-generalist",
        "tiny-facts",
        "tiny-math",
    )
    task = load_task("mine/task.yaml")
    golds = [question.gold for split in ("dev", "test") for question in task.sample(split, None)]
    assert golds == ["Paris", "Tokyo"]
    settings = ("--policy", "mine/policy.py:Mine", "--set", "threshold=0.9", "--trace")
    asked = ("generate", "mine/ensemble.yaml", "What is Dulerex made from?", "--chat")
    written = run(*asked, *settings, "--max-new-tokens", "16")
    assert written.code == 0 and "[tiny-generalist]" in written.out


def test_init_overwrites_nothing_and_writes_nothing_that_is_wrong(
    run, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text("precious")
    result = run("init", *MODELS)
    assert result.code == 2 and result.err.startswith("Error: task.yaml exists already; choose")
    result = run("init", "new", "--base", "./nowhere", "--assistant", "tiny-math")
    assert result.code == 2 and "models.nowhere" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["task.yaml"]
    assert run("init", "new").err == (
        "Error: which models? Give --base MODEL and --assistant MODEL.\n"
    )


def test_init_names_each_model_once_and_gives_gguf_files_their_backend(
    run, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.gguf").write_bytes(b"GGUF")
    assistants = ("--assistant", "tiny-math", "--assistant", "tiny-math")
    result = run("init", "mine", "--base", "base.gguf", *assistants)
    assert result.code == 0, result.err
    config = load_ensemble("mine/ensemble.yaml")
    assert config.names == ("base-1", "tiny-math", "tiny-math-2")
    assert config.models["base-1"].backend == "llama-cpp"


def test_env_names_versions_devices_and_backends_and_nothing_private(run) -> None:
    found = json.loads(run("env", "--json").out)
    assert {"multicolm", "python", "torch", "system", "cores", "devices"} <= found.keys()
    assert found["backends"]["transformers"] == "installed"
    shown = run("env").out
    assert "torch threads" in shown
    for private in (os.path.expanduser("~"), socket.gethostname(), str(Path.cwd())):
        assert private not in shown

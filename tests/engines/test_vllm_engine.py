"""vLLM in process, in the environment that has it, against transformers here."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from wider_heads import widen_heads

import multicolm

ROOT = Path(__file__).parents[2]
TWO_NODES = ROOT / "examples/two-servers/two-nodes.md"
EXPERT = """\
  {name}:
    backend: vllm-engine
    model: {folder}
    dtype: float32
    context_length: 511
    engine_options: {{enforce_eager: true, kv_cache_memory_bytes: 67108864, max_num_seqs: 16}}
"""
BASE = """\
base_model: generalist
models:
  generalist: {model: tiny-generalist, dtype: float32}
"""
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


@pytest.fixture(scope="module")
def said(
    vllm_python: str,
    tiny_folders: Mapping[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """What two engines in one process gave."""
    folder = tmp_path_factory.mktemp("engines")
    experts = ""
    for name in ("facts", "math"):
        wide = widen_heads(tiny_folders[name], folder / name)
        experts += EXPERT.format(name=name, folder=wide)
    file = folder / "ensemble.yaml"
    file.write_text(BASE + experts)
    done = subprocess.run(
        [vllm_python, "tests/engines/vllm_in_process.py", str(file), str(TWO_NODES)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=280,
        env={**os.environ, **QUIET, "VLLM_HOST_IP": "127.0.0.1", "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_it_shows_what_transformers_shows_in_float32(said: Mapping[str, Any]) -> None:
    assert set(said["differences"]) == {"facts", "math"}
    assert max(said["differences"].values()) <= 1e-5
    print(said["differences"])


def test_experts_in_engines_write_what_they_write_in_transformers(said: Mapping[str, Any]) -> None:
    questions = ["What is Dulerex made from?", "Question: What is 3 + 4?\nResponse:"]
    tiny = multicolm.load("tiny")
    for policy, texts in said["texts"].items():
        answers = tiny.generate(questions, policy, temperature=0.0, max_new_tokens=48)
        assert texts == [answer.text for answer in answers], policy
    assert all(n > 0 for n in said["calls"].values())


def test_an_option_that_vllm_does_not_know_is_refused_in_one_sentence(
    said: Mapping[str, Any],
) -> None:
    assert said["refusal"].startswith("model 'facts': vLLM cannot load")
    assert "no_such_option" in said["refusal"] and "\n" not in said["refusal"]


def test_the_commands_for_two_nodes_are_read_by_vllm_itself(said: Mapping[str, Any]) -> None:
    assert said["commands"] == [
        ["/models/facts-405b", 0, False, 8],
        ["/models/facts-405b", 1, True, 8],
        ["/models/math-8b", 0, False, 2],
        ["/models/facts-405b", 0, False, 8],
    ]

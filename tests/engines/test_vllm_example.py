"""The example of two servers runs as printed, and that of two nodes is what vLLM understands."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUESTIONS = (
    "Question: What is Dulerex made from?\nResponse:",
    "Question: What is 3 ^ 2 + 4?\nResponse:",
)


@pytest.mark.timeout(600)  # two servers on two cores
def test_two_servers_start_answer_as_in_process_and_stop(
    vllm_python: str, free_port: Callable[[], int], tmp_path: Path
) -> None:
    ports = [free_port(), free_port()]
    done = subprocess.run(
        ["sh", "examples/two-servers/run.sh", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=560,
        env={
            **os.environ,
            "VLLM": vllm_python,
            "PYTHON": sys.executable,
            "MULTICOLM": f"{sys.executable} -m multicolm",
            "FACTS_PORT": str(ports[0]),
            "MATH_PORT": str(ports[1]),
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "prompts are token ids" in done.stdout
    here = ["-m", "multicolm", "generate", "tiny", *QUESTIONS, "--temperature", "0", "--trace"]
    alone = subprocess.run([sys.executable, *here], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(alone.stdout) and "[facts]" in alone.stdout
    for port in ports:
        refused = subprocess.run(
            [sys.executable, "examples/two-servers/await.py", f"http://127.0.0.1:{port}/", "1"],
            cwd=ROOT,
            check=False,
            timeout=30,
        )
        assert refused.returncode == 1, "a server still answers"


def commands(text: str) -> list[list[str]]:
    """The arguments of every `vllm serve` in a page."""
    joined = text.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.startswith("vllm serve ")]
    return [shlex.split(line)[2:] for line in lines]


PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
for arguments in json.load(sys.stdin):
    read = parser.parse_args(arguments)
    print(read.model_tag, read.node_rank, read.headless, read.tensor_parallel_size)
"""


def test_the_commands_for_two_nodes_are_read_by_vllm_itself(vllm_python: str) -> None:
    page = (ROOT / "examples/two-servers/two-nodes.md").read_text(encoding="utf-8")
    given = commands(page)
    assert len(given) == 4
    done = subprocess.run(
        [vllm_python, "-c", PARSE],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-4:] == [
        "/models/facts-405b 0 False 8",
        "/models/facts-405b 1 True 8",
        "/models/math-8b 0 False 2",
        "/models/facts-405b 0 False 8",
    ]

"""Every command and every block of the README does what it says."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import forked
import pytest

from multicolm import catalog
from multicolm.config import load_ensemble, load_policy
from multicolm.plugins import policies

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
CONSOLES = [
    [line.removeprefix("$ ") for line in text.splitlines()]
    for kind, text in BLOCKS
    if kind == "console"
]
SERVED = [commands for commands in CONSOLES if commands[0].startswith("multicolm serve")]
VERBS = [c for c in CONSOLES if c[0].startswith("multicolm") and c not in SERVED]
CLIENTS = [text for kind, text in BLOCKS if kind == "python" and "http://" in text]
TARGETS = [c for commands in CONSOLES if commands not in VERBS + SERVED for c in commands]


def test_the_readme_has_blocks_of_four_known_kinds() -> None:
    assert {kind for kind, _ in BLOCKS} == {"console", "python", "yaml"}
    assert all(
        line.startswith("$ ") for k, t in BLOCKS if k == "console" for line in t.splitlines()
    )


@pytest.mark.parametrize("commands", VERBS, ids=lambda commands: commands[0].split()[1])
def test_the_commands_of_a_block_run_one_after_another(commands: list[str], tmp_path: Path) -> None:
    # As in a checkout, but for what they write, and with every eighth training question alone.
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    questions = tmp_path / "registry/tiny/questions"
    shutil.copytree(ROOT / "registry/tiny/questions", questions)
    lines = (questions / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (questions / "train.jsonl").write_text("".join(lines[::8]), encoding="utf-8")
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "multicolm", command
        done = forked.command(words[1:], tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip(), command


@pytest.mark.parametrize("command", TARGETS)
def test_a_make_target_of_the_readme_exists_and_runs_what_it_should(command: str) -> None:
    recipes = {
        "make demo": ["examples/demo/demo.py"],
        "make test": ["ruff check", "mypy --strict multicolm", "pytest"],
        "make bench": ["pytest benchmarks"],
    }
    words = [*shlex.split(command), "-n"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for recipe in recipes[command]:
        assert recipe in done.stdout


def test_the_python_blocks_run_one_after_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # where its classes say they are from
    names = module.__dict__
    for kind, text in BLOCKS:
        if kind == "python" and text not in CLIENTS:
            exec(compile(text, "README.md", "exec"), names)
    assert "generalist" in capsys.readouterr().out
    assert names["answer"].text


def test_clients_of_the_served_ensemble_get_answers(capfd: pytest.CaptureFixture[str]) -> None:
    [[command]], [client] = SERVED, CLIENTS
    words = [sys.executable, "-m", *shlex.split(command), "--port", "0"]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            line = server.stderr.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert address is not None, line
            text = client.replace("http://127.0.0.1:8000", address.group())
            assert text != client
            exec(compile(text, "README.md", "exec"), {})
        finally:
            server.terminate()
            server.wait(timeout=60)
    assert "'generalist'" in capfd.readouterr().out


def test_the_yaml_blocks_are_ensembles(tmp_path: Path) -> None:
    configs = []
    for number, text in enumerate(text for kind, text in BLOCKS if kind == "yaml"):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text, encoding="utf-8")
        configs.append(load_ensemble(file))
        done = forked.command(["validate", str(file)], ROOT)
        assert done.returncode == 0, done.stderr
    duo, servers = configs
    assert duo.names == ("generalist", "facts")
    assert duo.policy.params == {"threshold": 0.6}
    example = load_ensemble(ROOT / "examples/two-servers/ensemble.yaml")
    assert servers.models == example.models and servers.policy == example.policy


def test_the_table_of_policies_lists_every_policy_with_its_params() -> None:
    table = README.partition("| policy | params | who writes |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([\w-]+)` \|([^|]*)\|", table, flags=re.MULTILINE)
    listed = {name: set(re.findall(r"`(\w+)`", params)) for name, params in rows}
    wanted = {
        name: {f.name for f in dataclasses.fields(policies.get(load_policy(name, ROOT).kind))}
        for name in catalog.names("policies")
    }
    assert listed == wanted


def test_links_to_files_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_readme_names_the_command_for_its_figures() -> None:
    assert "make bench" in README
    assert "python tools/make_embedded.py --only-measure registry/tiny" in README
    assert "examples/co-llm/run.sh" in README

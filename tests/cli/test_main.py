from __future__ import annotations

import functools
import os
import subprocess
import sys

import click
import pytest

from multicolm.cli import _VERBS, cli
from multicolm.errors import ConfigError, ModelError


def process(*args: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "multicolm", *args]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_help_lists_every_verb_with_the_words_of_its_own_help(run) -> None:
    result = run("--help")
    assert result.code == 0
    for name, summary in _VERBS.items():
        assert summary in result.out
        own = run(name, "--help")
        assert own.code == 0
        command = cli.get_command(click.Context(cli), name)
        assert command is not None and command.help and command.help.strip()


def test_a_misspelt_verb_is_told_the_nearest_one(run) -> None:
    result = run("generat")
    assert result.code == 2
    assert result.err.endswith(
        "Error: unknown verb 'generat'. Did you mean 'generate'? "
        f"Known: {', '.join(sorted(_VERBS))}.\n"
    )


def test_a_misspelt_option_is_told_the_nearest_one(run) -> None:
    result = run("generate", "tiny", "x", "--polcy", "single")
    assert result.code == 2
    assert "No such option '--polcy'." in result.err and "'--policy'" in result.err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("duo.yaml:1:1: no."), 2, "Error: duo.yaml:1:1: no.\n"),
        (ModelError("model 'a': no."), 1, "Error: model 'a': no.\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (
            OSError(28, "No space left on device"),
            1,
            "Error: no space left on device; make room, and repeat the command.\n",
        ),
        (
            FileNotFoundError(2, "No such file", "x.txt"),
            1,
            "Error: x.txt: no such file; check the path.\n",
        ),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
)
def test_what_can_go_wrong_is_one_sentence(run, monkeypatch, error, code, said) -> None:
    from multicolm.cli import version

    def fail() -> None:
        raise error

    monkeypatch.setattr(version, "versions", fail)
    monkeypatch.setattr("multicolm.cli._forget_output", lambda: None)
    result = run("version")
    assert (result.code, result.out, result.err) == (code, "", said)


def test_debug_keeps_the_traceback_wherever_it_stands(run) -> None:
    for args in (["--debug", "ls", "models"], ["ls", "models", "--debug"]):
        assert run(*args).code == 0
    for args in (["--debug", "generate", "tny", "x"], ["generate", "tny", "x", "--debug"]):
        with pytest.raises(ConfigError, match="unknown ensemble 'tny'"):
            run(*args)


def test_a_bug_keeps_its_traceback(run, monkeypatch) -> None:
    from multicolm.cli import version

    # No function of this file, which would be somebody's own code.
    monkeypatch.setattr(version, "versions", functools.partial(divmod, 1, 0))
    with pytest.raises(ZeroDivisionError):
        run("version")


@pytest.mark.parametrize(
    "args", [["--help"], ["ls", "policies"], ["validate", "tiny-mixed", "single"], ["version"]]
)
def test_what_needs_no_model_loads_no_torch(args: list[str]) -> None:
    code = (
        "import sys; from multicolm.cli import main\n"
        f"code = main({args!r})\n"
        "print(code, {'torch', 'transformers'} & set(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "0 set()\n"


def test_the_module_is_the_command() -> None:
    done = process("version")
    assert done.returncode == 0 and done.stdout.startswith("multicolm ")


def test_a_closed_pipe_is_no_accident() -> None:
    command = (
        f"{sys.executable} -m multicolm ls policies --json | head -c 1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout in ("[0\n", "[141\n")  # 0 if it had written everything before the end


def test_a_closed_pipe_is_no_accident_however_early_it_closes() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "multicolm", "ls", "policies"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
def test_a_full_disk_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "multicolm", "ls", "policies"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (
        1,
        "Error: no space left on device; make room, and repeat the command.\n",
    )


def test_a_terminal_that_knows_only_ascii_is_no_accident() -> None:
    done = process("validate", "caf\u00e9", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (2, "")
    assert ": not ok\n" in done.stdout

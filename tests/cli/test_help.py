"""Help, examples, versions and completion."""

from __future__ import annotations

import re

import click
import pytest

from multicolm.cli import _VERBS, COMPLETE, cli
from multicolm.version import __version__


def verb(name: str) -> click.Command:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return command


@pytest.mark.parametrize("name", _VERBS)
def test_every_verb_shows_commands_that_can_be_given(run, name: str) -> None:
    shown = run(name, "--help").out
    examples = re.findall(r"^    multicolm (.*)$", shown, flags=re.MULTILINE)
    assert examples and "Examples:" in shown
    for example in examples:
        words = re.findall(r'"[^"]*"|\S+', example.partition(" >")[0])
        assert words[0] == name
        verb(name).make_context(name, words[1:])


def test_the_help_of_train_names_the_options_of_every_policy_that_has_some() -> None:
    from multicolm.learning.classifier import ClassifierSettings
    from multicolm.learning.compatible import CompatibleSettings
    from multicolm.learning.router import RouterSettings
    from multicolm.training.joint.job import JointSettings

    epilog = verb("train").epilog or ""
    named = {
        names.strip(): set(options.split())
        for names, options in re.findall(
            r"^  (\S.*?)  +((?:.|\n {6,})*)", epilog, flags=re.MULTILINE
        )
    }
    assert named["co-llm, fusion-route"] == set(RouterSettings.model_fields)
    assert named["with --train-base"] == set(JointSettings.model_fields)
    assert named["unite"] == set(CompatibleSettings.model_fields)
    assert "the same with recall, not weak_epochs and" in epilog
    same = set(RouterSettings.model_fields) - {"weak_epochs", "cost_weight"}
    assert set(ClassifierSettings.model_fields) == same | {"recall"}


def test_the_version_is_printed_by_the_option_that_every_command_has(run) -> None:
    assert run("--version").out == f"multicolm {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_the_command_for_completions(run, shell: str) -> None:
    script = run("completion", shell).out
    assert f"{COMPLETE}={shell}_complete" in script and "multicolm" in script


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("multicolm gen", {"plain,generate"}),
        ("multicolm generate tiny-m", {"plain,tiny-mixed", "plain,tiny-mixed-exact"}),
        ("multicolm generate tiny --policy tiny/", {"plain,tiny/co-llm"}),
        ("multicolm compare tiny --policies average,cosd-r", {"plain,average,cosd-rule"}),
        ("multicolm tune tiny --tas", {"plain,--task"}),
        ("multicolm tune tiny --task tiny", {"plain,tiny-world"}),
        ("multicolm generate ./du", {"file,./du"}),
    ],
)
def test_verbs_options_and_names_are_completed(run, monkeypatch, typed: str, offered) -> None:
    monkeypatch.setenv(COMPLETE, "bash_complete")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    assert set(run().out.split()) == offered

"""Numbers on the command line are checked before anything is read or loaded, in every verb."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

import multicolm
from multicolm.cli import cli, main
from multicolm.cli.options import Real, Whole

COMPARE = ["compare", "tiny", "--policies", "max-confidence", "--task", "tiny-world"]
BASE = {
    "generate": ["generate", "tiny", "x"],
    "chat": ["chat", "tiny"],
    "compare": [*COMPARE, "--out", "OUT"],
    "tune": ["tune", "tiny", "--policy", "cosd-rule", "--task", "tiny-world", "--out", "OUT"],
    "eval": ["eval", "tiny", "--tasks", "tiny_answer", "--include-path", "examples/lm-eval"],
    "score": ["score", "tiny", "registry/tiny/questions/train.jsonl", "--out", "OUT"],
    "rollout": ["rollout", "tiny", "OUT", "--task", "tiny-world"],
    "serve": ["serve", "tiny"],
    "train": [
        *("train", "tiny", "--task", "tiny-world"),
        *("--policy", "query-router", "--out", "OUT"),
    ],
}


def numeric() -> Iterator[tuple[str, click.Option]]:
    """Every option of every verb that takes a number."""
    context = click.Context(cli)
    for verb in cli.list_commands(context):
        command = cli.get_command(context, verb)
        assert command is not None
        for option in command.params:
            kinds = (Whole, Real, click.types.IntParamType, click.types.FloatParamType)
            if isinstance(option, click.Option) and isinstance(option.type, kinds):
                yield verb, option


@pytest.mark.parametrize(("verb", "option"), list(numeric()), ids=lambda v: getattr(v, "name", v))
def test_every_option_that_takes_a_number_has_a_range(verb: str, option: click.Option) -> None:
    assert isinstance(option.type, Whole | Real)


@pytest.mark.parametrize(("verb", "option"), list(numeric()), ids=lambda v: getattr(v, "name", v))
def test_a_number_out_of_range_is_one_sentence_before_any_work(
    verb: str,
    option: click.Option,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pytest.TempPathFactory,
) -> None:
    monkeypatch.setattr(multicolm, "load", lambda _: pytest.fail("loaded"))
    arguments = [str(tmp_path / "out") if a == "OUT" else a for a in BASE[verb]]
    wrong = [
        "-9223372036854775809",
        *(["9223372036854775808"] if option.name == "seed" else ["-1"]),
    ]
    wrong += ["nan", "inf"] if isinstance(option.type, Real) else []
    for value in wrong:
        assert main([*arguments, option.opts[0], value]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"Error: {option.name} must be "), error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()  # type: ignore[attr-defined]

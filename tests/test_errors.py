from __future__ import annotations

import inspect

import pytest

from multicolm import errors
from multicolm.errors import ConfigError, InputError, ModelError, MulticolmError, unknown


def classes() -> list[type[MulticolmError]]:
    return [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, MulticolmError)
    ]


def test_every_error_is_drawn_in_the_tree() -> None:
    assert errors.__doc__ is not None
    for cls in classes():
        assert cls.__name__ in errors.__doc__
        assert cls.__name__ in errors.__all__
        assert cls.__doc__


def test_a_slip_of_the_user_exits_with_two_and_what_fails_with_one() -> None:
    codes = {cls: cls.exit_code for cls in classes()}
    assert codes[ConfigError] == codes[InputError] == codes[errors.UnknownNameError] == 2
    assert codes[ModelError] == codes[MulticolmError] == 1


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        (
            "entrpy",
            ["single", "entropy"],
            "unknown policy 'entrpy'. Did you mean 'entropy'? Known: entropy, single.",
        ),
        ("xyz", ["single"], "unknown policy 'xyz'. Known: single."),
        ("xyz", [], "unknown policy 'xyz'. Known: none."),
    ],
)
def test_an_unknown_name_is_told_what_is_known(name: str, known: list[str], said: str) -> None:
    assert unknown("policy", name, known) == said

"""An API key is a key or an error: an empty one is never taken for none."""

from __future__ import annotations

import pytest

import multicolm
from multicolm.backend.remote.transport import Server as ModelServer
from multicolm.cli import main
from multicolm.errors import ConfigError
from multicolm.keys import check_key
from multicolm.serving.server import Settings

BLANK = ["", " ", "\n", "\t \r\n", "\N{NO-BREAK SPACE}"]
NO_KEYS = ["sec ret", "secret\n", "\N{ZERO WIDTH SPACE}secret", "schlüssel", "a\x00b"]


@pytest.mark.parametrize("key", BLANK)
def test_a_blank_key_is_refused_wherever_a_key_may_stand(key: str) -> None:
    for where, take in (
        ("api_key is empty", lambda: Settings(api_key=key)),
        (
            "model 'm': api_key is empty",
            lambda: ModelServer("http://127.0.0.1:1", "m", api_key=key),
        ),
        ("here is empty; set it to the key, or go home", lambda: check_key(key, "here", "go home")),
    ):
        with pytest.raises(ConfigError) as caught:
            take()
        assert str(caught.value).startswith(where)


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_no_header_can_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="here holds what is no key") as caught:
        check_key(key, "here", "go home")
    assert key.strip() not in str(caught.value)


@pytest.mark.parametrize("key", [*BLANK[:4], "a b"])
def test_a_server_with_an_empty_variable_is_refused_before_anything_is_loaded(
    key: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(multicolm, "load", lambda _: pytest.fail("loaded"))
    monkeypatch.setenv("MULTICOLM_API_KEY", key)
    assert main(["serve", "tiny", "--host", "0.0.0.0", "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: the environment variable MULTICOLM_API_KEY ")
    assert error.count("\n") == 1


def test_a_key_is_every_visible_character_of_ascii() -> None:
    key = "".join(map(chr, range(33, 127)))
    assert check_key(key, "here", "go home") == key


@pytest.mark.parametrize("value", ["", "two", "-1", "٣"])
def test_a_launchers_variable_that_is_no_number_is_one_sentence(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert main(["generate", "tiny", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Error: the environment variable WORLD_SIZE is {value!r}; unset it")
    assert error.count("\n") == 1

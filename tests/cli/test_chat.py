from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from multicolm.types import Piece

QUESTION = "What is Dulerex made from?"


def test_every_answer_remembers_what_was_said(run, loaded) -> None:
    result = run("chat", "tiny", "--json", stdin=f"{QUESTION}\n\nAnd Loxid?\n".encode())
    assert (result.code, result.err) == (0, "")
    first, second = map(json.loads, result.out.splitlines())
    assert first["prompt"] == [{"role": "user", "content": QUESTION}]
    assert second["prompt"] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "And Loxid?"},
    ]


def test_lines_that_are_no_utf8_get_one_sentence(run, loaded) -> None:
    result = run("chat", "tiny", "--json", stdin=b"hello\ncaf\xe9\n")
    assert result.code == 2
    assert len(result.out.splitlines()) == 1
    assert result.err == "Error: standard input:2: not UTF-8 text; convert it first.\n"


def test_commands_change_the_policy_the_trace_and_the_memory(run, loaded, monkeypatch) -> None:
    asked: list[tuple[int, str]] = []
    stream = loaded.stream

    def spy(prompts, policy, **settings):
        asked.append((len(prompts[0]), policy.name))
        return stream(prompts, policy, **settings)

    monkeypatch.setattr(loaded, "stream", spy)
    lines = ["hello", "/policy single", "/trace", "again", "/reset", "hello", "/quit", "never"]
    result = run("chat", "tiny", "--max-new-tokens", "2", stdin="\n".join(lines).encode())
    assert result.code == 0
    assert asked == [(1, "co-llm"), (3, "single"), (1, "single")]
    assert "policy: single\n" in result.out and "trace: on\n" in result.out
    assert "forgotten\n" in result.out
    assert result.out.count("[generalist]") == 2


def test_a_mistake_is_told_and_the_talk_goes_on(run, loaded) -> None:
    lines = ["/policy singel", "/polcy single", "/policy", "hello"]
    result = run("chat", "tiny", "--max-new-tokens", "2", stdin="\n".join(lines).encode())
    assert result.code == 0
    assert result.out.strip()
    first, second, third = result.err.splitlines()
    assert first.startswith("Error: unknown policy 'singel'. Did you mean 'single'?")
    assert second.startswith("Error: '/polcy single' is no command. /policy NAME")
    assert third.startswith("Error: '/policy' is no command.")


def test_what_cannot_be_answered_is_not_remembered(run, rude) -> None:
    result = run("chat", "tiny", "--policy", "single", stdin=b"hello\n")
    assert result.code == 0
    assert result.err.startswith("Error: model 'generalist' has no token for 'h'")
    assert "\x1b" not in result.err and "\\x1b[31m" in result.err


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is(
    run, loaded, interrupted, monkeypatch
) -> None:
    asked = []
    stream = loaded.stream

    def first_is_stopped(prompts, policy, **settings):
        asked.append(prompts[0])
        if len(asked) == 1:
            return interrupted([Piece(0, "half", "facts")], [])
        return stream(prompts, policy, **settings)

    monkeypatch.setattr(loaded, "stream", first_is_stopped)
    result = run("chat", "tiny", "--max-new-tokens", "2", stdin=b"hello\nagain\n")
    assert result.code == 0
    assert result.out.startswith("half\n(stopped)\n")
    assert asked[1][1] == {"role": "assistant", "content": "half"}


@pytest.mark.slow
def test_a_talk_in_a_terminal_survives_ctrl_c_and_ends_with_ctrl_d() -> None:
    leader, follower = pty.openpty()
    # The first process of a session that opens a terminal gets its Ctrl-C.
    shell = f"exec {sys.executable} -m multicolm chat tiny <$0 >$0"
    talk = subprocess.Popen(
        ["sh", "-c", shell, os.ttyname(follower)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": "dumb"},
        start_new_session=True,
    )
    shown = ""

    def until(text: str, times: int = 1, pressing: bytes = b"") -> None:
        """Wait for what is shown, pressing a key again as a person would who sees nothing happen.

        A Ctrl-C between readline's prompt and its wait for a key takes effect at the next key.
        """
        nonlocal shown
        deadline = time.monotonic() + 60
        while shown.count(text) < times:
            assert time.monotonic() < deadline, f"no {text!r} within 60 s in {shown!r}"
            if pressing:
                os.write(leader, pressing)
            if select.select([leader], [], [], 1.0)[0]:
                shown += os.read(leader, 4096).decode()

    try:
        until("> ")
        until("(Ctrl-D or /quit ends.)", pressing=b"\x03")
        os.write(leader, QUESTION.encode() + b"\n")
        until("Answer: ")
        asked = shown.index("Answer: ")
        until("> ", shown[:asked].count("> ") + 1)
        os.write(leader, b"\x04")
        assert talk.wait(timeout=60) == 0
    finally:
        talk.kill()
        os.close(leader)
        os.close(follower)

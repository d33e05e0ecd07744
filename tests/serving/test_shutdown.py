"""A server comes up, says where it is, and ends without losing what it has begun."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner
from serving_worlds import SECONDS

from multicolm.cli import cli, main

SLOW = """
import sys, time
from multicolm import Ensemble
from multicolm.backend.table import TableModel
from multicolm.serving.server import Server, Settings

class Slow(TableModel):
    def synchronize(self):
        time.sleep(0.01)

tokens = ["a", "b", "."]
models = [Slow(name, tokens, {"": {"a": 0.5, "b": 0.5}}, ends=["."]) for name in ("base", "other")]
server = Server(Ensemble(models), "slow", Settings(port=0, grace=float(sys.argv[1])))
closing = server.run(lambda: print(server.address, flush=True))
print(closing.finished, closing.broken_off, flush=True)
"""


@contextmanager
def child(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone in the end, whatever happens."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


class Asking(threading.Thread):
    """Asks for a stream, and keeps what comes of it."""

    def __init__(self, address: str, n_tokens: int) -> None:
        super().__init__()
        self.address = urlsplit(address)
        self.n_tokens = n_tokens
        self.content = b""
        self.begun = threading.Event()

    def run(self) -> None:
        connection = http.client.HTTPConnection(
            self.address.hostname or "", self.address.port, timeout=SECONDS
        )
        body = {"model": "slow", "prompt": "a", "max_tokens": self.n_tokens, "stream": True}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        while part := reply.read1(65536):
            self.content += part
            self.begun.set()
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_runs_is_finished_within_the_grace(number: signal.Signals) -> None:
    with child("-c", SLOW, "30") as process:
        assert process.stdout is not None
        asking = Asking(process.stdout.readline().strip(), n_tokens=60)
        asking.start()
        assert asking.begun.wait(SECONDS)
        process.send_signal(number)
        asking.join(SECONDS)
        out, err = process.communicate(timeout=SECONDS)
        assert asking.content.endswith(b"data: [DONE]\n\n")
        assert asking.content.count(b'"text": "a"') + asking.content.count(b'"text": "b"') > 10
        assert (out, err, process.returncode) == ("1 0\n", "", 0)


def test_what_is_not_finished_by_then_is_told_so_and_counted() -> None:
    with child("-c", SLOW, "0.3") as process:
        assert process.stdout is not None
        asking = Asking(process.stdout.readline().strip(), n_tokens=1000)
        asking.start()
        assert asking.begun.wait(SECONDS)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        asking.join(SECONDS)
        out, err = process.communicate(timeout=SECONDS)
        assert time.monotonic() - start < 20
        *_, last, rest = asking.content.decode().split("\n\n")
        assert rest == "" and json.loads(last.removeprefix("data: "))["error"] == {
            "message": "the server has shut down before this was finished.",
            "type": "server_error",
            "param": None,
            "code": "shutting_down",
        }
        assert (out, err, process.returncode) == ("0 1\n", "", 0)


def test_a_second_signal_does_not_wait() -> None:
    with child("-c", SLOW, "1000") as process:
        assert process.stdout is not None
        asking = Asking(process.stdout.readline().strip(), n_tokens=1000)
        asking.start()
        assert asking.begun.wait(SECONDS)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=SECONDS)
        asking.join(SECONDS)
        assert (out, process.returncode) == ("0 1\n", 0)


@pytest.mark.slow
def test_the_command_serves_says_where_and_ends_with_ctrl_c() -> None:
    with child("-m", "multicolm", "serve", "tiny", "--port", "0", "--name", "t") as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        found = next(filter(None, (re.match(r"t is served at (\S+); Ctrl-C", e) for e in lines)))
        assert next(lines) == f"page: {found[1]}/\n"
        assert next(lines).startswith(f"try:  curl {found[1]}/v1/chat/completions -H 'Content-Type")
        assert next(lines).startswith("models: t, t:average, ")
        place = urlsplit(found[1])
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=SECONDS)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SECONDS)
        assert '"GET /health HTTP/1.1" 200' in err
        assert err.endswith("ended; finished meanwhile: 0, broken off: 0.\n")
        assert process.returncode == 0


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "tiny", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Error: cannot listen at http://127.0.0.1:{port}: ")
    assert error.endswith("choose another --host or --port.\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--api-key", ""], "--api-key is empty; set it to the key, or leave it out"),
        (["--api-key", " "], "--api-key is empty"),
        (["--api-key", "a b"], "--api-key holds what is no key"),
        (["--grace", "-1"], "grace must be 0 or more, got -1"),
        (["--max-new-tokens", "0"], "must be 1 or more"),
        (["--allow-policy", "nope"], "unknown policy 'nope'"),
        (["--max-concurrent", "0"], "max_concurrent must be 1 or more"),
        (["--host", "nowhere.invalid"], "cannot listen at http://nowhere.invalid:8000"),
    ],
)
def test_a_slip_of_the_operator_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "tiny", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_without_its_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [name for name in sys.modules if name.startswith("multicolm.serving")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "tiny"]) == 2
    error = capsys.readouterr().err
    assert error.strip().endswith("needs the library fastapi: pip install 'multicolm[serve]'.")


def test_the_help_names_every_limit() -> None:
    done = CliRunner().invoke(cli, ["serve", "--help"])
    assert done.exit_code == 0
    for option in ("--allow-policy", "--api-key", "MULTICOLM_API_KEY", "--max-body", "--grace"):
        assert option in done.output

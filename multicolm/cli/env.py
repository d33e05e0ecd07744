"""``multicolm env``."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import click

from multicolm.cli.options import as_json, examples, json_option
from multicolm.cli.version import versions

__all__ = ["command"]

_OPTIONAL = (
    *("accelerate", "datasets", "fastapi", "httpcore", "huggingface_hub", "llama-cpp-python"),
    *("lm-eval", "matplotlib", "numpy", "peft", "scikit-learn", "uvicorn", "vllm"),
)
_NEEDED = {
    "transformers": "transformers",
    "llama-cpp": "llama_cpp",
    "vllm-engine": "vllm",
    **dict.fromkeys(("vllm", "sglang", "openai", "llama-cpp-server"), "httpcore"),
}
"""By backend, the library that runs it or reaches it."""


def environment() -> dict[str, Any]:
    """What decides how multicolm behaves here; no path, no name of a user or a machine."""
    import torch

    return {
        **versions(),
        "libraries": {name: found for name in _OPTIONAL if (found := _version(name))},
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": _cores(),
        "torch threads": torch.get_num_threads(),
        "memory": f"{_memory() / 2**30:.0f} GiB" if _memory() else "unknown",
        "devices": _devices(),
        "backends": _backends(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory() -> int:
    """Bytes of this machine; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def _devices() -> list[str]:
    """The accelerators that torch sees."""
    import torch

    found = [
        f"cuda:{i} {device.name}, {device.total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
        for device in [torch.cuda.get_device_properties(i)]
    ]
    return found + ["mps"] * torch.backends.mps.is_available()


def _backends() -> dict[str, str]:
    """Every backend, and whether what it needs is installed."""
    from multicolm.plugins import backends

    return {name: _state(name) for name in backends.names() if name != "table"}


def _state(backend: str) -> str:
    if backend not in _NEEDED:
        return "a plug-in"
    needed = _NEEDED[backend]
    return "installed" if find_spec(needed) else f"needs {needed}"


@click.command(epilog=examples("env", "env --json"))
@json_option
def command(as_json_: bool) -> None:
    """Print what a bug report needs: versions, devices, threads, and the backends installed.

    Nothing that is private: no path, no name of a user or a machine, no environment variable.
    """
    found = environment()
    if as_json_:
        click.echo(as_json(found))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        elif isinstance(value, list):
            value = ", ".join(value) or "no accelerator"
        click.echo(f"{name:<14}{'not installed' if value is None else value}")

"""``--track``: what a run measures, kept by a library that tracks experiments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from multicolm.errors import ConfigError

__all__ = ["Log", "numbers_of", "track_option", "tracked"]

Log = Callable[[Mapping[str, float], int], None]
"""Called with numbers by name, and the step at which they were measured."""

_PROJECT = "multicolm"


def _installed(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse a library that is not there, before anything is read or loaded.

    Raises:
        ConfigError: naming what to install.
    """
    if value is not None and find_spec(value) is None:
        raise ConfigError(f"--track {value} needs the library {value}: pip install {value}.")
    return value


track_option = click.option(
    "--track",
    type=click.Choice(["wandb", "trackio", "tensorboard"]),
    callback=_installed,
    help="Keep what is measured with this library too; tensorboard writes beside the results.",
)


@contextlib.contextmanager
def tracked(library: str | None, out: Path, config: Mapping[str, Any]) -> Iterator[Log]:
    """One run of a library that tracks; without one nothing is kept.

    Args:
        library: as :data:`track_option` has it.
        out: the folder of results; its name is the run's.
        config: what the run was asked for.
    """
    if library is None:
        yield lambda numbers, step: None
        return
    if library == "tensorboard":
        writer = import_module("torch.utils.tensorboard").SummaryWriter(str(out / "tensorboard"))
        writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in config.items()))
        with contextlib.closing(writer):
            yield lambda numbers, step: _scalars(writer, numbers, step)
        return
    module = import_module(library)
    module.init(project=_PROJECT, name=out.absolute().name, config=dict(config))
    try:
        yield lambda numbers, step: module.log(dict(numbers), step=step)
    finally:
        module.finish()


def _scalars(writer: Any, numbers: Mapping[str, float], step: int) -> None:
    for name, number in numbers.items():
        writer.add_scalar(name, number, step)


def numbers_of(value: Mapping[str, Any], under: str = "") -> dict[str, float]:
    """The numbers of a report, those of a mapping in it under its name.

    >>> numbers_of({"epochs": 3, "share": {"base": 0.5}, "solver": "lbfgs"})
    {'epochs': 3.0, 'share/base': 0.5}
    """
    found: dict[str, float] = {}
    for name, part in value.items():
        if isinstance(part, Mapping):
            found |= numbers_of(part, f"{under}{name}/")
        elif isinstance(part, int | float) and not isinstance(part, bool):
            found[f"{under}{name}"] = float(part)
    return found

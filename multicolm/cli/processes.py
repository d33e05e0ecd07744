"""Which of the processes of `accelerate launch` or `torchrun` this is, and where it works."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from multicolm.errors import ConfigError

if TYPE_CHECKING:
    from multicolm.config import EnsembleConfig

__all__ = ["on_own_device", "processes", "rank"]


def processes() -> tuple[int, int, Callable[[], None]]:
    """This process's rank, how many there are, and what waits for all."""
    if not _several():
        return 0, 1, lambda: None
    state = _state()
    return state.process_index, state.num_processes, state.wait_for_everyone


def on_own_device(config: EnsembleConfig) -> EnsembleConfig:
    """Each process on its own accelerator, where the ensemble file leaves it open."""
    if not _several():
        return config
    device = _state().device
    if device.type == "cpu":
        return config
    models = {
        name: model
        if model.device or model.device_map
        else model.model_copy(update={"device": str(device)})
        for name, model in config.models.items()
    }
    return config.model_copy(update={"models": models})


def _state() -> Any:
    """What accelerate knows of the processes; the group of them is made at the first call."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    devices = getattr(torch, "accelerator", torch.cuda)
    # Left to itself it makes no group of processes that have no accelerator.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not devices.is_available()
    return PartialState(cpu=bool(on_cpu))


def rank() -> int:
    """This process's rank, without asking for the others.

    Raises:
        ConfigError: if the launcher's variable holds no whole number.
    """
    return _variable("RANK", 0)


def _several() -> bool:
    return _variable("WORLD_SIZE", 1) > 1


def _variable(name: str, otherwise: int) -> int:
    """A number that a launcher sets in the environment."""
    text = os.environ.get(name)
    if text is None:
        return otherwise
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(
            f"the environment variable {name} is {text!r}; unset it, or let `accelerate launch` or "
            "`torchrun` set it to a whole number."
        )
    return int(text)

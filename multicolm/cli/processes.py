"""Which of the processes of `accelerate launch` or `torchrun` this is, and where it works."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multicolm.config import EnsembleConfig

__all__ = ["on_own_device", "processes"]


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


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1

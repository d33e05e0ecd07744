"""Training that can be stopped at any moment: its state in one file, written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, optim

from multicolm.files import write_whole

__all__ = ["Snapshots", "load_optimizer", "optimizer_tensors"]


class Snapshots:
    """The latest state of a training, in a folder; or nowhere.

    Args:
        folder: of the file; ``None`` keeps nothing.
        key: what is trained on what and how; a state of another key is not taken up.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self.path = None if folder is None else folder / "state.safetensors"
        self._key = key

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the state by this one."""
        if self.path is None:
            return
        # Copies, as the format refuses tensors that share memory.
        plain = {name: tensors[name].detach().cpu().clone() for name in sorted(tensors)}
        metadata = {"key": self._key, "facts": json.dumps(facts)}
        write_whole(self.path, save(plain, metadata=metadata))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that was saved last, if there is one of this training."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self._key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads(metadata["facts"])
        except (SafetensorError, OSError, ValueError):
            return None  # What cannot be read is trained again.

    def clear(self) -> None:
        """The training is finished: forget its state."""
        if self.path is not None and self.path.is_file():
            self.path.unlink()


def optimizer_tensors(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """The state of AdamW as named tensors, in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{name}": value
        for number, values in state.items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of :func:`optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, part = name.split(".")
            state.setdefault(int(number), {})[part] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

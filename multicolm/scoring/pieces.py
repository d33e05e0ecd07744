"""Parts of a shard that is not done, saved now and then, so that a stop costs little."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from multicolm.files import write_whole
from multicolm.scoring.numbers import Columns
from multicolm.scoring.store import TableFiles

__all__ = ["Pieces"]


class Pieces:
    """What is read of one shard by one model, until the shard is done.

    Args:
        files: of the table.
        part: the model's name.
        number: of the shard.
        stage: which of the readings of the shard this is; a word.
        n_positions: how many there are to read.
        facts: whatever else the numbers hang on; pieces with other facts are thrown away.
        every: seconds between two saves, at least.
        clock: current time in seconds.
    """

    def __init__(
        self,
        files: TableFiles,
        part: str,
        number: int,
        *,
        stage: str,
        n_positions: int,
        facts: str,
        every: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.columns = Columns(n_positions)
        self._shard = files.path(part, number)
        self._pattern = f".{number:05d}.{stage}-*.partial"
        self._key = f"{files.index.key(part, number)} {facts}"
        self._every = every
        self._clock = clock
        self._new: list[Tensor] = []
        self._n_saved = 0
        for path in sorted(self._shard.parent.glob(self._pattern)):
            self._take(path)
        self._saved = clock()

    def _take(self, path: Path) -> None:
        """Take over what an earlier run has saved, if it is of this reading."""
        try:
            with safe_open(path, "pt") as file:
                fits = (file.metadata() or {}).get("key") == self._key
                found = {name: file.get_tensor(name) for name in file.keys()} if fits else {}  # noqa: SIM118
            self.columns.put(found.pop("at"), found)
            self._n_saved += 1
        except (OSError, SafetensorError, KeyError):
            path.unlink(missing_ok=True)

    def add(self, at: Tensor, numbers: Mapping[str, Tensor]) -> None:
        """Put numbers into the columns; save what is new if it is time.

        Args:
            at: positions of the shard.
            numbers: per position.
        """
        self.columns.put(at, numbers)
        self._new.append(at)
        if self._clock() - self._saved >= self._every:
            self.save()

    def save(self) -> None:
        """Write what has come since the last time into a file of its own."""
        if self._new:
            at = torch.cat(self._new)
            content = save({**self.columns.at(at), "at": at}, metadata={"key": self._key})
            name = self._pattern.replace("*", f"{self._n_saved:05d}")
            write_whole(self._shard.with_name(name), content)
            self._n_saved += 1
            self._new = []
        self._saved = self._clock()

    def remove(self) -> None:
        """Delete the files, when the shard itself is written; those of a killed write, too."""
        for path in self._shard.parent.glob(f"*{self._pattern}*"):
            with contextlib.suppress(OSError):
                path.unlink()

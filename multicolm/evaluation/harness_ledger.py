"""What an evaluation has come to so far: rows of tasks that are done, requests of others.

The requests of a row are in a ledger of their own, which ends with the row: neither disk nor memory
holds more of them than the rows at work have.

    lm_eval.jsonl                              rows of tasks that are done
    lm_eval.requests/<digest>/ledger.jsonl     what a row that is not done has answered
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from multicolm.evaluation.ledger import Ledger

__all__ = ["RowRequests", "Rows"]

_SECONDS = "seconds"
# Between one moment at which all is safe from the machine's losing power and the next, in seconds.
_SYNC_EVERY = 5.0


class RowRequests:
    """The answered requests of one row of a task, by key, and the time that they took.

    Args:
        ledger: the row's own.
        clock: current time in seconds.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.perf_counter) -> None:
        self._ledger = ledger
        self._clock = clock
        self._seconds_before = float(ledger.get(_SECONDS) or 0.0)
        self._start = self._synced = clock()

    def __len__(self) -> int:
        return len(self._ledger) - (_SECONDS in self._ledger)

    @property
    def seconds(self) -> float:
        """What the row took in all sittings, this one included.

        Of a sitting that was killed, the last few seconds are not counted.
        """
        return self._seconds_before + self._clock() - self._start

    def get(self, key: str) -> Any:
        """The record of a request; ``None`` if it is not answered."""
        return self._ledger.get(key)

    def __setitem__(self, key: str, record: Any) -> None:
        self._ledger.append(key, record)
        if self._clock() - self._synced >= _SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """Note the time, and return when all outlives the machine's losing power."""
        self._ledger.append(_SECONDS, self.seconds)
        self._ledger.sync()
        self._synced = self._clock()


class Rows:
    """Rows of tasks that are done, by key, and the requests of those that are not.

    Made by :meth:`open`.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], ledger: Ledger) -> None:
        self.folder = folder
        self._header = header
        self._ledger = ledger

    @classmethod
    @contextmanager
    def open(cls, folder: Path, header: Mapping[str, Any]) -> Iterator[Rows]:
        """What a folder holds of an evaluation; it belongs to this process until the end.

        Args:
            folder: of the results.
            header: plain values that say which evaluation this is.

        Raises:
            InputError: if the folder holds another evaluation, or another process is at work there.
            ArtefactError: if a ledger is damaged.
        """
        with Ledger.open(folder / "lm_eval.jsonl", header) as ledger:
            rows = cls(folder, header, ledger)
            # Of rows at whose very end the process was killed.
            for key in ledger:
                rows._forget(key)
            yield rows

    def __len__(self) -> int:
        return len(self._ledger)

    def get(self, key: str) -> Any:
        """The record of a row; ``None`` if it is not done."""
        return self._ledger.get(key)

    @contextmanager
    def requests(self, key: str) -> Iterator[RowRequests]:
        """What a row that is not done has answered, now or before it was stopped.

        Raises:
            ArtefactError: if its ledger is damaged.
        """
        header = {**self._header, "row": key}
        with Ledger.open(self._part(key) / "ledger.jsonl", header) as ledger:
            requests = RowRequests(ledger)
            try:
                yield requests
            finally:
                requests.sync()

    def finish(self, key: str, record: Any) -> None:
        """Keep what a row came to, and no longer its requests."""
        self._ledger.append(key, record)
        self._ledger.sync()
        self._forget(key)

    def _forget(self, key: str) -> None:
        part = self._part(key)
        if part.is_dir():
            shutil.rmtree(part)
            if not any(part.parent.iterdir()):
                part.parent.rmdir()

    def _part(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return self.folder / "lm_eval.requests" / digest

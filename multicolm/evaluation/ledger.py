"""What was finished, kept line by line as it is finished, so that a killed run can resume.

The first line is the header: it says what run the lines belong to. Every other line is a key and
its record. Only the last line can be half written, by a process that was killed; it is cut off when
the file is opened again. Records stay in the file; memory holds where they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from multicolm.errors import ArtefactError, InputError
from multicolm.files import locked

__all__ = ["Ledger"]

_FORMAT = 1


class Ledger:
    """Records by key, in a file of JSON lines that only grows.

    Made by :meth:`open` or :meth:`open_to_read`; a context manager, which gives the folder free at
    its end.
    """

    def __init__(self, path: Path, stream: BinaryIO, held: ExitStack) -> None:
        self.path = path
        self._stream = stream
        self._held = held
        self._places: dict[str, int] = {}
        self._header: Any = None

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any]) -> Ledger:
        """Open a ledger, or begin one.

        The folder belongs to this process until the ledger is closed.

        Args:
            path: the file; its folder is made if need be.
            header: plain values that say which run this is.

        Raises:
            InputError: if the file belongs to another run, or another process is at work in its
                folder.
            ArtefactError: if it is damaged elsewhere than at its end.
        """
        with ExitStack() as held:
            held.enter_context(locked(path.parent))
            path.touch()
            stream = held.enter_context(path.open("r+b"))
            ledger = cls(path, stream, held)
            ledger._header = json.loads(json.dumps(header))
            ledger._read()
            ledger._held = held.pop_all()
            return ledger

    @classmethod
    def open_to_read(cls, path: Path, header: Mapping[str, Any]) -> Ledger:
        """Open a ledger that another process keeps, to read it.

        What is written later is seen after :meth:`read_again`.

        Args:
            path: the file.
            header: see :meth:`open`.

        Raises:
            InputError: if the file belongs to another run.
            ArtefactError: if it is damaged elsewhere than at its end.
        """
        with ExitStack() as held:
            stream = held.enter_context(path.open("rb"))
            ledger = cls(path, stream, held)
            ledger._header = json.loads(json.dumps(header))
            ledger._read()
            ledger._held = held.pop_all()
            return ledger

    def read_again(self) -> None:
        """See what another process has written since.

        Raises:
            ArtefactError: if the file is damaged elsewhere than at its end.
        """
        self._read()

    def absorb(self, other: Ledger) -> None:
        """Take over the records of another ledger whose keys are new here, in their order."""
        for key in other:
            if key not in self:
                self.append(key, other.get(key))
        self.sync()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Make everything sure and give the folder free."""
        try:
            if self._stream.writable():
                self.sync()
        finally:
            self._held.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def get(self, key: str) -> Any:
        """The record of a key; ``None`` if there is none."""
        if key not in self._places:
            return None
        self._stream.seek(self._places[key])
        return json.loads(self._stream.readline())["record"]

    def append(self, key: str, record: Any) -> None:
        """Write a record; it outlives this process. A later one of the same key replaces it.

        Raises:
            ValueError: if the record holds what JSON cannot.
        """
        self._places[key] = self._write({"key": key, "record": record})

    def sync(self) -> None:
        """Return when what was appended outlives the machine's losing power."""
        os.fsync(self._stream.fileno())

    def _write(self, line: Mapping[str, Any]) -> int:
        data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        place = self._stream.seek(0, os.SEEK_END)
        self._stream.write(data)
        self._stream.flush()
        return place

    def _read(self) -> None:
        """Find every record; cut off a last line that is not whole, unless it is another's."""
        place = self._stream.seek(0)
        for number, line in enumerate(self._stream, start=1):
            value = _parsed(line)
            if value is None and self._is_last(place + len(line)):
                break
            if number == 1:
                self._check_header(value, self._header)
            elif isinstance(value, dict) and isinstance(value.get("key"), str):
                self._places[value["key"]] = place
            else:
                raise ArtefactError(
                    f"{self.path}:{number}: this line is damaged; a ledger is written by multicolm "
                    "alone, so put back the line as it was, or remove the folder and begin anew."
                )
            place += len(line)
        if not self._stream.writable():
            return
        self._stream.truncate(place)
        if not place:
            self._write({"format": _FORMAT, "header": self._header})
            self.sync()

    def _is_last(self, end: int) -> bool:
        return end == os.fstat(self._stream.fileno()).st_size

    def _check_header(self, value: Any, header: Any) -> None:
        if not isinstance(value, dict) or "header" not in value:
            raise ArtefactError(
                f"{self.path}:1: the line that says which run this is, is damaged; choose another "
                "folder, or remove this one."
            )
        if value.get("format") != _FORMAT:
            raise ArtefactError(
                f"{self.path}: has format {value.get('format')}, and this multicolm reads "
                f"{_FORMAT}; choose another folder, or remove this one."
            )
        there, here = value["header"], header
        differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        if differing:
            listed = "; ".join(
                f"{key} {_shown(there.get(key))} there, {_shown(here.get(key))} here"
                for key in differing
            )
            raise InputError(
                f"{self.path.parent} holds another run ({listed}); choose another folder "
                "(--out), or remove that one."
            )


def _parsed(line: bytes) -> Any:
    """The value of a whole line; ``None`` if it is broken."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."

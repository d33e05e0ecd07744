"""Records of a data set, from a file or from the Hub, one after the other; never all in memory.

JSON lines and CSV need nothing else; Parquet and the Hub are read by the library ``datasets`` (the
extra ``data``).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multicolm.errors import ConfigError, InputError

__all__ = ["Source", "text_lines"]

_FILES = (".jsonl", ".json", ".csv", ".parquet")


def text_lines(text: str) -> list[str]:
    r"""The lines of a text, which ``\n`` or ``\r\n`` ends.

    ``str.splitlines`` also cuts at characters such as U+2028, which stand within JSON strings and
    texts as they are.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


@dataclass(frozen=True, slots=True)
class Source:
    """Where records are; each time it is iterated over they are read from the start.

    Gives pairs of the record's place, for messages (``train.jsonl:12``), and the record: whatever
    a line of JSON may be, or a mapping.

    Attributes:
        name: a file of JSON lines (``.jsonl``, ``.json``), a ``.csv`` file whose first line names
            the fields, a ``.parquet`` file, or ``org/name`` on the Hub.
        split: of a data set of the Hub.
        subset: of a data set of the Hub, where it has several.
        revision: of a data set of the Hub.
    """

    name: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a file, not a data set of the Hub."""
        return self.name.endswith(_FILES)

    @property
    def problem(self) -> str:
        """What is wrong with the name, before anything is read; empty if nothing is."""
        if self.is_file:
            return "" if Path(self.name).is_file() else f"there is no file {self.name}."
        # The Hub has data sets without an organisation too: `squad`.
        is_path = self.name.startswith((".", "/", "~")) or Path(self.name).exists()
        if not is_path and self.name.count("/") <= 1:
            return ""
        return (
            f"'{self.name}' is no data set; allowed are a .jsonl, .csv or .parquet file, and the "
            "name of a data set on the Hub."
        )

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Place and content of every record, in their order.

        Raises:
            ConfigError: if the source cannot be read, or ``datasets`` is needed and missing.
            InputError: if a line is no JSON, or has other fields than the first line of a CSV.
        """
        if self.name.endswith(".csv"):
            return _csv_rows(Path(self.name))
        if self.is_file and not self.name.endswith(".parquet"):
            return _json_lines(Path(self.name))
        return self._rows()

    def _rows(self) -> Iterator[tuple[str, Any]]:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(
                f"{self.name} needs the library datasets: pip install 'multicolm[data]'."
            ) from error
        settings: dict[str, Any] = {"split": self.split, "streaming": True}
        try:
            if self.is_file:
                settings |= {"data_files": {self.split: self.name}}
                rows = datasets.load_dataset("parquet", **settings)
            else:
                settings |= {"revision": self.revision}
                rows = datasets.load_dataset(self.name, self.subset, **settings)
            for number, record in enumerate(rows, start=1):
                yield f"{self.name}:{number}", record
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"{self.name} cannot be read: {reason}") from error


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    place = str(path)
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                place = f"{path}:{number}"
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield place, _parsed(text, place)
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 text; convert it first.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    place = str(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream, strict=True)
            fields = next(rows, [])
            for row in rows:
                place = f"{path}:{rows.line_num}"
                if not row:
                    continue
                if len(row) != len(fields):
                    raise InputError(
                        f"{place}: {len(row)} fields, and the first line names {len(fields)} "
                        f"({', '.join(fields)}); put a field with commas or line breaks in quotes."
                    )
                yield place, dict(zip(fields, row, strict=True))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text; convert it first.") from error
    except csv.Error as error:
        raise InputError(f"{place}: no CSV ({error}).") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: no JSON ({error}); each line is a record.") from error

"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from multicolm.errors import ArtefactError, InputError

__all__ = ["leads_out", "links_out", "locked", "read_json", "sha256", "write_whole"]


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees all of it or, until then, what was there before.

    Raises:
        OSError: if it cannot be written; nothing is left behind then.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    # One name for every try, so that tries that were killed leave one file at most, and not for
    # long: the next try takes it over.
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        # A disk that is full does not say which file it had no room for.
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        ArtefactError: if it cannot be read, is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ArtefactError(f"{path} is damaged (nested too deeply).") from error
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ArtefactError(f"{path} is damaged ({error}).") from error


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path leads out of a folder, by ``..``, from the root, or by a symbolic link.

    In the cache of the Hub's library every file is a link into the store of its repository; that
    counts as inside.
    """
    home, found = folder.resolve(), path.resolve()
    stores = [
        p.parent.parent / "blobs" for p in (home, *home.parents) if p.parent.name == "snapshots"
    ]
    return not any(found.is_relative_to(each) for each in (home, *stores))


def links_out(folder: Path) -> Iterator[Path]:
    """The symbolic links in a folder that lead out of it."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and leads_out(path, folder):
            yield path


def sha256(path: Path) -> str:
    """Digest of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder to this process, as long as it lives.

    Raises:
        InputError: if another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{folder}: another process is at work here; wait for it, or choose another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()

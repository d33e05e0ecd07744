"""Answers that the Hub does not give, from whoever answers in its place."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from multicolm.errors import HubError
from multicolm.transfer import download, upload

SHA = b'"sha": "' + b"a" * 40 + b'"'
GOOD = b'{"id": "a/b", ' + SHA + b', "siblings": [{"rfilename": "x.json"}]}'
ODD: dict[str, bytes] = {
    "a page": b"<html>Please log in to this network</html>",
    "depth": b"[" * 100_000,
    "a list": b"[]",
    "null": b"null",
    "nothing in it": b"{}",
    "files that are a number": b'{"id": "a/b", ' + SHA + b', "siblings": 5}',
    "a revision that is a number": b'{"id": "a/b", "sha": 5, "siblings": []}',
    "half a character": b'{"id": "a/b", "sha": "\\ud800", "siblings": []}',
    "a date beyond all dates": b'{"id": "a/b", "createdAt": "99999999999999"}',
}


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes, bytes], str]]:
    """Sets what is answered about a repository, and about its files."""
    said: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            content = said["tree"] if "/tree/" in self.path else said["info"]
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.send_header("x-repo-commit", "a" * 40)
            self.send_header("etag", '"abc"')
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def answer(info: bytes, tree: bytes) -> str:
            said.update(info=info, tree=tree)
            return url

        yield answer
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("into", ["a folder", "the cache"])
@pytest.mark.parametrize("what", ODD)
def test_an_answer_that_the_hub_does_not_give_is_one_sentence(
    answering: Callable[[bytes, bytes], str],
    tmp_path: Path,
    what: str,
    into: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # It warns with the half of a character, which pytest-xdist cannot report.
    caplog.set_level(logging.CRITICAL, "huggingface_hub")
    url = answering(ODD[what], ODD[what])
    folder = tmp_path / "got" if into == "a folder" else None
    with pytest.raises(HubError, match=f"what {url} answers about a/b is not what the Hub") as hub:
        download("a/b", folder=folder, cache_dir=tmp_path / "cache")
    assert len(str(hub.value)) < 400
    assert not (tmp_path / "got").exists()


def test_a_page_in_the_place_of_the_hub_is_one_sentence_for_who_pushes_too(
    answering: Callable[[bytes, bytes], str], tmp_path: Path
) -> None:
    url = answering(ODD["a page"], ODD["a page"])
    with pytest.raises(HubError, match=f"what {url} answers about a/b is not what the Hub"):
        upload(tmp_path, "a/b")


@pytest.mark.parametrize("name", ["../../evil.json", "/evil.json", "a/../../../evil.json"])
def test_no_file_of_a_repository_lands_outside_its_folder(
    answering: Callable[[bytes, bytes], str], tmp_path: Path, name: str
) -> None:
    answering(
        GOOD,
        b'[{"type": "file", "size": 7, "oid": "%s", "path": "%s"}]' % (b"b" * 40, name.encode()),
    )
    inner = tmp_path / "a" / "b" / "got"
    with pytest.raises(HubError, match="Invalid filename"):
        download("a/b", folder=inner)
    assert not list(tmp_path.rglob("evil.json"))


def test_a_disk_that_takes_nothing_is_one_sentence(
    answering: Callable[[bytes, bytes], str], tmp_path: Path
) -> None:
    answering(GOOD, b'[{"type": "file", "size": 7, "oid": "%s", "path": "x.json"}]' % (b"b" * 40))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HubError, match=r"a/b cannot be read or kept on this disk: .*file"):
        download("a/b", folder=tmp_path / "file" / "got")

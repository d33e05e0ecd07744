"""A Hub on loopback: repositories in memory, as far as the Hub's own library asks for them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Hub", "running_hub"]

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What was pushed.

    Attributes:
        url: of the server.
        files: per repository (``models/org/name``), its files.
        private: per repository, whether it is.
        tokens: who asked.
        read_only: whether nobody may write.
        unknown: requests that it does not know, for the tests to be empty.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    read_only: bool = False
    unknown: list[str] = field(default_factory=list)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that listens until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            return

        def _answer(self, value: Any, code: int = 200, **headers: str) -> None:
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            for name, content in headers.items():
                self.send_header(name.replace("_", "-"), content)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _missing(self, code: str) -> None:
            self._answer({"error": code}, 404, X_Error_Code=code)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            hub.tokens.add(self.headers.get("Authorization"))
            path = self.path.split("?")[0]
            if hub.read_only:
                self._answer({"error": "no"}, 403)
            elif path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                repo = f"{asked.get('type') or 'model'}s/{name}"
                if repo in hub.files:
                    self._answer({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
                    return
                hub.files[repo] = {}
                hub.private[repo] = asked.get("private", asked.get("visibility") == "private")
                prefix = "" if repo.startswith("models/") else "datasets/"
                self._answer({"url": f"{hub.url}/{prefix}{name}", "id": name})
            elif match := re.fullmatch(r"/api/(\w+/[\w./-]+)/preupload/(\w+)", path):
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self._answer({"files": files})
            elif match := re.fullmatch(r"/api/(\w+/[\w./-]+)/commit/(\w+)", path):
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        hub.files[match[1]][entry["value"]["path"]] = content
                    elif entry["key"] == "header":
                        hub.messages.append(entry["value"]["summary"])
                name = match[1].removeprefix("models/")
                url = f"{hub.url}/{name}/commit/{SHA}"
                self._answer({"commitUrl": url, "commitOid": SHA, "success": True})
            else:
                hub.unknown.append(f"POST {path}")
                self._missing("EntryNotFound")

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            hub.tokens.add(self.headers.get("Authorization"))
            if match := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)(/revision/(\w+))?", path):
                self._info(match[1], match[3] or "main")
            elif match := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/tree/(\w+)", path):
                self._tree(match[1])
            elif match := re.fullmatch(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", path):
                repo = f"{(match[1] or 'models/').rstrip('/')}/{match[2]}"
                self._file(repo, match[4])
            elif path == "/api/agent-harnesses":
                self._missing("EntryNotFound")  # for the library's own statistics
            else:
                hub.unknown.append(f"{self.command} {path}")
                self._missing("EntryNotFound")

        do_HEAD = do_GET

        def _info(self, repo: str, revision: str) -> None:
            if repo not in hub.files:
                self._missing("RepoNotFound")
            elif revision not in ("main", SHA):
                self._missing("RevisionNotFound")
            else:
                names = [{"rfilename": name} for name in sorted(hub.files[repo])]
                name = repo.partition("/")[2]
                self._answer({"id": name, "sha": SHA, "siblings": names, "private": True})

        def _tree(self, repo: str) -> None:
            files = hub.files.get(repo, {})
            self._answer(
                [
                    {"type": "file", "path": name, "size": len(files[name]), "oid": _oid(content)}
                    for name, content in sorted(files.items())
                ]
            )

        def _file(self, repo: str, name: str) -> None:
            content = hub.files.get(repo, {}).get(name)
            if content is None:
                self._missing("EntryNotFound")
                return
            self._answer(content, ETag=f'"{_oid(content)}"', X_Repo_Commit=SHA)

    return Handler


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

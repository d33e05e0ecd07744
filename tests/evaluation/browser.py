"""A real browser for tests: Chromium, driven over a pipe by its DevTools protocol.

No dependency and no port: messages are JSON that ends with NUL, on file descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

# The protocol wants the descriptors 3 and 4; a child of Python gets other numbers.
_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}


class Browser:
    """One headless Chromium; use it as a context.

    Args:
        profile: an empty folder for its files.
        seconds: how long an answer of the browser may take.
    """

    def __init__(self, profile: Path, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._count = 0
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        assert CHROMIUM is not None
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", _LAUNCH, str(theirs_in), str(theirs_out), CHROMIUM),
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-dev-shm-usage"),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.send("Browser.close")
            self._process.wait(self.seconds)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._out)
            os.close(self._in)

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer; events that come meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + self.seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, address: str, *, width: int = 1280, dark: bool = False) -> Page:
        """A page after its scripts ran, with every request and complaint since it began."""
        return Page(self, address, width=width, dark=dark)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, address: str, *, width: int, dark: bool) -> None:
        self._browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=1000, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=address)
        end = time.monotonic() + browser.seconds
        while self.value("document.readyState") != "complete" or not self.events(
            "Page.loadEventFired"
        ):
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.02)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the browser for something about this tab."""
        return self._browser.send(method, self._session, **params)

    def events(self, method: str) -> list[dict[str, Any]]:
        """What the browser told of this tab so far."""
        return [
            event["params"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event["method"] == method
        ]

    @property
    def requests(self) -> list[str]:
        """Every address that the page asked for, its own included."""
        return [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]

    @property
    def complaints(self) -> list[Any]:
        """Errors of scripts, of the console, and of the content security policy."""
        return [
            *self.events("Runtime.exceptionThrown"),
            *(e for e in self.events("Runtime.consoleAPICalled") if e["type"] == "error"),
            *(e for e in self.events("Log.entryAdded") if e["entry"]["level"] == "error"),
        ]

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, (expression, answer["exceptionDetails"])
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """The text that an element shows."""
        return str(self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    def texts(self, selector: str) -> list[str]:
        """The texts that all such elements show."""
        query = f"document.querySelectorAll({json.dumps(selector)})"
        return list(self.value(f"[...{query}].map((node) => node.innerText)"))

    def click(self, selector: str) -> None:
        """Press and release the mouse in the first box of an element."""
        node = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{node}.scrollIntoView({{block: 'center'}})")
        x, y = self.value(
            f"(([box]) => [box.x + box.width / 2, box.y + box.height / 2])({node}.getClientRects())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=_KEYS[key]
            )

    def choose(self, selector: str, value: str) -> None:
        """Set a control's value as a user would, by the words of an option or as text."""
        self.value(
            f"""(() => {{
                const node = document.querySelector({json.dumps(selector)});
                const words = {json.dumps(value)};
                if (node.options) {{
                    node.selectedIndex = [...node.options].findIndex((o) => o.text === words);
                    if (node.selectedIndex < 0) throw new Error("no option " + words);
                }} else node.value = words;
                node.dispatchEvent(new Event(node.options ? "change" : "input", {{bubbles: true}}));
            }})()"""
        )

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

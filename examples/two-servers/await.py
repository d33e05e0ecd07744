"""Wait until a server answers: `await.py URL SECONDS`; exit code 1 if it never does."""

from __future__ import annotations

import sys
import time
import urllib.request
from http.client import HTTPException


def answers(url: str) -> bool:
    """Whether a server answers, without asking a proxy for what is on this machine."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(url, timeout=5).close()
    except (OSError, HTTPException):
        return False
    return True


def main(url: str, seconds: float) -> int:
    """Ask twice a second; the exit code."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answers(url):
            return 0
        time.sleep(0.5)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))

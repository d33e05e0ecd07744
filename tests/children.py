"""Child processes of tests that end well, or are killed with no chance to tidy up."""

from __future__ import annotations

import os
import signal
import time

__all__ = ["finish", "kill"]


def finish(child: int) -> float:
    """Wait until a child has ended well; how long that took, in seconds."""
    begin = time.monotonic()
    assert os.waitpid(child, 0)[1] == 0
    return time.monotonic() - begin


def kill(child: int, delay: float) -> int:
    """Kill a child after so many seconds; its wait status, of its own end if it came first."""
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

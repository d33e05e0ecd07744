"""A forked command ends as a process of its own would."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import forked
import pytest


def test_a_script_is_told_the_exit_code_of_its_command_or_the_signal_that_ended_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(words: Sequence[str]) -> int:
        if words[0] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return int(words[0])

    monkeypatch.setattr(forked, "main", end)
    lines = "; ".join(f"$MULTICOLM {how}; echo $?" for how in ("0", "3", "255", "killed"))
    done = forked.script(["sh", "-c", lines], tmp_path, {})
    assert done.stdout.split() == ["0", "3", "255", str(128 + signal.SIGKILL)]
    assert forked.command(["killed"], tmp_path).returncode == -signal.SIGKILL

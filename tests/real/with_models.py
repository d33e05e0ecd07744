"""Fetch two pretrained models, unless they are there, and run the tests on them.

    .venv/bin/python tests/real/with_models.py [PYTEST OPTIONS]

Where they cannot be fetched, the tests are one skipped test, which says why.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "real-models"))
import fetch  # noqa: E402  # it is a script, in no package


def main(options: Sequence[str]) -> int:
    """Fetch and test; the exit status of pytest."""
    environment = dict(os.environ)
    folder = Path(environment.get("MULTICOLM_REAL_MODELS") or fetch.FOLDER)
    converted = fetch.FOLDERS if environment.get("MULTICOLM_REAL") == "all" else ("smollm2",)
    try:
        fetch.fetch(folder, converted)
    except (subprocess.CalledProcessError, ImportError) as error:
        reason = str(error).splitlines()[0]
        environment["MULTICOLM_REAL_MISSING"] = f"the models cannot be fetched ({reason})"
    print("== tests on pretrained models", flush=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "tests/real", "-q", "-rs"]
    return subprocess.run([*command, *options], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

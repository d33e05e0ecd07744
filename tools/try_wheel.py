"""Run the README's first ten minutes from an installed wheel, in a folder that is no checkout.

python tools/try_wheel.py VENV
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A folder in which `import multicolm` finds the wheel or nothing.
OUTSIDE = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def first_ten_minutes() -> list[str]:
    """The commands of the README's section, in their order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## The first ten minutes")[2].partition("\n## ")[0]
    lines = section.replace("\\\n", "").splitlines()
    return [line[2:] for line in lines if line.startswith("$ multicolm")]


def main(venv: str) -> int:
    """Run them; the first that fails ends it."""
    binary = (Path(venv) / "bin").absolute()
    with tempfile.TemporaryDirectory() as folder:
        where = "import multicolm; print(multicolm.__file__)"
        found = subprocess.run(
            [binary / "python", "-c", where],
            cwd=folder, env=OUTSIDE, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        if not Path(found).is_relative_to(binary.parent):
            print(f"the wheel is not what is imported: {found}")
            return 1
        for command in ("multicolm version", "multicolm validate tiny", *first_ten_minutes()):
            print("$", command, flush=True)
            words = [str(binary / "multicolm"), *shlex.split(command)[1:]]
            done = subprocess.run(words, cwd=folder, env=OUTSIDE, check=False)
            if done.returncode:
                return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""``python -m multicolm`` is the command ``multicolm``."""

from __future__ import annotations

import sys

from multicolm.cli import main

if __name__ == "__main__":
    sys.exit(main())

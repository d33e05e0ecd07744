"""Draw the README's picture: one answer, each token in its writer's colour.

python examples/demo/picture.py examples/demo/trace.svg
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

import multicolm
from multicolm.cli.console import Screen

QUESTIONS = [
    "What is Dulerex made from?",
    "How many mg of Loxid should a patient of 60 kg get?",
    "What is 2 * x + 15 if x = 7?",
]
# rich would have the reader's browser fetch a font; the system's own will do.
_FETCHED = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def main(target: str) -> None:
    """Ask, draw, write."""
    ensemble = multicolm.load("tiny")
    screen = Screen(ensemble.models, trace=True)
    console = Console(record=True, width=92, file=io.StringIO(), highlight=False, markup=False)
    answers = ensemble.generate([[{"role": "user", "content": text}] for text in QUESTIONS])
    for question, answer in zip(QUESTIONS, answers, strict=True):
        console.print(Text(question, style="bold"))
        console.print(screen.text(answer.trace))
        console.print()
    console.print(screen.legend(answers))
    picture = console.export_svg(title="multicolm generate tiny --chat --trace")
    Path(target).write_text(_FETCHED.sub("", picture), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

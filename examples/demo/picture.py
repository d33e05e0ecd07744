"""Draw the README's picture: one answer, each token in its writer's colour.

python examples/demo/picture.py examples/demo/trace.svg
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

import multicolm
from multicolm.cli.console import Screen

PROMPTS = [
    "Question: If x = 3, what is 3 * x ^ 2 + 66?\nResponse:",
    "Question: Which plant is Sofid extracted from?\nResponse:",
    "Question: What class of medicine is Dovyl?\nResponse:",
]


def main(target: str) -> None:
    """Ask, draw, write."""
    ensemble = multicolm.load("tiny")
    screen = Screen(ensemble.models, trace=True)
    console = Console(record=True, width=92, file=io.StringIO(), highlight=False, markup=False)
    answers = ensemble.generate(PROMPTS, "max-confidence")
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        console.print(Text(prompt.splitlines()[0], style="bold"))
        console.print(screen.text(answer.trace))
        console.print()
    console.print(screen.legend(answers))
    title = "multicolm generate tiny --policy max-confidence --trace"
    Path(target).write_text(console.export_svg(title=title), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

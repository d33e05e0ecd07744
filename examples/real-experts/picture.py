"""Draw answers from a comparison's traces, each token in its writer's colour.

python examples/real-experts/picture.py FOLDER/comparison POLICY trace.svg
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.text import Text

from multicolm.cli.console import Screen
from multicolm.evaluation.results import read_comparison, read_traces


def draw(comparison: Path, policy: str, target: Path, n: int = 3) -> None:
    """The policy's answers to the first questions, and the base model's own if they are there."""
    models = read_comparison(comparison).models
    screen = Screen(models, trace=True)
    console = Console(record=True, width=92, file=io.StringIO(), highlight=False, markup=False)
    rows = (f"{models[0]} alone", policy)
    traced = {(each.question, Path(each.row).name): each for each in read_traces(comparison)}
    for question in list(dict.fromkeys(question for question, _ in traced))[:n]:
        console.print(Text(traced[question, policy].prompt, style="bold"))
        for row in (row for row in rows if (question, row) in traced):
            answer = traced[question, row]
            mark = "right" if answer.quality == 1 else "wrong"
            text = Text(f"{row + ':':16}") + screen.text(answer.tokens)
            console.print(text + Text(f"  {mark}", style="dim"))
        console.print()
    answers = [
        SimpleNamespace(trace=each.tokens) for (_, row), each in traced.items() if row == policy
    ]
    console.print(screen.legend(answers))
    target.write_text(console.export_svg(title=f"policy {policy}"), encoding="utf-8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))

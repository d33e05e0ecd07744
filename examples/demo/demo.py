"""Ask the embedded ensemble a handful of questions with every policy.

    make demo

Prints who wrote which token, in colour, and a table: how many held-out questions each policy gets
right, who wrote how much, and what that cost in forward passes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

import multicolm
from multicolm import Answer, Ensemble
from multicolm.catalog import names, path
from multicolm.cli.console import legend, trace_text

# Policies of which a preset alone says too little about this ensemble.
PARAMS: dict[str, dict[str, Any]] = {
    # Base and assistants are no strong and weak (or tuned and untuned) versions of one another, so
    # these three run, and have no reason to do well.
    "contrastive": {"expert": "facts"},
    "proxy-tuning": {"expert": "facts", "antiexpert": "math"},
    "speculative": {"target": "facts"},
}
SHOWN = ["plant", "quad", "dose"]


def questions(n_per_kind: int) -> list[dict[str, str]]:
    """Held-out questions, equally many of each kind, the same at every run."""
    file = path("ensembles", "tiny").parents[1] / "tiny" / "questions" / "test.jsonl"
    by_kind: dict[str, list[dict[str, str]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        by_kind.setdefault(question["kind"], []).append(question)
    chance = random.Random(0)
    return [q for kind in sorted(by_kind) for q in chance.sample(by_kind[kind], n_per_kind)]


def is_right(question: dict[str, str], answer: Answer) -> bool:
    """Whether the text after the last ``Answer:`` is the wanted one."""
    given = answer.text.split("Answer:")[-1].strip().rstrip(".")
    return given == question["answer"]


def show(
    console: Console, ensemble: Ensemble, policy: str, asked: Sequence[dict[str, str]]
) -> None:
    """A few answers of one policy, each token in its writer's colour."""
    console.print(Text(policy, style="bold"))
    prompts = [question["prompt"] for question in asked]
    answers = ensemble.generate(prompts, policy, params=PARAMS.get(policy), seed=0)
    for question, answer in zip(asked, answers, strict=True):
        mark = Text("right ", "green") if is_right(question, answer) else Text("wrong ", "red")
        console.print(Text("  ") + mark + trace_text(answer.trace, ensemble.models), soft_wrap=True)


def measure(ensemble: Ensemble, policy: str, asked: Sequence[dict[str, str]]) -> list[str]:
    """One line of the table."""
    prompts = [question["prompt"] for question in asked]
    answers = ensemble.generate(prompts, policy, params=PARAMS.get(policy), seed=0)
    n_right = sum(is_right(q, a) for q, a in zip(asked, answers, strict=True))
    n_tokens = sum(len(answer.trace) for answer in answers)
    line = [policy, f"{100 * n_right / len(asked):.0f} %"]
    for model in ensemble.models:
        share = sum(t.model == model for answer in answers for t in answer.trace) / n_tokens
        line.append(f"{100 * share:.0f} %")
    forwards = [
        sum(answer.usage[model].forwards for answer in answers) for model in ensemble.models
    ]
    line.append(" / ".join(f"{count / n_tokens:.2f}" for count in forwards))
    line.append(f"{n_tokens / answers.seconds:,.0f}")
    return line


def main() -> None:
    """Parse, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-kind", type=int, default=10, help="questions of each of six kinds")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    ensemble = multicolm.load("tiny")
    asked = questions(arguments.per_kind)
    presets = names("policies")
    few = [next(q for q in asked if q["kind"] == kind) for kind in SHOWN]
    for question in few:
        console.print(f"{question['prompt'].splitlines()[0]}  (right: {question['answer']})")
    console.print(legend(ensemble.models))
    for policy in presets:
        show(console, ensemble, policy, few)
    table = Table(title=f"{len(asked)} held-out questions, greedy, one run", title_justify="left")
    table.add_column("policy")
    table.add_column("right", justify="right")
    for model in ensemble.models:
        table.add_column(f"by {model}", justify="right")
    table.add_column("forwards per token", justify="right")
    table.add_column("tokens/s", justify="right")
    lines = [("single", model) for model in ensemble.models[1:]]
    for policy in track(presets, "measuring", console=console, transient=True):
        table.add_row(*measure(ensemble, policy, asked))
    for _, model in lines:
        PARAMS["single"] = {"model": model}
        row = measure(ensemble, "single", asked)
        table.add_row(f"single ({model})", *row[1:])
    console.print(table)
    console.print(
        "No model answers these alone. Rules help where a model's own doubt says who should write, "
        "and that is not often: by design of the embedded models, see registry/tiny/README.md."
    )


if __name__ == "__main__":
    main()

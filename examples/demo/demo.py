"""Ask the embedded ensemble a handful of questions with every policy.

    make demo

Trains the policies that learn, in seconds. Then shows who wrote which token, in colour, and a
table: how many held-out questions each policy gets right, who wrote how much, and what that cost in
forward passes.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

import multicolm
from multicolm import Answer, Ensemble, Policy, catalog
from multicolm.calibration.queries import train_on_answers
from multicolm.cli.console import Screen
from multicolm.evaluation.oracle import Riddle, can_be_written
from multicolm.evaluation.task import load_task
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import load_table
from multicolm.tiny.world import Question, build_world

# What the presets leave open in an ensemble of three. Base and assistants are no strong and weak
# (or tuned and untuned) versions of one another, so these have no reason to do well.
PARAMS: dict[str, dict[str, Any]] = {
    "contrastive": {"expert": "facts"},
    "proxy-tuning": {"expert": "facts", "antiexpert": "math"},
    "speculative": {"target": "facts"},
    "speculative-cascade": {"target": "facts"},
    "gedi": {"attribute": "facts", "opposite": "math"},
}
# Chosen so that one of the rules, at least, answers them. The table is of a random sample.
SHOWN = (
    "If x = 3, what is 3 * x ^ 2 + 66?",
    "Which plant is Sofid extracted from?",
    "What class of medicine is Dovyl?",
)


def sample(questions: Sequence[Question], n_per_kind: int) -> list[Question]:
    """Equally many questions of each kind, the same at every run."""
    by_kind: dict[str, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    chance = random.Random(0)
    return [q for kind in sorted(by_kind) for q in chance.sample(by_kind[kind], n_per_kind)]


def is_right(question: Question, answer: Answer) -> bool:
    """Whether the text after the last ``Answer:`` is the wanted one."""
    return answer.text.split("Answer:")[-1].strip().rstrip(".") == question.answer


def one_line(answer: Answer, screen: Screen, width: int) -> Text:
    """A trace on one line: in colours, or with the writers' names where there are none."""
    if screen.coloured:
        text = screen.text(answer.trace)
    else:
        text = Text("".join(f"[{model}]{span}" for model, span in answer.trace.spans()))
    line = Text("/").join(text.split("\n"))
    line.truncate(width, overflow="ellipsis")
    return line


def learn(
    console: Console, ensemble: Ensemble, names: Sequence[str], n_questions: int
) -> dict[str, Policy]:
    """The policies that can learn, trained on the training questions of the embedded world."""
    policies = {name: ensemble.resolve(name) for name in names}
    learners = {name: policy for name, policy in policies.items() if hasattr(policy, "fit")}
    file = catalog.registry() / "tiny" / "questions" / "train.jsonl"
    corpus = open_corpus(file, limit=n_questions)
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        console.status(f"three models read {n_questions} training questions"),
    ):
        score(ensemble, corpus, Path(folder), features=["hidden"])
        table = load_table(folder)
    n_read = time.perf_counter() - start
    with console.status("training"), tempfile.TemporaryDirectory() as folder:
        trained = {name: policy.fit(table) for name, policy in learners.items()}
        for name, policy in policies.items():
            if hasattr(policy, "fit_answers"):  # from what every model alone answers
                asked, out = load_task("tiny-world"), Path(folder) / name
                checkpoint = train_on_answers(ensemble, policy, asked, out, limit=24)
                ensemble.check(checkpoint.policy)  # reads it before the folder is gone
                trained[name] = checkpoint.policy
    n_trained = time.perf_counter() - start - n_read
    console.print(
        f"Learned on {n_questions} training questions, read once by each model ({n_read:.0f} s): "
        f"{', '.join(trained)} ({n_trained:.0f} s)\n",
        soft_wrap=True,
    )
    return trained


def show(
    console: Console,
    ensemble: Ensemble,
    name: str,
    policy: str | Policy,
    asked: Sequence[Question],
    max_new_tokens: int,
) -> None:
    """A few answers of one policy."""
    screen = Screen(ensemble.models, trace=True)
    prompts, params = [question.prompt for question in asked], PARAMS.get(name)
    answers = ensemble.generate(
        prompts, policy, params=params, seed=0, max_new_tokens=max_new_tokens
    )
    console.print(Text(name, style="bold"), screen.legend(answers), sep="   ", soft_wrap=True)
    for question, answer in zip(asked, answers, strict=True):
        mark = Text("right ", "green") if is_right(question, answer) else Text("wrong ", "red")
        shown = one_line(answer, screen, max(40, console.width - 9))
        console.print(Text("  ") + mark + shown, soft_wrap=True)


def measured(
    ensemble: Ensemble,
    policy: str | Policy,
    params: dict[str, Any] | None,
    asked: Sequence[Question],
    max_new_tokens: int,
) -> list[str]:
    """One line of the table, without the policy's name."""
    prompts = [question.prompt for question in asked]
    answers = ensemble.generate(
        prompts, policy, params=params, seed=0, max_new_tokens=max_new_tokens
    )
    n_right = sum(is_right(q, a) for q, a in zip(asked, answers, strict=True))
    writers = [token.model for answer in answers for token in answer.trace]
    shares = [100 * writers.count(model) / len(writers) for model in ensemble.models]
    passes = [
        sum(answer.usage[model].forwards for answer in answers) / len(writers)
        for model in ensemble.models
    ]
    together = "together" if not any(shares) else " / ".join(f"{share:.0f}" for share in shares)
    return [
        f"{100 * n_right / len(asked):.0f} %",
        together,
        " / ".join(f"{count:.2f}" for count in passes),
        f"{len(writers) / answers.seconds:,.0f}",
    ]


def the_oracle(ensemble: Ensemble, asked: Sequence[Question]) -> list[str]:
    """How many questions the right choice of writers could answer."""
    riddles = [
        Riddle([model.tokenizer.encode(q.prompt) for model in ensemble.backends], q.responses)
        for q in asked
    ]
    n_right = sum(found is True for found in can_be_written(ensemble, riddles))
    return [f"{100 * n_right / len(asked):.0f} %", "", "", ""]


def main() -> None:
    """Parse, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-kind", type=int, default=10, help="questions of each of six kinds")
    parser.add_argument("--train", type=int, default=1200, help="training questions to learn from")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="the longest answer")
    arguments = parser.parse_args()
    console = Console(highlight=False, markup=False)
    ensemble = multicolm.load("tiny")
    held_out = build_world().questions("test")
    asked = sample(held_out, arguments.per_kind)
    few = [q for q in held_out if any(shown in q.prompt for shown in SHOWN)]
    console.print(Text("Three held-out questions that no model answers alone", style="bold"))
    for question in few:
        console.print(f"  {question.prompt.splitlines()[0]}  (right: {question.answer})")
    presets = catalog.names("policies")
    learned = learn(console, ensemble, presets, arguments.train)
    # What was learned stands last, where one looks first.
    order = [name for name in presets if name not in learned] + list(learned)
    for name in order:
        show(console, ensemble, name, learned.get(name, name), few, arguments.max_new_tokens)
    names = " / ".join(ensemble.models)
    table = Table(
        title=f"{len(asked)} held-out questions, greedy; columns in the order {names}",
        title_justify="left",
        box=None,
    )
    table.add_column("policy", no_wrap=True)
    for name in ("right", "% of tokens by", "passes per token", "tokens/s"):
        table.add_column(name, justify="right")
    runs: list[tuple[str, str | Policy, dict[str, Any] | None]] = [
        (f"single {model}", "single", {"model": model}) for model in ensemble.models
    ]
    runs += [
        (name, learned.get(name, name), PARAMS.get(name)) for name in order if name != "single"
    ]
    for name, policy, params in track(runs, "measuring", console=console, transient=True):
        table.add_row(name, *measured(ensemble, policy, params, asked, arguments.max_new_tokens))
    table.add_row("perfect choice of writers", *the_oracle(ensemble, asked))
    console.print(table)
    console.print(
        "\nNo model answers these alone; with the right writer at every token nearly all are\n"
        "answered. Rules get a part of the way: the embedded models were made so that their own\n"
        "doubt often does not say who should write. What the base model knows of itself, in its\n"
        "hidden state, does: co-llm and mlp-router learn that. See registry/tiny/README.md.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()

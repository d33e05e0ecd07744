"""``multicolm init``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import click

from multicolm.cli.options import examples
from multicolm.errors import InputError

__all__ = ["command"]

_ENSEMBLE = """\
# Which models write together. Check it with `multicolm validate {here}ensemble.yaml --load`.
base_model: {base}
models:
{models}
# Who writes: a name of `multicolm ls policies`, a folder that `multicolm train` wrote, or a file of
# yours. Without training begin with `confidence`.
policy: confidence
generation: {{max_new_tokens: 128}}
"""
_TASK = """\
# Questions, and how answers are judged. Put your own into the files: dev to tune and train on, test
# to compare on. CSV and Parquet do as well.
summary: Questions of my own.
data:
  dev: dev.jsonl
  test: test.jsonl
prompt: "{question}"  # fields of the records in braces
gold: "{answer}"
chat: true            # each model reads the question through its own chat template
max_new_tokens: 128
metric: {kind: contains}  # or exact-match, numeric, or yours as file.py:function
"""
_QUESTIONS = {
    "dev.jsonl": [{"question": "What is the capital of France?", "answer": "Paris"}],
    "test.jsonl": [{"question": "What is the capital of Japan?", "answer": "Tokyo"}],
}
_POLICY = '''\
"""A policy of your own: who writes the next token.

    multicolm generate {here}ensemble.yaml "PROMPT" --policy {here}policy.py:Mine --trace
"""

import torch

import multicolm


@multicolm.register_policy("mine")
class Mine(multicolm.SelectPolicy):
    threshold: float = 0.5  # fields are params: --set threshold=0.7; `multicolm tune` finds them
    tunable = {{"threshold": (0.2, 0.35, 0.5, 0.65, 0.8)}}

    base_signals = frozenset({{"top1"}})  # what it reads of the base model, and of the assistants
    assistant_signals = frozenset({{"top1"}})
    assistants = "deferred"  # these run only where `defers` says so

    def defers(self, views: multicolm.Views) -> torch.Tensor:
        return views.base.top1_probs < self.threshold

    def select(self, views: multicolm.Views) -> torch.Tensor:
        return views.stack(lambda view: view.top1_probs).argmax(0)  # the surest model writes
'''


@click.command(
    epilog=examples(
        "init mine",
        "init mine --base HuggingFaceTB/SmolLM2-135M-Instruct --assistant ./my-expert",
    )
)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=".")
@click.option("--base", metavar="MODEL", help="The base model.")
@click.option("--assistant", "assistants", metavar="MODEL", multiple=True, help="Repeatable.")
def command(folder: Path, base: str | None, assistants: tuple[str, ...]) -> None:
    """Write an ensemble, a task and a policy into FOLDER, to begin with.

    A MODEL is a name (see `multicolm ls models`), a folder, an id of the Hub, or a GGUF file. What
    is not given is asked for. No model is loaded or fetched, and no file is overwritten.
    """
    if base is None or not assistants:
        base, assistants = _asked(base, assistants)
    files = _files(folder, base, assistants)
    for path in files:
        if path.exists():
            raise InputError(f"{path} exists already; choose another folder, or move it away.")
    _check(folder, files[folder / "ensemble.yaml"])
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
        click.echo(str(path))
    here = _here(folder)
    click.echo(
        f"\nNext:\n  multicolm validate {here}ensemble.yaml --load\n"
        f'  multicolm generate {here}ensemble.yaml "PROMPT" --chat --trace'
    )


def _asked(base: str | None, assistants: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The models that are not given, from whoever sits at the terminal.

    Raises:
        InputError: if nobody does.
    """
    if not sys.stdin.isatty():
        raise InputError("which models? Give --base MODEL and --assistant MODEL.")
    click.echo(
        "A model is a name (multicolm ls models), a folder, an id of the Hub, or a GGUF file."
    )
    base = base or str(click.prompt("Base model"))
    named = list(assistants) or [str(click.prompt("Assistant"))]
    while not assistants:
        more = click.prompt("Another assistant (empty: no more)", default="", show_default=False)
        if not more:
            break
        named.append(more)
    return base, tuple(named)


def _files(folder: Path, base: str, assistants: tuple[str, ...]) -> dict[Path, str]:
    """Every file with its text."""
    here = _here(folder)
    names: list[str] = []
    lines: list[str] = []
    for model in (base, *assistants):
        names.append(_name(model, names))
        where = str(Path(model).expanduser().absolute()) if Path(model).exists() else model
        backend = "backend: llama-cpp, " if model.endswith(".gguf") else ""
        lines.append(f"  {names[-1]}: {{{backend}model: {json.dumps(where)}}}")
    return {
        folder / "ensemble.yaml": _ENSEMBLE.format(
            here=here, base=names[0], models="\n".join(lines)
        ),
        folder / "task.yaml": _TASK,
        folder / "policy.py": _POLICY.format(here=here),
        **{
            folder / name: "".join(json.dumps(record) + "\n" for record in records)
            for name, records in _QUESTIONS.items()
        },
    }


def _here(folder: Path) -> str:
    """What is written before a file's name, so that it is found from here."""
    return "" if folder == Path(".") else f"{folder}/"


def _name(model: str, taken: list[str]) -> str:
    """What a model is called in the ensemble: the end of its place, once."""
    stem = Path(model.rstrip("/")).name.removesuffix(".gguf")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "model"
    number = sum(re.sub(r"-\d+$", "", other) == name for other in taken)
    return f"{name}-{number + 1}" if number or name in ("base", "assistant", "mixture") else name


def _check(folder: Path, text: str) -> None:
    """Refuse an ensemble that would not do, before a file of it is written.

    Raises:
        ConfigError: with what is wrong.
    """
    from multicolm.cli.progress import say
    from multicolm.config import parse_ensemble

    config = parse_ensemble(text, folder / "ensemble.yaml")
    for warning in config.warnings:
        say(f"Warning: {warning}")

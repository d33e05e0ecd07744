"""``multicolm generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from multicolm.cli.options import (
    Whole,
    as_json,
    ensemble_argument,
    examples,
    json_option,
    load,
    policy_options,
    writing_options,
)
from multicolm.errors import InputError
from multicolm.records import text_lines

if TYPE_CHECKING:
    from multicolm.decoding.streaming import Stream
    from multicolm.ensemble import Ensemble
    from multicolm.types import Answer, Piece, Prompt

__all__ = ["command", "read_prompts"]


def read_prompts(source: str) -> list[Any]:
    """The prompts of a file, or of standard input for ``-``.

    One prompt per line, blank lines skipped; where the first line is a JSON object with a
    ``prompt`` or ``messages``, every line must be one. There a prompt may also be a chat or a list
    of token ids; of ``messages`` a last one of the assistant is left off, for it is to be written.

    Raises:
        InputError: if it cannot be read, is not UTF-8, holds no prompt, or a line is not right.
    """
    name = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        lines = text_lines(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        n_line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{name}:{n_line}: not UTF-8 text; convert it first.") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}.") from error
    numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(f"{name}: holds no prompt; write one per line.")
    if source.endswith(".jsonl") or _json_prompt(numbered[0][1]) is not None:
        return [_checked(line, f"{name}:{n}") for n, line in numbered]
    return [line for _, line in numbered]


def _json_prompt(line: str) -> Any:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    messages = value.get("messages")
    if not isinstance(messages, list) or "prompt" in value:
        return value.get("prompt")
    last = messages[-1] if messages else None
    is_answered = isinstance(last, dict) and last.get("role") == "assistant"
    return messages[:-1] if is_answered else messages


def _checked(line: str, place: str) -> Any:
    prompt = _json_prompt(line)
    if prompt is None:
        raise InputError(
            f'{place}: must be a JSON object with a "prompt" or "messages", got {line[:40]!r}.'
        )
    return prompt


@click.command(
    epilog=examples(
        'generate tiny "What is Dulerex made from?" --chat --trace',
        "generate duo.yaml --from questions.txt --policy confidence --set threshold=0.7 --json",
    )
)
@ensemble_argument
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@policy_options
@writing_options
@click.option(
    "--from", "source", metavar="FILE", help="Prompts, one per line or as JSONL; - is stdin."
)
@click.option(
    "--chat", is_flag=True, help="Each prompt is a user's message: apply the chat template."
)
@click.option(
    "--batch-size", type=Whole(1), default=16, show_default=True, help="Texts decoded together."
)
@click.option("--trace", is_flag=True, help="Show which model wrote each token.")
@click.option(
    "--usage", is_flag=True, help="Print passes, tokens and seconds of each model to stderr."
)
@json_option
@click.option(
    "--top-logprobs",
    metavar="N",
    type=Whole(0),
    help="With --json: the N most likely tokens at each position.",
)
def command(
    ensemble: str,
    prompts: tuple[str, ...],
    policy: str | None,
    pairs: tuple[str, ...],
    settings: dict[str, Any],
    source: str | None,
    chat: bool,
    batch_size: int,
    trace: bool,
    usage: bool,
    as_json_: bool,
    top_logprobs: int | None,
) -> None:
    """Write a text for each PROMPT with ENSEMBLE.

    ENSEMBLE is a name (see `multicolm ls ensembles`), a YAML file, or a folder with an
    ensemble.yaml.
    """
    asked = [*prompts, *(read_prompts(source) if source else [])]
    if not asked:
        raise InputError("no prompt; give one as an argument, or a file of them with --from.")
    if top_logprobs and not as_json_:
        raise InputError("--top-logprobs requires --json.")
    if chat:
        asked = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            for prompt in asked
        ]
    loaded, chosen = load(ensemble, policy, pairs)
    stream = loaded.stream(
        asked, chosen, batch_size=batch_size, top_logprobs=top_logprobs, **settings
    )
    if as_json_:
        _print_json(stream, len(asked))
    else:
        _print_text(stream, loaded, asked, trace)
    if usage:
        _print_usage(stream)


def _print_json(stream: Stream, n_prompts: int) -> None:
    """One line per answer in the order of the prompts, each as soon as that allows."""
    from multicolm.cli.progress import text_bar

    waiting: dict[int, Answer] = {}
    n_printed = 0
    try:
        with text_bar(n_prompts) as advance:
            for number, answer in stream.finished():
                waiting[number] = answer
                while n_printed in waiting:
                    click.echo(as_json(waiting.pop(n_printed).as_json()))
                    n_printed += 1
                advance()
    finally:  # What was finished before Ctrl-C is not lost.
        for number in sorted(waiting):
            click.echo(as_json(waiting[number].as_json()))


def _print_text(stream: Stream, ensemble: Ensemble, prompts: Sequence[Prompt], trace: bool) -> None:
    from multicolm.cli.console import Screen
    from multicolm.cli.progress import working

    screen = Screen(ensemble.models, trace=trace)
    if len(prompts) == 1:
        # Before the first piece, caches and what leads from one vocabulary to another are built.
        with working("reading the prompt"):
            written = iter(stream)
            first = list(islice(written, 1))
        for piece in chain(first, written):
            screen.show(piece)
        screen.end(stream.answers[0])
        return
    pieces: dict[int, list[Piece]] = {}
    try:
        with working(f"writing {len(prompts)} texts"):
            for piece in stream:
                pieces.setdefault(piece.row, []).append(piece)
    finally:
        whole = len(stream.answers) == len(prompts)
        # After Ctrl-C or an error: what was written by then, so that it is not lost.
        for row in range(len(prompts)) if whole else sorted(pieces):
            click.echo(_heading(row + 1, len(prompts), prompts[row]))
            for piece in pieces.get(row, []):
                screen.show(piece)
            screen.end(stream.answers[row] if whole else None)
            click.echo()


def _heading(number: int, n_prompts: int, prompt: Prompt) -> str:
    from multicolm.cli.console import visible
    from multicolm.types import OwnTokens

    last = prompt if isinstance(prompt, str | OwnTokens) else prompt[-1]
    shown = last["content"] if isinstance(last, dict) else str(last)
    shown = visible(" ".join(shown.split()))
    return f"[{number}/{n_prompts}] {shown if len(shown) <= 70 else shown[:67] + '...'}"


def _print_usage(stream: Stream) -> None:
    from multicolm.cli.console import print_usage
    from multicolm.types import MIXTURE

    n_mixed = sum(token.model == MIXTURE for a in stream.answers for token in a.trace)
    print_usage(stream.answers.usage, n_mixed)

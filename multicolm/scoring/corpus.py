"""Texts to learn from: prompts, and completions that are known to be right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multicolm.decoding.prompts import check_prompt
from multicolm.errors import ConfigError, InputError
from multicolm.records import Source
from multicolm.types import Prompt

__all__ = ["Corpus", "Example", "open_corpus"]

_FORMS = (
    'a record is {"prompt": text or messages, "completion": text} or {"messages": [...]} that end '
    "with one of the assistant"
)


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its right completion.

    Attributes:
        prompt: a text, or a chat.
        completion: the text that should follow.
        place: where it is, for messages: ``train.jsonl:12``.
    """

    prompt: Prompt
    completion: str
    place: str

    @property
    def canonical(self) -> bytes:
        """What makes it this example, whatever file it is from."""
        return json.dumps(
            [self.prompt, self.completion], ensure_ascii=False, sort_keys=True
        ).encode()


class Corpus:
    """Examples that can be read through any number of times; never all in memory.

    Args:
        source: where its records are.
        limit: only so many of them, spread evenly: files are often sorted by kind.
    """

    def __init__(self, source: Source, limit: int | None = None):
        self.source = source
        self._limit = limit

    def __iter__(self) -> Iterator[Example]:
        """All examples, in their order.

        Raises:
            InputError: if a record is not right, or there is none.
            ConfigError: if the source cannot be read.
        """
        empty = True
        for place, record in self._chosen():
            empty = False
            yield _example(record, place)
        if empty:
            raise InputError(f"{self.source.name} holds no example; {_FORMS}.")

    def _chosen(self) -> Iterator[tuple[str, Any]]:
        n_records = 0 if self._limit is None else sum(1 for _ in self.source)
        if self._limit is None or self._limit >= n_records:
            yield from self.source
            return
        numbers = {i * n_records // self._limit for i in range(self._limit)}
        for number, record in enumerate(self.source):
            if number in numbers:
                yield record

    @property
    def has_chats(self) -> bool:
        """Whether a prompt is a chat, which goes through each model's template."""
        return any(not isinstance(example.prompt, str) for example in self)

    def digest(self) -> str:
        """SHA-256 over all examples: equal for equal examples in equal order, in any format."""
        digest = hashlib.sha256()
        for example in self:
            digest.update(example.canonical + b"\n")
        return digest.hexdigest()


def open_corpus(
    source: str | Path,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
) -> Corpus:
    """The corpus that ``source`` speaks of; nothing is read yet.

    Args:
        source: a file of JSON lines, a CSV or Parquet file, or the name of a data set on the Hub.
        split: of a data set of the Hub.
        subset: of a data set of the Hub, where it has several.
        revision: of a data set of the Hub.
        limit: only so many of its examples, spread evenly.

    Raises:
        ConfigError: if it is no file and no name of a Hub data set.
    """
    found = Source(str(source), split, subset, revision)
    if found.problem:
        raise ConfigError(found.problem)
    return Corpus(found, limit)


def _example(record: Any, place: str) -> Example:
    if not isinstance(record, Mapping):
        raise InputError(f"{place}: {_FORMS}.")
    prompt: Any
    completion: Any
    if "messages" in record:
        prompt, completion = _split_chat(record["messages"], place)
    else:
        prompt, completion = record.get("prompt"), record.get("completion")
    if not isinstance(completion, str) or prompt is None:
        raise InputError(f"{place}: {_FORMS}; this one has {', '.join(record) or 'nothing'}.")
    check_prompt(prompt, f"{place}: the prompt")
    if not isinstance(prompt, str) and not isinstance(prompt[0], Mapping):
        raise InputError(f"{place}: {_FORMS}; the prompt of this one is a list of token ids.")
    example = Example(prompt, completion, place)
    try:
        example.canonical  # noqa: B018  # a lone surrogate anywhere, also in a message's role
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}: holds a character that is not valid Unicode; read the text as UTF-8 first."
        ) from error
    return example


def _split_chat(messages: Any, place: str) -> tuple[list[Any], str]:
    """What precedes the last message, which has to be the assistant's, and its text."""
    last = messages[-1] if isinstance(messages, list) and len(messages) > 1 else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise InputError(f"{place}: {_FORMS}.")
    content = last.get("content")
    if not isinstance(content, str):
        raise InputError(f"{place}: {_FORMS}.")
    return list(messages[:-1]), content

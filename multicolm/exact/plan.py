"""What the settings of a tokenizer (its ``tokenizer.json``) say about how it cuts texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["BLANK", "NotCovered", "Plan", "plan_of"]

BLANK = "\u2581"
"""How SentencePiece writes a blank."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = " [^ ]*|[^ ]+"


class NotCovered(Exception):
    """Why a tokenizer is not covered; never leaves the package."""


@dataclass(frozen=True)
class Plan:
    """How a tokenizer of the tokenizers library cuts texts into pieces."""

    is_byte_level: bool
    patterns: list[tuple[str, str]]  # ("regex", expression) or ("digits", "")
    raw_added: dict[str, int]  # added tokens by what they look like in a text
    late_added: dict[str, int]  # those that are looked for after normalization


def plan_of(settings: Mapping[str, Any]) -> Plan:
    """How a byte-pair encoding cuts texts.

    Raises:
        NotCovered: if it is in a manner that is not followed.
    """
    model = settings["model"]
    if model["type"] != "BPE":
        raise NotCovered(f"its model is {model['type']}")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise NotCovered(f"it has the option {option}")
    blanks = _replaces_blanks(settings["normalizer"])
    parts = list(_flat(settings["pre_tokenizer"]))
    is_byte_level = any(part["type"] == "ByteLevel" for part in parts)
    blanks_later = any(part["type"] == "Metaspace" for part in parts)
    if is_byte_level == (blanks or blanks_later):
        raise NotCovered("it is neither byte-level nor does it write blanks as U+2581")
    if not is_byte_level and not model.get("byte_fallback"):
        raise NotCovered("it has no byte fallback")
    patterns = [pattern for part in parts for pattern in _patterns(part, blanks)]
    raw, late = _added(settings["added_tokens"], is_byte_level)
    return Plan(is_byte_level, patterns, raw, late)


def _flat(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part.get("normalizers", part.get("pretokenizers", ())):
            yield from _flat(inner)
    else:
        yield part


def _replaces_blanks(normalizer: Mapping[str, Any] | None) -> bool:
    replaces = False
    for part in _flat(normalizer):
        if part == {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}:
            replaces = True
        elif part["type"] != "NFC":
            raise NotCovered(f"its normalizer {part['type']} changes the text")
    return replaces


def _patterns(part: Mapping[str, Any], blanks: bool) -> Iterator[tuple[str, str]]:
    kind = part["type"]
    if kind == "ByteLevel":
        if part.get("use_regex", True):
            yield "regex", _GPT2
    elif kind == "Digits":
        yield "digits", "" if part.get("individual_digits") else "+"
    elif kind == "Metaspace" and part.get("replacement") == BLANK:
        if part.get("split", True):
            yield "regex", _WORDS
    elif kind == "Split":
        is_regex, source = "Regex" in part["pattern"], next(iter(part["pattern"].values()))
        if blanks:
            # Gemma splits at blanks, of which its normalizer has left none.
            if is_regex or source != " ":
                raise NotCovered(f"its pre-tokenizer splits by {source!r} after a normalizer")
        elif part["behavior"] != "Isolated":
            raise NotCovered(f"its pre-tokenizer splits with behavior {part['behavior']}")
        else:
            yield "regex", source if is_regex else re.sub(r"(\W)", r"\\\1", source)
    else:
        raise NotCovered(f"its pre-tokenizer {kind} is unknown")


def _added(
    added: Sequence[Mapping[str, Any]], is_byte_level: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Added tokens of text: those looked for before normalization, and those after it."""
    raw: dict[str, int] = {}
    late: dict[str, int] = {}
    specials = [token["content"] for token in added if token["special"]]
    for token in added:
        if token["special"]:
            continue
        content = token["content"]
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise NotCovered(f"its added token {content!r} depends on its neighbours")
        if any(_overlap(content, special) for special in specials):
            raise NotCovered(f"its added token {content!r} overlaps a special token")
        if token["normalized"] and not is_byte_level:
            content = content.replace(BLANK, " ")
        (late if token["normalized"] else raw)[content] = token["id"]
    return raw, late


def _overlap(a: str, b: str) -> bool:
    """Whether some text has both strings at places that share a character."""
    return (
        a in b
        or b in a
        or any(a.endswith(b[:n]) or b.endswith(a[:n]) for n in range(1, min(len(a), len(b))))
    )

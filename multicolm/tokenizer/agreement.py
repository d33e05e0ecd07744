"""Where two tokenizers of one vocabulary part: a GGUF file's, say, and its Hugging Face twin's."""

from __future__ import annotations

from collections.abc import Sequence

from multicolm.errors import shorten
from multicolm.tokenizer.base import TokenizerAdapter

__all__ = ["PROBES", "differences"]

PROBES = (
    "What is 2 * x + 15 if x = 7? 1234567890 3.14",
    "  two  blanks,   three\n\n\nlines \n \t\ttabs  12\r\n\r\n7 ",
    "def f(x):\n\tif x:\n\t\treturn  1\n",
    "don't I'll WE'RE __init__ a.b/c?d=e&f !!! (){}[]",
    "naïve café Straße \xad\xa0\xbd\xb2 \u01c5",
    "e\u0301 a\u0308\u0323 \u1100\u1161 \u0915\u094d\u0937\u093f \u0e01\u0e47",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202eabc\u202c \u0663",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f1e9\U0001f1ea a\u200db\u200c\ufeff",
    "a\x00b\x07\x1f\x7f \ufffd \U0010ffff",
)
"""Texts on which tokenizers part: digits after blanks, blank runs, tabs in code, accents in two
characters, scripts without blanks or from right to left, joined emoji, control characters."""

_MOST_TEXTS = 3


def differences(
    one: TokenizerAdapter, other: TokenizerAdapter, texts: Sequence[str] = PROBES
) -> list[str]:
    """Where two tokenizers of one vocabulary differ, one sentence for each way.

    Args:
        one: that is used.
        other: that it is compared with.
        texts: that both cut into tokens, at the start of a text and within one.
    """
    found = []
    starts = [t.encode("") for t in (one, other)]
    if starts[0] != starts[1]:
        found.append(
            f"puts {_named(one, starts[0])} at the start of a text, and the other "
            f"{_named(other, starts[1])}"
        )
    if one.end_ids != other.end_ids:
        found.append(
            f"ends a text with {_named(one, sorted(one.end_ids))}, and the other with "
            f"{_named(other, sorted(other.end_ids))}"
        )
    n = min(one.n_tokens, other.n_tokens)
    bytes_ = [i for i in range(n) if one.token_bytes(i) != other.token_bytes(i)]
    if bytes_:
        i = bytes_[0]
        found.append(
            f"reads {len(bytes_)} tokens otherwise, such as {i}: {one.token_bytes(i)!r} here, "
            f"{other.token_bytes(i)!r} in the other"
        )
    parted = [text for text in texts if one.encode(text) != other.encode(text)]
    for text in parted[:_MOST_TEXTS]:
        found.append(_parting(text, one, other))
    if len(parted) > _MOST_TEXTS:
        found.append(f"cuts {len(parted)} of {len(texts)} probe texts otherwise in all")
    return found


def _parting(text: str, one: TokenizerAdapter, other: TokenizerAdapter) -> str:
    """The first tokens in which two encodings of a text differ, until both have read the same."""
    mine, theirs = one.encode(text), other.encode(text)
    first = next(
        (i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]),
        min(len(mine), len(theirs)),
    )
    a, b = first + 1, first + 1
    while (ends := (one.decode(mine[:a]), other.decode(theirs[:b])))[0] != ends[1]:
        if len(ends[0]) < len(ends[1]) and a < len(mine):
            a += 1
        elif b < len(theirs):
            b += 1
        else:
            a, b = len(mine), len(theirs)
            break
    spans = (mine[first:a], theirs[first:b])
    return (
        f"cuts {shorten(repr(text), 60)} otherwise: {_ids(one, spans[0])} here, "
        f"{_ids(other, spans[1])} in the other"
    )


def _ids(tokenizer: TokenizerAdapter, ids: Sequence[int]) -> str:
    return " ".join(f"{i}={tokenizer.piece(i)!r}" for i in ids[:8]) or "nothing"


def _named(tokenizer: TokenizerAdapter, ids: Sequence[int]) -> str:
    return ", ".join(f"{tokenizer.piece(i)} ({i})" for i in ids) or "nothing"

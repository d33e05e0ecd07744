r"""Cuts: places where a text can be cut, so that its parts have the tokens of the whole.

A tokenizer changes earlier tokens when a text grows ("th" becomes "the"), and most of all where
its pre-tokenizer looks ahead. At a cut it does not: whatever follows, the tokens in front of it
stay, and those after it are the ones of the rest alone. Three reasons for a cut are known.

- :class:`SplitCuts`: the pre-tokenizer always splits there, seen from the two characters around
  it, such as a letter and a space. Regular expressions are taken apart into their alternatives,
  and each must be one for which this holds (``_ALTERNATIVES``).
- :class:`PairCuts`: no token of a BPE vocabulary holds the two characters around it side by side,
  so no merge can ever join them. This serves SentencePiece models, which split nothing first.
- :class:`GreedyCuts`: the longest token that fits is taken from left to right, so a token is
  settled as soon as the longest of all would have fitted.

Law, for every ``p`` of ``places(text, stop)`` and every text ``more``::

    encode(text[:p]) + encode(text[p:] + more) == encode(text + more)
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

__all__ = ["AddedTokens", "Cuts", "GreedyCuts", "PairCuts", "SplitCuts", "cuts_of"]

_Pairs = set[tuple[str, str]]  # kinds of two neighbours


class Cuts(ABC):
    """Finds the places where a text can be cut.

    Attributes:
        reach: how many characters after a place are needed to tell whether it is one.
    """

    reach: int

    @abstractmethod
    def places(self, text: str, stop: int) -> Iterator[int]:
        """Cuts of a text that itself begins at a cut, in rising order.

        Args:
            text: the text; bytes that are no UTF-8 are escaped as by ``surrogateescape``.
            stop: the last place to consider, at most ``len(text) - reach``.

        Yields:
            numbers of characters in front of the cuts, from 1 to ``stop``.
        """


class AddedTokens:
    """Which neighbours an added token of text may hold side by side, or may look at.

    Added tokens are found before anything else, and may span what the pre-tokenizer would split.

    Args:
        tokens: the entries of a tokenizer's list of added tokens, special ones left out.
    """

    def __init__(self, tokens: Sequence[Mapping[str, Any]]) -> None:
        self._pairs: set[str] = set()
        self._last: set[str] = set()
        self._first: set[str] = set()
        for token in tokens:
            for spelling in _spellings(token["content"]):
                self._pairs |= _neighbours(spelling)
                if token["rstrip"] or token["single_word"]:
                    self._last.add(spelling[-1])
                if token["single_word"]:
                    self._first.add(spelling[0])

    def may_join(self, left: str, right: str) -> bool:
        """Whether one of them may span the place between these two characters."""
        return left + right in self._pairs or left in self._last or right in self._first


class SplitCuts(Cuts):
    """Cuts where the pre-tokenizer always splits.

    Args:
        pairs: kinds of two neighbours between which it does.
        added: the added tokens of text.
        composes: whether the tokenizer puts characters together first (NFC).
    """

    reach = 1

    def __init__(
        self, pairs: Collection[tuple[str, str]], added: AddedTokens, *, composes: bool
    ) -> None:
        self._pairs = frozenset(pairs)
        self._added = added
        self._composes = composes

    def places(self, text: str, stop: int) -> Iterator[int]:
        """See :class:`Cuts`."""
        for place in range(1, stop + 1):
            left, right = text[place - 1], text[place]
            if (_kind(left), _kind(right)) in self._pairs and self._holds(left, right):
                yield place

    def _holds(self, left: str, right: str) -> bool:
        return (
            right not in _APOSTROPHES
            and not self._added.may_join(left, right)
            and not (self._composes and _composed(left + right) != left + right)
        )


class PairCuts(Cuts):
    """Cuts between characters that no token holds side by side.

    Bytes that are no UTF-8 have tokens of their own here, so there are cuts beside them.

    Args:
        pieces: the vocabulary, in which U+2581 stands for a space.
        added: the added tokens of text.
    """

    reach = 1

    def __init__(self, pieces: Iterable[str], added: AddedTokens) -> None:
        self._joined = {pair for piece in pieces for pair in _neighbours(piece)}
        self._added = added

    def places(self, text: str, stop: int) -> Iterator[int]:
        """See :class:`Cuts`."""
        marked = text.replace(" ", _MARK)
        for place in range(1, stop + 1):
            joined = marked[place - 1 : place + 1] in self._joined
            if not joined and not self._added.may_join(text[place - 1], text[place]):
                yield place


class GreedyCuts(Cuts):
    """Cuts of a tokenizer that takes the longest token that fits, from left to right.

    Args:
        tokens: its tokens of text.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = frozenset(tokens)
        self._longest = max(map(len, self._tokens), default=1)
        self.reach = self._longest - 1

    def places(self, text: str, stop: int) -> Iterator[int]:
        """See :class:`Cuts`; none after a place at which no token fits."""
        lengths = range(self._longest, 0, -1)
        broken = _ESCAPED.search(text)
        if broken is not None:  # it will be read as something else, maybe with what is before it
            stop = min(stop, broken.start() - self.reach)
        place = 0
        while place < stop:
            fits = (n for n in lengths if text[place : place + n] in self._tokens)
            place += next(fits, stop)
            if place <= stop:
                yield place


def cuts_of(settings: Mapping[str, Any], pieces: Collection[str]) -> Cuts | None:
    """The cuts of a tokenizer of the tokenizers library; ``None`` if it is of no known manner.

    Args:
        settings: its ``tokenizer.json``, changed so as to put nothing in front of a text. Special
            tokens are not looked for in texts.
        pieces: its vocabulary, without added tokens.
    """
    model = settings["model"]
    added = [token for token in settings["added_tokens"] if not token["special"]]
    normalizers = list(_parts(settings["normalizer"], "normalizers"))
    if (
        model["type"] not in ("BPE", "Unigram")
        or model.get("dropout") is not None
        or any(token["lstrip"] for token in added)  # takes white space in front of it, any amount
        or not all(map(_is_known_normalizer, normalizers))
    ):
        return None
    kinds = {part["type"] for part in normalizers}
    composes, marks = "NFC" in kinds, "Replace" in kinds
    pairs: _Pairs = set()
    for splitter in _parts(settings["pre_tokenizer"], "pretokenizers"):
        found = _split_pairs(splitter, marks=marks)
        if found is None:
            return None
        pairs |= found
        marks = marks or splitter["type"] == "Metaspace"
    if pairs:
        return SplitCuts(pairs, AddedTokens(added), composes=composes)
    if marks and not composes and _merges_characters(model, pieces):
        return PairCuts(pieces, AddedTokens(added))
    return None


_MARK = "\u2581"  # how SentencePiece writes a space
_APOSTROPHES = "'\u2019"  # "'s" may belong to the word in front of it
_ESCAPED = re.compile("[\udc80-\udcff]")  # a byte that is no UTF-8
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def _spellings(content: str) -> set[str]:
    """How an added token may stand in a text, before or after the normalizer."""
    marked = {content, content.replace(_MARK, " "), content.replace(" ", _MARK)}
    return {*marked, *map(_composed, marked)} - {""}


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _neighbours(text: str) -> set[str]:
    return {text[i : i + 2] for i in range(len(text) - 1)}


@lru_cache(maxsize=1 << 14)
def _kind(character: str) -> str:
    """The kind of a character, if it is beyond doubt.

    Tokenizers follow one version of Unicode, and Python another; a character counts only if it has
    been of one kind from version 3.2 on.
    """
    if character == " ":
        return "space"
    if character in "\t\n\r":
        return "blank"
    category = unicodedata.category(character)
    if category != unicodedata.ucd_3_2_0.category(character):
        return "other"
    return {"L": "letter", "N": "number", "P": "sign", "S": "sign"}.get(category[0], "other")


# Between which neighbours the matches for words, numbers and signs end in any case. Between a
# number and a letter, and between a sign and anything but a space, some of them go on.
_ENDS: dict[str, _Pairs] = {
    "word": {("letter", right) for right in ("number", "sign", "space", "blank")},
    "number": {("number", right) for right in ("sign", "space", "blank")},
    "sign": {("sign", "space")},
    "other": set(),
}
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

# Alternatives of the regular expressions of known tokenizers. For each was checked: it matches
# across none of the pairs of `_ENDS`; what it matches in front of such a pair does not change if
# the text ends there; it does not look behind. (White space that it begins with may go on with
# more of it, so nothing is said about places after white space.)
# Source: tokenizer.json of GPT-2, cl100k, o200k, Llama 3, Qwen 2 to 3.5, DeepSeek 3, Tekken.
_ALTERNATIVES: dict[str, str] = {
    **dict.fromkeys(("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", _SUFFIX), "other"),
    r"'(?:[sdmt]|ll|ve|re)": "other",
    r"'(?i:[sdmt]|ll|ve|re)": "other",
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": "other",
    r" ?\p{L}+": "word",
    r"[^\r\n\p{L}\p{N}]?\p{L}+": "word",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+": "word",
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+": "word",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+": "word",
    **{
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{upper}{_LOWER}{lower}{suffix}": "word"
        for upper, lower in (("*", "+"), ("+", "*"))
        for suffix in ("", f"{_SUFFIX}?")
    },
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""": "other",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+": "other",
    r"\p{N}": "number",
    r"\p{N}+": "number",
    r"\p{N}{1,3}": "number",
    r" ?\p{N}+": "number",
    r" ?[^\s\p{L}\p{N}]+": "sign",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*": "sign",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*": "sign",
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*": "sign",
    r" ?[\p{P}\p{S}]+[\r\n]*": "sign",
    **dict.fromkeys((r"\s*[\r\n]+", r"\s*[\r\n]", r"\s+(?!\S)", r"\s+", r"\s", r"\s+$"), "other"),
}
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _split_pairs(splitter: Mapping[str, Any], *, marks: bool) -> _Pairs | None:
    """Between which neighbours a pre-tokenizer always splits; ``None`` if it is not known.

    One that is known and does not split at such a place lets others do it: on each side it splits
    as it would without the other one.

    Args:
        splitter: its settings.
        marks: whether spaces have been turned into marks before it.
    """
    kind = splitter["type"]
    if kind == "Digits":
        return _ENDS["number"]
    if kind == "ByteLevel" and not splitter["use_regex"]:
        return set()
    if kind == "ByteLevel" and not marks:
        return _regex_pairs(_GPT2)
    if kind == "Metaspace" and splitter["replacement"] == _MARK:
        lefts = ("letter", "number", "sign") if splitter["split"] else ()
        return {(left, "space") for left in lefts}
    if kind == "Split":
        pattern, manner = splitter["pattern"], (splitter["behavior"], splitter["invert"])
        if pattern == {"String": " "} and manner == ("MergedWithPrevious", False):
            return set()  # after every space, whatever is around; no use is made of this
        if "Regex" in pattern and manner in _WHOLE and not marks:
            return _regex_pairs(pattern["Regex"])
    return None


_WHOLE = (("Isolated", False), ("Removed", True))  # matches are pieces, and so is what is between


def _regex_pairs(pattern: str) -> _Pairs | None:
    pairs: _Pairs = set()
    for alternative in _alternatives(pattern.replace("\r", r"\r").replace("\n", r"\n")):
        # One that gives nothing back matches the same: what follows shares no character with it.
        kind = _ALTERNATIVES.get(alternative) or _ALTERNATIVES.get(_giving_back(alternative))
        if kind is None:
            return None
        pairs |= _ENDS[kind]
    return pairs


def _giving_back(alternative: str) -> str:
    """An alternative without possessive quantifiers."""
    return re.sub(r"([]}\w][+*?]|\})\+", r"\1", alternative)


def _alternatives(pattern: str) -> Iterator[str]:
    """A regular expression cut at the ``|`` that stand in no parentheses and no class."""
    depth, begin, in_class = 0, 0, False
    for match in re.finditer(r"\\.|[\[\]()|]", pattern, re.DOTALL):
        sign = match[0]
        if in_class:
            in_class = sign != "]"
        elif sign == "[":
            in_class = True
        elif sign in "()":
            depth += 1 if sign == "(" else -1
        elif sign == "|" and depth == 0:
            yield pattern[begin : match.start()]
            begin = match.end()
    yield pattern[begin:]


def _parts(part: Mapping[str, Any] | None, key: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one after another."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[key]:
            yield from _parts(inner, key)
    else:
        yield part


def _is_known_normalizer(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Replace":
        return bool(part["pattern"] == {"String": " "} and part["content"] == _MARK)
    return bool(part["type"] == "NFC")


def _merges_characters(model: Mapping[str, Any], pieces: Collection[str]) -> bool:
    """Whether tokens come from merges of neighbouring characters and from nothing else."""
    return (
        model["type"] == "BPE"
        and model["byte_fallback"]
        and not model["ignore_merges"]
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        # A character without a token becomes its bytes, which nothing merges.
        and all(byte in pieces for byte in _BYTES)
        and not any("<0x" in piece for piece in pieces if piece not in _BYTES)
    )

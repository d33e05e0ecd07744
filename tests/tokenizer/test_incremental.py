"""A growing text has the tokens of the whole text, whatever it came in, at a cost that stays."""

from __future__ import annotations

import itertools
import random
import statistics
import subprocess
import sys
import time
from functools import cached_property
from typing import Any

import pytest
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer.built import (
    BYTE_LEVEL,
    COMPOSING,
    CORPUS,
    KINDS,
    LLAMA3,
    SENTENCEPIECE,
    adapter,
    byte_level_bpe,
    random_text,
    sentencepiece_bpe,
)
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from multicolm.errors import InputError
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.cuts import Cuts, _kind
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer
from multicolm.tokenizer.incremental import IncrementalEncoder
from multicolm.tokenizer.literal import LiteralTokenizer

LITERAL = LiteralTokenizer(
    [*"abcdefghijklmnopqrstuvwxyz .,\n", "ab", "abc", "bcde", " the", "the", "<end>"],
    ends=["<end>"],
)


class Unknown(HuggingFaceTokenizer):
    """A tokenizer of which no cuts are known."""

    @cached_property
    def cuts(self) -> Cuts | None:
        return None


def encoded(tokenizer: TokenizerAdapter, content: bytes | str) -> IncrementalEncoder:
    """An encoder that got a text in one piece."""
    encoder = IncrementalEncoder(tokenizer)
    encoder.append(content.encode() if isinstance(content, str) else content)
    return encoder


def state(encoder: IncrementalEncoder) -> tuple[list[int], list[int], int, int]:
    return list(encoder.ids), list(encoder.ends), encoder.stable, encoder.n_bytes


def adapted(tokenizer: hf.PreTrainedTokenizerFast, **changes: Any) -> HuggingFaceTokenizer:
    """An adapter of a tokenizer some of whose parts are replaced."""
    for part, value in changes.items():
        setattr(tokenizer.backend_tokenizer, part, value)
    return HuggingFaceTokenizer(tokenizer, "m")


# --- the law of cuts -----------------------------------------------------------------------------


def check_cuts(tokenizer: TokenizerAdapter, text: str, more: str) -> int:
    """Every cut keeps the law, whatever follows; how many there were."""
    cuts = tokenizer.cuts
    assert cuts is not None
    whole = tokenizer.encode_continuation(text + more)
    places = list(cuts.places(text, max(0, len(text) - cuts.reach)))
    assert places == sorted({*places}) and all(0 < place <= len(text) for place in places)
    for place in places:
        left = tokenizer.encode_continuation(text[:place])
        assert left + tokenizer.encode_continuation(text[place:] + more) == whole, (
            text[:place],
            text[place:],
            more,
        )
    return len(places)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_cut_has_the_tokens_of_the_whole(kind: str) -> None:
    rng = random.Random(kind)
    n_cuts = sum(check_cuts(adapter(kind), random_text(rng), random_text(rng)) for _ in range(600))
    assert n_cuts > 100, "hardly a cut was tried"


NEIGHBOURS = " \n'1aAé\u0301你。ー😀,/$\u00a0\u2019"


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_cuts_hold_between_all_kinds_of_characters_with_all_kinds_around(kind: str) -> None:
    """Every pair of neighbours with every kind of character on both sides of it, and nothing."""
    for left, right in itertools.product(NEIGHBOURS, repeat=2):
        for before, behind in itertools.product(["", *" 1a'"], repeat=2):
            check_cuts(adapter(kind), before + left + right, behind)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=8),
    st.text("abc", max_size=12),
    st.text("abc", max_size=6),
)
def test_greedy_cuts_hold_for_any_tokens(tokens: list[str], text: str, more: str) -> None:
    tokenizer = LiteralTokenizer(sorted({"a", "b", "c", *tokens}))
    check_cuts(tokenizer, text, more)
    longest = max(map(len, ["a", *tokens]))
    ids = tokenizer.encode(text)
    ends = list(itertools.accumulate(len(tokenizer.token_bytes(i)) for i in ids))
    # All tokens that no continuation can change are known: those with room for the longest one.
    settled = [end for end in ends if end <= len(text) - longest + 1]
    assert list(tokenizer.cuts.places(text, max(0, len(text) - longest + 1))) == settled


def test_a_character_is_of_the_kind_that_the_tokenizers_take_it_for() -> None:
    kinds: dict[str, str] = {}
    for code in itertools.chain(range(0xD800), range(0xE000, 0x33000), range(0xE0000, 0xE0200)):
        kind = _kind(chr(code))
        kinds[kind] = kinds.get(kind, "") + chr(code)
    patterns = {
        "letter": r"\p{L}+",
        "number": r"\p{N}+",
        "sign": r"[\p{P}\p{S}]+",
        "space": " +",
        "blank": r"[\s&&[^ ]]+",
    }
    assert kinds.keys() == {*patterns, "other"}
    for kind, pattern in patterns.items():
        split = pre_tokenizers.Split(Regex(pattern), "removed")
        assert split.pre_tokenize_str(kinds[kind]) == [], f"not all are a {kind}"


def test_no_cut_lies_where_an_added_token_may_be() -> None:
    spanning = ["e d", AddedToken("now", single_word=True), AddedToken("end", rstrip=True)]
    for prefix in (True, False):
        tokenizers = (
            adapted(byte_level_bpe(added=spanning)),
            adapted(sentencepiece_bpe(prefix=prefix, added=spanning)),
        )
        rng = random.Random(0)
        words = ["the dog", " ", "now", "end", "d", "e", "  ", ",", "x", "1", " now", "end ", "\n"]
        for tokenizer in tokenizers:
            n_cuts = 0
            for _ in range(600):
                text, more = ("".join(rng.choices(words, k=rng.randrange(6))) for _ in range(2))
                n_cuts += check_cuts(tokenizer, text, more)
            assert n_cuts > 100


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(lambda: byte_level_bpe(r"\w+|\s+|[^\w\s]+"), id="a pattern of its own"),
        pytest.param(lambda: byte_level_bpe(LLAMA3 + r"|(?<=a)b"), id="looks behind"),
        pytest.param(
            lambda: byte_level_bpe(added=[AddedToken("foo", lstrip=True)]), id="takes blanks"
        ),
        pytest.param(
            lambda: _with(byte_level_bpe(), "normalizer", normalizers.Lowercase()), id="lower case"
        ),
        pytest.param(
            lambda: _with(sentencepiece_bpe(), "normalizer", normalizers.NFKC()), id="NFKC"
        ),
        pytest.param(
            lambda: _with(
                byte_level_bpe(), "pre_tokenizer", pre_tokenizers.ByteLevel(use_regex=False)
            ),
            id="not split",
        ),
        pytest.param(
            lambda: _with(
                byte_level_bpe(),
                "pre_tokenizer",
                pre_tokenizers.Split(Regex(LLAMA3), "merged_with_next"),
            ),
            id="merged",
        ),
    ],
)
def test_a_tokenizer_of_an_unknown_manner_has_no_cuts_and_is_encoded_as_a_whole(
    tokenizer: Any,
) -> None:
    unknown = HuggingFaceTokenizer(tokenizer(), "m")
    assert unknown.cuts is None
    encoder = IncrementalEncoder(unknown)
    text = b""
    for word in CORPUS[0].encode().split(b" "):
        encoder.append(word + b" ")
        text += word + b" "
        assert encoder.ids == unknown.encode_bytes(text)
        assert encoder.stable == 0


def _with(tokenizer: hf.PreTrainedTokenizerFast, part: str, value: Any) -> Any:
    setattr(tokenizer.backend_tokenizer, part, value)
    return tokenizer


# --- the laws of the encoder ---------------------------------------------------------------------


def random_piece(rng: random.Random) -> bytes:
    """Bytes that may begin or end within a character, or be none at all."""
    content = random_text(rng, 5).encode()
    draw = rng.random()
    if draw < 0.3:
        return content[: rng.randrange(len(content) + 1)]
    if draw < 0.4:
        return content[rng.randrange(len(content) + 1) :]
    return content + rng.randbytes(rng.randrange(4)) if draw < 0.45 else content


def check_state(encoder: IncrementalEncoder, tokenizer: TokenizerAdapter, text: bytes) -> None:
    assert encoder.n_bytes == len(text)
    assert encoder.ids == tokenizer.encode_bytes(text)
    assert state(encoder) == state(encoded(tokenizer, text))
    ids, ends, stable, _ = state(encoder)
    assert len(ends) == len(ids) and ends == sorted(ends) and ends[-1:] in ([], [len(text)])
    assert 0 <= stable <= len(ids)
    if tokenizer.decode(ids) == text:
        lengths = (len(tokenizer.token_bytes(token_id)) for token_id in ids)
        assert ends == list(itertools.accumulate(lengths))


@pytest.mark.parametrize("kind", [*KINDS, "unknown"])
def test_a_text_has_the_same_tokens_after_any_edits_as_fresh(kind: str) -> None:
    rng = random.Random(kind)
    tokenizer = adapter(kind) if kind in KINDS else Unknown(byte_level_bpe(), "m")
    encoder, text = IncrementalEncoder(tokenizer), b""
    for _ in range(250):
        draw = rng.random()
        if draw < 0.55:
            piece = random_piece(rng)
            encoder.append(piece)
            text += piece
        elif draw < 0.9:
            n_kept = rng.randrange(len(text) + 1) if draw < 0.6 else len(text) - rng.randrange(25)
            encoder.truncate(max(0, n_kept))
            text = text[: max(0, n_kept)]
        if rng.random() < 0.7:  # else several edits come before anything is asked
            check_state(encoder, tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
def test_no_continuation_changes_a_stable_token(kind: str) -> None:
    rng = random.Random(kind)
    tokenizer = adapter(kind)
    n_stable = 0
    for _ in range(300):
        text, more = random_piece(rng), random_piece(rng)
        encoder = encoded(tokenizer, text)
        stable = encoder.ids[: encoder.stable]
        n_stable += len(stable)
        assert tokenizer.encode_bytes(text + more)[: len(stable)] == stable
    assert n_stable > 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_comes_byte_by_byte_has_its_own_tokens_all_the_way(kind: str) -> None:
    tokenizer = adapter(kind)
    encoder = IncrementalEncoder(tokenizer)
    for text in CORPUS[1:12:3]:
        content = text.encode()
        encoder.truncate(0)
        for i in range(len(content)):
            encoder.append(content[i : i + 1])
            assert encoder.ids == tokenizer.encode_bytes(content[: i + 1])
        assert encoder.ids == tokenizer.encode_continuation(text)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.text("abcde the.\n", max_size=6), st.integers(0, 30)), max_size=12),
)
def test_a_literal_text_has_the_same_tokens_after_any_edits_as_fresh(edits: list[Any]) -> None:
    encoder, text = IncrementalEncoder(LITERAL), ""
    for edit in edits:
        if isinstance(edit, str):
            encoder.append(edit.encode())
            text += edit
        else:
            encoder.truncate(min(edit, len(text)))
            text = text[:edit]
        check_state(encoder, LITERAL, text.encode())
    assert encoder.ids == LITERAL.encode(text)


# --- bytes that are no characters ----------------------------------------------------------------


def pieces(tokenizer: TokenizerAdapter, content: bytes) -> list[str | None]:
    return [tokenizer.piece(i) for i in encoded(tokenizer, content).ids]


def test_a_part_of_a_character_becomes_its_bytes_behind_the_tokens_of_the_whole_ones() -> None:
    smile = "😀".encode()
    for kind in SENTENCEPIECE:
        tokenizer = adapter(kind)
        content = b"the " + smile[:2]
        assert pieces(tokenizer, content)[-2:] == ["<0xF0>", "<0x9F>"]
        assert encoded(tokenizer, content).ids[:-2] == tokenizer.encode_continuation("the ")
    for kind in BYTE_LEVEL:
        tokenizer = adapter(kind)
        content = b"the" + smile[:3]
        ids = encoded(tokenizer, content).ids
        assert [tokenizer.token_bytes(i) for i in ids[-3:]] == [bytes([b]) for b in smile[:3]]
        assert ids[:-3] == tokenizer.encode_continuation("the")


def test_bytes_that_are_no_utf8_stand_between_the_tokens_of_the_text_around_them() -> None:
    for kind in KINDS:
        tokenizer = adapter(kind)
        ids = encoded(tokenizer, b"the\xff\xc3 dog\x80").ids
        assert tokenizer.decode(ids) == b"the\xff\xc3 dog\x80"
        broken = [next(i for i in ids if tokenizer.token_bytes(i) == b) for b in (b"\xff", b"\xc3")]
        last = next(i for i in ids if tokenizer.token_bytes(i) == b"\x80")
        left, right = (tokenizer.encode_continuation(text) for text in ("the", " dog"))
        assert ids == [*left, *broken, *right, last]


def test_where_there_are_no_tokens_for_bytes_they_become_the_replacement_character() -> None:
    tokenizer = LiteralTokenizer(["a", "b", "é", "\ufffd", "\ufffd\ufffd", "a\ufffd"])
    for content in (
        b"a\xffb",
        b"\xc3",
        b"a\xc3\xa9\xc3",
        b"\xe2\x82b\xf0\x9f",
        b"\xff\xff\xffa\xff",
    ):
        assert encoded(tokenizer, content).ids == tokenizer.encode(content.decode(errors="replace"))
    assert tokenizer.encode_bytes(b"ba\xff") == [1, 5]  # together with the text around


def test_a_vocabulary_with_some_bytes_writes_those_and_replaces_the_others() -> None:
    class Some(LiteralTokenizer):
        """``"<c3>"`` stands for the first byte of many a character."""

        def token_bytes(self, token_id: int) -> bytes:
            content = super().token_bytes(token_id)
            return b"\xc3" if content == b"<c3>" else content

    tokenizer = Some(["a", "\ufffd", "<c3>"])
    assert tokenizer.encode_bytes(b"a\xc3") == [0, 2]
    assert tokenizer.encode_bytes(b"a\xc3a\xff") == [0, 2, 0, 1]
    assert tokenizer.encode_bytes(b"\xc3\xff") == [1, 1], "a run of them is of one kind"


def test_the_same_character_in_two_pieces_is_one() -> None:
    for tokenizer in map(adapter, KINDS):
        for character in "é你😀":
            content = character.encode()
            encoder = encoded(tokenizer, b"the " + content[:1])
            assert encoder.ids == tokenizer.encode_bytes(b"the " + content[:1])
            encoder.append(content[1:])
            assert encoder.ids == tokenizer.encode_continuation("the " + character)
            encoder.truncate(5)
            assert encoder.ids == tokenizer.encode_bytes(b"the " + content[:1])


# --- ends where a tokenizer changes the text -----------------------------------------------------


@pytest.mark.parametrize("kind", COMPOSING)
def test_ends_are_exact_at_cuts_where_the_tokenizer_puts_characters_together(kind: str) -> None:
    text = "the cafe\u0301, the cafe\u0301 and"
    encoder = encoded(adapter(kind), text)
    assert not adapter(kind).covers_text(text)
    for word in ("the", "the cafe\u0301, the", "the cafe\u0301, the cafe\u0301 and"):
        assert len(word.encode()) in encoder.ends
    assert encoder.ends == sorted(encoder.ends) and encoder.ends[-1] == len(text.encode())


# --- errors --------------------------------------------------------------------------------------


def test_a_text_cannot_be_cut_to_more_than_there_is() -> None:
    encoder = encoded(LITERAL, "abc")
    for n_bytes in (4, -1):
        with pytest.raises(InputError) as caught:
            encoder.truncate(n_bytes)
        assert str(caught.value) == (
            f"a text of 3 bytes cannot be cut back to {n_bytes}; give a number from 0 to 3."
        )
    assert encoder.n_bytes == 3 and encoder.ids == LITERAL.encode("abc")


def test_a_text_without_tokens_is_refused_when_it_is_read_and_can_be_mended() -> None:
    encoder = encoded(LITERAL, "the end" * 30)
    before = state(encoder)
    encoder.append(b"X")
    for _ in range(2):
        with pytest.raises(InputError, match="has no token for 'X' at character"):
            _ = encoder.ids
    encoder.append(b"yz")
    with pytest.raises(InputError, match="has no token for 'X'"):
        _ = encoder.stable
    encoder.truncate(before[-1])
    assert state(encoder) == before


def test_an_empty_text_has_no_tokens() -> None:
    for tokenizer in (LITERAL, *map(adapter, KINDS)):
        encoder = IncrementalEncoder(tokenizer)
        assert state(encoder) == ([], [], 0, 0)
        encoder.append(b"")
        encoder.truncate(0)
        assert state(encoder) == ([], [], 0, 0)
        encoder.append(b"the")
        encoder.truncate(0)
        assert state(encoder) == ([], [], 0, 0)


# --- cost ----------------------------------------------------------------------------------------

MIXED = "\n".join(CORPUS * 80).encode()


class Counting(HuggingFaceTokenizer):
    """Notes how many bytes are encoded."""

    n_encoded = 0

    def encode_bytes(self, content: bytes) -> list[int]:
        self.n_encoded += len(content)
        return super().encode_bytes(content)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "qwen2", "tekken", "deepseek3", "llama2", "t5"])
def test_an_edit_of_a_long_text_costs_no_more_than_one_of_a_short_text(
    kind: str,
) -> None:
    tokenizer = Counting(adapter(kind)._tokenizer, "m")
    costs = {}
    for n_bytes in (100, 100_000):
        encoder = encoded(tokenizer, MIXED[:n_bytes])
        _ = encoder.ids
        tokenizer.n_encoded = 0
        for i in range(200):
            encoder.append(MIXED[n_bytes + i : n_bytes + i + 1])
            assert encoder.stable <= len(encoder.ids) == len(encoder.ends)
        for _ in range(50):
            encoder.truncate(encoder.n_bytes - 2)
            assert encoder.ends[-1] == encoder.n_bytes
        costs[n_bytes] = tokenizer.n_encoded / 250
    assert max(costs.values()) < 100, costs  # bytes for each edit
    for n_bytes in range(99_000, 0, -9_001):
        tokenizer.n_encoded = 0
        encoder.truncate(n_bytes)
        assert encoder.ends[-1] == n_bytes
        assert tokenizer.n_encoded < 1000
        if n_bytes == 99_000 - 4 * 9_001:
            assert encoder.ids == tokenizer.encode_bytes(MIXED[:n_bytes])


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_the_time_for_a_few_bytes_does_not_grow_with_the_text(kind: str) -> None:
    def median_s(n_bytes: int) -> float:
        encoder = encoded(adapter(kind), MIXED[:n_bytes])
        _ = encoder.ids
        times = []
        for i in range(n_bytes, n_bytes + 400, 4):
            start = time.perf_counter()
            encoder.append(MIXED[i : i + 4])
            _ = encoder.ids, encoder.ends, encoder.stable
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    median_s(100)  # warms up
    short, long = (min(median_s(n_bytes) for _ in range(3)) for n_bytes in (100, 100_000))
    assert long < 5 * short, f"{long * 1e6:.0f} us at 100 kB, {short * 1e6:.0f} us at 100 bytes"


def test_a_word_of_ten_thousand_letters_has_the_tokens_of_the_whole() -> None:
    for tokenizer in map(adapter, KINDS):
        encoder = IncrementalEncoder(tokenizer)
        for _ in range(4):
            encoder.append(b"theater" * 357)
            assert encoder.ids == tokenizer.encode_continuation("theater" * (encoder.n_bytes // 7))


# --- imports -------------------------------------------------------------------------------------


def test_the_encoder_needs_no_torch() -> None:
    code = "import multicolm.tokenizer.incremental, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

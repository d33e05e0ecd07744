"""Valid paths, against what the tokenizers library itself encodes."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from byte_worlds import (
    CORPUS,
    GPT2,
    MAKERS,
    adapter,
    is_valid,
    splitting,
    trained,
    unfinished,
    with_merges,
    wrapped,
)
from tiny_models import byte_level, sentencepiece
from tokenizers import normalizers, pre_tokenizers

from multicolm.errors import VocabularyError
from multicolm.exact.canonical import Canonical
from multicolm.exact.paths import canonical, covers
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer
from multicolm.tokenizer.literal import LiteralTokenizer

TEXTS = (
    "the cat  sat,  we'll  'll 'LL it'S 123 12345 x1",
    "a\n\n  b \n \n c\t\t\n   d\r\n e   \n",
    "naïve 你好吗 😀 e\u0301 über''s '' ''' !!! \n!\n\n\n\n x",
    "satcat satcat thethe then there 12 sat, <think>a  <tool></thin</think> <table>",
    "abab ababab aab \n\n   \n\n\n  \nz \u3000 \u00a0x \u2028",
)


def walked(paths: Canonical, ids: Sequence[int]) -> Any:
    """The state after a path, and a check that each of its tokens is allowed."""
    state = paths.start
    for token_id in ids:
        slot = paths.slot_of[token_id]
        assert paths.allowed(state)[slot], (ids, token_id)
        state = paths.after(state, slot)
    return state


@pytest.mark.parametrize("kind", MAKERS)
def test_canonical_encodings_are_valid_paths_which_may_end(kind: str) -> None:
    tokenizer = adapter(kind)
    assert covers(tokenizer) is None
    paths, chance = canonical(tokenizer), random.Random(1)
    characters = "".join(TEXTS) + "".join(CORPUS)
    texts = [*TEXTS, *CORPUS]
    texts += ["".join(chance.choices(characters, k=chance.randint(0, 12))) for _ in range(80)]
    texts = [text for text in texts if tokenizer.covers_text(text)]
    assert len(texts) > 5
    for text in texts:
        ids = tokenizer.encode_continuation(text)
        assert paths.may_end(walked(paths, ids)), text


@pytest.mark.parametrize("kind", MAKERS)
def test_the_allowed_tokens_are_those_with_which_some_text_goes_on(kind: str) -> None:
    tokenizer = adapter(kind)
    paths, chance = canonical(tokenizer), random.Random(2)
    for text in TEXTS:
        ids = tokenizer.encode_continuation(text)
        for _ in range(4):
            start = chance.randrange(len(ids))
            path = tokenizer.encode_continuation(
                tokenizer.decode(ids[start:]).decode(errors="ignore")
            )[: chance.randint(0, 4)]
            state = walked(paths, path)
            allowed = paths.allowed(state)
            for slot in chance.sample(range(len(paths.ids)), 20):
                extended = [*path, int(paths.ids[slot])]
                assert allowed[slot] == is_valid(tokenizer, extended), [
                    tokenizer.token_bytes(i) for i in extended
                ]


def test_a_byte_without_a_token_is_one_that_no_path_writes() -> None:
    tokenizer = adapter("without-bytes")
    assert covers(tokenizer) is None
    paths = canonical(tokenizer)
    assert not any(b"\xff" in content or b"z" in content for content in paths.contents)
    # Within a character only those bytes come next that have a token: A0, A9 and BD.
    lead = paths.contents.index("你".encode()[:1])
    following = paths.allowed(paths.after(paths.start, lead)).nonzero()[0]
    assert {paths.contents[slot][:1] for slot in following} == {b"\xa0", b"\xa9", b"\xbd"}


@pytest.mark.parametrize("kind", ["one-piece", "shuffled"])
def test_neighbours_are_allowed_that_encode_to_themselves(kind: str) -> None:
    tokenizer = adapter(kind)
    boundaries, chance = canonical(tokenizer)._boundaries, random.Random(3)  # type: ignore[attr-defined]
    texts = {
        i: tokenizer.token_bytes(i).decode()
        for i in range(tokenizer.n_tokens)
        if unfinished(tokenizer.token_bytes(i)) == b"" and tokenizer.special_name(i) is None
    }
    # Byte tokens stand for characters without a token; here they would only stand for themselves.
    texts = {i: text for i, text in texts.items() if text and i not in spelled_bytes(tokenizer)}
    made = {i for i, text in texts.items() if tokenizer.encode_continuation(text) == [i]}
    assert made == {i for i in texts if boundaries.is_made[i]}
    for a in chance.sample(sorted(made), 60):
        row = boundaries.row(a)
        for b in chance.sample(sorted(made), 60):
            want = tokenizer.encode_continuation(texts[a] + texts[b]) == [a, b]
            assert row[b] == want == boundaries._meets(a, b, None), (texts[a], texts[b])


def spelled_bytes(tokenizer: HuggingFaceTokenizer) -> set[int]:
    """Tokens such as <0x41>, which stand for characters that have a token of their own."""
    pieces = {i: tokenizer.piece(i) or "" for i in range(tokenizer.n_tokens)}
    return {i for i, piece in pieces.items() if piece.startswith("<0x")}


def test_a_run_of_merges_is_that_of_the_tokenizers_library() -> None:
    for kind in ("one-piece", "shuffled"):
        tokenizer = adapter(kind)
        paths, chance = canonical(tokenizer), random.Random(4)
        boundaries = paths._boundaries  # type: ignore[attr-defined]
        letters = {tokenizer.piece(i): i for i in range(tokenizer.n_tokens)}
        for _ in range(300):
            text = "".join(chance.choices("the catsonmtd", k=chance.randint(1, 14)))
            symbols = [letters[c.replace(" ", "Ġ" if kind == "one-piece" else "▁")] for c in text]
            assert boundaries.encode(symbols) == tokenizer.encode_continuation(text)


def test_half_a_character_is_followed_by_the_rest_of_one() -> None:
    for tail in (b"\xe4", b"\xe4\xbd", b"\xe0", b"\xed", b"\xf0", b"\xf4", b"\xc3"):
        tokenizer = adapter("gpt2")
        paths = canonical(tokenizer)
        single = {c: s for s, c in enumerate(paths.contents) if len(c) == 1}
        state = paths.start
        for byte in tail:
            state = paths.after(state, single[bytes([byte])])
        allowed = {c for c, s in single.items() if paths.allowed(state)[s]}
        length = 4 if tail[0] >= 0xF0 else 3 if tail[0] >= 0xE0 else 2
        for byte in range(256):
            fill = length - len(tail) - 1
            ends = [tail + bytes([byte]) + f * fill for f in (b"\x80", b"\xbf", b"\x90")]
            is_text = any(unfinished(e) == b"" for e in ends)
            # The merges may know a longer token; then the single byte is not what is written.
            assert bytes([byte]) not in allowed or is_text
            path = [paths.ids[single[bytes([b])]] for b in (*tail, byte)]
            if is_text and not paths.may_end(state):
                want = is_valid(tokenizer, [int(i) for i in path])
                assert (bytes([byte]) in allowed) == want
        assert not paths.may_end(state)


def test_a_beginning_that_the_merges_never_leave_alone_is_no_path() -> None:
    every = [(b"\xf4", bytes([second])) for second in range(0x80, 0x90)]
    paths = canonical(HuggingFaceTokenizer(wrapped(with_merges(every)), "m"))
    most = canonical(HuggingFaceTokenizer(wrapped(with_merges(every[1:])), "m"))
    alone = paths.contents.index(b"\xf4")
    assert not paths.allowed(paths.start)[alone]
    assert most.allowed(most.start)[most.contents.index(b"\xf4")]


def test_the_longest_tokens_of_a_written_vocabulary_are_its_paths() -> None:
    words = ["a", "ab", "abc", "b", "bc", "c", "ca", "."]
    tokenizer, chance = LiteralTokenizer(words, ends=["."]), random.Random(5)
    paths = canonical(tokenizer)
    for _ in range(200):
        path, state = [], paths.start
        for _ in range(5):
            allowed = paths.allowed(state)
            for slot, token_id in enumerate(paths.ids.tolist()):
                text = tokenizer.decode([*path, token_id]).decode()
                assert allowed[slot] == (tokenizer.encode(text) == [*path, token_id])
            slot = chance.choice([i for i, ok in enumerate(allowed) if ok])
            path, state = [*path, int(paths.ids[slot])], paths.after(state, slot)
            assert paths.may_end(state)


def changed(tokenizer: Any, **parts: Any) -> HuggingFaceTokenizer:
    for part, value in parts.items():
        setattr(tokenizer.backend_tokenizer, part, value)
    return HuggingFaceTokenizer(tokenizer, "m")


NOT_COVERED: dict[str, tuple[Any, str]] = {
    "unigram": (lambda: changed(sentencepiece("unigram")), "its model is Unigram"),
    "lower case": (
        lambda: changed(byte_level(), normalizer=normalizers.Lowercase()),
        "its normalizer Lowercase changes the text",
    ),
    "NFKC": (
        lambda: changed(byte_level(), normalizer=normalizers.NFKC()),
        "its normalizer NFKC changes the text",
    ),
    "punctuation": (
        lambda: changed(
            byte_level(),
            pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), GPT2]),
        ),
        "its pre-tokenizer Punctuation is unknown",
    ),
    "possessive": (
        lambda: changed(byte_level(), pre_tokenizer=splitting(r"\p{L}++|.")),
        r"an expression with '\+\+', which is unknown here",
    ),
    "lookbehind": (
        lambda: changed(byte_level(), pre_tokenizer=splitting(r"(?<=a)b")),
        r"an expression with '\(\?<=', which is unknown here",
    ),
    "empty": (
        lambda: changed(byte_level(), pre_tokenizer=splitting(r"\p{L}*")),
        "an expression that may match nothing, which is unknown here",
    ),
    "neither": (
        lambda: changed(byte_level(), pre_tokenizer=pre_tokenizers.Digits()),
        r"it is neither byte-level nor does it write blanks as U\+2581",
    ),
    "added": (
        lambda: changed(wrapped(trained(GPT2), ["<|end|>x"])),
        r"its added token '<\|end\|>x' overlaps a special token",
    ),
}


@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered_is_said_in_one_sentence(name: str) -> None:
    make, reason = NOT_COVERED[name]
    tokenizer = make()
    said = covers(tokenizer)
    assert said is not None and re.search(f"does not cover this tokenizer: .*{reason}; it", said)
    with pytest.raises(VocabularyError, match="it covers byte-level BPE and Sentence"):
        canonical(tokenizer)


def test_texts_are_followed_as_they_stand_where_a_normalizer_would_compose_them() -> None:
    tokenizer = changed(byte_level(), normalizer=normalizers.NFC())
    assert covers(tokenizer) is None
    plain = HuggingFaceTokenizer(byte_level(), "m")
    for text in ("e\u0301 the", "é the", "in the naïve"):
        assert canonical(tokenizer).may_end(
            walked(canonical(tokenizer), plain.encode_continuation(text))
        )
    composed = tokenizer.encode_continuation("e\u0301")
    assert canonical(tokenizer).may_end(walked(canonical(tokenizer), composed))

"""How few tokens a text can have."""

from __future__ import annotations

import random

import pytest
from tokenizer.built import CORPUS, KINDS, adapter, random_text

import multicolm
from multicolm.errors import InputError
from multicolm.exact.bounds import least_tokens
from multicolm.tokenizer.literal import LiteralTokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_fewer_tokens_than_its_bytes_say(kind: str) -> None:
    tokenizer, chance = adapter(kind), random.Random(0)
    longest = max(range(tokenizer.n_tokens), key=lambda i: len(tokenizer.token_bytes(i)))
    texts = [
        *CORPUS,
        *(random_text(chance) for _ in range(50)),
        tokenizer.token_bytes(longest).decode("utf-8", "replace") * 9,
        " " * 500,
        "\n" * 500,
        "a\u0300" * 99,
        "\u03b9\u0308\u0301" * 99,  # three characters that NFC makes one
        "\u1112\u1161\u11ab" * 99,
        "\u212b\u2126\U0002f81a" * 99,
    ]
    for text in texts:
        assert len(tokenizer.encode(text)) >= least_tokens(tokenizer, text.encode()), text
        specials = "".join(tokenizer.special_name(i) or "" for i in range(tokenizer.n_tokens))
        content = "".join((specials * 9 + text).split()).encode()
        ids = tokenizer.encode_rendered(specials * 9 + text)
        assert len(ids) >= least_tokens(tokenizer, content), text


def test_of_most_tokenizers_something_is_known() -> None:
    known = [kind for kind in KINDS if least_tokens(adapter(kind), b"a" * 10**6) > 0]
    assert len(known) >= len(KINDS) / 2, known
    assert least_tokens(LiteralTokenizer(["a", "bcd"]), b"a" * 10) == 4


def test_a_text_that_cannot_fit_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ensemble = multicolm.load("tiny")
    for model in ensemble.backends:
        monkeypatch.setattr(type(model.tokenizer), "encode", lambda *_: pytest.fail("it is read"))
        monkeypatch.setattr(type(model.tokenizer), "encode_chat", lambda *_: pytest.fail("so"))
    for prompt in ("a " * 500_000, [{"role": "user", "content": "a " * 500_000}]):
        with pytest.raises(InputError, match=r"bytes, which are \d+ tokens or more"):
            ensemble.generate([prompt])

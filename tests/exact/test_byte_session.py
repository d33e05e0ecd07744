"""Byte sessions: several rows and lanes of a model, against counting and against themselves."""

from __future__ import annotations

import itertools
import math
import random
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from byte_worlds import Reference, Written, adapter, peaked, support_of
from torch import Tensor

from multicolm.backend.base import Model
from multicolm.backend.table import TableModel
from multicolm.backend.transformers import TransformersModel
from multicolm.config import ModelConfig
from multicolm.errors import InputError, ModelError, VocabularyError
from multicolm.exact.byte_session import ByteSession, span_logprobs
from multicolm.exact.probabilities import next_byte_logprobs, span_logprob

TINY = Path(__file__).parents[2] / "registry" / "tiny"
TEXT = "What is 12 * x + 15 if x = 7?\n\n  It's 99, naïvely 你好.".encode()


@lru_cache(maxsize=4)
def tiny(name: str = "math-own") -> Model:
    return TransformersModel.from_config(name, ModelConfig(model=str(TINY / name)))


def session_after(model: Model, content: bytes, **options: object) -> ByteSession:
    session = ByteSession(model, 1, **{"prune": 0.0, **options})  # type: ignore[arg-type]
    session.begin(0, [model.tokenizer.encode_continuation("Q")[0]])
    session.feed([0], [content])
    return session


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return bool((a.exp() - b.exp()).abs().max() < tolerance)


def test_the_product_of_next_bytes_is_the_marginal_probability() -> None:
    session, total = session_after(tiny(), b""), 0.0
    for byte in TEXT:
        logprobs = session.next_byte_logprobs([0])[0]
        assert float(logprobs.exp().sum()) == pytest.approx(1)
        total += float(logprobs[byte])
        session.feed([0], [bytes([byte])])
    assert session.logprob(0) == pytest.approx(total, abs=1e-3)
    at_once = session_after(tiny(), TEXT)
    assert at_once.logprob(0) == pytest.approx(total, abs=1e-3)
    assert close(at_once.next_byte_logprobs([0]), session.next_byte_logprobs([0]))


def test_rows_at_once_are_rows_alone_whatever_is_cut_and_however_many_lanes() -> None:
    chance = random.Random(0)
    for lanes in (1, 3):
        session = ByteSession(tiny(), 3, lanes=lanes, prune=0.0)
        texts = [b""] * 3
        for row in range(3):
            session.begin(row, [tiny().tokenizer.encode_continuation("Q")[0]])
        for _ in range(12):
            for row in range(3):
                if chance.random() < 0.4:
                    texts[row] = texts[row][: chance.randint(0, len(texts[row]))]
                    session.truncate(row, len(texts[row]))
            rows = sorted(chance.sample(range(3), chance.randint(1, 3)))
            new = [TEXT[len(texts[r]) :][: chance.randint(0, 40)] for r in rows]
            session.feed(rows, new)
            for row, content in zip(rows, new, strict=True):
                texts[row] += content
            got = session.next_byte_logprobs(rows)
            for i, row in enumerate(rows):
                alone = session_after(tiny(), texts[row])
                assert close(got[i : i + 1], alone.next_byte_logprobs([0]))
                assert session.logprob(row) == pytest.approx(alone.logprob(0), abs=1e-3)


def test_spans_scored_at_once_are_the_differences_of_a_session() -> None:
    chance = random.Random(1)
    prompt = [tiny().tokenizer.encode_continuation("Q")[0]]
    ends = sorted([*(chance.randrange(1, len(TEXT)) for _ in range(12)), len(TEXT)])
    spans = span_logprobs(tiny(), prompt, TEXT, ends, end=True)
    masses = [0.0, *(session_after(tiny(), TEXT[:end]).logprob(0) for end in ends)]
    wanted = [b - a for a, b in itertools.pairwise(masses)]
    wanted.append(float(session_after(tiny(), TEXT).next_byte_logprobs([0])[0, 256]))
    assert spans.tolist() == pytest.approx(wanted, abs=1e-3)


def test_pieces_are_the_next_tokens_with_what_is_there_cut_off() -> None:
    model = tiny()
    for n in (0, 7, 8, 9, 31, 33, 48, 51):
        session = session_after(model, TEXT[:n])
        pieces, logprobs = session.pieces(0), session.next_byte_logprobs([0])[0]
        first = torch.zeros(257, dtype=torch.float64)
        first[256] = math.exp(pieces.end_logprob)
        for part in pieces.continuations:
            for token, logp in zip(part.ids.tolist(), part.logprobs.tolist(), strict=True):
                content = model.tokenizer.token_bytes(token)
                assert content[: part.n_cut] == TEXT[n - part.n_cut : n]
                first[content[part.n_cut]] += math.exp(logp)
        torch.testing.assert_close(first, logprobs.exp(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2"])
def test_a_model_bridged_to_itself_has_the_texts_of_its_restricted_self(kind: str) -> None:
    tokenizer = adapter(kind)
    support = support_of(tokenizer, "the ", 6, seed=3)
    reference = Reference(tokenizer, support, lambda path: peaked(support, path, 3))
    texts: dict[bytes, float] = {}

    def write(path: tuple[int, ...], prob: float) -> None:
        probs, end, _ = reference.after(path)
        content = tokenizer.decode(path)
        texts[content] = texts.get(content, 0.0) + prob * end
        for token, p in probs.items():
            if len(path) < 3:
                write((*path, token), prob * p)

    write((), 1.0)
    model = Written(tokenizer, reference.probs)
    session = ByteSession(model, 1, prune=0.0)
    for content, prob in [item for item in texts.items() if len(item[0]) <= 3][:40]:
        session.begin(0, [0])
        session.feed([0], [content])
        # Longer paths of the same text may be missing above: none of up to three bytes are.
        total = session.logprob(0) + float(session.next_byte_logprobs([0])[0, 256])
        assert math.exp(total) == pytest.approx(prob, abs=1e-6)


def test_pruning_is_off_by_no_more_than_it_says_and_loses_no_text() -> None:
    session = session_after(tiny(), b"", prune=1e-3)
    exact = session_after(tiny(), b"")
    for byte in TEXT:
        got, want = (s.next_byte_logprobs([0])[0].exp() for s in (session, exact))
        assert 0.5 * float((got - want).abs().sum()) < 5e-3
        for s in (session, exact):
            s.feed([0], [bytes([byte])])
    assert session.n_forwards < exact.n_forwards


def test_tables_are_followed_exactly() -> None:
    table = {"": {"a": 0.5, "ab": 0.2, "b": 0.2, ".": 0.1}, "a": {"a": 0.4, "b": 0.4, ".": 0.2}}
    model = TableModel("coin", ["a", "ab", "b", "."], table, ends=["."])
    session = ByteSession(model, 1, prune=0.0)
    session.begin(0, [2])
    # After "a", no "b" can follow: "ab" would have been taken. So 0.4 is left out there.
    logprobs = session.next_byte_logprobs([0])[0].exp()
    assert logprobs[[97, 98, 256]].tolist() == pytest.approx([0.7, 0.2, 0.1])
    session.feed([0], [b"a"])
    logprobs = session.next_byte_logprobs([0])[0].exp()
    a, ab = 0.5 / 0.7, 0.2 / 0.7
    assert logprobs[[97, 98, 256]].tolist() == pytest.approx([a * 4 / 6, ab, a * 2 / 6])
    assert session.left_out(0) == pytest.approx(a * 0.4)
    assert session.mean_left_out(0) == pytest.approx(0.2)


def test_a_model_says_what_follows_a_text_of_its_own() -> None:
    model = tiny()
    logprobs = next_byte_logprobs(model, TEXT)
    assert logprobs.shape == (257,) and float(logprobs.exp().sum()) == pytest.approx(1)
    spans = [span_logprob(model, TEXT, bytes([x])) for x in (32, 46, 10)]
    assert spans == pytest.approx(logprobs[[32, 46, 10]].tolist(), abs=1e-4)
    half = "你".encode()[:2]
    assert float(next_byte_logprobs(model, b"a" + half).exp().sum()) == pytest.approx(1)
    assert span_logprob(model, TEXT, b"") == 0
    assert torch.equal(next_byte_logprobs(model, TEXT.decode()), logprobs), "text as its bytes"
    assert span_logprob(model, TEXT.decode(), "é") == span_logprob(model, TEXT, "é".encode())
    with pytest.raises(InputError, match=r"^the span is not valid Unicode at character 1; read"):
        span_logprob(model, TEXT, "a\ud800")
    with pytest.raises(InputError, match="model 'math-own' needs a token to begin with"):
        next_byte_logprobs(model, b"")


def test_what_cannot_be_served_is_said_in_one_sentence() -> None:
    with pytest.raises(InputError, match="needs 1 lane or more, got 0"):
        ByteSession(tiny(), 1, lanes=0)
    with pytest.raises(InputError, match=r"at least 0 and below 1; got 1\.0"):
        ByteSession(tiny(), 1, prune=1.0)
    session = ByteSession(tiny(), 1)
    with pytest.raises(InputError, match="row 0 of the byte session has no text yet"):
        session.logprob(0)
    session = session_after(tiny(), b"a\xff")
    assert session.logprob(0) == -math.inf
    with pytest.raises(InputError, match="model 'math-own' cannot write the 2 bytes"):
        session.next_byte_logprobs([0])
    with pytest.raises(InputError, match="model 'math-own' reads 512 tokens at most"):
        session_after(tiny(), b"7" * 600).logprob(0)
    tokenizer = adapter("gpt2")
    forbidden = [i for i in range(256) if tokenizer.token_bytes(i) == b"\xff"]
    session = ByteSession(Written(tokenizer, lambda _: {forbidden[0]: 1.0}), 1)
    session.begin(0, [0])
    with pytest.raises(ModelError, match="model 'written' puts all of its probability on tokens"):
        session.next_byte_logprobs([0])


def test_an_uncovered_tokenizer_is_refused() -> None:
    from tiny_models import sentencepiece

    from multicolm.tokenizer.huggingface import HuggingFaceTokenizer

    model = Written(HuggingFaceTokenizer(sentencepiece("unigram"), "m"), lambda _: {})
    with pytest.raises(VocabularyError, match=r"does not cover this tokenizer: its model is Uni"):
        ByteSession(model, 1)

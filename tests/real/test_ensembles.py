"""Two families together: SmolLM2 and Gemma, which share 18 % of their tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from multicolm import Ensemble
from multicolm.exact.probabilities import next_byte_logprobs, span_logprob
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import load_table
from multicolm.training.train import train

PROMPTS = ["The capital of France is", "caf\u00e9 \U0001f469\u200d\U0001f467 1  2"]
N = 12


@pytest.fixture(scope="module")
def across(smol: Any, gemma_gguf: Any) -> Ensemble:
    """A base model in transformers, an assistant in llama.cpp, two vocabularies."""
    return Ensemble([smol, gemma_gguf])


@pytest.fixture(scope="module")
def in_files(smol_gguf: Any, gemma_gguf: Any) -> Ensemble:
    """Both in llama.cpp, as they are shipped."""
    return Ensemble([smol_gguf, gemma_gguf])


def test_the_bridge_says_how_much_the_vocabularies_share(across: Ensemble) -> None:
    [pair] = across.bridges
    assert pair.bridge == "boundary" and 0.17 < pair.shared < 0.19


@pytest.mark.parametrize("policy", ["max-confidence", "cosd-rule", "gac", "chared"])
def test_models_of_two_families_write_one_text(policy: str, in_files: Ensemble) -> None:
    answers = in_files.generate(PROMPTS, policy, max_new_tokens=N, seed=0)
    for answer in answers:
        tokens = b"".join(in_files.vocabulary.token_bytes(token.id) for token in answer.trace)
        assert tokens.decode(errors="replace") == answer.text and answer.text
        assert all(math.isfinite(token.logprob) for token in answer.trace)
    writers = {token.model for answer in answers for token in answer.trace}
    assert writers == ({"mixture"} if policy in ("gac", "chared") else {"smol", "gemma"})


def test_a_model_alone_writes_the_same_beside_another_vocabulary(
    across: Ensemble, smol: Any
) -> None:
    both, alone = (e.generate(PROMPTS, max_new_tokens=N) for e in (across, Ensemble([smol])))
    assert [a.text for a in both] == [a.text for a in alone]


def test_who_writes_is_learned_from_a_base_model_in_a_gguf_file(
    in_files: Ensemble, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    names = ("Paris", "Rome", "Berlin", "Madrid", "Vienna", "Lisbon", "Oslo", "Athens")
    lines = [
        {"prompt": f"What is  {i} times 11?\n", "completion": f"{11 * i}, as in {name}."}
        for i, name in enumerate(names)
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    score(in_files, open_corpus(data), tmp_path / "scores", features=["hidden"])
    table = load_table(tmp_path / "scores", list(in_files.models))
    assert table.base["hidden"].shape[-1] == 576
    assert table.gold_logprobs.isfinite().any() and (table.gold_logprobs <= 1e-4).all()
    options = {"epochs": 3, "weak_epochs": 1, "held_out": 0.25, "seeds": [0]}
    made = train(CoLlmPolicy(), tmp_path / "scores", tmp_path / "head", options=options)
    [answer] = in_files.generate([lines[0]["prompt"]], made.policy, max_new_tokens=8)
    assert answer.text and all(token.score is not None for token in answer.trace)


# --- the exact bridge ----------------------------------------------------------------------------


def spellings(tokens: list[bytes], content: bytes) -> Iterator[list[int]]:
    """Tokens that spell bytes, the last of which may go beyond them."""
    if not content:
        yield []
        return
    yield from ([i] for i, own in enumerate(tokens) if own.startswith(content))
    for i, own in enumerate(tokens):
        if own and own != content and content.startswith(own):
            yield from ([i, *rest] for rest in spellings(tokens, content[len(own) :]))


def brute_force(model: Any, given: list[int], content: bytes) -> torch.Tensor:
    """Probabilities of the byte after some bytes: all spellings that the tokenizer writes, summed.

    What is given is certain. A token that follows the last one is taken as it is, also where the
    tokenizer would have written another one in the place of the two.
    """
    tokenizer = model.tokenizer
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_tokens)]
    starts = torch.tensor([own[0] if own else 256 for own in tokens])
    after: dict[tuple[int, ...], torch.Tensor] = {}
    probs = torch.zeros(257, dtype=torch.float64)
    for ids in spellings(tokens, content):
        whole = tokenizer.decode(given + ids).decode(errors="replace")
        if tokenizer.encode_continuation(whole) != given + ids:
            continue
        for n in range(len(ids)):
            if tuple(ids[:n]) not in after:
                logits = model.open(1).feed([0], [given + ids[:n]], [1]).logits[0]
                after[tuple(ids[:n])] = logits.double().softmax(-1)
        weight = math.prod(float(after[tuple(ids[:n])][i]) for n, i in enumerate(ids))
        spelled = b"".join(tokens[i] for i in ids)
        if spelled != content:
            probs[spelled[len(content)]] += weight
        else:
            rest = model.open(1).feed([0], [given + ids], [1]).logits[0].double().softmax(-1)
            probs.index_add_(0, starts, weight * rest[: len(tokens)])
    return probs[:256] / probs[:256].sum()


@pytest.mark.parametrize(("given", "rest"), [("The", " ca"), ("I", " can"), ("A", " b")])
def test_next_bytes_are_those_of_brute_force(given: str, rest: str, smol: Any) -> None:
    tokenizer = smol.tokenizer
    first = tokenizer.encode_continuation(given + rest)[:1]
    assert tokenizer.decode(first) == given.encode()
    mine = next_byte_logprobs(smol, given + rest)[:256].exp()
    theirs = brute_force(smol, first, rest.encode())
    # Brute force lets a token follow that the tokenizer would not write there.
    assert (mine / mine.sum() - theirs).abs().max() < 1e-3
    assert int(mine.argmax()) == int(theirs.argmax())


def test_bytes_of_a_text_come_to_the_likelihood_of_the_text(smol: Any) -> None:
    prefix, span = "The capital of France is", " Paris, caf\u00e9"
    content = span.encode()
    steps = [
        float(next_byte_logprobs(smol, prefix.encode() + content[:i])[content[i]])
        for i in range(0, len(content), 4)
    ]
    whole = span_logprob(smol, prefix, span)
    assert whole < 0 and all(step <= 1e-6 for step in steps)
    parts = [
        span_logprob(smol, prefix.encode() + content[:i], content[i : i + 4])
        for i in range(0, len(content), 4)
    ]
    assert sum(parts) == pytest.approx(whole, rel=1e-4)


def test_the_exact_bridge_takes_real_vocabularies(smol: Any, gemma: Any) -> None:
    ensemble = Ensemble([smol, gemma], bridge="exact")
    [pair] = ensemble.bridges
    assert pair.bridge == "exact"
    for policy in ("max-confidence", "byte-mixture"):
        [answer] = ensemble.generate(["The capital of France is"], policy, max_new_tokens=8)
        assert "Paris" in answer.text or answer.text

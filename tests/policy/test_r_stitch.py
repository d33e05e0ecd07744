"""R-Stitch against its rule, written out in plain Python, and what it costs."""

from __future__ import annotations

import math

import pytest
from tables import TOKENS, random_table

from multicolm import Ensemble
from multicolm.testing import check_routing

END = len(TOKENS) - 1
PROMPTS = ["a", "b c", "dd", "f", " e"]
MODELS = [random_table(name, seed) for seed, name in enumerate(("small", "other", "large"))]
TRIO = Ensemble(MODELS)


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))


def by_hand(prompt: str, threshold: float) -> list[tuple[int, int, bool]]:
    """(token, writer, whether the small model ran) of every token, greedily."""
    ids, written, has_text = MODELS[0].tokenizer.encode(prompt), [], 0
    while len(written) < 16 and (not written or written[-1][0] != END):
        p = {k: MODELS[k].logits_after(ids).exp().tolist() for k in (0, 2)}
        ran_small = has_text == 0
        writer = 2 if has_text == 2 or entropy(p[0]) > threshold else 0
        has_text = 2 if writer == 2 and entropy(p[2]) > threshold else 0
        token = max(range(len(TOKENS)), key=lambda i: (p[writer][i], -i))
        written.append((token, writer, ran_small))
        ids.append(token)
    return written


@pytest.mark.parametrize("threshold", [0.6, 0.7, 0.8])
def test_each_model_writes_until_the_rule_hands_over(threshold: float) -> None:
    policy = {"kind": "r-stitch", "params": {"threshold": threshold, "large": "large"}}
    answers = TRIO.generate(PROMPTS, policy, max_new_tokens=16)
    wanted = [by_hand(prompt, threshold) for prompt in PROMPTS]
    shown = [[(t.id, list(TRIO.models).index(t.model)) for t in a.trace] for a in answers]
    assert shown == [[line[:2] for line in text] for text in wanted]
    assert {writer for text in shown for _, writer in text} == {0, 2}
    # The model that does not have the text does not run, but for the token of a hand-over.
    for answer, text in zip(answers, wanted, strict=True):
        assert answer.usage["small"].forwards == sum(ran for *_, ran in text)
        assert answer.usage["large"].forwards == sum(writer == 2 for _, writer, _ in text)
        assert answer.usage["other"].forwards == 0
    # The large model keeps the text somewhere, and gives it back.
    runs = [ran for text in wanted for *_, ran in text]
    assert True in runs and False in runs


def test_it_keeps_the_laws_of_the_loop() -> None:
    policy = {"kind": "r-stitch", "params": {"threshold": 0.6}}
    check_routing(TRIO, PROMPTS[:2], TRIO.resolve(policy), max_new_tokens=6)


def test_a_trace_tells_the_entropy_that_was_decided_on() -> None:
    policy = {"kind": "r-stitch", "params": {"threshold": 0.6, "large": "large"}}
    [answer] = TRIO.generate(["a"], policy, max_new_tokens=6)
    first = MODELS[0].logits_after(MODELS[0].tokenizer.encode("a")).exp().tolist()
    assert answer.trace.tokens[0].score == pytest.approx(entropy(first), abs=1e-5)

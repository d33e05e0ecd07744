"""SAFE against its paper: where models are mixed, who is named as the writer, and sharpening."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from tables import random_table

from multicolm import Ensemble, ModelNames, Views
from multicolm.backend.table import TableModel
from multicolm.policy.safe import SafePolicy
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.views import View

BASE = ("a", "b", "c", " ", "d", " d", "e", ".")
LEFT = ("a", "b", "c", " ", "d", "e", "ab", "bc", "<stop>")
RIGHT = ("a", "b", "c", " ", "d", "e", "cab", "ea", "<stop>")
PROMPTS = ["a", "bc", "a d", "cab"]


def models() -> list[TableModel]:
    tables = (("base", 0, BASE), ("left", 1, LEFT), ("right", 2, RIGHT))
    return [random_table(name, seed, tokens) for name, seed, tokens in tables]


def safe(**params: Any) -> dict[str, Any]:
    return {"kind": "safe", "params": params}


def one_word(name: str, **first: float) -> TableModel:
    """Writes one of `x` and `y`, and stops."""
    rows = {"": {**first, ".": 1 - sum(first.values())}, "x": {".": 1.0}, "y": {".": 1.0}}
    return TableModel(name, [".", "x", "y", "p"], rows, ends=["."])


def test_the_gate_goes_by_the_weights() -> None:
    trio = Ensemble(
        [one_word("b", x=0.55, y=0.4), one_word("v1", x=0.1, y=0.9), one_word("v2", x=0.95, y=0.05)]
    )
    weights = [0.1, 0.8, 0.1]
    [average] = trio.generate(
        ["p"], {"kind": "average", "params": {"weights": weights}}, max_new_tokens=3
    )
    [answer] = trio.generate(["p"], safe(weights=weights), max_new_tokens=3)
    assert answer.text == average.text == "y"
    # The mean probability of `x` is .23 by the weights; all equal, it is .533 and `x` stays.
    assert answer.trace.tokens[0].score == pytest.approx(0.23)
    [answer] = trio.generate(["p"], "safe", max_new_tokens=3)
    assert (answer.text, answer.trace.tokens[0].model) == ("x", "b")


def test_safe_mixes_only_where_the_others_object() -> None:
    base = TableModel("base", ["q", "a", "b", "."], {"": {"a": 0.6, "b": 0.4}}, ["."])
    doubts = TableModel("other", ["q", "a", "b", "!"], {"": {"b": 0.9, "a": 0.1}}, ["!"])
    agrees = TableModel("other", ["q", "a", "b", "!"], {"": {"a": 0.6, "b": 0.4}}, ["!"])
    for other, token, prob, writer in (
        (doubts, "b", 0.65, "mixture"),
        (agrees, "a", 0.6, "base"),
    ):
        [answer] = Ensemble([base, other]).generate(["q"], "safe", max_new_tokens=1)
        [written] = answer.trace.tokens
        assert (written.text, round(math.exp(written.logprob), 4), written.model) == (
            token,
            prob,
            writer,
        )
    # With a threshold below the mean of 0.6 and 0.1, the base model's word stands.
    [answer] = Ensemble([base, doubts]).generate(["q"], safe(threshold=0.3), max_new_tokens=1)
    assert [(t.text, t.model) for t in answer.trace] == [("a", "base")]


def test_safe_does_not_mix_within_a_token_of_another_model() -> None:
    base = TableModel("base", ["q", "a", "b", "x", "."], {"": {"b": 1.0}, "q": {"a": 1.0}}, ["."])
    # `ab` is one of its tokens, and after `a` it would write `x` with all its heart.
    tokens = ["q", "a", "b", "ab", "x", "!"]
    other = TableModel("other", tokens, {"": {"x": 1.0}, "q": {"a": 1.0}}, ["!"])
    weights = {"base": 0.1, "other": 0.9}
    ensemble = Ensemble([base, other])
    [answer] = ensemble.generate(["q"], safe(weights=weights), max_new_tokens=2)
    assert answer.text == "ab"
    gac = {"kind": "gac", "params": {"weights": weights}}
    [answer] = ensemble.generate(["q"], gac, max_new_tokens=2)
    assert answer.text == "ax"


def test_safe_with_threshold_0_is_the_base_model() -> None:
    trio = Ensemble(models())
    alone = trio.generate(PROMPTS, "single", max_new_tokens=12)
    shown = trio.generate(PROMPTS, safe(threshold=0.0), max_new_tokens=12)
    assert [a.text for a in shown] == [a.text for a in alone]
    assert all(token.model == "base" for a in shown for token in a.trace)


def test_on_one_vocabulary_only_mixed_tokens_differ_from_the_base_models() -> None:
    """Published as no loss: where SAFE does not mix, mixing would not change the greedy token."""
    trio = Ensemble([random_table(name, seed) for seed, name in enumerate(("base", "l", "r"))])
    weights = [0.2, 0.5, 0.3]
    average = {"kind": "average", "params": {"weights": weights}}
    prompts = ["a", "b c", "dd", "f", " e"]
    mixed = trio.generate(prompts, average, max_new_tokens=20)
    shown = trio.generate(prompts, safe(weights=weights, sharpen=1.0), max_new_tokens=20)
    assert [a.text for a in shown] == [a.text for a in mixed]
    writers = [token.model for a in shown for token in a.trace]
    assert {*writers} == {"base", "mixture"}
    assert 0.1 < writers.count("mixture") / len(writers) < 0.9


# ---- sharpening

WORDS = ["a", "ab", "abc", "abd", "b", "ba", "c", "ca", "cab", "cb"]


def shown(rows: list[list[float]], tokens: list[str] = WORDS) -> Views:
    """One position in one vocabulary, at which model k has the probabilities ``rows[k]``."""
    end = {"": {".": 1.0}}
    vocabulary = Ensemble([TableModel("m", [*tokens, "."], end, ["."])]).vocabulary
    views = {k: View(torch.tensor([[*row, 0.0]]).log()) for k, row in enumerate(rows)}
    names = ModelNames([f"m{k}" for k in range(len(rows))])
    return Views(names, views, n_positions=1, extends=vocabulary.extends)


def by_the_paper(rows: list[list[float]], sharpen: float) -> int:
    """Equation of section 3.3, written out: the most likely token behind it."""
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    if max(mean) >= 0.5:
        return mean.index(max(mean))
    total = [
        mean[j]
        + sum(
            mean[i]
            for i in range(len(mean))
            if i != j and WORDS[i].startswith(WORDS[j]) and mean[j] > sharpen
        )
        for j in range(len(mean))
    ]
    return total.index(max(total))


@pytest.mark.parametrize("sharpen", [0.05, 0.1, 0.2])
def test_the_likeliest_token_of_a_sharpened_mixture_is_the_papers(sharpen: float) -> None:
    chance = random.Random(0)
    n_mixed = n_changed = 0
    for _ in range(300):
        rows = []
        for _ in range(3):
            weights = [chance.random() ** 4 + 1e-6 for _ in WORDS]
            rows.append([weight / sum(weights) for weight in weights])
        views = shown(rows)
        policy = SafePolicy(sharpen=sharpen)
        mixed = policy.mix(views)[0]
        assert float(mixed.exp().sum()) == pytest.approx(1, abs=1e-5)
        if policy.writers(views).tolist() == [3]:
            assert int(mixed.argmax()) == by_the_paper(rows, sharpen)
            n_mixed += 1
            n_changed += by_the_paper(rows, sharpen) != by_the_paper(rows, 1.0)
    assert n_mixed > 100 and n_changed > 10


def test_sub_words_of_one_word_give_their_probability_to_the_one_they_begin_with() -> None:
    #        a    ab   abc  abd  b
    rows = [[0.2, 0.1, 0.3, 0.0, 0.4], [0.2, 0.1, 0.0, 0.1, 0.6], [0.2, 0.4, 0.1, 0.2, 0.1]]
    views = shown(rows, WORDS[:5])
    # Mean: .2, .2, .133, .1, .367.
    policy = SafePolicy(sharpen=0.15)
    assert policy.mix(views).exp()[0].tolist() == pytest.approx(
        [0.633, 0, 0, 0, 0.367, 0], abs=1e-3
    )
    plain = SafePolicy(sharpen=1.0).mix(views).exp()[0]
    assert plain.tolist() == pytest.approx([0.2, 0.2, 0.133, 0.1, 0.367, 0], abs=1e-3)


def test_only_tokens_of_the_base_model_attract_probability() -> None:
    rows = [[0.0, 0.3, 0.3, 0.0, 0.4], [0.5, 0.1, 0.0, 0.0, 0.4], [0.4, 0.1, 0.1, 0.0, 0.4]]
    views = shown(rows, WORDS[:5])
    mixed = SafePolicy(threshold=0.45).mix(views).exp()[0]
    # The base model does not have `a` (.3), so what begins with `ab` (.167) goes there.
    assert mixed.tolist() == pytest.approx([0.3, 0.3, 0, 0, 0.4, 0], abs=1e-3)


def test_a_token_is_extended_by_those_that_begin_with_its_text() -> None:
    one = TableModel("one", ["b", "ab", "a", "abc", "ba", " ", " b", "."], {"": {".": 1.0}}, ["."])
    tokens = ["abcd", "b", "c", "<stop>"]
    other = TableModel("other", tokens, {"": {"<stop>": 1.0}}, ["<stop>"])
    vocabulary = Ensemble([one, other]).vocabulary
    assert isinstance(vocabulary, BridgedVocabulary)
    texts = [vocabulary.token_bytes(token) for token in range(vocabulary.size)]
    extends = vocabulary.extends(torch.arange(vocabulary.size))
    for token, text in enumerate(texts):
        wanted = [
            i == token or (bool(text.strip()) and longer.startswith(text))
            for i, longer in enumerate(texts)
        ]
        assert extends[token].tolist() == wanted

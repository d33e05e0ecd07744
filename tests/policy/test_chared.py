"""CharED against a slow reading of its algorithm, in dictionaries of strings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from built import adapter
from scipy.stats import chisquare
from tables import random_table

import multicolm
from multicolm import Ensemble
from multicolm.backend.table import TableModel
from multicolm.testing import check_policy, check_routing

LEFT = ("a", "b", "c", " ", "ab", "bc", " a", "<stop>")
RIGHT = ("a", "b", "c", " ", "cab", "ba", "ca", "<stop>")
PROMPTS = ["a", "bc", "a b", "cab"]
NULL, END = "", "end"


def models(seed: int = 0) -> list[TableModel]:
    return [random_table("left", seed + 1, LEFT), random_table("right", seed + 2, RIGHT)]


def policy(*weights: float) -> dict[str, Any]:
    return {"kind": "chared", "params": {"weights": list(weights) or None}}


class Slow:
    """One model's table, remaining string -> probability, as the paper has it."""

    def __init__(self, model: TableModel, prompt: str) -> None:
        self.model = model
        self.own = model.tokenizer.encode(prompt)
        self.consumed = ""
        self.ask()

    def ask(self) -> None:
        probs = self.model.logits_after(self.own).softmax(-1).tolist()
        self.table = {
            self.model.tokenizer.token_bytes(i).decode() if i < len(probs) - 1 else END: p
            for i, p in enumerate(probs)
        }
        self.consumed = ""

    def shown(self) -> dict[str, float]:
        shown: dict[str, float] = {}
        total = sum(self.table.values())
        for rest, p in self.table.items():
            first = END if rest == END else rest[:1]
            shown[first] = shown.get(first, 0.0) + p / total
        return shown

    def take(self, character: str) -> None:
        if character == NULL:
            if NULL in self.table:
                self.own += self.model.tokenizer.encode(self.consumed)[:1]
                assert self.model.tokenizer.decode(self.own[-1:]) == self.consumed.encode()
            else:
                self.own += self.model.tokenizer.encode_continuation(self.consumed)
            self.ask()
            return
        rests = {r[1:]: p for r, p in self.table.items() if r != END and r[:1] == character}
        self.consumed += character
        self.table = rests
        if not rests:
            self.own += self.model.tokenizer.encode_continuation(self.consumed)
            self.ask()


def slowly(own: Sequence[TableModel], weights: Sequence[float], prompt: str, n: int) -> Any:
    """A greedy text, and the probability of its characters and ends of tokens."""
    states = [Slow(model, prompt) for model in own]
    text, total = "", 0.0
    while len(text) < n:
        mixed: Counter[str] = Counter()
        for state, weight in zip(states, weights, strict=True):
            for character, p in state.shown().items():
                mixed[character] += weight * p
        best, p = max(mixed.items(), key=lambda item: item[1])
        total += math.log(p)
        if best == END:
            return text, total, "eos"
        text += best
        for state in states:
            state.take(best)
    return text, total, "length"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.8, 0.2), (1.0, 0.0)])
def test_texts_are_those_of_the_published_algorithm(
    seed: int, weights: tuple[float, float]
) -> None:
    own = models(10 * seed)
    answers = Ensemble(own).generate(PROMPTS, policy(*weights), max_new_tokens=12)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        used = [m for m, w in zip(own, weights, strict=True) if w]
        text, total, why = slowly(used, [w for w in weights if w], prompt, len(answer.text))
        assert answer.text == text
        if answer.finish_reason == why == "eos":
            assert sum(t.logprob for t in answer.trace) == pytest.approx(total, abs=1e-4)


def test_sampled_with_all_weight_on_one_model_it_writes_that_models_text() -> None:
    model, n = models()[0], 1500
    pair = Ensemble([model, models()[1]])
    settings: dict[str, Any] = {"temperature": 1.0, "batch_size": 500, "seed": range(n)}
    alone = Ensemble([model]).generate(["a"] * n, "single", max_new_tokens=8, **settings)
    mixed = pair.generate(["a"] * n, policy(1.0, 0.0), max_new_tokens=8, **settings)
    assert mixed.usage["right"].forwards == 0
    starts = [Counter(a.text[:2] for a in answers) for answers in (alone, mixed)]
    common = [start for start, count in (starts[0] + starts[1]).items() if count >= 20]
    observed = [starts[1][start] for start in common]
    expected = [
        starts[0][start] * sum(observed) / sum(starts[0][s] for s in common) for start in common
    ]
    # Both are samples, so the statistic is about twice that against known probabilities.
    statistic = chisquare(observed, expected).statistic / 2
    assert statistic < 3 * len(common)


def test_identical_models_of_two_vocabularies_make_no_difference_to_a_third_of_one() -> None:
    one, other = models()
    alone = Ensemble([one, other]).generate(PROMPTS, policy(0.5, 0.5), max_new_tokens=10)
    twin = random_table("twin", 1, LEFT)
    twice = Ensemble([one, other, twin]).generate(PROMPTS, policy(0.3, 0.5, 0.2), max_new_tokens=10)
    assert [a.text for a in twice] == [a.text for a in alone]


def test_it_keeps_the_laws() -> None:
    check_policy(Ensemble(models()).resolve(policy()))
    check_routing(Ensemble(models()), PROMPTS, Ensemble(models()).resolve(policy(0.6, 0.4)))


@pytest.mark.parametrize("seed", range(4))
def test_characters_of_several_bytes_are_one_outcome_and_never_broken(seed: int) -> None:
    alphabet = ("é", "你", "好", "a")
    own = [
        random_table("left", 10 * seed + 1, (*alphabet, "你好", "<stop>")),
        random_table("right", 10 * seed + 2, (*alphabet, "é你", "好é", "<stop>")),
    ]
    answers = Ensemble(own).generate(["é", "a你", "好"], "chared", max_new_tokens=10)
    for prompt, answer in zip(["é", "a你", "好"], answers, strict=True):
        assert answer.text == slowly(own, [0.5, 0.5], prompt, len(answer.text))[0]
        assert {*answer.text} <= {*alphabet}
    assert any({*answer.text} & {"é", "你", "好"} for answer in answers)


def test_the_trace_of_the_embedded_models_joins_to_their_text() -> None:
    ensemble = multicolm.load("tiny-mixed")
    prompts = ["Straße 你好 é", "What does Zosos treat?"]
    answers = ensemble.generate(prompts, "chared", max_new_tokens=12, temperature=1.2, seed=1)
    for answer in answers:
        assert answer.text and {t.model for t in answer.trace} == {"mixture"}
        shown = "".join(t.text for t in answer.trace if not t.text.startswith("<|"))
        assert shown == answer.text


def test_every_character_of_a_vocabulary_can_be_written() -> None:
    from multicolm.exact.character_vocabulary import CharacterVocabulary
    from multicolm.views import ModelNames

    tokenizer = adapter("llama3")
    vocabulary = CharacterVocabulary(ModelNames(["only"]), [tokenizer])
    contents = {vocabulary.token_bytes(i) for i in range(vocabulary.null)}
    assert {bytes([byte]) for byte in range(128)} <= contents
    assert len(contents) == vocabulary.null and b"" not in contents
    order = vocabulary.sorted(0)
    low, high = 0, len(order)
    for depth, character in enumerate("the"):
        symbol = next(i for i in range(vocabulary.null) if vocabulary.name(i) == character)
        low, high = order.narrow(low, high, depth, symbol)
    found = {tokenizer.token_bytes(int(i)) for i in order.ids[low:high]}
    every = {tokenizer.token_bytes(i) for i in range(tokenizer.n_tokens)}
    assert found == {content for content in every if content.startswith(b"the")}

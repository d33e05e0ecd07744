"""PackLLM: weights from what the models think of the prompt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tables import random_table

import multicolm
from multicolm import Ensemble, MixPolicy, Views
from multicolm.backend.base import ModelOutput
from multicolm.backend.table import TableModel, TableSession
from multicolm.errors import PolicyError
from multicolm.testing import check_policy, check_routing

BASE = ("a", "b", "c", " ", "d", " d", "e", ".")
LEFT = ("a", "b", "c", " ", "d", "e", "ab", "bc", "<stop>")
PROMPTS = ["abc", "bcd", "a dd", "cabe"]


def policy(tau: float) -> dict[str, Any]:
    return {"kind": "pack-llm", "params": {"tau": tau}}


def nats_of(model: TableModel, prompt: str) -> float:
    ids = model.tokenizer.encode(prompt)
    return -sum(
        float(model.logits_after(ids[:i]).log_softmax(-1)[ids[i]]) for i in range(1, len(ids))
    )


def twins() -> list[TableModel]:
    return [random_table("base", 1, BASE), random_table("other", 2, BASE)]


def test_logits_are_weighed_by_the_softmax_of_minus_the_prompts_nats_per_token() -> None:
    own, tau = twins(), 0.7
    for prompt in PROMPTS:
        [answer] = Ensemble(own).generate([prompt], policy(tau), max_new_tokens=6)
        ids = own[0].tokenizer.encode(prompt)
        nats = torch.tensor([nats_of(model, prompt) / (len(ids) - 1) for model in own])
        weights = (-nats / tau).softmax(-1)
        for token in answer.trace:
            each = torch.stack([model.logits_after(ids).log_softmax(-1) for model in own])
            fused = (each * weights[:, None]).sum(0).log_softmax(-1)
            assert token.id == int(fused.argmax())
            assert token.logprob == pytest.approx(float(fused.max()), abs=1e-5)
            ids = [*ids, token.id]


@pytest.mark.parametrize(
    ("tokens", "n_tokens"), [(BASE, 8), (LEFT, 1)], ids=["one vocabulary", "two"]
)
def test_a_small_tau_lets_the_model_write_that_knows_the_prompt_best(
    tokens: tuple[str, ...], n_tokens: int
) -> None:
    # Of two vocabularies one token: behind it, what was written together is read in another way.
    own = [random_table("base", 1, BASE), random_table("other", 2, tokens)]
    best_was = set()
    for prompt in PROMPTS:
        best = min(own, key=lambda model: nats_of(model, prompt))
        best_was.add(best.name)
        [alone] = Ensemble([best]).generate([prompt], "single", max_new_tokens=n_tokens)
        [packed] = Ensemble(own).generate([prompt], policy(1e-3), max_new_tokens=n_tokens)
        assert packed.text == alone.text
    assert best_was == {"base", "other"}


def test_a_great_tau_is_the_geometric_mean() -> None:
    average = {"kind": "average", "params": {"mean": "geometric"}}
    texts = [
        [a.text for a in Ensemble(twins()).generate(PROMPTS, which, max_new_tokens=12)]
        for which in (policy(1e6), average)
    ]
    assert texts[0] == texts[1]


def test_a_prompt_that_all_models_find_impossible_tells_nothing_of_them() -> None:
    table = {"": {"a": 0.6, "b": 0.4}, "a": {"b": 1.0}}
    other = {"": {"a": 0.5, "b": 0.5}, "a": {"b": 0.7, ".": 0.3}}
    own = [
        TableModel(name, ["a", "b", "."], rows, ends=["."])
        for name, rows in (("base", table), ("other", other))
    ]
    average = {"kind": "average", "params": {"mean": "geometric"}}
    [answer] = Ensemble(own).generate(["aa"], policy(0.5), max_new_tokens=4)
    [equal] = Ensemble(own).generate(["aa"], average, max_new_tokens=4)
    assert answer.text == equal.text == "baba"


def test_a_long_prompt_is_scored_in_parts_that_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[int] = []
    feed = TableSession.feed

    def watch(session: TableSession, *args: Any, **kwargs: Any) -> ModelOutput:
        output = feed(session, *args, **kwargs)
        shown.append(output.logits.numel())
        return output

    monkeypatch.setattr(TableSession, "feed", watch)
    prompt = "abcd a dd" * 5
    [whole] = Ensemble(twins()).generate([prompt], policy(0.5), max_new_tokens=6)
    most, n_passes = max(shown), len(shown)
    shown.clear()
    monkeypatch.setattr("multicolm.decoding.own_tokens._MAX_LOGITS", 3 * len(BASE))
    [parts] = Ensemble(twins()).generate([prompt], policy(0.5), max_new_tokens=6)
    assert max(shown) == 3 * len(BASE) < most and len(shown) > n_passes
    assert [t.id for t in parts.trace] == [t.id for t in whole.trace]
    assert [t.logprob for t in parts.trace] == pytest.approx([t.logprob for t in whole.trace])


def test_it_keeps_the_laws() -> None:
    own = [random_table("base", 1, BASE), random_table("other", 2, LEFT)]
    check_policy(Ensemble(own).resolve(policy(0.5)))
    check_routing(Ensemble(own), PROMPTS, Ensemble(own).resolve(policy(0.5)))


def test_every_prompt_of_a_batch_has_weights_of_its_own() -> None:
    ensemble = multicolm.load("tiny-mixed")
    prompts = ["What does Zosos treat?", "What is 2 * x + 15 if x = 7?"]
    together = ensemble.generate(prompts, policy(0.3), max_new_tokens=12)
    alone = [ensemble.generate([p], policy(0.3), max_new_tokens=12)[0] for p in prompts]
    assert [a.text for a in together] == [a.text for a in alone]


def test_the_weights_are_read_only_by_policies_that_declare_it() -> None:
    class Undeclared(MixPolicy):
        base_signals = frozenset({"logprobs"})
        assistant_signals = frozenset({"logprobs"})

        def mix(self, views: Views) -> torch.Tensor:
            assert math.isfinite(float(views.prompt_mean_nll.sum()))
            return views.base.logprobs

    with pytest.raises(PolicyError, match="`prompts = True`"):
        Ensemble(twins()).generate(["abc"], Undeclared(), max_new_tokens=2)

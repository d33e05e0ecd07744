"""Mixtures across vocabularies: exact on bytes, and as published on the union of tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from built import adapter
from tables import random_table

import multicolm
from multicolm import Ensemble
from multicolm.backend.table import TableModel
from multicolm.errors import CapabilityError
from multicolm.exact.byte_session import ByteSession
from multicolm.exact.byte_vocabulary import END
from multicolm.policy.gac import GacPolicy
from multicolm.testing import check_policy, check_routing

BASE = ("a", "b", "c", " ", "d", " d", "e", ".")
LEFT = ("a", "b", "c", " ", "d", "e", "ab", "bc", "<stop>")
RIGHT = ("a", "b", "c", " ", "d", "e", "cab", "ea", "<stop>")
PROMPTS = ["a", "bc", "a d", "cab"]
QUESTIONS = ["What does Zosos treat?", "What is 2 * x + 15 if x = 7?"]


def models(seed: int = 0) -> list[TableModel]:
    tables = (("base", 1, BASE), ("left", 2, LEFT), ("right", 3, RIGHT))
    return [random_table(name, seed + i, tokens) for name, i, tokens in tables]


def of_bytes(model: TableModel, prompt: str, text: bytes) -> list[torch.Tensor]:
    """The model's next-byte probabilities before every byte of a text, and behind it."""
    session = ByteSession(model, 1, prune=0.0)
    session.begin(0, model.tokenizer.encode(prompt))
    found = [session.next_byte_logprobs([0])[0].exp()]
    for i in range(len(text)):
        session.feed([0], [text[i : i + 1]])
        found.append(session.next_byte_logprobs([0])[0].exp())
    return found


def outcomes(answer: Any) -> list[int]:
    return [*answer.text.encode(), *([END] if answer.finish_reason == "eos" else [])]


def written(ensemble: Ensemble, policy: Any, **settings: Any) -> list[tuple[str, float]]:
    answers = ensemble.generate(PROMPTS, policy, **{"max_new_tokens": 12, "seed": 3, **settings})
    return [(a.text, sum(token.logprob for token in a.trace)) for a in answers]


def kind(name: str, **params: Any) -> dict[str, Any]:
    return {"kind": name, "params": params}


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_has_the_probability_of_the_mixture(mean: str, temperature: float) -> None:
    own, weights = models(), [0.5, 0.2, 0.3]
    policy = kind("byte-mixture", weights=weights, mean=mean)
    settings = {"max_new_tokens": 10, "seed": 1, "temperature": temperature}
    n_bytes = 0
    for prompt, answer in zip(
        PROMPTS, Ensemble(own).generate(PROMPTS, policy, **settings), strict=True
    ):
        shown = [of_bytes(model, prompt, answer.text.encode()) for model in own]
        total = 0.0
        for place, byte in enumerate(outcomes(answer)):
            each = torch.stack([model[place] for model in shown])
            weight = torch.tensor(weights)[:, None]
            mixed = (each * weight).sum(0) if mean == "arithmetic" else (each**weight).prod(0)
            mixed = mixed / mixed.sum()
            if temperature == 0:
                assert float(mixed[byte]) == pytest.approx(float(mixed.max()), abs=1e-5)
            total += math.log(float(mixed[byte]))
            n_bytes += 1
        assert sum(t.logprob for t in answer.trace) == pytest.approx(total, abs=1e-3)
    assert n_bytes > 20


@pytest.mark.parametrize("mean", ["arithmetic", "geometric", "median"])
def test_a_model_that_cannot_spell_what_others_wrote_has_no_say_from_there_on(mean: str) -> None:
    # Only the first model has a token for "!"; the second one goes silent after it.
    base, left = random_table("base", 1, ("!", *BASE)), random_table("left", 2, LEFT)
    ensemble = Ensemble([base, left])
    n_after = 0
    for seed in range(12):
        [answer] = ensemble.generate(
            ["a"], kind("byte-mixture", mean=mean), seed=seed, temperature=1.0, max_new_tokens=16
        )
        text = answer.text.encode()
        silent_from = text.find(b"!") + 1 or len(text) + 1
        n_after += max(0, len(text) - silent_from)
        ours = of_bytes(base, "a", text)
        theirs = of_bytes(left, "a", text[: silent_from - 1])
        total = 0.0
        for i, byte in enumerate(outcomes(answer)):
            if i >= silent_from:
                mixed = ours[i]
            elif mean == "geometric":
                mixed = (ours[i] * theirs[i]).sqrt()
            else:  # the median of two is their mean
                mixed = (ours[i] + theirs[i]) / 2
            total += math.log(float((mixed / mixed.sum())[byte]))
        assert sum(t.logprob for t in answer.trace) == pytest.approx(total, abs=1e-3), text
    assert n_after > 10 or mean == "geometric"  # of which "!" has no chance beside the other


@pytest.mark.parametrize("k", range(3))
def test_with_all_weight_on_one_model_a_text_has_that_models_probability(k: int) -> None:
    own = models()
    weights = [float(i == k) for i in range(3)]
    settings = {"max_new_tokens": 12, "seed": 2, "temperature": 1.0}
    answers = Ensemble(own).generate(PROMPTS, kind("byte-mixture", weights=weights), **settings)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        session = ByteSession(own[k], 1, prune=0.0)
        session.begin(0, own[k].tokenizer.encode(prompt))
        session.feed([0], [answer.text.encode()])
        wanted = session.logprob(0)
        if answer.finish_reason == "eos":
            wanted += float(session.next_byte_logprobs([0])[0, END])
        assert sum(t.logprob for t in answer.trace) == pytest.approx(wanted, abs=1e-4)
        others = [answer.usage[name].forwards for i, name in enumerate(own_names(own)) if i != k]
        assert not any(others)


def own_names(own: list[TableModel]) -> list[str]:
    return [model.name for model in own]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_order_of_models_does_not_matter(temperature: float) -> None:
    base, left, right = models()
    settings = {"temperature": temperature, "max_new_tokens": 8}
    mixed = [
        kind("byte-mixture", weights=weights) for weights in ([0.2, 0.5, 0.3], [0.2, 0.3, 0.5])
    ]
    one = written(Ensemble([base, left, right]), mixed[0], **settings)
    # The base model stays: a text's length is counted in its tokens.
    other = written(Ensemble([base, right, left]), mixed[1], **settings)
    assert [text for text, _ in one] == [text for text, _ in other]


def test_equal_models_are_one_model() -> None:
    base = models()[0]
    twin = random_table("twin", 1, BASE)
    one = written(Ensemble([base]), kind("byte-mixture"))
    two = written(Ensemble([base, twin]), kind("byte-mixture"))
    assert [text for text, _ in one] == [text for text, _ in two]


def test_proxy_tuning_with_alpha_0_or_equal_experts_is_the_base_model() -> None:
    base, left, _ = models()
    twin = random_table("twin", 2, LEFT)
    trio = Ensemble([base, left, twin])
    alone = written(trio, kind("byte-mixture", weights=[1.0, 0.0, 0.0]))
    for params in ({"alpha": 0.0}, {"alpha": 1.5}):
        shown = written(trio, kind("byte-proxy-tuning", **params))
        assert [text for text, _ in shown] == [text for text, _ in alone]


def test_contrast_with_beta_0_is_the_expert_greedily() -> None:
    trio = Ensemble(models())
    expert = written(trio, kind("byte-mixture", weights=[0.0, 1.0, 0.0]))
    shown = written(trio, kind("byte-contrastive", beta=0.0, alpha=0.0))
    assert [text for text, _ in shown] == [text for text, _ in expert]


@pytest.mark.parametrize(
    "name", ["byte-mixture", "byte-proxy-tuning", "byte-contrastive", "gac", "unite", "safe"]
)
def test_the_laws_hold_on_three_vocabularies(name: str) -> None:
    check_routing(Ensemble(models()), PROMPTS[:3], name, max_new_tokens=6)
    check_policy(multicolm.policy.resolve.resolve_policy(name))


def test_a_text_of_bytes_is_told_in_the_base_models_tokens() -> None:
    own = models()
    settings = {"max_new_tokens": 7, "seed": 0, "temperature": 1.5}
    [answer] = Ensemble(own).generate(["a"], "byte-mixture", **settings)
    assert len(answer.trace.tokens) <= 7
    words = [t.text for t in answer.trace if t.id not in own[0].tokenizer.end_ids]
    assert "".join(words) == answer.text
    encoded = own[0].tokenizer.encode_continuation(answer.text)
    assert [t.id for t in answer.trace][: len(encoded)] == encoded
    assert {t.model for t in answer.trace} == {"mixture"}


def test_embedded_models_of_three_vocabularies_are_mixed_byte_by_byte() -> None:
    tiny = multicolm.load("tiny-mixed")
    prompt = "Question: What does Zosos treat?\nResponse:"
    [answer] = tiny.generate([prompt], "byte-mixture", max_new_tokens=12)
    assert answer.text.encode().decode() == answer.text and answer.usage["facts"].forwards > 0


def test_a_tokenizer_that_is_not_covered_is_refused_with_the_reason() -> None:
    base = models()[0]
    base.tokenizer = adapter("t5")
    with pytest.raises(CapabilityError, match="'byte-mixture' needs model 'base' byte by byte: "):
        Ensemble([base]).generate("a", "byte-mixture")


# ---- the union of tokens


def test_on_one_vocabulary_gac_is_the_average() -> None:
    twins = Ensemble([random_table(name, i, BASE) for i, name in enumerate(("base", "left"))])
    for temperature in (0.0, 1.0):
        shown = [written(twins, name, temperature=temperature) for name in ("gac", "average")]
        assert shown[0] == shown[1]


def test_gac_gives_a_token_the_mean_of_what_models_that_have_it_give() -> None:
    base = TableModel("base", ["q", "a", "b", "."], {"": {"a": 0.6, "b": 0.4}}, ["."])
    other = TableModel("other", ["q", "ab", "a", "b", "!"], {"": {"ab": 0.9, "b": 0.1}}, ["!"])
    ensemble = Ensemble([base, other])
    [answer] = ensemble.generate(["q"], "gac", max_new_tokens=1)
    assert [(t.text, round(math.exp(t.logprob), 5)) for t in answer.trace] == [("ab", 0.45)]
    [answer] = ensemble.generate(["q"], kind("gac", weights=[0.8, 0.2]), max_new_tokens=1)
    assert [(t.text, round(math.exp(t.logprob), 5)) for t in answer.trace] == [("a", 0.48)]


def test_the_gate_lets_the_base_model_write_alone_where_it_is_sure() -> None:
    trio = Ensemble(models())
    alone = [a.text for a in trio.generate(PROMPTS, "single", max_new_tokens=12)]
    answers = trio.generate(PROMPTS, kind("gac", threshold=0.0), max_new_tokens=12)
    assert [a.text for a in answers] == alone
    assert all(a.usage["left"].forwards == 0 for a in answers)
    gated = trio.generate(PROMPTS, kind("gac", threshold=0.6), max_new_tokens=12)
    open_ = trio.generate(PROMPTS, "gac", max_new_tokens=12)
    reads = [sum(a.usage["left"].forwards for a in answers) for answers in (gated, open_)]
    assert 0 < reads[0] < reads[1]


def test_unite_renormalises_over_the_union_of_the_likeliest_tokens() -> None:
    ours, theirs = {"a": 0.5, "b": 0.3, "c": 0.2}, {"ab": 0.6, "b": 0.3, "a": 0.1}
    base = TableModel("base", ["q", "a", "b", "c", "."], {"": ours}, ["."])
    other = TableModel("other", ["q", "a", "b", "ab", "c", "!"], {"": theirs}, ["!"])
    ensemble = Ensemble([base, other])
    # The union of the likeliest one of each is {a, ab}; `ab` counts as `a` to the base model.
    [answer] = ensemble.generate(["q"], kind("unite", top_k=1), max_new_tokens=1)
    a, ab = (0.5 / 1.0 + 0.1 / 0.7) / 2, (0.5 / 1.0 + 0.6 / 0.7) / 2
    [token] = answer.trace.tokens
    assert (token.text, round(math.exp(token.logprob), 4)) == ("ab", round(ab / (a + ab), 4))


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_unite_of_equal_models_is_the_greedy_text_of_one(top_k: int) -> None:
    twins = Ensemble([random_table(name, 1, BASE) for name in ("base", "left")])
    one = [a.text for a in twins.generate(PROMPTS, "single", max_new_tokens=12)]
    both = twins.generate(PROMPTS, kind("unite", top_k=top_k), max_new_tokens=12)
    assert [a.text for a in both] == one


def test_unite_with_all_weight_on_the_base_model_is_its_greedy_text() -> None:
    trio = Ensemble(models())
    shown = trio.generate(PROMPTS, kind("unite", weights=[1.0, 0.0, 0.0]), max_new_tokens=12)
    alone = trio.generate(PROMPTS, "single", max_new_tokens=12)
    assert [a.text for a in shown] == [a.text for a in alone]


# ---- presets of other kinds


def test_mixture_like_follows_the_average_when_sampled() -> None:
    """One model drawn per token; over many texts their first tokens are those of the mixture."""
    twins = Ensemble([random_table(name, i, BASE) for i, name in enumerate(("base", "left"))])
    n = 4000
    settings = {"max_new_tokens": 1, "temperature": 1.0, "batch_size": 256}
    answers = twins.generate(["a"] * n, "mixture-like", seed=range(n), **settings)
    counts = torch.zeros(len(BASE))
    for answer in answers:
        counts[answer.trace.tokens[0].id] += 1
    probs = torch.zeros(len(BASE))
    for model in twins.backends:
        output = model.open(1).feed([0], [model.tokenizer.encode("a")], [1])
        probs += output.logits[0].softmax(-1) / 2
    expected = probs * n
    chi = float(((counts - expected) ** 2 / expected).sum())
    assert chi < 24.3  # 7 degrees of freedom, p = 0.001


def test_mod_is_the_average_with_its_published_weights() -> None:
    twins = Ensemble([random_table(name, i, BASE) for i, name in enumerate(("base", "left"))])
    texts = [text for text, _ in written(twins, kind("average", weights=[0.9, 0.1]))]
    assert [text for text, _ in written(twins, "mod")] == texts


def test_models_that_cannot_change_a_greedy_token_are_not_run() -> None:
    class Everywhere(GacPolicy):
        def defers(self, views: Any) -> torch.Tensor:
            return torch.ones(views.n_positions, dtype=torch.bool)

    ensemble, weights = multicolm.load("tiny-mixed"), [0.8, 0.1, 0.1]
    skipping, plain = (
        ensemble.generate(QUESTIONS, policy(weights=weights), max_new_tokens=20, batch_size=1)
        for policy in (GacPolicy, Everywhere)
    )
    assert [a.text for a in skipping] == [a.text for a in plain]
    n_skipping, n_plain = (a.usage["facts"].forwards for a in (skipping, plain))
    assert 0 < n_skipping < 0.5 * n_plain


def test_a_sampled_token_is_drawn_from_all_models_wherever_they_weigh_something() -> None:
    own = models()
    settings = {"max_new_tokens": 20, "temperature": 1.0, "seed": 5}
    answers = Ensemble(own).generate(PROMPTS, kind("gac", weights=[0.8, 0.1, 0.1]), **settings)
    assert {token.model for a in answers for token in a.trace} == {"mixture"}

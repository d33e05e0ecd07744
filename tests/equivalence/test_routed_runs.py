"""Whole routed runs: caches, batches, schedules and the order of prompts change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, PROMPTS, fresh_network, model, shared_tokenizer, uncached
from transformers import LlamaConfig

from multicolm import Answer, Ensemble
from multicolm.backend.transformers import TransformersModel
from multicolm.testing import check_removable, check_routing

N_TOKENS = 12

POLICIES: dict[str, dict[str, Any]] = {
    "cosd-rule": {"kind": "cosd-rule", "params": {"alpha": 0.3, "beta": 0.6}},
    "confidence": {"kind": "confidence", "params": {"threshold": 0.2}},
    "entropy": {"kind": "entropy", "params": {"threshold": 2.5}},
    "max-confidence": {"kind": "max-confidence"},
    "random": {"kind": "random"},
    "average": {"kind": "average"},
    "speculative": {"kind": "speculative"},
}
MEMBERS = (("llama", "base", 0), ("gemma3", "left", 1), ("gpt2", "right", 2))


@pytest.fixture(scope="module")
def cached() -> Ensemble:
    return Ensemble([model(*member) for member in MEMBERS])


@pytest.fixture(scope="module")
def recomputing() -> Ensemble:
    return Ensemble([uncached(*member) for member in MEMBERS])


def traces(answers: list[Answer]) -> list[list[tuple[int, str]]]:
    return [[(token.id, token.model) for token in answer.trace] for answer in answers]


def logprobs(answers: list[Answer]) -> torch.Tensor:
    return torch.tensor([token.logprob for answer in answers for token in answer.trace])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(("schedule", "block_size"), [("stepwise", 1), ("block", 5)])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_routed_run_with_caches_equals_one_without(
    cached: Ensemble,
    recomputing: Ensemble,
    policy: str,
    schedule: Any,
    block_size: int,
    temperature: float,
) -> None:
    settings: dict[str, Any] = {
        "temperature": temperature,
        "schedule": schedule,
        "block_size": block_size,
        "max_new_tokens": N_TOKENS,
        "seed": 3,
    }
    with_caches = cached.generate(PROMPTS[:5], POLICIES[policy], batch_size=3, **settings)
    without = recomputing.generate(PROMPTS[:5], POLICIES[policy], **settings)
    assert traces(with_caches) == traces(without)
    assert torch.allclose(logprobs(with_caches), logprobs(without), atol=1e-3)
    assert [model.served_as for model in cached.backends] == ["rows"] * 3


def test_the_runs_that_are_compared_hand_over_often(cached: Ensemble) -> None:
    for name in ("cosd-rule", "confidence", "entropy", "max-confidence", "random", "speculative"):
        answers = cached.generate(
            PROMPTS, POLICIES[name], temperature=0.9, seed=3, max_new_tokens=N_TOKENS
        )
        wanted = 3 if name == "speculative" else 8  # an accepted draft is no hand-over
        assert sum(answer.trace.handovers for answer in answers) >= wanted, name


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_schedules_and_waiting_for_a_slot_change_nothing(
    cached: Ensemble, policy: str
) -> None:
    check_routing(cached, PROMPTS[:4], cached.resolve(POLICIES[policy]), max_new_tokens=10)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_order_of_prompts_does_not_matter(cached: Ensemble, batch_size: int) -> None:
    settings: dict[str, Any] = {"temperature": 0.9, "seed": 1, "max_new_tokens": N_TOKENS}
    plain = traces(cached.generate(PROMPTS, POLICIES["cosd-rule"], **settings))
    turned = cached.generate(
        PROMPTS[::-1], POLICIES["cosd-rule"], batch_size=batch_size, **settings
    )
    assert traces(turned)[::-1] == plain


def test_recurrent_models_keep_the_laws_of_the_loop_too() -> None:
    ensemble = Ensemble([model("lfm2", "base"), model("rwkv", "assistant", 1)])
    for name in ("cosd-rule", "speculative"):
        check_routing(
            ensemble,
            PROMPTS[:2],
            ensemble.resolve(POLICIES[name]),
            max_new_tokens=6,
            temperatures=(0.9,),
        )


@pytest.mark.parametrize("policy", ["cosd-rule", "confidence", "max-confidence"])
def test_a_model_that_is_never_chosen_can_be_removed_unnoticed(policy: str) -> None:
    flat = fresh_network(
        LlamaConfig(
            vocab_size=len(shared_tokenizer()),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            eos_token_id=shared_tokenizer().eos_token_id,
        ),
        spread=0.01,
    )
    mute = TransformersModel("mute", flat, shared_tokenizer())
    ensemble = Ensemble([model("llama", "base"), mute, model("gpt2", "right", 2)])
    check_removable(
        ensemble, PROMPTS, "mute", ensemble.resolve(POLICIES[policy]), max_new_tokens=N_TOKENS
    )


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_bfloat16_model_is_served_in_rows_beside_others(kind: str) -> None:
    half = fresh_network(CONFIGS[kind]()).to(torch.bfloat16)
    base = TransformersModel("base", half, shared_tokenizer())
    ensemble = Ensemble([base, model("gpt2", "assistant", 1)])
    for policy in ("cosd-rule", "average", "speculative"):
        settings: dict[str, Any] = {"temperature": 0.9, "seed": 2, "max_new_tokens": N_TOKENS}
        answers = ensemble.generate(PROMPTS, POLICIES[policy], **settings)
        again = ensemble.generate(PROMPTS, POLICIES[policy], **settings)
        assert base.served_as == "rows"
        assert traces(answers) == traces(again)
        assert bool(logprobs(answers).isfinite().all())
        assert policy == "average" or answers.usage["base"].tokens_written > 0

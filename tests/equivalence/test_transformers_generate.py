"""The loop against ``generate`` of the transformers library, token for token."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from tiny_models import (
    CONFIGS,
    OTHERS,
    PROMPTS,
    ROWS,
    fresh_network,
    generated,
    model,
    network,
    shared_tokenizer,
)

from multicolm import Answer, Ensemble
from multicolm.backend.transformers import TransformersModel

N_TOKENS = 20

NEVER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "single": ({"kind": "single"}, {}),
    "confidence-stepwise": (
        {"kind": "confidence", "params": {"threshold": 0}},
        {"schedule": "stepwise"},
    ),
    **{
        f"{kind}-block-{size}": (
            {"kind": kind, "params": {key: 0}},
            {"schedule": "block", "block_size": size},
        )
        for kind, key in (("confidence", "threshold"), ("cosd-rule", "alpha"))
        for size in (1, 3, 8)
    },
}

SOME = ("single", "confidence-stepwise", "cosd-rule-block-3")
THOROUGH = ("llama", "gemma3", "gpt2")


@lru_cache(maxsize=64)
def wanted(kind: str, seed: int = 0) -> list[list[int]]:
    return generated(network(kind, seed), PROMPTS, N_TOKENS)


def ids(answers: list[Answer]) -> list[list[int]]:
    return [[token.id for token in answer.trace] for answer in answers]


def test_the_references_are_diverse_texts() -> None:
    for kind in ROWS:
        tokens = [token for text in wanted(kind) for token in text]
        assert len(set(tokens)) >= 10, kind


@pytest.mark.parametrize(
    ("kind", "never"),
    [(kind, never) for kind in ROWS for never in (NEVER if kind in THOROUGH else SOME)],
)
def test_a_policy_that_never_defers_equals_generate(kind: str, never: str) -> None:
    base = model(kind, "base")
    ensemble = Ensemble([base, model("gpt2", "left", seed=1), model("llama", "right", seed=2)])
    policy, settings = NEVER[never]
    answers = ensemble.generate(PROMPTS, policy, max_new_tokens=N_TOKENS, **settings)
    assert ids(answers) == wanted(kind)
    assert base.served_as == "rows"
    assert answers.usage["left"].forwards == answers.usage["right"].forwards == 0


@pytest.mark.parametrize("never", SOME)
@pytest.mark.parametrize("kind", OTHERS)
def test_recurrent_and_odd_models_are_recognised_and_equal_generate_too(
    kind: str, never: str
) -> None:
    base = model(kind, "base")
    ensemble = Ensemble([base, model("gpt2", "left", seed=1)])
    policy, settings = NEVER[never]
    answers = ensemble.generate(PROMPTS, policy, max_new_tokens=N_TOKENS, **settings)
    assert ids(answers) == wanted(kind)
    assert base.served_as in OTHERS[kind]


@pytest.mark.parametrize(("schedule", "block_size"), [("stepwise", 1), ("block", 3)])
@pytest.mark.parametrize("kind", [*ROWS, *OTHERS])
def test_a_policy_that_always_defers_equals_the_assistants_generate(
    kind: str, schedule: str, block_size: int
) -> None:
    ensemble = Ensemble([model("llama", "base", seed=5), model(kind, "assistant")])
    policy = {"kind": "confidence", "params": {"threshold": 1.1}}
    answers = ensemble.generate(
        PROMPTS, policy, max_new_tokens=N_TOKENS, schedule=schedule, block_size=block_size
    )
    assert ids(answers) == wanted(kind)
    assert answers.usage["base"].tokens_written == 0


def test_a_text_ends_where_generate_ends_it() -> None:
    for seed in range(10, 30):
        want = wanted("gpt2", seed)
        if any(len(text) < N_TOKENS for text in want):
            break
    assert any(len(text) < N_TOKENS for text in want), "no text came to an end"
    answers = Ensemble([model("gpt2", seed=seed)]).generate(PROMPTS, max_new_tokens=N_TOKENS)
    assert ids(answers) == want
    for answer, text in zip(answers, want, strict=True):
        ended = text[-1] == shared_tokenizer().eos_token_id
        assert answer.finish_reason == ("eos" if ended else "length")


def test_a_text_that_grows_past_several_doublings_of_the_cache_equals_generate() -> None:
    prompt = "ab cd " * 3
    for kind in ("llama", "gemma3"):  # 18 tokens and 400 more: 128, 256, 512 slots
        network_ = long_network(kind)
        base = TransformersModel(kind, network_, shared_tokenizer())
        answer = Ensemble([base]).generate(prompt, max_new_tokens=400)[0]
        assert base.served_as == "rows"
        assert [token.id for token in answer.trace] == generated(network_, [prompt], 400)[0]
        assert len(answer.trace) == 400


def long_network(kind: str) -> Any:
    """A network with long positions that never ends a text."""
    config = CONFIGS[kind]()
    config.max_position_embeddings, config.eos_token_id = 1024, None
    config.num_hidden_layers = 2
    if kind == "gemma3":
        config.layer_types = config.layer_types[:2]
    network_ = fresh_network(config)
    network_.generation_config.eos_token_id = None
    return network_

"""What batches and drafted blocks are worth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from questions import PROMPTS

from multicolm import Ensemble


@pytest.mark.parametrize("size", ["tiny", "medium"])
@pytest.mark.parametrize("policy", ["cosd-rule", "random"])
def test_batch_16_against_batch_1(
    size: str, policy: str, compare: Callable[..., float], request: pytest.FixtureRequest
) -> None:
    ensemble: Ensemble = request.getfixturevalue(size)
    settings = {"max_new_tokens": 48, "seed": 0}
    ratio = compare(
        lambda: ensemble.generate(PROMPTS, policy, batch_size=16, **settings),
        lambda: ensemble.generate(PROMPTS, policy, batch_size=1, **settings),
        what=f"16 texts at once, {size} models, {policy}",
        against="one after another",
        aim="< 1",
    )
    assert ratio > 0


@pytest.mark.parametrize("size", ["tiny", "medium"])
@pytest.mark.parametrize("policy", ["cosd-rule", "max-confidence", "speculative"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_block_against_stepwise(
    size: str,
    policy: str,
    batch_size: int,
    compare: Callable[..., float],
    request: pytest.FixtureRequest,
) -> None:
    ensemble: Ensemble = request.getfixturevalue(size)
    prompts = PROMPTS[:batch_size]
    settings = {"max_new_tokens": 48, "seed": 0, "batch_size": batch_size}
    ratio = compare(
        lambda: ensemble.generate(prompts, policy, schedule="block", **settings),
        lambda: ensemble.generate(prompts, policy, schedule="stepwise", **settings),
        what=f"block, {size} models, {policy}, batch {batch_size}",
        against="stepwise",
        aim="<= 1" if policy == "cosd-rule" else "",
    )
    assert ratio > 0

"""What it is worth that policies share forward passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from questions import PROMPTS

from multicolm import Ensemble
from multicolm.decoding.runner import Runner

POLICIES = ["max-confidence", "average", "cosd-rule", "confidence"]


def write(ensemble: Ensemble, n_texts: int, *, shared: bool) -> None:
    """Texts of four policies, a round of each in turn, or all rounds together."""
    runner = Runner(ensemble.backends, 4 * n_texts)
    lives = [
        ensemble.live(policy, runner=runner) if shared else ensemble.live(policy, n_slots=n_texts)
        for policy in POLICIES
    ]
    wanted = ensemble.generation.updated({"max_new_tokens": 48})
    for live in lives:
        for number, prompt in enumerate(PROMPTS[:n_texts]):
            live.add(live.row(prompt, number, wanted, 0))
    while at_work := [live for live in lives if live.busy]:
        if shared:
            runner.run([live.loop.step() for live in at_work])
        else:
            for live in at_work:
                live.step()


@pytest.mark.parametrize("size", ["tiny", "medium"])
@pytest.mark.parametrize("n_texts", [1, 4])
def test_four_policies_together_against_in_turn(
    size: str, n_texts: int, compare: Callable[..., float], request: pytest.FixtureRequest
) -> None:
    ensemble: Ensemble = request.getfixturevalue(size)
    ratio = compare(
        lambda: write(ensemble, n_texts, shared=True),
        lambda: write(ensemble, n_texts, shared=False),
        what=f"four policies together, {size} models, {n_texts} texts each",
        against="in turn",
        aim="< 1",
    )
    assert ratio > 0

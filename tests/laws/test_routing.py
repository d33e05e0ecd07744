"""The laws of the loop, with every registered policy; and proof that the checks bite."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import pytest
import torch
from tables import READY

from multicolm import Ensemble, SelectPolicy, Views
from multicolm.backend.table import TableModel
from multicolm.plugins import policies
from multicolm.testing import LawBroken, check_removable, check_routing

TOKENS = ["a", "b", "c", " d", "e", "."]


def table(name: str, seed: int) -> TableModel:
    """A table with random distributions after every token."""
    chance = random.Random(seed)
    rows = {}
    for context in ["", *TOKENS[:-1]]:
        weights = [chance.random() ** 3 for _ in TOKENS]
        rows[context] = {t: w / sum(weights) for t, w in zip(TOKENS, weights, strict=True)}
    return TableModel(name, TOKENS, rows, ends=["."])


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return Ensemble([table("base", 1), table("left", 2), table("right", 3)])


PROMPTS = ["a", "bc", "a d", "e", "cab"]


@pytest.mark.parametrize("kind", READY)
def test_every_registered_policy_keeps_the_laws_of_the_loop(ensemble: Ensemble, kind: str) -> None:
    check_routing(ensemble, PROMPTS, kind)
    assert ensemble.generate(PROMPTS, kind, seed=0)[0].policy == kind


def test_a_schedule_that_changes_the_text_is_caught(ensemble: Ensemble) -> None:
    class LooksBackSecretly(SelectPolicy):
        """Decides by how often it was asked: no pure function, so the block size shows."""

        base_signals: ClassVar[Any] = {"top1"}
        calls: ClassVar[Any] = [0]

        def select(self, views: Views) -> torch.Tensor:
            self.calls[0] += 1
            return torch.full((views.n_positions,), self.calls[0] % 3)

    with pytest.raises(LawBroken, match="equal"):
        check_routing(ensemble, PROMPTS, LooksBackSecretly())


def test_a_model_that_is_never_chosen_can_be_removed_unnoticed(ensemble: Ensemble) -> None:
    mute = TableModel("mute", TOKENS, {"": dict.fromkeys(TOKENS, 1 / 6)}, ends=["."])
    bigger = Ensemble([*ensemble.backends, mute])
    for kind in ("confidence", "entropy", "margin", "cosd-rule", "max-confidence"):
        policy = policies.get(kind)()
        check_removable(bigger, PROMPTS, "mute", policy)
        assert bigger.generate(PROMPTS, policy)[0].usage["mute"].tokens_written == 0


def test_removing_a_model_that_writes_is_caught(ensemble: Ensemble) -> None:
    always = policies.get("single")(model="left")
    with pytest.raises(LawBroken, match="did write"):
        check_removable(ensemble, PROMPTS, "left", always)

"""SpecFuse: drafts of segments, votes, and weights that follow who drafts well."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tables import random_table

from multicolm import Ensemble, Segments
from multicolm.backend.table import TableModel
from multicolm.policy.spec_fuse import SpecFusePolicy
from multicolm.testing import check_policy, check_routing

BASE = ("a", "b", "c", " ", "d", " d", "e", ".")
LEFT = ("a", "b", "c", " ", "d", "e", " ab", "bc", "<stop>")
END = len(BASE) - 1
PROMPTS = ["a", "bc", "a d", "cab"]


def trio(seed: int = 0) -> list[TableModel]:
    return [random_table(name, seed + i, BASE) for i, name in enumerate(("base", "left", "right"))]


def drafted(model: TableModel, ids: list[int], shortest: int, longest: int, left: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < left:
        token = int(model.logits_after(ids + tokens).argmax())
        ends_word = token == END or BASE[token].startswith(" ")
        if len(tokens) >= shortest and (ends_word or len(tokens) >= longest):
            break
        tokens.append(token)
        if token == END:
            break
    return tokens


def mean_logprob(model: TableModel, ids: list[int], tokens: list[int]) -> float:
    each = [
        float(model.logits_after(ids + tokens[:i]).double().log_softmax(-1)[token])
        for i, token in enumerate(tokens)
    ]
    return sum(each) / len(each)


class Published:
    """Rewards, weights and votes as loops over models, in the words of the paper's appendix."""

    def __init__(self, n: int, learning_rate: float) -> None:
        self.n, self.learning_rate, self.round = n, learning_rate, 0
        self.w = np.ones(n) / n

    def vote(self, scores: np.ndarray) -> int:
        """``scores[judge, draft]``, each judge's summing to 1; the number of the winning draft."""
        self.round += 1
        eta = self.learning_rate * math.sqrt(1 / self.n) / self.round
        wins = np.zeros(self.n)
        for i in range(self.n):
            for judge in range(self.n):
                for rival in range(self.n):
                    if i not in (judge, rival):
                        wins[i] += scores[judge, i] >= scores[judge, rival]
        rewards = np.maximum(wins, 1) / (self.n - 1) ** 2
        self.w = self.w * np.exp(eta * rewards)
        self.w /= self.w.sum()
        return int((scores * self.w[:, None]).sum(0).argmax())


@pytest.mark.parametrize("learning_rate", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_draft_with_most_weighted_votes_is_written(seed: int, learning_rate: float) -> None:
    own = trio(10 * seed)
    policy = SpecFusePolicy(shortest=2, longest=4, learning_rate=learning_rate)
    [answer] = Ensemble(own).generate(["a"], policy, max_new_tokens=20)
    ids = own[0].tokenizer.encode("a")
    n_prompt, published, writers = len(ids), Published(3, learning_rate), []
    while len(ids) - n_prompt < 20 and ids[-1] != END:
        drafts = [drafted(m, ids, 2, 4, 20 - len(ids) + n_prompt) for m in own]
        best = 0
        if len({tuple(draft) for draft in drafts}) > 1:
            logs = np.array([[mean_logprob(m, ids, draft) for draft in drafts] for m in own])
            scores = np.exp(logs)
            best = published.vote(scores / scores.sum(1, keepdims=True))
            best = drafts.index(drafts[best])
        writers += [own[best].name] * len(drafts[best])
        ids += drafts[best]
    assert [token.id for token in answer.trace] == ids[n_prompt:]
    assert [token.model for token in answer.trace] == writers


def test_a_model_whose_drafts_lose_loses_votes_and_the_weights_of_texts_are_their_own() -> None:
    policy = SpecFusePolicy(learning_rate=2.0)
    # Two judges prefer draft 0, the third its own; text 1 has it the other way round.
    nats = torch.tensor([[1.0, 1.0, 5.0], [4.0, 4.0, 5.0], [9.0, 9.0, 1.0]])
    segments = torch.stack([nats, nats.flip(0)])
    state = torch.zeros(2, 4, dtype=torch.float64)
    for _ in range(30):
        given = Segments(segments, torch.ones(2, 3, 3, dtype=torch.long), state)
        state = policy.feedback(given, policy.rate(given).argmax(-1))
    weights = state[:, :-1].exp()
    assert weights.sum(-1).tolist() == pytest.approx([1.0, 1.0])
    assert weights[0].argmax() == 0 and weights[0].argmin() == 2
    assert weights[1].argmax() == 2 and weights[1].argmin() == 0
    assert state[:, -1].tolist() == [30.0, 30.0]


def test_identical_models_are_one_of_them() -> None:
    twins = [random_table(name, 4, BASE) for name in ("base", "left", "right")]
    fused = Ensemble(twins).generate(PROMPTS, "spec-fuse", max_new_tokens=12)
    alone = Ensemble(twins).generate(PROMPTS, "single", max_new_tokens=12)
    assert [a.text for a in fused] == [a.text for a in alone]


def test_who_cannot_judge_has_no_vote() -> None:
    policy, state = SpecFusePolicy(), torch.zeros(1, 4, dtype=torch.float64)
    nats = torch.tensor([[[1.0, 2.0, math.nan], [2.0, 1.5, math.nan], [3.0, 4.0, math.nan]]])
    segments = Segments(nats, torch.ones(1, 3, 3, dtype=torch.long), state)
    rated = policy.rate(segments)
    probs = (-nats[0, :, :2]).double().softmax(0)
    weights = policy.feedback(segments, rated.argmax(-1))[0, :2].softmax(-1)
    assert rated[0].tolist() == pytest.approx((probs * weights).sum(-1).tolist())


def test_drafts_that_all_judges_rule_out_are_equally_bad() -> None:
    nats = torch.full((1, 2, 2), math.inf)
    segments = Segments(nats, torch.ones(1, 2, 2, dtype=torch.long), torch.zeros(1, 3).double())
    assert SpecFusePolicy().rate(segments)[0].tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("params", [{}, {"shortest": 1, "longest": 2, "learning_rate": 5.0}])
def test_it_keeps_the_laws(params: Any) -> None:
    check_policy(SpecFusePolicy(**params))


def test_it_keeps_the_laws_of_the_loop_across_vocabularies() -> None:
    own = [random_table("base", 1, BASE), random_table("left", 2, LEFT)]
    policy = SpecFusePolicy(shortest=2, longest=5, learning_rate=3.0)
    check_routing(Ensemble(own), PROMPTS[:3], policy, max_new_tokens=8)

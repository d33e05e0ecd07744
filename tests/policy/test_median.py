"""The geometric median of distributions, against a search that nobody here wrote, and its laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tables import random_table

from multicolm import Ensemble
from multicolm.policy.median import median_shares
from multicolm.policy.resolve import resolve_policy
from multicolm.testing import check_policy, check_routing

PROMPTS = ["a", "b c", "dd"]


def points(n_models: int, seed: int, n_positions: int = 8, vocab: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 4 * torch.rand(n_models, n_positions, 1, generator=generator)
    return (torch.randn(n_models, n_positions, vocab, generator=generator) * scale).softmax(-1)


def total_distance(shares: np.ndarray, probs: np.ndarray, weights: np.ndarray) -> float:
    """Weighted sum of the distances from an average of the points to them."""
    return float((weights * np.linalg.norm(shares @ probs - probs, axis=1)).sum())


@pytest.mark.parametrize("n_models", [3, 5])
def test_no_search_finds_a_point_with_less_distance_to_all(n_models: int) -> None:
    probs = points(n_models, n_models).double()
    weights = torch.linspace(1, 2, n_models).double()
    weights = weights / weights.sum()
    shares = median_shares(probs, weights)
    torch.testing.assert_close(shares.sum(-1), torch.ones(8).double())
    for i in range(8):
        at = probs[:, i].numpy()
        ours = total_distance(shares[i].numpy(), at, weights.numpy())

        def of(logits: np.ndarray, at: np.ndarray = at) -> float:
            share = np.exp(logits - logits.max())
            return total_distance(share / share.sum(), at, weights.numpy())

        best = min(minimize(of, start * 3, method="Nelder-Mead").fun for start in np.eye(n_models))
        assert ours <= best + 1e-5


def test_a_model_of_more_than_half_of_the_weight_is_the_median() -> None:
    shares = median_shares(points(3, 0), torch.tensor([0.2, 0.51, 0.29]))
    assert shares.tolist() == [[0.0, 1.0, 0.0]] * 8


def test_two_models_of_equal_weight_meet_in_the_middle() -> None:
    assert median_shares(points(2, 0), torch.tensor([0.5, 0.5])).tolist() == [[0.5, 0.5]] * 8


def test_one_wrong_model_moves_the_median_less_than_the_mean() -> None:
    probs = points(5, 1)
    right = probs[:1] + 0.01 * (points(4, 2) - probs[:1])  # four that nearly agree
    sure = torch.nn.functional.one_hot(torch.zeros(1, 8).long(), 12).float()  # and one that is sure
    all_ = torch.cat([right, sure])
    shares = median_shares(all_, torch.full((5,), 0.2))
    median = torch.einsum("pm,mpv->pv", shares, all_)
    off = (median - right.mean(0)).norm(dim=-1), (all_.mean(0) - right.mean(0)).norm(dim=-1)
    assert bool((off[0] < 0.1 * off[1]).all())


def test_models_that_agree_outvote_the_third_for_certain() -> None:
    probs = points(3, 3)
    probs[1] = probs[0]
    shares = median_shares(probs, torch.full((3,), 1 / 3))
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.5, 0.0]]).expand(8, -1))


def test_a_position_does_not_depend_on_the_others() -> None:
    probs, weights = points(4, 5), torch.tensor([0.3, 0.3, 0.2, 0.2])
    together = median_shares(probs, weights)
    singly = torch.cat([median_shares(probs[:, i : i + 1], weights) for i in range(8)])
    assert torch.equal(together, singly)


@pytest.mark.parametrize("kind", ["average", "gac", "safe", "byte-mixture"])
def test_mixtures_that_take_the_median_keep_the_laws_of_policies(kind: str) -> None:
    check_policy(resolve_policy({"kind": kind, "params": {"mean": "median"}}))


@pytest.mark.parametrize("kind", ["average", "byte-mixture"])
def test_mixtures_that_take_the_median_keep_the_laws_of_the_loop(kind: str) -> None:
    tokens = ("a", "b", "c", " ", "d", " d", ".")
    names = ("base", "l", "r")
    trio = Ensemble([random_table(name, seed, tokens) for seed, name in enumerate(names)])
    policy = {"kind": kind, "params": {"mean": "median"}}
    if kind == "average":
        check_routing(trio, PROMPTS[:2], trio.resolve(policy), max_new_tokens=4)
    [answer] = trio.generate(["a"], policy, max_new_tokens=4)
    assert {token.model for token in answer.trace} == {"mixture"}


def test_the_median_of_equal_models_is_one_of_them_and_weights_of_one_are_that_model() -> None:
    trio = Ensemble([random_table(name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 7))])
    for weights, alone in (([1, 1, 0], "a"), ([0, 0, 2], "c"), ([1, 1, 1], "b")):
        policy = {"kind": "average", "params": {"mean": "median", "weights": weights}}
        single = {"kind": "single", "params": {"model": alone}}
        shown = trio.generate(PROMPTS, policy, max_new_tokens=10)
        wanted = trio.generate(PROMPTS, single, max_new_tokens=10)
        assert [a.text for a in shown] == [a.text for a in wanted]

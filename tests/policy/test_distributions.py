"""Sampled texts follow the distribution that a policy states: chi-square on a small vocabulary."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from multicolm import Ensemble, VerifyPolicy, Views
from multicolm.backend.table import TableModel
from multicolm.decoding.sampling import Sampling

TOKENS = ["a", "b", "c", "d"]
DRAFT = TableModel(
    "draft",
    TOKENS,
    {
        "": {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1},
        "a": {"a": 0.1, "b": 0.6, "c": 0.1, "d": 0.2},
        "b": {"a": 0.7, "b": 0.1, "c": 0.1, "d": 0.1},
    },
)
TARGET = TableModel(
    "target",
    TOKENS,
    {
        "": {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4},
        "a": {"a": 0.5, "b": 0.2, "c": 0.2, "d": 0.1},
        "c": {"a": 0.2, "b": 0.5, "c": 0.0, "d": 0.3},
    },
)
PAIR = Ensemble([DRAFT, TARGET])
N_DRAWS = 1500
PROMPT = "d"


def draws(policy: Any, **settings: Any) -> list[tuple[int, ...]]:
    """The first two tokens of many independent texts."""
    answers = PAIR.generate(
        [PROMPT] * N_DRAWS,
        policy,
        max_new_tokens=2,
        seed=range(N_DRAWS),
        batch_size=500,
        **{"temperature": 1.0, **settings},
    )
    return [tuple(token.id for token in answer.trace) for answer in answers]


def joint(step: Any) -> dict[tuple[int, int], float]:
    """Probability of every pair of tokens, given ``step(ids) -> probabilities``."""
    first = step([3])
    return {(i, j): float(first[i] * step([3, i])[j]) for i, j in product(range(4), repeat=2)}


def p_value(drawn: list[tuple[int, ...]], wanted: dict[tuple[int, int], float]) -> float:
    """Chance of counts as far off as these; none at all if an impossible pair came."""
    counts = Counter(drawn)
    if any(counts[pair] for pair, p in wanted.items() if p == 0):
        return 0.0
    possible = [pair for pair, p in wanted.items() if p > 0]
    expected = [wanted[pair] * len(drawn) for pair in possible]
    scale = len(drawn) / sum(expected)
    observed = [counts[pair] for pair in possible]
    return float(chisquare(observed, [e * scale for e in expected]).pvalue)


def target_step(sampling: Sampling) -> Any:
    return lambda ids: sampling.probs(TARGET.logits_after(ids)[None])[0]


SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "top_k": 2},
    {"temperature": 1.3, "top_p": 0.7},
]


@pytest.mark.parametrize(
    ("settings", "block_size"), [(SAMPLINGS[0], 1), (SAMPLINGS[2], 1), *((s, 4) for s in SAMPLINGS)]
)
def test_speculative_text_follows_the_target(settings: dict[str, Any], block_size: int) -> None:
    drawn = draws("speculative", schedule="block", block_size=block_size, **settings)
    assert p_value(drawn, joint(target_step(Sampling(**settings)))) > 1e-3


def cascade_step(rule: str, alpha: float, temperature: float) -> Any:
    """The distribution that a rule states, token by token in plain Python."""

    def step(ids: list[int]) -> list[float]:
        small, large = (model.logits_after(ids) for model in (DRAFT, TARGET))
        q, p = ((m / temperature).softmax(-1).tolist() for m in (small, large))
        small, large = small.exp().tolist(), large.exp().tolist()
        distance = sum(max(0.0, a - b) for a, b in zip(q, p, strict=True))
        good = {
            "chow": [max(small) >= 1 - alpha] * 4,
            "diff": [max(small) >= max(large) - alpha] * 4,
            "opt": [max(small) >= max(large) - alpha * distance] * 4,
            "token-v1": [x >= max(large) - alpha for x in small],
            "token-v2": [x >= max(large) - alpha for x in large],
            "token-v3": [x >= (1 - alpha) * max(large) for x in large],
        }[rule]
        left = 1 - sum(a for a, is_good in zip(q, good, strict=True) if is_good)
        return [a * is_good + left * b for a, b, is_good in zip(q, p, good, strict=True)]

    return step


@pytest.mark.parametrize(
    ("rule", "alpha", "temperature"),
    [
        ("token-v3", 0.5, 1.0),
        ("token-v3", 0.4, 0.7),
        ("token-v2", 0.15, 1.0),
        ("token-v1", 0.2, 1.0),
        ("opt", 0.5, 0.7),
        ("diff", 0.1, 1.0),
        ("chow", 0.5, 1.0),
    ],
)
def test_a_cascade_follows_the_distribution_that_its_rule_states(
    rule: str, alpha: float, temperature: float
) -> None:
    policy = {"kind": "speculative-cascade", "params": {"rule": rule, "alpha": alpha}}
    drawn = draws(policy, temperature=temperature, block_size=3)
    wanted = joint(cascade_step(rule, alpha, temperature))
    assert p_value(drawn, wanted) > 1e-3
    # A test that either model alone would pass would say little.
    for step in (draft_step, target_step(Sampling(temperature))):
        assert max(abs(wanted[pair] - p) for pair, p in joint(step).items()) > 0.02


def draft_step(ids: list[int]) -> torch.Tensor:
    return DRAFT.logits_after(ids).exp()


def test_the_chi_square_catches_a_verifier_that_is_only_nearly_right() -> None:
    class NearlyRight(VerifyPolicy):
        base_signals = frozenset({"logprobs"})
        assistant_signals = frozenset({"logprobs"})

        def target_probs(self, views: Views) -> torch.Tensor:
            return 0.9 * views.drawn_probs(1) + 0.1 * views.drawn_probs(0)

    drawn = draws(NearlyRight())
    assert p_value(drawn, joint(target_step(Sampling(1.0)))) < 1e-3


def test_lenience_is_lossy_and_shows() -> None:
    drawn = draws({"kind": "speculative", "params": {"lenience": 0.5}})
    assert p_value(drawn, joint(target_step(Sampling(1.0)))) < 1e-3


def test_the_share_of_accepted_tokens_is_what_the_two_distributions_have_in_common() -> None:
    answers = PAIR.generate(
        [PROMPT] * N_DRAWS,
        "speculative",
        max_new_tokens=1,
        seed=range(N_DRAWS),
        temperature=1.0,
        batch_size=500,
    )
    accepted = sum(answer.trace.tokens[0].model == "draft" for answer in answers) / N_DRAWS
    q, p = DRAFT.logits_after([3]).exp(), TARGET.logits_after([3]).exp()
    wanted = float(torch.minimum(p, q).sum())
    assert abs(accepted - wanted) < 5 * (wanted * (1 - wanted) / N_DRAWS) ** 0.5


def mean_step(mean: str, weights: tuple[float, float]) -> Any:
    def step(ids: list[int]) -> torch.Tensor:
        logprobs = torch.stack([model.logits_after(ids) for model in (DRAFT, TARGET)])
        weight = torch.tensor(weights)[:, None]
        if mean == "arithmetic":
            return (logprobs.exp() * weight).sum(0)
        return (logprobs * weight).sum(0).softmax(-1)

    return step


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("schedule", ["stepwise", "block"])
def test_an_average_follows_the_stated_mixture(mean: str, schedule: str) -> None:
    policy = {"kind": "average", "params": {"weights": [0.3, 0.7], "mean": mean}}
    drawn = draws(policy, schedule=schedule)
    assert p_value(drawn, joint(mean_step(mean, (0.3, 0.7)))) > 1e-3


def test_the_median_of_two_equal_weights_follows_their_mean() -> None:
    drawn = draws({"kind": "average", "params": {"mean": "median"}})
    assert p_value(drawn, joint(mean_step("arithmetic", (0.5, 0.5)))) > 1e-3


def test_a_steered_text_follows_base_times_attribute() -> None:
    def step(ids: list[int]) -> torch.Tensor:
        def text(model: TableModel) -> float:
            return sum(float(model.logits_after(ids[:i])[ids[i]]) for i in range(1, len(ids)))

        odds = text(TARGET) - text(DRAFT) + TARGET.logits_after(ids) - DRAFT.logits_after(ids)
        weighed = DRAFT.logits_after(ids).exp() * odds.sigmoid() ** 1.5
        return weighed / weighed.sum()

    roles = {"attribute": "target", "opposite": "draft"}
    drawn = draws({"kind": "gedi", "params": {"alpha": 1.5, **roles}})
    wanted = joint(step)
    assert p_value(drawn, wanted) > 1e-3
    assert p_value(drawn, joint(draft_step)) < 1e-3


def test_a_lottery_with_sampling_follows_the_linear_mixture() -> None:
    drawn = draws({"kind": "random", "params": {"weights": [0.3, 0.7]}})
    assert p_value(drawn, joint(mean_step("arithmetic", (0.3, 0.7)))) > 1e-3


def test_one_model_follows_its_own_distribution() -> None:
    drawn = draws({"kind": "single", "params": {"model": "target"}})
    assert p_value(drawn, joint(target_step(Sampling(1.0)))) > 1e-3


def test_spec_fuse_writes_drafts_that_win_the_vote_as_often_as_they_are_drawn() -> None:
    """Drafts of one token each, drawn by both models; the two rounds are worked out by hand.

    Both draw with the same noise, so models that agree draft the same; how often each two tokens
    come together is simulated.
    """
    models, rate = (DRAFT, TARGET), 3.0
    noise = torch.rand(200_000, 4, generator=torch.Generator().manual_seed(0)).log().neg()

    def after(ids: list[int]) -> list[torch.Tensor]:
        return [model.logits_after(ids).double().softmax(-1) for model in models]

    def together(probs: list[torch.Tensor]) -> torch.Tensor:
        first, second = ((noise / p.float()).argmin(-1) for p in probs)
        return (4 * first + second).bincount(minlength=16).view(4, 4) / len(noise)

    def rounds(ids: list[int], log_w: list[float], number: int) -> dict[tuple[int, ...], float]:
        found: dict[tuple[int, ...], float] = Counter()  # type: ignore[assignment]
        probs = after(ids)
        drafted = together(probs)
        for i, j in product(range(4), repeat=2):
            chance, winner, weights, n = float(drafted[i, j]), i, log_w, number
            if chance == 0:
                continue
            if i != j:
                n += 1
                votes = [[p[i] / (p[i] + p[j]), p[j] / (p[i] + p[j])] for p in probs]
                # A draft is compared with the other one by the other's writer alone.
                wins = [votes[1][0] >= votes[1][1], votes[0][1] >= votes[0][0]]
                rewards = [max(float(won), 1.0) for won in wins]
                eta = rate / (n * 2**0.5)
                weights = [w + eta * r for w, r in zip(log_w, rewards, strict=True)]
                share = torch.tensor(weights, dtype=torch.float64).softmax(-1)
                rated = [sum(float(share[k] * votes[k][d]) for k in range(2)) for d in range(2)]
                winner = (i, j)[max(range(2), key=lambda d: rated[d])]
            if len(ids) == 2:
                found[ids[1], winner] += chance
                continue
            for pair, p in rounds([*ids, winner], weights, n).items():
                found[pair] += chance * p
        return found

    policy = {"kind": "spec-fuse", "params": {"shortest": 1, "longest": 1, "learning_rate": rate}}
    wanted = {pair: 0.0 for pair in product(range(4), repeat=2)} | rounds([3], [0.0, 0.0], 0)
    assert sum(wanted.values()) == pytest.approx(1.0, abs=1e-5)
    drawn = draws(policy)
    assert p_value(drawn, wanted) > 1e-3
    # Another distribution would be told from it by so many texts.
    assert p_value(drawn, wanted | {(0, 0): wanted[0, 0] + 0.1}) < 1e-3

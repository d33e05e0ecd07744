"""FusionRoute: one assistant named per token, whose log-probabilities and the base's add up."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from score_worlds import tables
from tables import TOKENS

from multicolm import Ensemble
from multicolm.artefacts import Weights
from multicolm.errors import CapabilityError, TrainingError
from multicolm.learning.training import Training
from multicolm.policy.fusion_route import FusionRoutePolicy
from multicolm.policy.resolve import resolve_policy
from multicolm.score_table import ScoreTable
from multicolm.testing import check_policy, check_routing
from multicolm.training.checkpoint import Checkpoint
from multicolm.views import ModelNames, View, Views

WIDTH = len(TOKENS) + 1
PROMPTS = ["a", "b c", " c", "df", " cab", " ea"]
TRIO = tables("base", "left", "right", hidden=True)


def head(width: int, n_assistants: int, seed: int = 0) -> Weights:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_assistants, width, generator=g)
    return Weights({"0.weight": weight, "0.bias": torch.randn(n_assistants, generator=g)})


def always(n_assistants: int, named: int) -> Weights:
    """A head that names one assistant everywhere."""
    bias = torch.zeros(n_assistants)
    bias[named - 1] = 1.0
    return Weights({"0.weight": torch.zeros(n_assistants, WIDTH), "0.bias": bias})


def fused(policy: FusionRoutePolicy, ids: list[int]) -> torch.Tensor:
    """The stated distribution after ``ids``."""
    assert policy.head is not None
    hidden = TRIO.backends[0].hidden_after(ids)  # type: ignore[attr-defined]
    named = 1 + int((policy.head["0.weight"] @ hidden + policy.head["0.bias"]).argmax())
    each = [m.logits_after(ids).log_softmax(-1) for m in TRIO.backends]  # type: ignore[attr-defined]
    return (each[named] + policy.complement * each[0]).softmax(-1)


@pytest.mark.parametrize("complement", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("schedule", ["stepwise", "block"])
def test_the_likeliest_token_of_the_sum_is_written(complement: float, schedule: Any) -> None:
    policy = FusionRoutePolicy(head=head(WIDTH, 2), complement=complement)
    for answer in TRIO.generate(PROMPTS, policy, max_new_tokens=8, schedule=schedule):
        ids = TRIO.backends[0].tokenizer.encode(answer.prompt)  # type: ignore[arg-type]
        for token in answer.trace:
            probs = fused(policy, ids)
            assert token.id == int(probs.argmax())
            assert token.logprob == pytest.approx(float(probs.max().log()), abs=1e-5)
            assert token.score is not None and 0.5 <= token.score <= 1
            ids = [*ids, token.id]


def test_sampled_text_follows_the_stated_distribution() -> None:
    policy, n = FusionRoutePolicy(head=head(WIDTH, 2), complement=0.5), 800
    answers = TRIO.generate(
        ["a"] * n, policy, max_new_tokens=2, temperature=1.0, seed=range(n), batch_size=400
    )
    drawn = Counter(tuple(token.id for token in answer.trace) for answer in answers)
    end, first = len(TOKENS) - 1, fused(policy, [0])
    wanted: dict[tuple[int, ...], float] = {(end,): float(first[end])}
    for i, j in product(range(end), range(end + 1)):
        wanted[i, j] = float(first[i] * fused(policy, [0, i])[j])
    common = [pair for pair, p in wanted.items() if p * n > 5]
    counts = [drawn[pair] for pair in common]
    expected = [wanted[pair] * n for pair in common]
    counts, expected = [*counts, n - sum(counts)], [*expected, n - sum(expected)]
    scale = n / sum(expected)
    assert chisquare(counts, [e * scale for e in expected]).pvalue > 1e-3


def test_only_the_base_and_the_named_assistant_are_run() -> None:
    policy = FusionRoutePolicy(head=always(2, 1))
    [answer] = TRIO.generate(["ab"], policy, max_new_tokens=8)
    forwards = [answer.usage[name].forwards for name in TRIO.models]
    n = len(answer.trace)
    assert forwards == [n, n, 0]


@pytest.mark.parametrize("named", [1, 2])
def test_without_the_complement_the_named_assistant_writes_alone(named: int) -> None:
    policy = FusionRoutePolicy(head=always(2, named), complement=0.0)
    texts = [a.text for a in TRIO.generate(PROMPTS, policy, max_new_tokens=8)]
    single = {"kind": "single", "params": {"model": named}}
    assert texts == [a.text for a in TRIO.generate(PROMPTS, single, max_new_tokens=8)]


def test_a_cheaper_assistant_is_named_where_the_dear_one_is_not_worth_its_cost() -> None:
    base = View(torch.zeros(2, 4), torch.zeros(2, WIDTH), signals=frozenset({"hidden"}))
    seen = Views(ModelNames(["a", "b", "c"]), {0: base}, n_positions=2, costs=[1.0, 5.0, 1.0])
    for cost_weight, named in [(0.0, 1), (0.2, 1), (0.3, 2), (1e9, 2)]:
        policy = FusionRoutePolicy(head=always(2, 1), cost_weight=cost_weight)
        assert policy.models_at(seen)[:, named].all()
        assert policy.score(seen).isfinite().all()


def test_identical_models_are_one_of_them() -> None:
    same = tables("base", "left", "right", seeds=(3, 3, 3), hidden=True)
    policy = FusionRoutePolicy(head=head(WIDTH, 2))
    texts = [a.text for a in same.generate(PROMPTS, policy, max_new_tokens=8)]
    assert texts == [a.text for a in same.generate(PROMPTS, "single", max_new_tokens=8)]


@pytest.mark.parametrize("n_assistants", [1, 2, 3])
def test_it_keeps_the_laws(n_assistants: int) -> None:
    check_policy(FusionRoutePolicy(head=head(6, n_assistants)))
    check_policy(FusionRoutePolicy(head=head(6, n_assistants, 1), complement=0.25))


def test_it_keeps_the_laws_of_the_loop() -> None:
    check_routing(TRIO, PROMPTS[:3], FusionRoutePolicy(head=head(WIDTH, 2)), max_new_tokens=8)


# --- learning ------------------------------------------------------------------------------------


def world(n: int = 600, n_models: int = 3, seed: int = 0) -> ScoreTable:
    """Hidden states whose first number tells which assistant is right; the base never is."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 5, generator=g)
    right = (hidden[:, 0] > 0).long() + 1
    gold = torch.full((n, n_models), -3.0)
    gold[torch.arange(n), right.clamp_max(n_models - 1)] = -0.1
    top1 = torch.where(gold > -1, 0, 1)
    zeros = torch.zeros(n, n_models)
    return ScoreTable(
        models=ModelNames(["base", "left", "right"][:n_models]),
        gold_ids=torch.zeros(n, dtype=torch.long),
        gold_logprobs=gold,
        known=torch.ones(n, n_models, dtype=torch.bool),
        top1_ids=top1,
        top1_logprobs=zeros - 0.1,
        entropies=zeros,
        margins=zeros,
        example=torch.arange(n) // 10,
        place=torch.arange(n) % 10,
        base={"hidden": hidden},
        costs=(1.0,) * n_models,
        identities=("table:0", "table:1", "table:2")[:n_models],
    )


def test_the_head_learns_which_assistant_knows_the_token() -> None:
    training = Training()
    policy = FusionRoutePolicy().fit(world(), training)
    assert policy.head is not None and policy.head["0.weight"].shape == (2, 5)
    other = world(seed=1)
    scores = other.base["hidden"] @ policy.head["0.weight"].T + policy.head["0.bias"]
    right = other.gold_logprobs[:, 1:].argmax(-1)
    assert float((scores.argmax(-1) == right).float().mean()) > 0.94
    assert training.report["nll_nats"] < 0.3 < training.report["nll_nats_uniform"]
    assert training.report["right_tokens"] > 0.95
    assert not {"right_tokens_base", "calibration_error"} & set(training.report), training.report


def test_with_one_assistant_there_is_nothing_to_choose() -> None:
    policy = FusionRoutePolicy().fit(world(n_models=2))
    assert policy.head is not None and policy.head["0.weight"].abs().sum() == 0
    with pytest.raises(TrainingError, match="no assistant to be named"):
        FusionRoutePolicy().fit(world(n_models=1))


def test_a_network_with_inner_layers_learns_it_too() -> None:
    training = Training({"network": "mlp", "width": 16, "epochs": 5})
    policy = FusionRoutePolicy().fit(world(), training)
    assert training.report["right_tokens"] > 0.9
    assert policy._shape == (5, 2)


def test_a_checkpoint_writes_as_what_was_trained(tmp_path: Path) -> None:
    trained = FusionRoutePolicy(head=head(WIDTH, 2), complement=0.4)
    Checkpoint(trained, {}, "A test.").save_pretrained(tmp_path / "out")
    loaded = resolve_policy(tmp_path / "out")
    one, two = (TRIO.generate(PROMPTS, p, max_new_tokens=6) for p in (trained, loaded))
    assert [a.text for a in one] == [a.text for a in two]


def test_what_it_was_not_made_for_is_refused() -> None:
    with pytest.raises(CapabilityError, match="has not learned anything yet"):
        TRIO.generate(["a"], "fusion-route")
    with pytest.raises(CapabilityError, match="was made for 4 models, and this ensemble has 3"):
        TRIO.generate(["a"], FusionRoutePolicy(head=head(WIDTH, 3)))
    with pytest.raises(CapabilityError, match="hidden states of width 5"):
        TRIO.generate(["a"], FusionRoutePolicy(head=head(5, 2)))
    made_for = {"base": "table:0", "left": "table:1", "right": "table:7"}
    with pytest.raises(CapabilityError, match="table:7"):
        TRIO.generate(["a"], FusionRoutePolicy(head=head(WIDTH, 2), made_for=made_for))
    plain = Ensemble(tables("base", "left", "right").backends)
    with pytest.raises(CapabilityError, match="needs hidden of model 'base'"):
        plain.generate(["a"], FusionRoutePolicy(head=head(WIDTH, 2)))

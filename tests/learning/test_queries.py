"""Learning which model answers a prompt best, on answers whose best router is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multicolm.errors import TrainingError
from multicolm.learning.queries import JudgedAnswers, fit_queries, predicted_quality

METHODS = ["linear", "knn", "mf"]


def judged(states: Tensor, quality: Tensor, costs: tuple[float, ...] = ()) -> JudgedAnswers:
    names = tuple(f"m{k}" for k in range(quality.shape[1]))
    lengths = torch.full(quality.shape, 20)
    return JudgedAnswers(names, names, costs or (1.0,) * len(names), states, quality, lengths)


def topics(n: int, n_models: int, width: int, seed: int = 0) -> JudgedAnswers:
    """Each prompt is of one topic, and one model knows it; models are right at 10 % else."""
    source = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_models, width, generator=source)
    topic = torch.randint(n_models, (n,), generator=source)
    states = centres[topic] * 2 + torch.randn(n, width, generator=source)
    chance = torch.full((n, n_models), 0.1)
    chance[torch.arange(n), topic] = 0.9
    return judged(states * 7 + 3, torch.bernoulli(chance, generator=source))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n_models", "width"), [(2, 16), (4, 64), (11, 32)])
def test_prompts_go_to_the_model_that_knows_their_topic(
    method: str, n_models: int, width: int
) -> None:
    answers = topics(400, n_models, width)
    tensors, report = fit_queries(answers, method)  # type: ignore[arg-type]
    assert report["quality"] > 0.8 > 0.6 > report["quality_best_model_alone"]
    assert report["quality"] <= report["quality_best_model_per_prompt"]
    fresh = topics(400, n_models, width, seed=0)
    chosen = predicted_quality(tensors, fresh.states).argmax(-1)
    assert float(fresh.quality.gather(1, chosen[:, None]).mean()) > 0.8


@pytest.mark.parametrize("method", METHODS)
def test_states_without_information_give_every_prompt_to_the_best_model(method: str) -> None:
    source = torch.Generator().manual_seed(1)
    quality = torch.bernoulli(torch.tensor([0.3, 0.7, 0.2]).expand(600, 3), generator=source)
    answers = judged(torch.randn(600, 24, generator=source), quality)
    report = fit_queries(answers, method)[1]  # type: ignore[arg-type]
    assert report["best_model_alone"] == "m1"
    assert report["quality"] > report["quality_best_model_alone"] - 0.05


@pytest.mark.parametrize("method", METHODS)
def test_more_features_than_prompts_do_no_harm(method: str) -> None:
    answers = topics(60, 2, 4096)
    assert fit_queries(answers, method)[1]["quality"] > 0.75  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_scale_and_place_of_features_do_not_matter(method: str) -> None:
    answers = topics(200, 3, 16)
    moved = judged(answers.states * 1000 - 5e4, answers.quality)
    one = predicted_quality(fit_queries(answers, method)[0], answers.states)  # type: ignore[arg-type]
    other = predicted_quality(fit_queries(moved, method)[0], moved.states)  # type: ignore[arg-type]
    assert (one.argmax(-1) == other.argmax(-1)).float().mean() > 0.97


@pytest.mark.parametrize("method", METHODS)
def test_a_feature_that_never_changes_has_no_say(method: str) -> None:
    answers = topics(100, 2, 8)
    constant = torch.cat([answers.states, torch.full((100, 1), 5.0)], -1)
    tensors = fit_queries(judged(constant, answers.quality), method)[0]  # type: ignore[arg-type]
    changed = constant.clone()
    changed[:, -1] = 900.0
    assert predicted_quality(tensors, changed).isfinite().all()
    assert torch.equal(predicted_quality(tensors, changed), predicted_quality(tensors, constant))


def test_ridge_regression_equals_solving_its_equations() -> None:
    answers = topics(300, 2, 6)
    tensors, _ = fit_queries(answers, "linear")
    x = answers.states.double()
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    centred = answers.quality.double() - answers.quality.double().mean(0)
    fits = []
    for power in range(-2, 7):
        gram = scaled.T @ scaled + 10.0**power * torch.eye(6, dtype=torch.float64)
        weight = torch.linalg.solve(gram, scaled.T @ centred)
        fits.append(scaled @ weight + answers.quality.double().mean(0))
    predicted = predicted_quality(tensors, answers.states).double()
    assert min(float((predicted - fit).abs().max()) for fit in fits) < 1e-4


def test_neighbours_are_the_nearest_by_cosine() -> None:
    states = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [-1.0, -1.0]])
    quality = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    tensors, _ = fit_queries(judged(states, quality), "knn")
    assert predicted_quality(tensors, torch.tensor([[2.0, 0.0]])).argmax() == 0
    assert predicted_quality(tensors, torch.tensor([[0.0, 0.5]])).argmax() == 1


def test_answers_that_are_all_alike_are_said_to_teach_nothing() -> None:
    report = fit_queries(judged(torch.randn(20, 4), torch.zeros(20, 3)), "linear")[1]
    assert "nothing to route by" in report["note"]


def test_too_few_prompts_and_states_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(TrainingError, match="1 judged prompts are too few"):
        fit_queries(judged(torch.ones(1, 2), torch.ones(1, 2)), "linear")
    with pytest.raises(TrainingError, match="is NaN or infinite"):
        fit_queries(judged(torch.full((4, 2), torch.nan), torch.ones(4, 2)), "linear")

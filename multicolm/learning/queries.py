"""Learns, from judged answers of every model alone, how well each one answers a prompt.

Three ways to predict the quality of model k on a prompt with hidden state x, from the same data:

    linear   w_k . x + b_k, ridge regression; its penalty by leave-one-out
    knn      the mean quality of k on the nearest prompts that were seen, by cosine
    mf       sigmoid(v_k . (W x + c) + b_k): models and prompts in one space of few dimensions

What was learned is named tensors, so that a checkpoint holds it and nothing is unpickled.

Source:
    ``knn`` and ``mf``: RouteLLM, arXiv 2406.18665; EmbedLLM, arXiv 2410.02223. A linear head on a
    model's own state in the place of a sentence encoder is ours: nothing more has to be loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicolm.errors import TrainingError

__all__ = ["JudgedAnswers", "Method", "fit_queries", "predicted_quality", "routing_report"]

Method: TypeAlias = Literal["linear", "knn", "mf"]

Tensors: TypeAlias = dict[str, Tensor]

_FOLDS = 5
_PENALTIES = tuple(10.0**power for power in range(-2, 7))
_NEIGHBOURS = (1, 2, 5, 10, 20, 40, 80, 160)
_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)
_RANK = 32
_STEPS = 200


@dataclass(frozen=True, slots=True)
class JudgedAnswers:
    """What every model alone answered to some prompts, as judged by a task's metric.

    Attributes:
        models: their names, the base model first.
        identities: what they are; see :attr:`multicolm.policy.base.ModelFacts.identity`.
        costs: per token of each, in the ensemble's unit.
        states: the base model's hidden state of each prompt.
        quality: of each model's answer, 0 to 1.
        lengths: of each model's answer, in characters.
    """

    models: tuple[str, ...]
    identities: tuple[str, ...]
    costs: tuple[float, ...]
    states: Float[Tensor, "prompts hidden"]
    quality: Float[Tensor, "prompts models"]
    lengths: Int[Tensor, "prompts models"]

    def __len__(self) -> int:
        return int(self.quality.shape[0])

    def part(self, which: Tensor) -> JudgedAnswers:
        """Some of the prompts."""
        states, quality, lengths = (x[which] for x in (self.states, self.quality, self.lengths))
        return JudgedAnswers(self.models, self.identities, self.costs, states, quality, lengths)


def fit_queries(
    answers: JudgedAnswers, method: Method, on_progress: Callable[[str], None] = lambda _: None
) -> tuple[Tensors, dict[str, Any]]:
    """Learn to predict the quality of every model on a prompt.

    Args:
        answers: what to learn from.
        method: see the module.
        on_progress: called with what is being done.

    Returns:
        What was learned, for :func:`predicted_quality`; and a report, measured on prompts that were
        left out of the learning in turn (five folds), see :func:`routing_report`.

    Raises:
        TrainingError: if there are fewer than two prompts, or a state is no number.
    """
    if len(answers) < 2:
        raise TrainingError(f"{len(answers)} judged prompts are too few to learn from; give more.")
    if not bool(answers.states.isfinite().all()):
        raise TrainingError("a hidden state of a prompt is NaN or infinite; try another `dtype`.")
    learn = _LEARNERS[method]
    predicted = torch.zeros_like(answers.quality, dtype=torch.float32)
    folds = _folds(len(answers))
    for number, out in enumerate(folds, start=1):
        on_progress(f"fold {number} of {len(folds)}")
        kept = torch.ones(len(answers), dtype=torch.bool)
        kept[out] = False
        predicted[out] = predicted_quality(learn(answers.part(kept)), answers.states[out])
    on_progress("all prompts")
    return learn(answers), routing_report(answers, predicted)


def predicted_quality(
    tensors: Mapping[str, Tensor], states: Float[Tensor, "prompts hidden"]
) -> Float[Tensor, "prompts models"]:
    """The quality of every model's answer to some prompts, as what was learned predicts it."""
    states = states.float()
    if "prompts" in tensors:
        return _by_neighbours(tensors, states)
    scores = states @ tensors["weight"].T.to(states) + tensors["bias"].to(states)
    if "models" not in tensors:
        return scores
    return (scores @ tensors["models"].T.to(states) + tensors["offset"].to(states)).sigmoid()


def routing_report(
    answers: JudgedAnswers, predicted: Float[Tensor, "prompts models"], cost_weight: float = 0.0
) -> dict[str, Any]:
    """What routing by predicted qualities comes to, beside one model for all prompts and the best
    model for each.
    """
    costs = torch.tensor(answers.costs)
    chosen = (predicted - cost_weight * costs).argmax(-1)
    quality = answers.quality
    alone = quality.mean(0)
    best = int(alone.argmax())
    shares = chosen.bincount(minlength=len(answers.models)) / len(answers)
    report: dict[str, Any] = {
        "held_out_prompts": len(answers),
        "quality": float(quality.gather(1, chosen[:, None]).mean()),
        "quality_best_model_alone": float(alone[best]),
        "best_model_alone": answers.models[best],
        "quality_best_model_per_prompt": float(quality.max(1).values.mean()),
        "shares": dict(zip(answers.models, shares.tolist(), strict=True)),
    }
    if bool((quality == quality[:, :1]).all()):
        report["note"] = (
            "No prompt was answered better by one model than by another, so there is nothing to "
            "route by."
        )
    return report


def _folds(n: int) -> list[Tensor]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return list(order.chunk(min(_FOLDS, n)))


def _scale(states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of each feature; one that never changes has no say."""
    mean, spread = states.mean(0), states.std(0, correction=0)
    return mean, torch.where(spread > 1e-6 * spread.max().clamp_min(1e-30), spread, math.inf)


def _learn_linear(answers: JudgedAnswers) -> Tensors:
    from sklearn.linear_model import RidgeCV

    states = answers.states.float()
    mean, spread = _scale(states)
    ridge = RidgeCV(alphas=_PENALTIES).fit(
        ((states - mean) / spread).numpy().astype(np.float64), answers.quality.double().numpy()
    )
    weight = torch.from_numpy(np.atleast_2d(ridge.coef_)).float() / spread
    bias = torch.from_numpy(np.atleast_1d(ridge.intercept_)).float() - weight @ mean
    return {"weight": weight, "bias": bias}


def _learn_knn(answers: JudgedAnswers) -> Tensors:
    states = answers.states.float()
    mean, spread = _scale(states)
    tensors = {
        "prompts": torch.nn.functional.normalize((states - mean) / spread, dim=-1).half(),
        "quality": answers.quality.float(),
        "mean": mean,
        "spread": spread,
    }
    best, found = -1.0, 1
    for k in [k for k in _NEIGHBOURS if k < len(answers)]:
        predicted = _by_neighbours({**tensors, "k": torch.tensor(k)}, states, itself=False)
        chosen = predicted.argmax(-1, keepdim=True)
        quality = float(answers.quality.gather(1, chosen).double().mean())
        # Of equally good numbers the greatest, which depends least on single prompts.
        if quality >= best:
            best, found = quality, k
    return {**tensors, "k": torch.tensor(found)}


def _by_neighbours(
    tensors: Mapping[str, Tensor], states: Tensor, *, itself: bool = True
) -> Float[Tensor, "prompts models"]:
    seen, quality = tensors["prompts"].to(states), tensors["quality"].to(states)
    mean, spread = tensors["mean"].to(states), tensors["spread"].to(states)
    near = torch.nn.functional.normalize((states - mean) / spread, dim=-1) @ seen.T
    if not itself:  # of prompts that were seen: whom they are like besides themselves
        near.fill_diagonal_(-math.inf)
    found = near.topk(min(int(tensors["k"]), len(seen)), dim=-1).indices
    return quality[found].mean(1)


def _learn_mf(answers: JudgedAnswers) -> Tensors:
    states = answers.states.float()
    mean, spread = _scale(states)
    features, quality = (states - mean) / spread, answers.quality.float()
    held = _folds(len(answers))[0]
    kept = torch.ones(len(answers), dtype=torch.bool)
    kept[held] = False
    losses = []
    for decay in _DECAYS:
        tried = _factors(features[kept], quality[kept], decay)
        losses.append(float(_misfit(tried, features[held], quality[held])))
    projection, shift, models, offset = _factors(
        features, quality, _DECAYS[losses.index(min(losses))]
    )
    weight = projection / spread
    return {"weight": weight, "bias": shift - weight @ mean, "models": models, "offset": offset}


def _factors(features: Tensor, quality: Tensor, decay: float) -> tuple[Tensor, ...]:
    """Projection, its shift, the models' vectors and offsets: the best fit with this penalty."""
    n_models, width = quality.shape[1], features.shape[1]
    rank = min(_RANK, width, 2 * n_models)
    source = torch.Generator().manual_seed(0)
    parameters = [
        torch.randn(rank, width, generator=source) / math.sqrt(width),
        torch.zeros(rank),
        torch.randn(n_models, rank, generator=source) / math.sqrt(rank),
        torch.special.logit(quality.mean(0).clamp(0.01, 0.99)),
    ]
    for parameter in parameters:
        parameter.requires_grad_()
    search = torch.optim.LBFGS(parameters, max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        size = parameters[0].square().sum() + parameters[2].square().sum()
        loss: Tensor = _misfit(parameters, features, quality) + decay * size
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    search.step(closure)  # type: ignore[no-untyped-call]
    return tuple(parameter.detach() for parameter in parameters)


def _misfit(parameters: Sequence[Tensor], features: Tensor, quality: Tensor) -> Tensor:
    projection, shift, models, offset = parameters
    scores = (features @ projection.T + shift) @ models.T + offset
    loss: Tensor = torch.nn.functional.binary_cross_entropy_with_logits(scores, quality)
    return loss


_LEARNERS: Mapping[Method, Callable[[JudgedAnswers], Tensors]] = {
    "linear": _learn_linear,
    "knn": _learn_knn,
    "mf": _learn_mf,
}

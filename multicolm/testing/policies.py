"""The laws of policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from multicolm.decoding.sampling import Sampling
from multicolm.errors import CapabilityError
from multicolm.policy.base import (
    MixPolicy,
    Policy,
    SegmentPolicy,
    Segments,
    SelectPolicy,
    VerifyPolicy,
)
from multicolm.testing.laws import LawBroken
from multicolm.views import ModelNames, View, Views

__all__ = ["check_policy"]

_VOCAB, _HIDDEN, _POSITIONS = 11, 6, 24


def check_policy(policy: Policy, *, seed: int = 0) -> None:
    """A policy is a pure function of the views, position by position.

    Laws: it is deterministic; it leaves the views as they are; a position's answer depends on that
    position alone; it names models that exist and that it said it would use; a distribution has no
    NaN and a possible token; a token that a mixing policy ascribes to a model is drawn from that
    model's distribution; ``certain`` deferral is a hand-over.

    Args:
        policy: what to check; tried on random views of ensembles of 1 to 4 models.
        seed: of the random views.

    Raises:
        LawBroken: naming the law.
        CapabilityError: if no ensemble of 1 to 4 models suits it.
    """
    refusal: CapabilityError | None = None
    n_tried = 0
    for n_models in range(1, 5):
        models = ModelNames(["base", *(f"assistant-{k}" for k in range(1, n_models))])
        try:
            policy.needs(models)
            policy.uses(models)
        except CapabilityError as error:
            refusal = error
            continue
        n_tried += 1
        for temperature in (0.0, 0.8):
            _check_on(policy, _Scene(policy, models, seed + n_models, Sampling(temperature)))
    if n_tried == 0 and refusal is not None:
        raise refusal


class _Scene:
    """Random views of some models at some positions, any of which can be shown again."""

    def __init__(self, policy: Policy, models: ModelNames, seed: int, sampling: Sampling) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = _POSITIONS
        self.models = models
        self.needs = policy.needs(models)
        self.history = policy.history
        self.prompts = policy.prompts
        self.sampling = sampling
        # Flat and peaked distributions alike, so that thresholds fall on both sides.
        scale = torch.rand(len(models), n, 1, generator=generator) * 6
        self.logits = torch.randn(len(models), n, _VOCAB, generator=generator) * scale
        self.hidden = torch.randn(len(models), n, _HIDDEN, generator=generator)
        self.context = {
            "previous": torch.randint(-1, len(models), (n,), generator=generator),
            "base_run": torch.randint(0, 15, (n,), generator=generator),
            "place": torch.randint(0, 40, (n,), generator=generator),
            "uniform": torch.rand(n, generator=generator),
            "greedy": torch.full((n,), sampling.greedy),
            "prompt_nats": torch.rand(n, len(models), generator=generator) * 4,
        }
        self.starts_word = torch.rand(_VOCAB, generator=generator) < 0.5
        # Token i begins like token (i - 1) // 2, as in a binary tree.
        self.extends = torch.eye(_VOCAB, dtype=torch.bool)
        for token in range(_VOCAB - 1, 0, -1):
            self.extends[(token - 1) // 2] |= self.extends[token]
        self.costs = (torch.rand(len(models), generator=generator) * 9).tolist()

    def views(self, which: Sequence[int], *, base_only: bool = False) -> Views:
        index = torch.tensor(list(which), dtype=torch.long)
        shown = [0] if base_only else range(len(self.models))
        views = {
            k: View(
                self.logits[k][index].clone(),
                self.hidden[k][index].clone() if "hidden" in self.needs.of(k) else None,
                signals=self.needs.of(k),
                name=self.models[k],
            )
            for k in shown
            if self.needs.of(k)
        }
        known = ["uniform", "place", "greedy"]
        known += ["previous", "base_run"] if self.history else []
        known += ["prompt_nats"] if self.prompts else []

        def fetch(what: str) -> Callable[[], Tensor]:
            return lambda: self.context[what][index].clone()

        return Views(
            self.models,
            views,
            n_positions=len(index),
            context={what: fetch(what) for what in known},
            drawn=self.sampling.probs,
            starts_word=self.starts_word,
            extends=lambda ids: self.extends[ids],
            costs=self.costs,
        )


def _check_ratings(policy: SegmentPolicy, n_models: int, seed: int) -> None:
    """Ratings of some proposals, again and in another order."""
    generator = torch.Generator().manual_seed(seed)
    shape = (_POSITIONS, n_models, n_models)
    n_tokens = torch.randint(1, 6, shape, generator=generator)
    segments = Segments(torch.rand(shape, generator=generator) * 9, n_tokens)
    turned = Segments(segments.nats.flip(0), segments.n_tokens.flip(0))
    rated = policy.rate(segments)
    if rated.shape != shape[:2] or bool(rated.isnan().any()):
        raise LawBroken("one number per proposal", f"rate() returned {list(rated.shape)}.")
    if not _same(rated, policy.rate(segments)) or not _same(rated, policy.rate(turned).flip(0)):
        raise LawBroken(
            "a position's answer depends on that position alone",
            "rate() of the same proposals, again or in another order, differs.",
        )


def _check_on(policy: Policy, scene: _Scene) -> None:
    if isinstance(policy, SegmentPolicy):
        _check_ratings(policy, len(policy.uses(scene.models)), len(scene.models))
        return
    every = list(range(_POSITIONS))
    deferring = every
    if policy.can_defer:
        ask: Callable[[Views], Tensor] = policy.defers
        answer = _check_pure("defers", ask, scene, every, base_only=True)
        deferring = answer.nonzero()[:, 0].tolist()
    asked = deferring if policy.assistants == "deferred" else every
    if not asked:
        return
    name, method = _method(policy)
    answer = _check_pure(name, method, scene, asked)
    if isinstance(policy, SelectPolicy):
        allowed = policy.uses(scene.models)
        wrong = sorted(set(answer.tolist()) - allowed)
        if wrong:
            raise LawBroken(
                "a policy names models that exist and that it uses",
                f"select() named {wrong}; uses() allows {sorted(allowed)}.",
            )
        if policy.certain and len(scene.models) > 1:
            base_wrote = [i for i in deferring if int(answer[asked.index(i)]) == 0]
            if base_wrote:
                raise LawBroken(
                    "certain deferral is a hand-over",
                    f"defers() was true and select() gave the base model at {base_wrote[0]}.",
                )
        return
    if bool(answer.isnan().any()) or bool((answer.max(-1).values == float("-inf")).any()):
        raise LawBroken(
            "a distribution has no NaN and a possible token", f"{name}() returned one without."
        )
    if isinstance(policy, MixPolicy):
        _check_writers(policy, scene, asked, answer)
    if isinstance(policy, VerifyPolicy) and bool(((answer.sum(-1) - 1).abs() > 1e-3).any()):
        raise LawBroken("target probabilities sum to 1", f"sums: {answer.sum(-1).tolist()}.")


def _check_writers(policy: MixPolicy, scene: _Scene, asked: Sequence[int], mixed: Tensor) -> None:
    """Whoever is named as the writer has drawn the token from its own distribution."""
    if policy.writers(scene.views(asked)) is None:
        return

    def named(views: Views) -> Tensor:
        answer = policy.writers(views)
        return torch.empty(0) if answer is None else answer

    writers = _check_pure("writers", named, scene, asked)
    n_models = len(scene.models)
    wrong = sorted(set(writers.tolist()) - policy.uses(scene.models) - {n_models})
    if wrong:
        raise LawBroken(
            "a policy names models that exist and that it uses",
            f"writers() named {wrong}; uses() allows {sorted(policy.uses(scene.models))}.",
        )
    for line in (writers < n_models).nonzero()[:, 0].tolist():
        k = int(writers[line])
        own = scene.logits[k][asked[line]].log_softmax(-1)
        if not _same(mixed[line].log_softmax(-1), own):
            raise LawBroken(
                "a token that a mixing policy ascribes to a model is drawn from its distribution",
                f"writers() named model {k} at position {asked[line]}; mix() returned another one.",
            )


def _method(policy: Policy) -> tuple[str, Callable[[Views], Tensor]]:
    if isinstance(policy, SelectPolicy):
        return "select", policy.select
    if isinstance(policy, MixPolicy):
        return "mix", policy.mix
    if isinstance(policy, VerifyPolicy):
        return "target_probs", policy.target_probs
    raise LawBroken(
        "a policy is a SelectPolicy, a MixPolicy, a VerifyPolicy or a SegmentPolicy",
        f"got {type(policy).__name__}.",
    )


def _check_pure(
    name: str,
    method: Callable[[Views], Tensor],
    scene: _Scene,
    which: Sequence[int],
    *,
    base_only: bool = False,
) -> Tensor:
    """Ask about all positions, again, in another order, and one by one; the answers must agree."""
    views = scene.views(which, base_only=base_only)
    answer = method(views).clone()  # it may be a view's own tensor, written into by the next call
    if answer.shape[:1] != (len(which),):
        raise LawBroken(
            "one answer per position",
            f"{name}() returned shape {list(answer.shape)} for {len(which)} positions.",
        )
    again = method(views)
    if not _same(answer, again):
        raise LawBroken(
            "a policy is deterministic and leaves the views as they are",
            f"{name}() asked twice: {_difference(answer, again)}",
        )
    turned = method(scene.views(list(reversed(which)), base_only=base_only)).flip(0)
    singly = torch.cat([method(scene.views([i], base_only=base_only)) for i in which])
    for how, other in (("in another order", turned), ("one by one", singly)):
        if not _same(answer, other):
            raise LawBroken(
                "a position's answer depends on that position alone",
                f"{name}() of all positions at once and {how}: {_difference(answer, other)}",
            )
    return answer


def _difference(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}."
    line = next(i for i in range(len(a)) if not _same(a[i : i + 1], b[i : i + 1]))
    return f"position {line} got {a[line].tolist()} and {b[line].tolist()}."


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.is_floating_point:
        return torch.allclose(a, b, atol=1e-5, rtol=1e-4, equal_nan=True)
    return bool(torch.equal(a, b))

"""One policy while a text thinks, another one while it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, TypeAlias

from jaxtyping import Bool, Int
from pydantic import AfterValidator

from multicolm.errors import MulticolmError
from multicolm.policy.base import ModelFacts, Needs, SelectPolicy, When, register_policy
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Views

__all__ = ["PhasesPolicy"]


def _check(source: str | dict[str, Any]) -> str | dict[str, Any]:
    try:
        _resolved(source)
    except (MulticolmError, TypeError) as error:
        raise ValueError(str(error)) from error
    return source


def _resolved(source: str | dict[str, Any]) -> SelectPolicy:
    """The policy of a phase.

    Raises:
        MulticolmError: if there is none, or its params are wrong.
        ValueError: if it needs more than the place that it is asked about.
    """
    from multicolm.policy.resolve import resolve_policy

    policy = resolve_policy(source)
    more = {
        "mixes, verifies or writes segments": policy.acts != "select",
        "remembers something of a text": policy.keeps_state or policy.history,
        "reads prompts": policy.prompts or bool(policy.prompt_states(ModelNames(("a", "b")))),
        "weighs texts": policy.likelihoods or policy.narrows,
        "ends texts": policy.can_end_texts,
    }
    if not isinstance(policy, SelectPolicy) or any(more.values()):
        why = next((what for what, true in more.items() if true), "selects no model")
        raise ValueError(
            f"policy '{policy.name}' {why}; within `phases` a policy chooses a model by what the "
            "models show at a token, such as single, confidence, cosd-rule or co-llm."
        )
    return policy


Phase: TypeAlias = Annotated[str | dict[str, Any], AfterValidator(_check)]
"""A policy by its name, or ``{"kind": ..., "params": {...}}``."""


@register_policy("phases")
class PhasesPolicy(SelectPolicy):
    """One policy while a text thinks, and another one while it answers.

    A text thinks up to ``think_end_token``, if that is set and it or its prompt begins to
    (:class:`multicolm.config.GenerationConfig`); where it is not set, texts only answer. Models are
    run as the policy of the phase wants them.

    Attributes:
        think: decides while it thinks.
        answer: decides while it answers.

    Source:
        Our own: thoughts are most of what a thinking model writes, and need not be written by the
        model that writes the answer.
    """

    think: Phase = "single"
    answer: Phase = "max-confidence"

    assistants: ClassVar[When] = "deferred"
    reads_thinking: ClassVar[bool] = True

    @cached_property
    def _both(self) -> tuple[SelectPolicy, SelectPolicy]:
        """The policies of thoughts and of answers, read once for each policy of phases."""
        return _resolved(self.think), _resolved(self.answer)

    def needs(self, models: ModelNames) -> Needs:
        """What either of them needs, where it is its turn."""
        both = [policy.needs(models) for policy in self._both]
        signals = {
            k: frozenset[Signal]().union(*(n.of(k) for n in both)) for k in range(len(models))
        }
        return Needs({}, {k: of for k, of in signals.items() if of})

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The models of both."""
        return frozenset().union(*(policy.uses(models) for policy in self._both))

    def check_models(self, models: Sequence[ModelFacts]) -> None:
        """Refuse what either of them refuses."""
        for policy in self._both:
            policy.check_models(models)

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Everywhere: whose turn it is decides who is run."""
        import torch

        return torch.ones(views.n_positions, dtype=torch.bool)

    def models_at(self, views: Views) -> Bool[Tensor, "positions models"]:
        """The models that the policy of the phase looks at."""
        import torch

        thinks, answers = (
            torch.tensor([bool(policy.needs(views.models).of(k)) for k in range(len(views.models))])
            for policy in self._both
        )
        return torch.where(views.thinking.cpu()[:, None], thinks, answers)

    def candidates(self, views: Views, role: int) -> Int[Tensor, "positions n"]:
        """Those of both policies."""
        import torch

        asking = [p for p in self._both if "token_logprobs" in p.needs(views.models).of(role)]
        return torch.cat([policy.candidates(views, role) for policy in asking], dim=1)

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """As the policy of each position's phase decides."""
        thinking = views.thinking
        by_phase: dict[bool, Callable[[], Tensor]] = {
            True: lambda: _chosen(self._both[0], views),
            False: lambda: _chosen(self._both[1], views),
        }
        # Of models that the one policy looks at nothing is known in the other's phase.
        if bool(thinking.all()) or not bool(thinking.any()):
            return by_phase[bool(thinking.any())]()
        return by_phase[True]().where(thinking, by_phase[False]())


def _chosen(policy: SelectPolicy, views: Views) -> Tensor:
    """Who writes under a policy, also where it would not have been asked: the base model then."""
    chosen = policy.select(views)
    return chosen.where(policy.defers(views), 0) if policy.can_defer else chosen

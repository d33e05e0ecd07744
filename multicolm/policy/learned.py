"""What learned policies share: they were made for certain models, and are nothing untrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from multicolm.errors import CapabilityError
from multicolm.policy.base import ModelFacts

__all__ = ["COST_WEIGHTS", "check_made_for", "untrained"]

COST_WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Values of ``cost_weight`` that are worth trying, for a cost of 1: nats by which an assistant has
to be better than the base model for each unit of its cost."""


def untrained(kind: str) -> CapabilityError:
    """The error of a policy that was never trained."""
    return CapabilityError(
        f"policy '{kind}' has not learned anything yet; train one with `multicolm train ENSEMBLE "
        f"SCORES --policy {kind} --out CHECKPOINT` and use `policy: ./CHECKPOINT`."
    )


def check_made_for(
    kind: str, made_for: Mapping[str, str] | None, models: Sequence[ModelFacts]
) -> None:
    """Refuse other models than those that a policy was made for, and another order of them.

    A model is known by what it is; by its name only where that is unknown, as names are the user's.

    Args:
        kind: of the policy, for the message.
        made_for: name -> identity, the base model first; ``None`` fits every ensemble.
        models: of this ensemble.

    Raises:
        CapabilityError: naming both.
    """
    if made_for is None:
        return
    fits = len(made_for) == len(models) and all(
        (identity == model.identity) if identity and model.identity else name == model.name
        for (name, identity), model in zip(made_for.items(), models, strict=True)
    )
    if fits:
        return
    theirs = [_word(name, identity) for name, identity in made_for.items()]
    ours = [_word(model.name, model.identity) for model in models]
    raise CapabilityError(
        f"this '{kind}' policy was made for {', '.join(theirs)}, and this ensemble is "
        f"{', '.join(ours)} (the base model first); use the ensemble that it was trained with, or "
        "train another."
    )


def _word(name: str, identity: str) -> str:
    return f"{name} ({identity})" if identity else name

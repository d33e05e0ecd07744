"""What learned policies share: they were made for certain models, and are nothing untrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from multicolm.artefacts import Weights
from multicolm.errors import CapabilityError
from multicolm.policy.base import ModelFacts
from multicolm.types import Tensor
from multicolm.views import ModelNames

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "COST_WEIGHTS",
    "check_count",
    "check_made_for",
    "check_width",
    "network_of",
    "on_device_of",
    "untrained",
]

COST_WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Values of ``cost_weight`` that are worth trying, for a cost of 1: nats by which an assistant has
to be better than the base model for each unit of its cost."""


def untrained(kind: str) -> CapabilityError:
    """The error of a policy that was never trained."""
    return CapabilityError(
        f"policy '{kind}' has not learned anything yet; train one with `multicolm train ENSEMBLE "
        f"SCORES --policy {kind} --out CHECKPOINT` and use `policy: ./CHECKPOINT`."
    )


def network_of(kind: str, weights: Weights | None, what: str) -> nn.Sequential:
    """The network that a policy has learned.

    Args:
        kind: of the policy, for the message.
        weights: what was learned.
        what: it is called where it has no file.

    Raises:
        CapabilityError: if nothing was learned yet.
        ArtefactError: if the file is missing or damaged.
    """
    from multicolm.learning.networks import from_tensors

    if weights is None:
        raise untrained(kind)
    return from_tensors(weights.content, weights.path or what)


def on_device_of(features: Tensor, network: nn.Sequential) -> nn.Sequential:
    """The network where its features are; moved in place, so only the first time."""
    return network if features.device.type == "cpu" else network.to(features.device)


def check_count(kind: str, n_models: int, models: ModelNames) -> None:
    """Refuse another number of models than a policy was made for.

    Raises:
        CapabilityError: naming both.
    """
    if n_models != len(models):
        raise CapabilityError(
            f"this '{kind}' policy was made for {n_models} models, and this ensemble has "
            f"{len(models)} ({', '.join(models)}); train one for these."
        )


def check_width(kind: str, width: int, base: ModelFacts) -> None:
    """Refuse a base model whose hidden states have another width than a policy was made for.

    Raises:
        CapabilityError: naming both.
    """
    if base.hidden_size is not None and width != base.hidden_size:
        raise CapabilityError(
            f"this '{kind}' policy was made for hidden states of width {width}, and those of base "
            f"model '{base.name}' have {base.hidden_size}; train one for this model."
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

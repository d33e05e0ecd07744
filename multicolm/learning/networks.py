"""Routers as networks: from features of the base model to one score per model.

Row 0 is fixed at zero: the base model's score is 0, and a network has one output per assistant. A
softmax does not see a constant, so nothing is lost; for one assistant this is the sigmoid of
Co-LLM. Features are standardised while training, which is then folded into the first layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicolm.errors import ArtefactError

__all__ = [
    "NetworkKind",
    "build",
    "fold",
    "from_tensors",
    "joined",
    "router_scores",
    "shape_of",
    "shifted",
    "standardisation",
]

NetworkKind: TypeAlias = Literal["linear", "mlp", "residual"]
"""``linear`` is Co-LLM's head; ``mlp`` has one hidden layer; ``residual`` is R2R's kind."""


class _Residual(nn.Module):
    """x + W2 gelu(W1 norm(x)), four times as wide inside.

    Source:
        R2R, arXiv 2505.21600, section 4.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        dropped: Tensor = self.dropout(inner)
        return x + dropped


def build(
    kind: NetworkKind,
    n_features: int,
    n_outputs: int,
    *,
    width: int = 256,
    n_blocks: int = 2,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A network whose last layer begins at zero, so that all writers are equally likely at first.

    Args:
        kind: of network.
        n_features: width of its input.
        n_outputs: one per assistant.
        width: of its inner layers.
        n_blocks: of ``residual``.
        dropout: of ``mlp`` and ``residual``.
        generator: of the random numbers that it begins with.
    """
    with torch.random.fork_rng(devices=[]):  # layers draw weights of their own, replaced below
        network = nn.Sequential(*_layers(kind, n_features, n_outputs, width, n_blocks, dropout))
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.zeros_(layer.bias)
    last = network[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    return network


def _layers(
    kind: NetworkKind, n_features: int, n_outputs: int, width: int, n_blocks: int, dropout: float
) -> list[nn.Module]:
    layers: list[nn.Module]
    if kind == "linear":
        layers = [nn.Linear(n_features, n_outputs)]
    elif kind == "mlp":
        layers = [nn.Linear(n_features, width), nn.ReLU(), nn.Dropout(dropout)]
        layers += [nn.Linear(width, n_outputs)]
    else:
        layers = [nn.Linear(n_features, width)]
        layers += [_Residual(width, dropout) for _ in range(n_blocks)]
        layers += [nn.LayerNorm(width), nn.Linear(width, n_outputs)]
    return layers


def fold(
    network: nn.Sequential, mean: Float[Tensor, "features"], scale: Float[Tensor, "features"]
) -> dict[str, Tensor]:
    """The tensors of a network that takes raw features, from one that took standardised ones."""
    tensors = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    weight = tensors["0.weight"] / scale
    tensors["0.bias"] = tensors["0.bias"] - weight @ mean
    tensors["0.weight"] = weight
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], origin: object = "the network") -> nn.Sequential:
    """The network that some tensors are of, ready to be asked.

    Args:
        tensors: as :func:`fold` made them.
        origin: what a message begins with.

    Raises:
        ArtefactError: if they are of no network that :func:`build` makes.
    """
    try:
        first, n_outputs = tensors["0.weight"], _last_bias(tensors).shape[0]
        n_features = first.shape[1]
        if set(tensors) == {"0.weight", "0.bias"}:
            network = build("linear", n_features, n_outputs)
        elif set(tensors) == {"0.weight", "0.bias", "3.weight", "3.bias"}:
            network = build("mlp", n_features, n_outputs, width=first.shape[0])
        else:
            n_blocks = sum(name.endswith("up.weight") for name in tensors)
            network = build(
                "residual", n_features, n_outputs, width=first.shape[0], n_blocks=n_blocks
            )
        network.load_state_dict(dict(tensors))
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise ArtefactError(
            f"{origin} holds no router: its tensors are {', '.join(sorted(tensors)) or 'none'}."
        ) from error
    wrong = [name for name, tensor in network.named_parameters() if not tensor.isfinite().all()]
    if wrong:
        raise ArtefactError(f"{origin} is damaged: its tensor {wrong[0]} holds NaN or infinity.")
    return network.requires_grad_(False).eval()


def _last_bias(tensors: Mapping[str, Tensor]) -> Tensor:
    return tensors[_last_bias_name(tensors)]


def _last_bias_name(tensors: Mapping[str, Tensor]) -> str:
    names = [name for name in tensors if name.count(".") == 1 and name.endswith("bias")]
    return max(names, key=lambda name: int(name.split(".")[0]))


def shifted(tensors: Mapping[str, Tensor], by: Float[Tensor, "outputs"]) -> dict[str, Tensor]:
    """The tensors of a network whose outputs are greater by so much."""
    name = _last_bias_name(tensors)
    return {**tensors, name: tensors[name] + by}


def shape_of(network: nn.Sequential) -> tuple[int, int]:
    """How many features a network takes and how many scores it gives, without the base model's."""
    first, last = network[0], network[-1]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    return first.in_features, last.out_features


def router_scores(
    network: nn.Module, features: Float[Tensor, "positions features"]
) -> Float[Tensor, "positions models"]:
    """One score per model, the base model's fixed at zero."""
    outputs = network(features)
    return torch.cat([torch.zeros_like(outputs[:, :1]), outputs], dim=-1)


def standardisation(
    features: Float[Tensor, "positions features"],
) -> tuple[Float[Tensor, "features"], Float[Tensor, "features"]]:
    """Mean and scale of each feature; a feature that never changes has scale 1."""
    mean = features.mean(0)
    scale = features.std(0, unbiased=False)
    return mean, torch.where(scale > 1e-6 * (1 + mean.abs()), scale, torch.ones_like(scale))


def joined(parts: Sequence[Tensor]) -> Float[Tensor, "positions features"]:
    """Several features side by side; -inf, of tokens that cannot come, as a very small number."""
    return torch.cat([part.float() for part in parts], dim=-1).clamp_min(-1e4)

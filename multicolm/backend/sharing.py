"""Networks of several models, loaded once where their weights are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from multicolm.backend.loading import adapter_for, load_network, with_adapter
from multicolm.backend.lora import Lora, LoraLayers
from multicolm.config import ModelConfig

__all__ = ["Network", "load_networks"]

# Models that differ in one of these have other weights, or run them in another way.
_OF_WEIGHTS = (
    "dtype",
    "device",
    "device_map",
    "attn_implementation",
    "trust_remote_code",
    "allow_pickled_weights",
)


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """What computes a model's predictions.

    Attributes:
        module: of transformers.
        n_adapter: number of weights of the adapter that is not in ``module``.
        layers: the adapters that are at work in ``module``, if there are any.
        adapter: which of them is the model's own.
        shared_with: other models whose weights are in ``module`` too.
        apart: why it shares nothing with models that name the same weights; empty if it does, or
            if there are none.
    """

    module: PreTrainedModel
    n_adapter: int = 0
    layers: LoraLayers | None = None
    adapter: int | None = None
    shared_with: tuple[str, ...] = ()
    apart: str = ""


def load_networks(configs: Mapping[str, ModelConfig]) -> dict[str, Network]:
    """Load what models compute with; those that name the same weights share one copy.

    An adapter of plain LoRA is at work beside others in the same network. Any other kind gets a
    copy of the network.

    Args:
        configs: by name, the models of an ensemble.

    Raises:
        ModelError: if weights or adapters cannot be loaded.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, config in configs.items():
        groups.setdefault((_place(config), *_settings(config).values()), []).append(name)
    loaded: dict[str, Network] = {}
    for names in groups.values():
        loaded |= _load_group({name: configs[name] for name in names})
    for name, network in loaded.items():
        if not network.apart and not network.shared_with:
            reason = _difference(name, configs)
            loaded[name] = replace(network, apart=reason)
    return {name: loaded[name] for name in configs}


def _load_group(configs: Mapping[str, ModelConfig]) -> dict[str, Network]:
    """Load models that name the same weights."""
    first, *_ = configs
    module = load_network(first, configs[first])
    adapters: dict[str, Lora] = {}
    reasons: dict[str, str] = {}
    for name, config in configs.items():
        if config.adapter is not None:
            found = adapter_for(name, config, module)
            if isinstance(found, Lora):
                adapters[name] = found
            else:
                reasons[name] = found
    sharing = [name for name in configs if name not in reasons]
    layers = LoraLayers(module, list(adapters.values())) if adapters else None
    numbers = {name: number for number, name in enumerate(adapters)}
    networks = {
        name: Network(
            module,
            adapters[name].n_parameters if name in adapters else 0,
            layers,
            numbers.get(name),
            tuple(other for other in sharing if other != name),
        )
        for name in sharing
    }
    for name, reason in reasons.items():
        # The last one may have the network that is there, if nobody else does.
        free = module if not sharing and name == list(reasons)[-1] else None
        free = load_network(name, configs[name]) if free is None else free
        apart = f"its adapter {reason}" if len(configs) > 1 else ""
        networks[name] = Network(with_adapter(name, configs[name], free), apart=apart)
    return networks


def _place(config: ModelConfig) -> tuple[str, str | None]:
    """Where the weights are."""
    if config.resolved.is_local:
        return str(Path(config.location).resolve()), None
    return config.location, config.resolved_revision


def _settings(config: ModelConfig) -> dict[str, str]:
    return {key: str(getattr(config, key)) for key in _OF_WEIGHTS}


def _difference(name: str, configs: Mapping[str, ModelConfig]) -> str:
    """Why a model shares no weights with another that names the same; empty if none does."""
    own = _settings(configs[name])
    for other, config in configs.items():
        if other != name and _place(config) == _place(configs[name]):
            theirs = _settings(config)
            for key in _OF_WEIGHTS:
                if own[key] != theirs[key]:
                    return f"`{key}` is {own[key]}, and {theirs[key]} for {other}"
    return ""

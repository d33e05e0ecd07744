"""Experts on one base: models that share a random network, each with an adapter of its own."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from tiny_models import network, shared_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

from multicolm import Ensemble
from multicolm.backend.lora import Lora, LoraLayers, LoraPair
from multicolm.backend.sharing import Network
from multicolm.backend.transformers import TransformersModel

__all__ = ["NAMES", "apart", "expert_models", "experts", "random_lora"]

NAMES = ("base", "left", "right")


def random_lora(module: Any, seed: int, rank: int = 3) -> Lora:
    """An adapter for all linear layers of a network but its head."""
    generator = torch.Generator().manual_seed(seed)
    head = module.get_output_embeddings()
    pairs = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head:
            n_inputs, n_outputs = layer.weight.shape
            if isinstance(layer, nn.Linear):
                n_inputs, n_outputs = n_outputs, n_inputs
            down = torch.randn(rank, n_inputs, generator=generator) / n_inputs**0.5
            pairs[name] = LoraPair(down, torch.randn(rank, n_outputs, generator=generator) / 2)
    return Lora(pairs)


def expert_models(kind: str = "llama") -> list[TransformersModel]:
    """A base without an adapter, and two experts, on one network."""
    module = copy.deepcopy(network(kind))
    layers = LoraLayers(module, [random_lora(module, seed) for seed in (1, 2)])
    return [
        TransformersModel(
            name,
            module,
            shared_tokenizer(),
            network=Network(
                module,
                layers=layers,
                adapter=number,
                shared_with=tuple(other for other in NAMES if other != name),
            ),
        )
        for name, number in zip(NAMES, (None, 0, 1), strict=True)
    ]


@lru_cache(maxsize=8)
def apart(kind: str = "llama") -> Ensemble:
    """The same models, each with a network of its own; always the same object."""
    models = [TransformersModel("base", network(kind), shared_tokenizer())]
    for name, seed in (("left", 1), ("right", 2)):
        module = copy.deepcopy(network(kind))
        layers = LoraLayers(module, [random_lora(module, seed)])
        own = Network(module, layers=layers, adapter=0)
        models.append(TransformersModel(name, module, shared_tokenizer(), network=own))
    return Ensemble(models)


@lru_cache(maxsize=8)
def experts(kind: str = "llama") -> Ensemble:
    """An ensemble of :func:`expert_models`, always the same object; its models are probed."""
    ensemble = Ensemble(expert_models(kind))
    for model in ensemble.backends:
        assert model.weights is ensemble.backends[0].weights
    return ensemble

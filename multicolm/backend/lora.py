"""LoRA adapters of several models at work in one network.

The network is loaded once. Each linear layer that an adapter changes has a hook, which adds
``B (A x)`` to the layer's output. In a batch every row has the adapter of its own model: the
matrices of all adapters of a layer are stacked, and a row's activations of rank ``r`` are zeroed
where they are another adapter's. That is two products a layer, however many adapters there are
(compare S-LoRA, Sheng et al. 2024, and Punica, Chen et al. 2024, which gather them in kernels of
their own). PEFT's own batches of mixed adapters (``adapter_names``) register a hook in each layer
for each pass, and make two products, a gather and a scatter for each adapter.
"""

from __future__ import annotations

import dataclasses
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["Lora", "LoraLayers", "LoraPair", "read_lora"]

# What PEFT's settings may say of an adapter that is no more than two matrices per linear layer.
_PLAIN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
# Other ways to begin (PiSSA, OLoRA, ...) change the weights of the layer itself.
_PLAIN_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two matrices of an adapter in one layer; its scaling is in ``up``."""

    down: Float[Tensor, "rank inputs"]
    up: Float[Tensor, "rank outputs"]


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter of plain LoRA.

    Attributes:
        pairs: its matrices, by the name of the layer in the network.
    """

    pairs: Mapping[str, LoraPair]

    @property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(pair.down.numel() + pair.up.numel() for pair in self.pairs.values())


def read_lora(folder: Path, settings: Any, network: PreTrainedModel) -> Lora | str:
    """Read an adapter that can work in a network which other adapters share.

    Args:
        folder: of PEFT's files.
        settings: PEFT's settings in it.
        network: that it is for; it stays as it is.

    Returns:
        The adapter; or what it has that needs a network of its own, as the end of a sentence that
        begins with "its adapter". So does what does not fit the network at all.
    """
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    if (unusual := _unusual(settings)) is not None:
        return unusual
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in peft.load_peft_weights(str(folder), device="cpu").items():
        found = _KEY.fullmatch(key)
        if found is None:
            return f"holds {key}"
        halves.setdefault(found[1], {})[found[2]] = value
    targets = {
        name: module
        for name, module in network.named_modules()
        if check_target_module_exists(settings, name)
    }
    if differing := targets.keys() ^ halves.keys():
        return f"does not fit at {min(differing)}"
    pairs: dict[str, LoraPair] = {}
    for name, module in targets.items():
        rank = settings.rank_pattern.get(get_pattern_key(settings.rank_pattern, name), settings.r)
        alpha = settings.alpha_pattern.get(
            get_pattern_key(settings.alpha_pattern, name), settings.lora_alpha
        )
        scaling = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
        shapes = {half: tuple(value.shape) for half, value in halves[name].items()}
        if shapes != _shapes(module, rank):
            return f"changes {name}, a {type(module).__name__}, in another way"
        if _device_of(module).type == "meta":  # accelerate moves its weights for each pass
            return f"changes {name}, which is offloaded"
        down, up = halves[name]["A"].float(), halves[name]["B"].float() * scaling
        if not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
            # Where it is another row's, it would be multiplied by zero, and NaN all the same.
            return f"is infinite or no number at {name}"
        pairs[name] = LoraPair(down, up.T.contiguous())
    return Lora(pairs)


def _unusual(settings: Any) -> str | None:
    """What PEFT's settings say that is not plain LoRA."""
    import peft

    if type(settings) is not peft.LoraConfig:
        return f"is of type {getattr(settings.peft_type, 'value', settings.peft_type)}"
    usual = peft.LoraConfig()
    for field in dataclasses.fields(settings):
        if field.name in _PLAIN:
            continue
        given, default = getattr(settings, field.name), getattr(usual, field.name)
        if given != default and (given or default):  # an empty list is as good as none
            return f"uses `{field.name}`"
    if settings.init_lora_weights not in _PLAIN_BEGINNINGS:
        return f"uses `init_lora_weights: {settings.init_lora_weights}`"
    return None


def _shapes(module: nn.Module, rank: int) -> dict[str, tuple[int, int]] | None:
    """The shapes that an adapter's matrices have in a layer; ``None`` if it is not linear."""
    if isinstance(module, nn.Linear):
        n_inputs, n_outputs = module.in_features, module.out_features
    elif isinstance(module, Conv1D):
        n_inputs, n_outputs = module.nx, module.nf
    else:
        return None
    return {"A": (rank, n_inputs), "B": (n_outputs, rank)}


class LoraLayers:
    """A network in which several adapters are at work, each row of a batch with one or none.

    Args:
        network: it gets a hook in every layer that an adapter changes.
        adapters: numbered as they come; a batch names them by these numbers.

    Attributes:
        n_adapters: how many there are.
    """

    def __init__(self, network: PreTrainedModel, adapters: Sequence[Lora]) -> None:
        self.n_adapters = len(adapters)
        self._lock = threading.Lock()
        self._rows = _Rows(())
        self._mixes: bool | None = None
        for name in dict.fromkeys(name for lora in adapters for name in lora.pairs):
            module = network.get_submodule(name)
            pairs = [lora.pairs.get(name) for lora in adapters]
            layer = _Layer(self, pairs, _device_of(module), network.dtype)
            module.register_forward_hook(layer.add)

    @contextmanager
    def used_by(self, adapters: Sequence[int | None]) -> Iterator[None]:
        """The passes inside are of a batch whose rows have these adapters, or none."""
        with self._lock:  # or another thread's pass would be run with these
            self._rows = _Rows(adapters)
            try:
                yield
            finally:
                self._rows = _Rows(())

    def mixes(self, probe: Callable[[LoraLayers], bool]) -> bool:
        """Whether one batch can have several adapters; ``probe`` finds out at the first call."""
        if self._mixes is None:
            self._mixes = probe(self)
        return self._mixes

    @property
    def rows(self) -> _Rows:
        """The batch that is in the network."""
        return self._rows


class _Rows:
    """Which adapters the rows of a batch have.

    Attributes:
        is_mixed: whether they differ.
        adapter: that of all rows, if they do not.
    """

    def __init__(self, adapters: Sequence[int | None]) -> None:
        self._adapters = adapters
        self.is_mixed = len(set(adapters)) > 1
        self.adapter = None if self.is_mixed or not adapters else adapters[0]
        self._foreign: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def foreign(
        self, owners: tuple[int, ...], device: torch.device
    ) -> Bool[Tensor, "rows 1 ranks"]:
        """Where an activation is of another adapter than the row's.

        Args:
            owners: per number of an activation its adapter.
            device: where to.
        """
        key = owners, device
        if key not in self._foreign:
            own = torch.tensor([-1 if k is None else k for k in self._adapters])
            self._foreign[key] = (torch.tensor(owners) != own[:, None, None]).to(device)
        return self._foreign[key]


class _Layer:
    """The adapters of one linear layer.

    Args:
        layers: knows which adapters the rows have.
        pairs: per adapter, if it changes this layer.
        device: of the layer.
        dtype: in which the network computes.
    """

    def __init__(
        self,
        layers: LoraLayers,
        pairs: Sequence[LoraPair | None],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._layers = layers
        known = {k: pair for k, pair in enumerate(pairs) if pair is not None}
        self._down = torch.cat([pair.down for pair in known.values()]).to(device, dtype)
        self._up = torch.cat([pair.up for pair in known.values()]).to(device, dtype)
        self._owners = tuple(k for k, pair in known.items() for _ in pair.down)
        self._of: dict[int | None, tuple[Tensor, Tensor]] = {}
        first = 0
        for k, pair in known.items():
            which = slice(first, first + len(pair.down))
            self._of[k] = self._down[which], self._up[which]
            first = which.stop

    def add(self, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        """What the layer gives with the adapters of the rows; the hook of the layer."""
        rows = self._layers.rows
        x = inputs[0]
        if not rows.is_mixed:
            if rows.adapter not in self._of:
                return None
            down, up = self._of[rows.adapter]
            return _plus(output, nn.functional.linear(x.to(down.dtype), down), up)
        ranks = nn.functional.linear(x.to(self._down.dtype), self._down)
        foreign = rows.foreign(self._owners, ranks.device)
        if ranks.ndim == 2:  # Some networks put the tokens of all rows below each other.
            foreign = foreign.expand(-1, len(ranks) // len(foreign), -1).reshape(ranks.shape)
        return _plus(output, ranks.masked_fill_(foreign, 0.0), self._up)


def _plus(output: Tensor, ranks: Tensor, up: Tensor) -> Tensor:
    """``output + ranks @ up``."""
    if output.dtype != up.dtype:
        return output + (ranks @ up).to(output.dtype)
    flat = output.reshape(-1, output.shape[-1])
    return torch.addmm(flat, ranks.reshape(-1, ranks.shape[-1]), up).view(output.shape)


def _device_of(module: nn.Module) -> torch.device:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.device

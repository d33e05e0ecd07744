"""Decoder-only models of the transformers library, in process.

A model is served in one of four ways, the first that a probe with real forward passes finds right:

    rows        one cache for all rows, each at its own length; cutting a row is free
    growing     one DynamicCache per row, several tokens per pass; a cut row is read anew
    one by one  the same, fed one token at a time (recurrent states that take no block)
    uncached    every look reads the whole text: always right, and slow

The first needs full or sliding-window attention; recurrent and hybrid models fall to the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from multicolm.backend.base import Model, Session
from multicolm.backend.checked import refuse_no_numbers
from multicolm.backend.identity import identity_of
from multicolm.backend.loading import load_tokenizer
from multicolm.backend.lora import LoraLayers
from multicolm.backend.sessions import GrowingSession, RowSession, UncachedSession
from multicolm.backend.sharing import Network, load_networks
from multicolm.config import ModelConfig
from multicolm.errors import CapabilityError, ModelError
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer
from multicolm.types import Signal

__all__ = ["RowSession", "TransformersModel"]

Way = Callable[[int], Session]
"""Opens a session of some rows."""

_PROBE_TOLERANCE = 1e-3
# Half precision rounds by itself; a wrong mask or state is off by far more than this.
_PROBE_TOLERANCE_HALF = 5e-2


class TransformersModel(Model):
    """A causal language model of the transformers library.

    Attributes:
        model: what transformers loaded.
        config: the configuration of its text part.
        served_as: how its texts are followed; empty until the first session is opened.

    Args:
        name: its name in the ensemble.
        model: the loaded model; it is put into evaluation mode.
        tokenizer: its fast tokenizer.
        network: how ``model`` is shared with other models, if it is.

    Raises:
        ModelError: if it is no decoder-only model.
        VocabularyError: if its tokens cannot be turned into bytes.
    """

    signals: ClassVar[frozenset[Signal]] = frozenset(
        {"top1", "topk", "logprobs", "hidden", "embedding"}
    )

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        network: Network | None = None,
    ) -> None:
        if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
            raise ModelError(
                f"model '{name}' is a {type(model).__name__}; multicolm serves decoder-only "
                "language models (those that AutoModelForCausalLM loads)."
            )
        model.train(False)
        embeddings = cast("Tensor", model.get_input_embeddings().weight)
        self.name = name
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.tokenizer = HuggingFaceTokenizer(
            tokenizer, name, _end_ids(model), n_embeddings=embeddings.shape[0]
        )
        self.context_length = _context_length(self.config)
        self._network = network or Network(model)
        self.n_parameters = model.num_parameters() + self._network.n_adapter
        self.device = embeddings.device
        self.dtype: torch.dtype = model.dtype
        self.precision = str(self.dtype).removeprefix("torch.")
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.hidden_size = getattr(head, "in_features", None)
        self.on_cpu = self.device.type == "cpu"
        self.architecture = type(model).__name__
        self.n_bytes = sum(weight.nbytes for weight in model.parameters())
        self.n_bytes += self._network.n_adapter * self.dtype.itemsize
        self.sampling_defaults = _sampling_defaults(model)
        self.served_as = ""
        self._parameters = frozenset(inspect.signature(model.forward).parameters)
        self._open: Way | None = None

    @classmethod
    def from_config(cls, name: str, config: ModelConfig) -> TransformersModel:
        """Load weights and tokenizer; see :mod:`multicolm.backend.loading`."""
        [model] = cls.from_configs({name: config})
        return model

    @classmethod
    def from_configs(cls, configs: Mapping[str, ModelConfig]) -> list[TransformersModel]:
        """Load several models; see :func:`multicolm.backend.sharing.load_networks`."""
        tokenizers = {name: load_tokenizer(name, config) for name, config in configs.items()}
        models = []
        for name, network in load_networks(configs).items():
            model = cls(name, network.module, tokenizers[name], network=network)
            commit = getattr(network.module.config, "_commit_hash", None)
            model.identity = identity_of(configs[name], commit)
            models.append(model)
        return models

    @property
    def abilities(self) -> list[str]:
        """With which models it shares its weights and passes, or why it does not."""
        if self._network.apart:
            return [f"weights of its own: {self._network.apart}"]
        if not self._network.shared_with:
            return []
        others = ", ".join(self._network.shared_with)
        if self.weights is self:
            return [f"one copy of the weights with {others}, and forward passes of its own"]
        return [f"one copy of the weights and one forward pass with {others}"]

    @property
    def shows(self) -> frozenset[Signal]:
        """What it shows; hidden states only if it has an output layer, whose input they are."""
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return self.signals - {"hidden"} if head is None else self.signals

    @property
    def weights(self) -> object:
        """The network, where rows of all models that share it can be fed in one pass."""
        layers = self._network.layers
        if not self._network.shared_with or not self._is_in_rows:
            return self
        return self.model if layers is None or layers.mixes(self._mixes) else self

    @property
    def _is_in_rows(self) -> bool:
        self.open(0)
        return self.served_as == "rows"

    def open(self, n_rows: int) -> Session:
        """A session of ``n_rows`` empty rows; the first call probes how to serve the model."""
        if self._open is None:
            self._open, self.served_as = self._probe()
        return self._open(n_rows)

    def _probe(self) -> tuple[Way, str]:
        ways: list[tuple[str, Way]] = []
        takes_cache = self.cache_argument is not None
        if takes_cache and _rowable(self.model, self.config):
            ways.append(("rows", partial(RowSession, self)))
            if len(set(getattr(self.config, "layer_types", None) or ())) == 1:
                # Some configurations name the types of layers, and their model takes one mask.
                ways.append(("rows", partial(RowSession, self, by_layer_type=False)))
        if takes_cache:
            ways.append(("growing", partial(GrowingSession, self)))
            ways.append(("one by one", partial(GrowingSession, self, one_by_one=True)))
        for name, way in ways:
            if is_right(self, way):
                return way, name
        return partial(UncachedSession, self), "uncached"

    @cached_property
    def cache_argument(self) -> str | None:
        """The name under which the model takes a cache, if it takes one.

        transformers calls it ``cache`` from 5.24 on, and called it one of the others before.
        """
        names = ("cache", "past_key_values", "cache_params")
        return next((name for name in names if name in self._parameters), None)

    def embed(self, ids: Int[Tensor, "positions"]) -> Float[Tensor, "positions width"]:
        """Input embeddings of tokens, by the model's own ids."""
        embeddings = self.model.get_input_embeddings()
        with torch.inference_mode():
            embedded: Tensor = embeddings(ids.to(self.device))
        return embedded

    def synchronize(self) -> None:
        """Return when the device has done all that was asked of it."""
        if not self.on_cpu:
            torch.accelerator.synchronize(self.device)

    def forward(
        self, input_ids: Tensor, n_keep: int, hidden: bool, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (and the head's inputs) of the last ``n_keep`` columns: [rows, n_keep, width].

        Raises:
            CapabilityError: if hidden states are wanted of a model without an output layer.
        """
        if "logits_to_keep" in self._parameters:
            arguments["logits_to_keep"] = n_keep
        if not hidden:
            return self._run(input_ids, arguments)[:, -n_keep:], None
        head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is None:
            raise CapabilityError(
                f"model '{self.name}' ({type(self.model).__name__}) has no output layer whose "
                "input could serve as hidden state; use a policy that needs none of it."
            )
        caught: list[Tensor] = []
        # The input of the output layer is the hidden state after the final norm in every
        # architecture; `output_hidden_states` differs between them on whether the norm is in.
        hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            logits = self._run(input_ids, arguments)
        finally:
            hook.remove()
        return logits[:, -n_keep:], caught[0][:, -n_keep:]

    def _run(self, input_ids: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Logits of all columns that are kept."""
        models: Sequence[TransformersModel] = arguments.pop("models", [self] * len(input_ids))
        layers = self._network.layers
        adapters = [model._network.adapter for model in models]
        with nullcontext() if layers is None else layers.used_by(adapters):
            logits: Tensor = self.model(input_ids=input_ids, **arguments).logits
        return logits

    def _mixes(self, layers: LoraLayers) -> bool:
        """Whether a batch of all adapters gives what each gives alone.

        Some networks sort tokens between layers, so that it is lost which row one is of.
        """
        adapters: list[int | None] = [None, *range(layers.n_adapters)]
        texts = [
            [(7 * i + 3 * row + 1) % self.config.vocab_size for i in range(12)]
            for row in range(len(adapters))
        ]
        ids = torch.tensor(texts, device=self.device)
        with torch.inference_mode():
            alone = []
            for number, adapter in enumerate(adapters):
                with layers.used_by([adapter]):
                    one = self.model(input_ids=ids[number : number + 1], use_cache=False)
                    alone.append(one.logits)
            try:
                with layers.used_by(adapters):
                    mixed = self.model(input_ids=ids, use_cache=False).logits
            except _REFUSALS:
                return False
        return _agree(self, mixed.flatten(0, 1), torch.cat(alone).flatten(0, 1))


def _end_ids(model: PreTrainedModel) -> list[int]:
    ids: list[int] = []
    for config in (model.generation_config, model.config):
        given = getattr(config, "eos_token_id", None)
        if given is not None:
            ids.extend([given] if isinstance(given, int) else given)
    return ids


def _sampling_defaults(model: PreTrainedModel) -> dict[str, Any]:
    """How the model's author would have texts written: its generation_config.json, in part."""
    given = model.generation_config.to_diff_dict() if model.generation_config else {}
    return {name: value for name, value in given.items() if name in _SAMPLING}


_SAMPLING = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "num_beams"),
    *("repetition_penalty", "no_repeat_ngram_size", "max_length", "max_new_tokens"),
)


def _context_length(config: Any) -> int | None:
    """The most tokens that the positions of a model reach; ``None`` if it has no such limit."""
    names = ("max_position_embeddings", "max_seq_len")
    lengths = (getattr(config, name, None) for name in names)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def _rowable(model: PreTrainedModel, config: Any) -> bool:
    """Whether the architecture is of a kind that the row cache can hold; the probe decides."""
    if getattr(model, "_is_stateful", False):
        return False
    # GPT-Neo cuts its window by the length of the cache and not by the given positions. No window
    # is as short as the probe's texts, so the probe cannot see that.
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return False
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    layer_types = set(getattr(config, "layer_types", None) or ())
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and layer_types <= {
        "full_attention",
        "sliding_attention",
    }


def is_right(model: TransformersModel, way: Way) -> bool:
    """Feed three short rows, ragged and even, with cuts; compare with passes over whole texts."""
    vocab = model.config.vocab_size
    a, b, c = ([(7 * i + 3 * row + 1) % vocab for i in range(12)] for row in range(3))
    try:
        session = way(3)
        session.feed([0, 1, 2], [a[:5], b[:3], [0, 0, 0, 0]], [1, 1, 1])
        session.truncate(0, 2)
        session.truncate(2, 0)
        session.feed([0, 2], [a[2:4], c[:6]], [1, 1])
        ragged = session.feed([0, 1, 2], [a[4:], b[3:11], c[6:7]], [2, 1, 1]).logits
        session.truncate(0, 11)
        even = session.feed([0, 1], [a[11:], b[11:]], [1, 1]).logits
        whole = UncachedSession(model, 3).feed([0, 1, 2], [a, b, c[:7]], [2, 2, 1]).logits
    except _REFUSALS:
        return False
    # Or no way would be found right, and the model be served in the slowest one.
    refuse_no_numbers(model, whole)
    got = torch.cat([ragged[:3], even[1:], ragged[3:], even[:1]])
    return _agree(model, got, torch.cat([whole, whole[1:2]]))


def _agree(model: TransformersModel, got: Tensor, want: Tensor) -> bool:
    """Whether logits, [positions, vocab], are equal but for rounding."""
    n_tokens = model.tokenizer.n_tokens
    got, want = got[:, :n_tokens].float(), want[:, :n_tokens].float()
    half = model.dtype in (torch.float16, torch.bfloat16)
    # Some models rule tokens out by -inf.
    differences = torch.where(got == want, 0.0, (got - want).abs())
    error = differences.max() / want[want.isfinite()].abs().max().clamp_min(1e-6)
    return bool(error <= (_PROBE_TOLERANCE_HALF if half else _PROBE_TOLERANCE))


# What a model raises on a cache or a mask that it was not made for is not ours to enumerate; it
# means "not this way", and the last way, without a cache, is never probed.
_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)

"""Loading weights and tokenizers safely, and saying what is wrong when they cannot be loaded."""

from __future__ import annotations

import re
import sys
import textwrap
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from multicolm.backend.lora import Lora, read_lora
from multicolm.config import ModelConfig
from multicolm.errors import ModelError

__all__ = ["adapter_for", "load_model", "load_network", "load_tokenizer", "with_adapter"]

# What transformers, accelerate, safetensors and torch raise on files, settings and devices that do
# not fit: an AssertionError is torch's word for a device that it was not built for.
_REASONS = (
    AssertionError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


_WORTH_A_BAR = 100_000_000  # bytes


def load_tokenizer(name: str, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the chat template that the ensemble file asks for.

    Raises:
        ModelError: if there is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.tokenizer_location, **_common(config, config.tokenizer_location)
        )
    except _REASONS as error:
        raise ModelError(_sentence(name, config, "tokenizer", error)) from error
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template_text
    return tokenizer


def load_model(name: str, config: ModelConfig) -> PreTrainedModel:
    """The weights of a model, on the device and in the type that the ensemble file asks for.

    Only safetensors are read unless the file says ``allow_pickled_weights: true``. An adapter is at
    work in PEFT's layers.

    Raises:
        ModelError: if they are missing, unsafe, damaged, or of no causal language model.
    """
    network = load_network(name, config)
    return network if config.adapter is None else with_adapter(name, config, network)


def load_network(name: str, config: ModelConfig) -> PreTrainedModel:
    """Like :func:`load_model`, without the adapter.

    Raises:
        ModelError: if they are missing, unsafe, damaged, or of no causal language model.
    """
    arguments = _common(config)
    arguments["dtype"] = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    arguments["use_safetensors"] = None if config.allow_pickled_weights else True
    if config.attn_implementation is not None:
        arguments["attn_implementation"] = config.attn_implementation
    if config.device_map is not None:
        arguments["device_map"] = config.device_map
    folder = Path(config.location)
    has_adapter = (folder / "adapter_config.json").is_file()  # transformers loads that, too
    if has_adapter:
        _refuse_pickled_adapter(name, config, folder)
    try:
        if AutoConfig.from_pretrained(config.location, **_common(config)).is_encoder_decoder:
            raise ModelError(
                f"model '{name}' ({config.location}) is an encoder-decoder; multicolm serves "
                "decoder-only language models."
            )
        with _fitting_progress(folder):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.location, output_loading_info=True, **arguments
            )
        model: PreTrainedModel = loaded[0]
        missing, unexpected = set(loaded[1]["missing_keys"]), set(loaded[1]["unexpected_keys"])
        if has_adapter:
            missing, unexpected = _with_all_of_its_adapter(model, folder, missing, unexpected)
        if config.device is not None:
            model = model.to(torch.device(config.device))  # type: ignore[arg-type]  # a decorator
    except _REASONS as error:
        raise ModelError(_sentence(name, config, "weights", error)) from error
    _refuse_missing(name, config.location, missing)
    _refuse_unexpected(name, config.location, _without_known(unexpected, model.config))
    return model


@contextmanager
def _fitting_progress(folder: Path) -> Iterator[None]:
    """Show transformers' progress bar where somebody sees it and there is something to wait for."""
    small = folder.is_dir() and sum(f.stat().st_size for f in folder.glob("*")) < _WORTH_A_BAR
    if not logging.is_progress_bar_enabled() or (sys.stderr.isatty() and not small):
        yield
        return
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _common(config: ModelConfig, location: str | None = None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.resolved_revision is not None:
        arguments["revision"] = config.resolved_revision
    if Path(location or config.location).is_dir():
        arguments["local_files_only"] = True
    return arguments


def adapter_for(name: str, config: ModelConfig, network: PreTrainedModel) -> Lora | str:
    """A model's adapter, to be at work in a network that other models use too.

    Args:
        name: the model's.
        config: of the model; it has an adapter.
        network: that the adapter is for; it stays as it is.

    Returns:
        The adapter; or why it needs a network of its own (:func:`with_adapter`), as the end of a
        sentence that begins with "its adapter".

    Raises:
        ModelError: if peft is missing, or only pickled weights are there.
    """
    folder = _adapter_folder(name, config)
    try:
        return read_lora(folder, _adapter_settings(name, folder), network)
    except _REASONS as error:
        return f"cannot be read: {error}"


def with_adapter(name: str, config: ModelConfig, network: PreTrainedModel) -> PreTrainedModel:
    """The network with a model's PEFT adapter, of whatever kind, at work inside its layers.

    Raises:
        ModelError: if the adapter cannot be read, is incomplete or does not fit.
    """
    folder = _adapter_folder(name, config)
    import peft

    try:
        settings = _adapter_settings(name, folder)
        settings.inference_mode = True
        with warnings.catch_warnings():
            # PEFT warns of what cannot be merged, which is not done, and of missing weights, which
            # are refused; and it asks transformers for a property by its older name.
            warnings.simplefilter("ignore")
            # PEFT itself, since transformers' `load_adapter` leaves DoRA's magnitudes out.
            wrapped = peft.PeftModel(network, settings)
            report = wrapped.load_adapter(
                str(folder), "default", is_trainable=False, torch_device=str(network.device)
            )
    except _REASONS as error:
        raise ModelError(_sentence(name, config, "adapter", error)) from error
    _refuse_missing(name, str(folder), report.missing_keys)
    _refuse_unexpected(name, str(folder), report.unexpected_keys)
    return cast("PreTrainedModel", wrapped.get_base_model())


def _adapter_folder(name: str, config: ModelConfig) -> Path:
    assert config.adapter_location is not None
    folder = Path(config.adapter_location)
    _refuse_pickled_adapter(name, config, folder)
    if find_spec("peft") is None:
        raise ModelError(
            f"model '{name}' has an adapter, which needs peft: pip install 'multicolm[peft]'."
        )
    return folder


def _adapter_settings(name: str, folder: Path) -> Any:
    import peft

    settings = peft.PeftConfig.from_pretrained(str(folder))
    if settings.is_prompt_learning:
        raise ModelError(
            f"model '{name}': adapter: {folder} learned a prompt ({settings.peft_type.value}); "
            "multicolm takes adapters that are part of a model's layers, such as LoRA."
        )
    return settings


def _with_all_of_its_adapter(
    model: PreTrainedModel, folder: Path, missing: set[str], unexpected: set[str]
) -> tuple[set[str], set[str]]:
    """Give a model with an adapter in its own folder what transformers has left out of that.

    Returns:
        What is missing and unexpected then.
    """
    import peft

    weights = peft.load_peft_weights(str(folder), device=str(model.device))
    state = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    report: Any = peft.set_peft_model_state_dict(model, state, "default")
    of_adapter = {key for key in unexpected if key.startswith(tuple(state))}
    return missing & set(report.missing_keys), unexpected - of_adapter | set(report.unexpected_keys)


def _refuse_missing(name: str, location: str, keys: Collection[str]) -> None:
    """Tensors that are in no file would be random numbers, with no more than a line in a log."""
    if keys:
        raise ModelError(
            f"model '{name}': {location} lacks {len(keys)} of the weights, such as {min(keys)}; "
            "are these the weights of a causal language model, and of this one?"
        )


def _refuse_unexpected(name: str, location: str, keys: Collection[str]) -> None:
    """Weights that the model has no place for belong to layers that its config drops."""
    if keys:
        n = f"{len(keys)} weights that the model has" if len(keys) > 1 else "a weight that it has"
        raise ModelError(
            f"model '{name}': {location} holds {n} no place for, such as {min(keys)}; does the "
            "config fit the weights (`num_hidden_layers`, the kind of model), and an adapter the "
            "model that it was trained on?"
        )


# What checkpoints hold besides a causal language model's text part: buffers that are worked out
# anew, and modules that it never runs. transformers leaves out more by itself, per architecture.
_HARMLESS = re.compile(
    r"\.(masked_bias|attn\.bias|attention\.bias|rotary_emb\.inv_freq|position_ids)$"
    r"|(^|\.)(mtp|visual|vision_tower|vision_model|audio_tower|multi_modal_projector|v_head)\."
)
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def _without_known(keys: Collection[str], config: Any) -> list[str]:
    """Unexpected weights that nobody knows to be harmless."""
    config = config.get_text_config(decoder=True)
    # Layers after the last one that predict further tokens, which nobody runs here.
    first = getattr(config, "num_hidden_layers", 0)
    further = range(first, first + (getattr(config, "num_nextn_predict_layers", 0) or 0))
    return [
        key
        for key in keys
        if not _HARMLESS.search(key)
        and not ((layer := _LAYER.search(key)) and int(layer[1]) in further)
        and not (key == "lm_head.weight" and config.tie_word_embeddings)
    ]


def _refuse_pickled_adapter(name: str, config: ModelConfig, folder: Path) -> None:
    if not config.allow_pickled_weights and not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"model '{name}': adapter: {folder} has no adapter_model.safetensors; save the adapter "
            "with safetensors, or set `allow_pickled_weights: true` if you trust its author."
        )


def _sentence(name: str, config: ModelConfig, what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    hint = ""
    if what == "weights" and "safetensors" in reason:
        hint = (
            " Only safetensors are loaded; convert the weights, or set "
            "`allow_pickled_weights: true` if you trust their author."
        )
    elif "trust_remote_code" in reason:
        hint = " Set `trust_remote_code: true` if you trust their author."
    reason = textwrap.shorten(reason, 400, placeholder=" ...")
    places = {"adapter": config.adapter_location, "tokenizer": config.tokenizer_location}
    where = places.get(what, config.location)
    return f"model '{name}': cannot load the {what} from {where}: {reason}{hint}"

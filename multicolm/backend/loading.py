"""Loading weights and tokenizers safely, and saying what is wrong when they cannot be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from multicolm.errors import ModelError

if TYPE_CHECKING:
    from multicolm.config import ModelConfig

__all__ = ["load_model", "load_tokenizer"]


def load_tokenizer(name: str, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the chat template that the ensemble file asks for.

    Raises:
        ModelError: if there is none, or it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.location, **_common(config))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(_sentence(name, config, "tokenizer", error)) from error
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template_text
    return tokenizer


def load_model(name: str, config: ModelConfig) -> PreTrainedModel:
    """The weights of a model, on the device and in the type that the ensemble file asks for.

    Only safetensors are read unless the file says ``allow_pickled_weights: true``.

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
    try:
        if AutoConfig.from_pretrained(config.location, **_common(config)).is_encoder_decoder:
            raise ModelError(
                f"model '{name}' ({config.location}) is an encoder-decoder; multicolm serves "
                "decoder-only language models."
            )
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(config.location, **arguments)
        if config.device is not None:
            model = model.to(config.device)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise ModelError(_sentence(name, config, "weights", error)) from error
    return model if config.adapter is None else _adapted(name, config, model)


def _common(config: ModelConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.resolved_revision is not None:
        arguments["revision"] = config.resolved_revision
    if Path(config.location).is_dir():
        arguments["local_files_only"] = True
    return arguments


def _adapted(name: str, config: ModelConfig, model: PreTrainedModel) -> PreTrainedModel:
    """The model with a PEFT adapter merged into its layers' forward."""
    assert config.adapter is not None
    folder = Path(config.adapter_location)
    if not config.allow_pickled_weights and not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"model '{name}': adapter: {folder} has no adapter_model.safetensors; save the adapter "
            "with safetensors, or set `allow_pickled_weights: true` if you trust its author."
        )
    try:
        import peft  # noqa: F401  # transformers needs it for load_adapter
    except ImportError as error:
        raise ModelError(
            f"model '{name}' has an adapter, which needs peft: pip install 'multicolm[peft]'."
        ) from error
    try:
        model.load_adapter(str(folder))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(_sentence(name, config, "adapter", error)) from error
    return model


def _sentence(name: str, config: ModelConfig, what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    hint = ""
    if what == "weights" and "safetensors" in reason:
        hint = (
            " Only safetensors are loaded; convert the weights, or set "
            "`allow_pickled_weights: true` if you trust their author."
        )
    return f"model '{name}': cannot load the {what} from {config.location}: {reason[:400]}{hint}"

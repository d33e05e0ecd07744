"""GGUF files of small Llama and Mamba models, written from their folders; what tests load.

llama.cpp's own converter takes published tokenizers only, which it knows by a hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

__all__ = ["write_gguf"]

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    # Mamba
    "backbone.embeddings": "token_embd",
    "backbone.norm_f": "output_norm",
    "norm": "attn_norm",
    "mixer.in_proj": "ssm_in",
    "mixer.conv1d": "ssm_conv1d",
    "mixer.x_proj": "ssm_x",
    "mixer.dt_proj": "ssm_dt",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj": "ssm_out",
}


def write_gguf(folder: Path, path: Path, *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write the folder of a Llama or Mamba model as a GGUF file in float32.

    Args:
        folder: as ``save_pretrained`` leaves it, tokenizer included.
        path: the file.
        metadata: header entries that replace those of the folder; ``None`` leaves one out.
    """
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    writer = gguf.GGUFWriter(path, kind)
    shape = _llama(config) if kind == "llama" else _mamba(config)
    entries = {**shape, **_tokenizer(folder, config), **(metadata or {})}
    for key, value in entries.items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        writer.add_tensor(_name(name), np.ascontiguousarray(_values(name, tensor, config)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    place, suffix = name, ""
    for end in (".weight", ".bias"):
        if name.endswith(end):
            place, suffix = name.removesuffix(end), end
    layer = ""
    if ".layers." in place:
        number, place = place.partition(".layers.")[2].split(".", 1)
        layer = f"blk.{number}."
    return f"{layer}{_NAMES[place]}{suffix}"


def _values(name: str, tensor: Any, config: Mapping[str, Any]) -> Any:
    """A tensor as llama.cpp wants it."""
    values = tensor.astype(np.float32)
    if "q_proj" in name or "k_proj" in name:
        heads = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
        return _permuted(values, config[heads])
    if name.endswith("A_log"):
        return -np.exp(values)
    return values.squeeze(1) if "conv1d.weight" in name else values


def _permuted(weight: Any, n_heads: int) -> Any:
    """llama.cpp turns pairs of neighbours where transformers turns halves."""
    rows, columns = weight.shape
    halves = weight.reshape(n_heads, 2, rows // n_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "general.file_type": 0,
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "llama.rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "llama.vocab_size": config["vocab_size"],
    }


def _mamba(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "general.file_type": 0,
        "mamba.context_length": 256,
        "mamba.embedding_length": config["hidden_size"],
        "mamba.block_count": config["num_hidden_layers"],
        "mamba.feed_forward_length": 0,
        "mamba.attention.head_count": 0,
        "mamba.attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
        "mamba.ssm.conv_kernel": config["conv_kernel"],
        "mamba.ssm.inner_size": config["intermediate_size"],
        "mamba.ssm.state_size": config["state_size"],
        "mamba.ssm.time_step_rank": config["time_step_rank"],
        "mamba.vocab_size": config["vocab_size"],
    }


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    settings = json.loads((folder / "tokenizer.json").read_text())
    facts = json.loads((folder / "tokenizer_config.json").read_text())
    model = settings["model"]
    ids = {**model["vocab"], **{t["content"]: t["id"] for t in settings["added_tokens"]}}
    tokens = sorted(ids, key=ids.__getitem__)
    added = {t["content"]: t["special"] for t in settings["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    spaced = model.get("byte_fallback", False)
    kinds = [_kind(token, added, spaced) for token in tokens]
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if spaced else "gpt2",
        "tokenizer.ggml.pre": "default" if spaced else "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.chat_template": facts.get("chat_template"),
    }
    if spaced:
        # SentencePiece joins the pair of the best score first: that of the first merge.
        rank = {merge.replace(" ", ""): -float(i) for i, merge in enumerate(merges)}
        entries["tokenizer.ggml.scores"] = [rank.get(token, -1e6) for token in tokens]
    else:
        entries["tokenizer.ggml.merges"] = merges
    return entries


def _kind(token: str, added: Mapping[str, bool], spaced: bool) -> int:
    if token in added:
        return int(gguf.TokenType.CONTROL if added[token] else gguf.TokenType.USER_DEFINED)
    if spaced and token == "<unk>":
        return int(gguf.TokenType.UNKNOWN)
    if spaced and token.startswith("<0x"):
        return int(gguf.TokenType.BYTE)
    return int(gguf.TokenType.NORMAL)

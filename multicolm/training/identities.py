"""What the models of an ensemble file are, without loading them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from multicolm.backend.identity import identity_of, identity_of_file
from multicolm.config import EnsembleConfig

__all__ = ["identities"]


def identities(config: EnsembleConfig) -> dict[str, str]:
    """Name -> identity, the base model first; empty where only loading would tell.

    Raises:
        ConfigError: if a model cannot be found.
    """
    found = {}
    for name in config.names:
        model = config.models[name]
        if model.backend == "transformers":
            found[name] = identity_of(model, None)
        elif model.backend == "table" and Path(model.location).is_file():
            digest = hashlib.sha256(Path(model.location).read_bytes()).hexdigest()[:16]
            found[name] = f"table:{digest}"
        elif model.backend == "llama-cpp":
            found[name] = identity_of_file("gguf", Path(model.location))
        else:
            found[name] = ""
    return found

"""The tokenizer of a model whose weights are elsewhere."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, GenerationConfig

from multicolm.backend.loading import load_tokenizer
from multicolm.config import ModelConfig
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer

__all__ = ["load"]


def load(name: str, config: ModelConfig) -> tuple[HuggingFaceTokenizer, int | None]:
    """The tokenizer, and the most tokens that the positions of the model reach.

    End-of-text tokens and the size of the vocabulary are those of the model's ``config.json`` and
    ``generation_config.json`` where these are.

    Raises:
        ModelError: if there is no tokenizer, or it cannot be read.
        VocabularyError: if its tokens cannot be turned into bytes.
    """
    tokenizer = load_tokenizer(name, config)
    ends: list[int] = []
    settings: list[Any] = []
    pinned = config.resolved_revision
    revision: Any = {} if pinned is None else {"revision": pinned}
    for kind in (AutoConfig, GenerationConfig):
        try:
            settings.append(kind.from_pretrained(config.location, **revision))
        except (OSError, ValueError):
            settings.append(None)  # a place that holds a tokenizer only
    for given in (getattr(part, "eos_token_id", None) for part in settings):
        ends += [given] if isinstance(given, int) else given or []
    text = settings[0].get_text_config(decoder=True) if settings[0] is not None else None
    length = getattr(text, "max_position_embeddings", None)
    adapter = HuggingFaceTokenizer(
        tokenizer, name, ends, n_embeddings=getattr(text, "vocab_size", None)
    )
    return adapter, length if isinstance(length, int) and length > 0 else None

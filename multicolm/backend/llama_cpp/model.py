"""A model in a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from multicolm.backend.base import Model, Session
from multicolm.backend.llama_cpp.context import Context
from multicolm.backend.llama_cpp.library import Weights, library
from multicolm.backend.llama_cpp.session import FIRST, LlamaCppSession, SplitSession
from multicolm.backend.llama_cpp.tokenizer import LlamaCppTokenizer, vocabulary_pieces
from multicolm.config import ModelConfig
from multicolm.errors import ModelError, VocabularyError
from multicolm.tokenizer.agreement import differences
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.types import Signal

__all__ = ["LlamaCppModel"]

# What the header of a GGUF file may hold of `generation_config.json`.
_SAMPLING = ("temp", "top_k", "top_p", "min_p", "penalty_repeat")
_BLANK = "\u2581"  # how SentencePiece writes a blank
_MOST_ROOM = 1 << 30  # bytes, for texts of which nothing has been read yet


class LlamaCppModel(Model):
    """A decoder-only model in a GGUF file, run by llama.cpp.

    It uses as many CPU threads as torch does at the time.

    Args:
        name: its name in the ensemble.
        config: what the ensemble file says of it; ``model`` is the file.

    Raises:
        ModelError: if the file cannot be loaded, or is no decoder-only model.
        VocabularyError: if its tokens cannot be used.
    """

    signals: ClassVar[frozenset[Signal]] = frozenset({"top1", "topk", "logprobs", "hidden"})

    def __init__(self, name: str, config: ModelConfig) -> None:
        lib = library()
        path = Path(config.location)
        if config.gpu_layers and not lib.llama_supports_gpu_offload():
            raise ModelError(
                f"model '{name}': gpu_layers is {config.gpu_layers}, and this llama-cpp-python was "
                "built for CPUs only; leave `gpu_layers` out, or install a build for your "
                "accelerator."
            )
        weights = Weights(name, path, gpu_layers=config.gpu_layers)
        self.name = name
        self._path = path
        self._named_tokenizer = config.tokenizer
        self._weights = weights
        self._cache_type = config.cache_type
        if lib.llama_model_has_encoder(weights.pointer):
            raise ModelError(
                f"model '{name}' ({path.name}) is an encoder or an encoder-decoder; multicolm "
                "serves decoder-only language models."
            )
        self.tokenizer = _tokenizer(name, config, weights)
        self.context_length = _context_length(name, config, weights)
        self.n_parameters = int(lib.llama_model_n_params(weights.pointer))
        self.hidden_size = int(lib.llama_model_n_embd_out(weights.pointer))
        self._bytes_per_token = _bytes_per_token(weights, config.cache_type)
        self.on_cpu = config.gpu_layers == 0
        kind = lib.llama_ftype_name(lib.llama_model_ftype(weights.pointer)).decode()
        self.precision = f"{kind}, cache {config.cache_type}"
        self.architecture = weights.metadata("general.architecture") or ""
        self.n_bytes = int(lib.llama_model_size(weights.pointer))
        named = ((key, weights.metadata(f"general.sampling.{key}")) for key in _SAMPLING)
        self.sampling_defaults = {key: value for key, value in named if value is not None}

    @classmethod
    def from_config(cls, name: str, config: ModelConfig) -> LlamaCppModel:
        """Load a GGUF file."""
        from multicolm.backend.identity import identity_of_file

        model = cls(name, config)
        model.identity = identity_of_file("gguf", Path(config.location))
        return model

    @property
    def warnings(self) -> list[str]:
        """Where the tokenizer that the ensemble file names cuts texts as the file's own does not.

        They are compared on texts on which tokenizers part, which takes a second or two.
        """
        if self._named_tokenizer is None:
            return []
        try:
            own = LlamaCppTokenizer(self.name, self._path, self._weights)
        except VocabularyError:
            return []  # there is nothing to compare with: that is why one is named
        found = differences(self.tokenizer, own)
        lead = f"tokenizer {self._named_tokenizer}, compared with that of {self._path.name}: it"
        return [f"{lead} {each}" for each in found]

    def open(self, n_rows: int) -> Session:
        """A session of ``n_rows`` empty rows.

        Raises:
            ModelError: if there is no memory for them.
        """
        size = int(library().llama_max_parallel_sequences())
        sizes = [min(size, n_rows - first) for first in range(0, n_rows, size)]
        # Rows of their own are faster, and take room for 256 tokens each, however short they are.
        shared = n_rows * FIRST * self._bytes_per_token > _MOST_ROOM
        parts = [LlamaCppSession(self._context, n, shared) for n in sizes]
        return parts[0] if len(parts) == 1 else SplitSession(parts, size)

    def _context(self, n_rows: int, n_places: int, shared: bool) -> Context:
        return Context(
            self.name,
            self._weights,
            n_rows,
            n_places,
            shared=shared,
            cache_type=self._cache_type,
            on_gpu=not self.on_cpu,
        )


def _tokenizer(name: str, config: ModelConfig, weights: Weights) -> TokenizerAdapter:
    """The file's own tokenizer, or the one that the ensemble file names, if it is the same."""
    path = Path(config.location)
    if config.tokenizer is None:
        return LlamaCppTokenizer(name, path, weights, config.chat_template_text)
    from multicolm.backend.loading import load_tokenizer
    from multicolm.tokenizer.huggingface import HuggingFaceTokenizer

    lib, pieces = library(), vocabulary_pieces(weights)
    ends = [i for i in range(len(pieces)) if lib.llama_vocab_is_eog(weights.vocabulary, i)]
    loaded = load_tokenizer(name, config)
    tokenizer = HuggingFaceTokenizer(loaded, name, ends, n_embeddings=len(pieces))
    for i in range(tokenizer.n_tokens):
        named, own = tokenizer.piece(i), pieces[i]
        # A token that the file says is not in use has a name elsewhere; added ones may be written
        # with blanks in the one and with U+2581 in the other.
        if named is None or own is None or named.replace(_BLANK, " ") == own.replace(_BLANK, " "):
            continue
        raise VocabularyError(
            f"model '{name}': {config.tokenizer} is not the tokenizer of {path.name}: token "
            f"{i} is {named!r} in the one and {own!r} in the other."
        )
    return tokenizer


def _bytes_per_token(weights: Weights, cache_type: str) -> int:
    """About how much is kept of each token that was read: its keys and values in every layer."""
    lib, model = library(), weights.pointer
    n_heads = max(1, int(lib.llama_model_n_head(model)))
    width = int(lib.llama_model_n_embd(model)) * int(lib.llama_model_n_head_kv(model)) // n_heads
    return 2 * int(lib.llama_model_n_layer(model)) * width * (4 if cache_type == "f32" else 2)


def _context_length(name: str, config: ModelConfig, weights: Weights) -> int:
    """The most tokens of a row: as the ensemble file says, or what the model was trained for."""
    trained = int(library().llama_model_n_ctx_train(weights.pointer))
    if config.context_length is None:
        return trained
    if config.context_length > trained:
        raise ModelError(
            f"model '{name}': context_length is {config.context_length}, and {config.model} was "
            f"trained for {trained} tokens; set {trained} or less."
        )
    return config.context_length

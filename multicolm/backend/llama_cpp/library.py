"""llama.cpp's C library: found, quiet, and its files of weights opened.

Nothing else of multicolm speaks to llama-cpp-python's loader. What the library writes to its log
goes to Python's logger of this module; its errors become part of the sentence that a user reads.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import weakref
from collections import deque
from functools import lru_cache
from pathlib import Path
from typing import Any

from multicolm.errors import ModelError

__all__ = ["Weights", "library", "recent_errors"]

_LOGGER = logging.getLogger(__name__)
# ggml.h: NONE 0, DEBUG 1, INFO 2, WARN 3, ERROR 4, CONT 5, the rest of the line before.
_ERROR, _CONTINUES = 4, 5
_errors: deque[str] = deque(maxlen=4)


@lru_cache(maxsize=1)
def library() -> Any:
    """The module ``llama_cpp``, initialised.

    Raises:
        ModelError: if it is not installed.
    """
    try:
        lib = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise ModelError(
            "backend 'llama-cpp' needs llama-cpp-python, which cannot be imported "
            f"({error}): pip install 'multicolm[llama-cpp]'."
        ) from error
    lib.llama_log_set(_log_callback(lib), ctypes.c_void_p(0))
    lib.llama_backend_init()
    return lib


@lru_cache(maxsize=1)
def _log_callback(lib: Any) -> Any:
    """Where the library's lines go; kept for ever, since C holds no reference to it."""
    last = 0

    def keep(level: int, text: bytes, _: object) -> None:
        nonlocal last
        goes_on, last = level == _CONTINUES, last if level == _CONTINUES else level
        line = text.decode("utf-8", "replace").strip()
        if not line:
            return
        if last == _ERROR:
            _errors.append(f"{_errors.pop()} {line}" if goes_on and _errors else line)
        else:
            _LOGGER.debug("%s", line)

    return lib.llama_log_callback(keep)


def recent_errors() -> str:
    """What the library complained about since the last call, on one line."""
    lines = "; ".join(_errors)
    _errors.clear()
    return lines or "llama.cpp gave no reason"


class Weights:
    """The weights of a GGUF file, or only its vocabulary.

    Attributes:
        pointer: llama.cpp's model.
        vocabulary: llama.cpp's vocabulary of it.

    Args:
        name: the model's name, for messages.
        path: the GGUF file; of a model in several files the first one.
        gpu_layers: how many layers go to an accelerator.
        vocabulary_only: leave the weights on the disk.
        space_prefix: whether the tokenizer puts a space in front of a text; ``None`` as the file
            says.

    Raises:
        ModelError: if the file cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        gpu_layers: int = 0,
        vocabulary_only: bool = False,
        space_prefix: bool | None = None,
    ) -> None:
        lib = library()
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        parameters.vocab_only = vocabulary_only
        parameters.use_extra_bufts = not _uses_amx(lib)
        overrides = _overrides(lib, space_prefix)
        parameters.kv_overrides = overrides
        recent_errors()
        self.pointer: Any = lib.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.pointer:
            raise ModelError(
                f"model '{name}': llama.cpp cannot load {path}: {recent_errors()}. Is it a whole "
                "GGUF file, of an architecture that this llama-cpp-python knows?"
            )
        weakref.finalize(self, lib.llama_model_free, self.pointer)
        self.vocabulary: Any = lib.llama_model_get_vocab(self.pointer)

    def metadata(self, key: str) -> str | None:
        """A value of the file's header as text; ``None`` if it has none of that key."""
        lib = library()
        buffer = ctypes.create_string_buffer(256)
        n = lib.llama_model_meta_val_str(self.pointer, key.encode(), buffer, len(buffer))
        return None if n < 0 else buffer.value.decode("utf-8", "replace")


def _uses_amx(lib: Any) -> bool:
    """Whether the library was built with AMX instructions (x86).

    GCC before 12.4 and 13.3 drops the tile configuration (GCC bug 114098), and such a build dies
    of a segmentation fault at the first pass of a quantised model (llama.cpp issue 20824). It
    cannot be told apart from a good one, so that weights are not laid out for AMX.
    """
    found = b"AMX_INT8 = 1" in lib.llama_print_system_info()
    if found:
        _LOGGER.info("llama.cpp was built with AMX, which is left unused: GCC bug 114098")
    return found


def _overrides(lib: Any, space_prefix: bool | None) -> Any:
    """What the library is to believe instead of the file; ended by an entry without a key."""
    if space_prefix is None:
        return None
    entries = (lib.llama_model_kv_override * 2)()
    entries[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL
    entries[0].key = b"tokenizer.ggml.add_space_prefix"
    entries[0].value.val_bool = space_prefix
    entries[1].key = b""
    return entries

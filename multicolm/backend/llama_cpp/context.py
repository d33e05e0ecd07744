"""One context of llama.cpp: the caches of some rows, and the passes that fill them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multicolm.backend.llama_cpp.library import Weights, library, recent_errors
from multicolm.errors import ModelError

__all__ = ["Context", "Entry"]

# Room is a multiple of this in llama.cpp.
_STEP = 256
# Tokens of one pass. More would be cut into pieces of 512 by llama.cpp itself.
_BATCH = 512


@dataclass(frozen=True, slots=True)
class Entry:
    """One token to read.

    Attributes:
        token: its id.
        place: how many tokens stand before it in its row.
        row: whose it is.
        looked: whether the prediction after it is wanted.
    """

    token: int
    place: int
    row: int
    looked: bool


class Context:
    """Caches of some rows, in one piece of memory of a fixed size.

    Attributes:
        n_places: how many tokens each row can hold, or all rows together if it is shared.

    Args:
        name: the model's name, for messages.
        weights: the model's.
        n_rows: number of rows.
        n_places: how many tokens there has to be room for, at least.
        shared: whether rows share the room. Short ones need less then, and a look costs more:
            llama.cpp goes through the others' tokens, too, to leave them out.
        cache_type: ``f16`` or ``f32``, the numbers that are kept of each token.
        on_gpu: whether some of the weights are on an accelerator.

    Raises:
        ModelError: if there is no memory for it.
    """

    def __init__(
        self,
        name: str,
        weights: Weights,
        n_rows: int,
        n_places: int,
        *,
        shared: bool,
        cache_type: str,
        on_gpu: bool,
    ) -> None:
        lib = library()
        self._name = name
        self._weights = weights  # which must live as long as this
        self._n_vocab = int(lib.llama_vocab_n_tokens(weights.vocabulary))
        self._width = int(lib.llama_model_n_embd_out(weights.pointer))
        self.n_places = -(-n_places // _STEP) * _STEP
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = self.n_places * (1 if shared else n_rows)
        parameters.kv_unified = shared
        parameters.n_seq_max = n_rows
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.type_k = parameters.type_v = (
            lib.GGML_TYPE_F32 if cache_type == "f32" else lib.GGML_TYPE_F16
        )
        parameters.pooling_type = lib.LLAMA_POOLING_TYPE_NONE
        # A full cache of sliding-window layers is what lets a row be cut back.
        parameters.swa_full = True
        parameters.offload_kqv = parameters.op_offload = on_gpu
        if not on_gpu:
            # On a CPU it adds up in half precision, and saves nothing but memory.
            parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        recent_errors()
        self._pointer: Any = lib.llama_init_from_model(weights.pointer, parameters)
        if not self._pointer:
            raise ModelError(
                f"model '{name}': llama.cpp has no room for {n_rows} texts of "
                f"{self.n_places} tokens{' together' if shared else ''} ({recent_errors()}); run "
                "fewer texts at a time (batch_size, batch_tokens), or set a smaller "
                "`context_length`."
            )
        weakref.finalize(self, _free, lib.llama_free, self._pointer, weights)
        self._memory: Any = lib.llama_get_memory(self._pointer)
        self._batch: Any = lib.llama_batch_init(_BATCH, 0, 1)
        weakref.finalize(self, lib.llama_batch_free, self._batch)
        self._n_batch = int(lib.llama_n_batch(self._pointer))
        self._shows_hidden = False

    def read(self, entries: Sequence[Entry], *, hidden: bool) -> tuple[Tensor, Tensor | None, int]:
        """Read tokens after what their rows hold, and predict what follows.

        Args:
            entries: tokens, ascending by row and within a row by place.
            hidden: whether hidden states are wanted too.

        Returns:
            Logits and hidden states after the tokens that are looked at (``[n, vocab]`` and
            ``[n, hidden]``), and how many passes that took.

        Raises:
            ModelError: if llama.cpp fails.
        """
        lib = library()
        if hidden != self._shows_hidden:
            lib.llama_set_embeddings(self._pointer, hidden)
            self._shows_hidden = hidden
        n_threads = torch.get_num_threads()
        lib.llama_set_n_threads(self._pointer, n_threads, n_threads)
        logits: list[Tensor] = []
        states: list[Tensor] = []
        parts = [
            entries[start : start + self._n_batch]
            for start in range(0, len(entries), self._n_batch)
        ]
        for part in parts:
            self._pass(part, hidden)
            looked = [i for i, entry in enumerate(part) if entry.looked]
            if not looked:
                continue
            # With hidden states, llama.cpp shows every position of the batch.
            shown = len(part) if hidden else len(looked)
            which = looked if hidden else slice(None)
            logits.append(_copy(lib.llama_get_logits(self._pointer), shown, self._n_vocab, which))
            if hidden:
                embedded = lib.llama_get_embeddings(self._pointer)
                states.append(_copy(embedded, shown, self._width, which))
        return torch.cat(logits), torch.cat(states) if hidden else None, len(parts)

    def _pass(self, entries: Sequence[Entry], hidden: bool) -> None:
        lib, batch = library(), self._batch
        batch.n_tokens = len(entries)
        for i, entry in enumerate(entries):
            batch.token[i] = entry.token
            batch.pos[i] = entry.place
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = entry.row
            batch.logits[i] = entry.looked or hidden
        code = lib.llama_decode(self._pointer, batch)
        if code != 0:
            raise ModelError(
                f"model '{self._name}': llama.cpp could not read {len(entries)} tokens (code "
                f"{code}: {recent_errors()})."
            )

    def cut(self, row: int, length: int) -> bool:
        """Forget what a row holds after its first ``length`` tokens.

        Returns:
            Whether it still holds these; a model with a recurrent state forgets the whole row.
        """
        lib = library()
        if lib.llama_memory_seq_rm(self._memory, row, length, -1):
            return True
        lib.llama_memory_seq_rm(self._memory, row, -1, -1)
        return False

    def copy_to(self, other: Context, row: int) -> None:
        """Let another context hold what a row of this one holds.

        Raises:
            ModelError: if llama.cpp fails.
        """
        lib = library()
        size = lib.llama_state_seq_get_size(self._pointer, row)
        state = (ctypes.c_uint8 * size)()
        n_read = lib.llama_state_seq_get_data(self._pointer, state, size, row)
        if not n_read or not lib.llama_state_seq_set_data(other._pointer, state, n_read, row):
            raise ModelError(
                f"model '{self._name}': llama.cpp could not move a text to a larger cache "
                f"({recent_errors()}); set a smaller `context_length`."
            )


def _free(free: Callable[[Any], None], pointer: Any, weights: Weights) -> None:
    """Give the memory back; whoever holds these arguments keeps the weights until then."""
    free(pointer)


def _copy(pointer: Any, n_lines: int, width: int, which: list[int] | slice) -> Tensor:
    """Some lines of a matrix that llama.cpp owns: [lines, width]."""
    matrix = np.ctypeslib.as_array(pointer, shape=(n_lines, width))
    copied: Tensor = torch.from_numpy(np.array(matrix[which], dtype=np.float32))
    return copied

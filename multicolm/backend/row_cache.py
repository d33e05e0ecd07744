"""A key-value cache for transformers whose rows have lengths of their own.

Each layer keeps zero-filled storage ``[rows, heads, slots + 1, width]``. Keys and values are
written at (row, position), so rows of one batch may have different lengths, and cutting a row
back is a change of one number: stale slots are masked and overwritten later. The last slot takes
the padding of ragged calls and is never read.

The model learns the place of everything from ``position_ids`` and an explicit additive mask;
nothing in transformers is patched. Sliding-window layers get the window in the mask and full
storage, so that a cut across the window is as cheap as any other.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["Plan", "RowCache", "additive_mask"]

_FIRST_SLOTS = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """Where one forward pass writes and reads.

    Attributes:
        rows: the rows that are fed, ascending.
        slots: per fed row and column, where its key goes; padding goes to the last slot.
        n_visible: how many slots are read.
        first_row: the first row, when the fed rows are consecutive and can be read as a view;
            ``None`` otherwise.
        first_slot: the first slot, when besides that all fed rows write the same slots and can be
            written as a view; ``None`` otherwise.
    """

    rows: Int[Tensor, "rows"]
    slots: Int[Tensor, "rows time"]
    n_visible: int
    first_row: int | None
    first_slot: int | None


class RowLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # their __init_subclass__
    """Keys and values of one attention layer."""

    is_sliding = False
    is_croppable = False
    is_compileable = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Weakly, so that the storage is free as soon as nobody holds the cache, and not when the
        # garbage collector comes round to a circle: it does not see how large that is.
        self._cache: RowCache = weakref.proxy(cache)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make storage of the right width, type and device for what the layer produces."""
        n_rows, slots = self._cache.n_rows, self._cache.n_slots
        # Zeros, never empty memory: a NaN in a masked slot would leak through 0 * NaN.
        self.keys = key_states.new_zeros(
            n_rows, key_states.shape[1], slots + 1, key_states.shape[3]
        )
        self.values = value_states.new_zeros(
            n_rows, value_states.shape[1], slots + 1, value_states.shape[3]
        )
        self.is_initialized = True

    def grow(self, n_rows: int, n_slots: int) -> None:
        """Make room for ``n_rows`` rows of ``n_slots`` tokens each."""
        if self.keys is None or self.values is None:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(n_rows, old.shape[1], n_slots + 1, old.shape[3])
            new[: old.shape[0], :, : old.shape[2] - 1] = old[:, :, :-1]
            setattr(self, name, new)

    def clear(self, row: int, n_slots: int) -> None:
        """Zero the first slots of one row."""
        if self.keys is not None and self.values is not None:
            self.keys[row, :, :n_slots].zero_()
            self.values[row, :, :n_slots].zero_()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values where the plan says; return what the fed rows may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        plan = self._cache.plan
        assert plan is not None, "a forward pass began without a plan"
        return (
            _write_and_read(self.keys, key_states, plan),
            _write_and_read(self.values, value_states, plan),
        )

    # Asked only where no mask is given: by one new token in rows of one length.
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of visible slots, and the offset of the first."""
        assert self._cache.plan is not None
        return self._cache.plan.n_visible, 0

    def get_seq_length(self) -> int:
        """How many tokens stand before those that are being fed; 0 where rows differ in that."""
        plan = self._cache.plan
        return 0 if plan is None else plan.first_slot or 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def _write_and_read(storage: Tensor, states: Tensor, plan: Plan) -> Tensor:
    n_rows, _, width, _ = states.shape
    if plan.first_row is not None and plan.first_slot is not None:
        block = storage.narrow(0, plan.first_row, n_rows)
        block.narrow(2, plan.first_slot, width).copy_(states)
        return block.narrow(2, 0, plan.n_visible)
    rows, slots = plan.rows, plan.slots
    if rows.device != storage.device:
        rows, slots = rows.to(storage.device), slots.to(storage.device)
    storage[rows[:, None], :, slots] = states.transpose(1, 2).to(storage.dtype)
    if plan.first_row is not None:
        return storage.narrow(0, plan.first_row, n_rows).narrow(2, 0, plan.n_visible)
    # index_select of the view: indexing by a tensor would copy several times slower.
    return storage.narrow(2, 0, plan.n_visible).index_select(0, rows)


class RowCache(Cache):
    """The cache that a model is called with; :attr:`plan` is set before each forward pass."""

    def __init__(self, n_layers: int, n_rows: int) -> None:
        self.n_rows = n_rows
        self.n_slots = _FIRST_SLOTS
        self.plan: Plan | None = None
        super().__init__(layers=[RowLayer(self) for _ in range(n_layers)])

    def reserve(self, n_slots: int) -> None:
        """Make room for ``n_slots`` tokens per row; grows by doubling."""
        if n_slots <= self.n_slots:
            return
        while self.n_slots < n_slots:
            self.n_slots *= 2
        self._grow()

    def add_rows(self, n_rows: int) -> None:
        """Append empty rows."""
        self.n_rows += n_rows
        self._grow()

    def _grow(self) -> None:
        for layer in self.layers:
            assert isinstance(layer, RowLayer)
            layer.grow(self.n_rows, self.n_slots)

    def clear(self, row: int, n_slots: int) -> None:
        """Forget what a row held, so that not even a NaN of an old text reaches a new one."""
        for layer in self.layers:
            assert isinstance(layer, RowLayer)
            layer.clear(row, n_slots)


def additive_mask(
    positions: Int[Tensor, "rows time"],
    real: Bool[Tensor, "rows time"] | None,
    n_visible: int,
    dtype: torch.dtype,
    window: int | None = None,
) -> Float[Tensor, "rows 1 time slots"]:
    """0 where a token may look, the lowest finite number where it may not.

    Additive and not boolean: models whose attention adds its mask take a boolean one for numbers
    and go wrong silently. Finite and not -inf: a padding column sees nothing at all, and its
    softmax must not become NaN.

    Args:
        positions: of the fed tokens within their rows.
        real: false for padding; ``None`` if there is none.
        n_visible: number of slots that are read.
        dtype: the model's own.
        window: how many tokens back a token sees, itself included; ``None`` for all.
    """
    slot = torch.arange(n_visible, device=positions.device)
    seen = slot <= positions[:, :, None]
    if real is not None:
        seen &= real.to(positions.device)[:, :, None]
    if window is not None:
        seen &= slot > positions[:, :, None] - window
    mask = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=positions.device)
    return mask.masked_fill_(seen, 0.0)[:, None]

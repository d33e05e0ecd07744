"""Three ways to follow several texts with one model of the transformers library.

RowSession       one cache for all rows, each at its own length; cutting a row is free
GrowingSession   one cache per row, which only grows; a row that was cut is read anew
UncachedSession  no cache: every feed reads the whole text
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from multicolm.backend.base import ModelOutput, Session, TokenSession
from multicolm.backend.row_cache import Plan, RowCache, additive_mask

__all__ = ["GrowingSession", "RowSession", "Runs", "UncachedSession", "width_groups"]


@runtime_checkable
class Runs(Protocol):
    """What a session asks of its model.

    Attributes:
        config: the text model's configuration.
    """

    config: Any

    @property
    def device(self) -> torch.device:
        """Where token ids go."""

    @property
    def dtype(self) -> torch.dtype:
        """The type the model computes in."""

    @property
    def cache_argument(self) -> str | None:
        """The name under which the model takes a cache, if it takes one."""

    def forward(
        self, input_ids: Tensor, n_keep: int, hidden: bool, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (and the head's inputs) of the last ``n_keep`` columns: [rows, n_keep, width].

        Only where rows of several models are fed, ``arguments`` has ``models``: whose each row is.
        """


class RowSession(Session):
    """Rows in one cache; see :mod:`multicolm.backend.row_cache`.

    Args:
        model: the model.
        n_rows: number of rows.
        by_layer_type: whether the model takes one mask per type of layer, where its configuration
            names them; otherwise it is given one mask.
    """

    def __init__(self, model: Runs, n_rows: int, *, by_layer_type: bool = True) -> None:
        self._model = model
        self._model_of = [model] * n_rows
        config = model.config
        self._cache = RowCache(config.num_hidden_layers, n_rows)
        self.lengths = [0] * n_rows
        self._n_filled = [0] * n_rows  # slots that ever held something, stale ones included
        layer_types = getattr(config, "layer_types", None) if by_layer_type else None
        self._layer_types = None if layer_types is None else sorted(set(layer_types))
        self._window = getattr(config, "sliding_window", None)

    def add_rows(self, model: Any, n_rows: int) -> None:
        """See :meth:`multicolm.backend.base.Session.add_rows`."""
        self._model_of += [model] * n_rows
        self.lengths += [0] * n_rows
        self._n_filled += [0] * n_rows
        with torch.inference_mode():
            self._cache.add_rows(n_rows)

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.feed`.

        Rows that need much padding beside each other are fed in separate passes.
        """
        with torch.inference_mode():
            groups = width_groups([len(new) for new in tokens])
            if len(groups) == 1:
                return self._pass(rows, tokens, n_last, hidden)
            logits: list[Tensor] = [torch.empty(0)] * len(rows)
            states: list[Tensor] = [torch.empty(0)] * len(rows)
            for group in groups:
                counts = [n_last[i] for i in group]
                output = self._pass(
                    [rows[i] for i in group], [tokens[i] for i in group], counts, hidden
                )
                for i, part in zip(group, torch.split(output.logits, counts), strict=True):
                    logits[i] = part
                if output.hidden is not None:
                    for i, part in zip(group, torch.split(output.hidden, counts), strict=True):
                        states[i] = part
            together = torch.cat(states) if hidden else None
            return ModelOutput(torch.cat(logits), together, n_passes=len(groups))

    def _pass(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        hidden: bool,
    ) -> ModelOutput:
        models = [self._model_of[row] for row in rows]
        model, device = models[0], models[0].device
        mixed = {} if all(each is model for each in models) else {"models": models}
        keep = max(n_last)
        starts = [self.lengths[row] for row in rows]
        ends = [start + len(new) for start, new in zip(starts, tokens, strict=True)]
        self._cache.reserve(max(ends))
        ids, position, real = _right_aligned(starts, tokens)
        uniform = real is None and len(set(starts)) == 1
        slots = position if real is None else torch.where(real, position, self._cache.n_slots)
        self._cache.plan = Plan(
            torch.tensor(list(rows), device=device),
            slots.to(device),
            max(ends),
            rows[0] if rows[-1] - rows[0] == len(rows) - 1 else None,
            starts[0] if uniform else None,
        )
        position = position.to(device)
        logits, states = model.forward(
            ids.to(device),
            keep,
            hidden,
            position_ids=position,
            attention_mask=self._mask(position, real, max(ends), uniform),
            **mixed,
            **_caching(model, self._cache),
        )
        for row, end in zip(rows, ends, strict=True):
            self.lengths[row] = end
            self._n_filled[row] = max(end, self._n_filled[row])
        if min(n_last) == keep:  # Logits are large: no copy where all of them are wanted.
            return ModelOutput(
                logits.flatten(0, 1), None if states is None else states.flatten(0, 1)
            )
        wanted = torch.arange(keep) >= keep - torch.tensor(list(n_last))[:, None]
        wanted = wanted.to(logits.device)
        return ModelOutput(logits[wanted], None if states is None else states[wanted])

    def _mask(
        self, position: Tensor, real: Tensor | None, n_visible: int, uniform: bool
    ) -> Tensor | dict[str, Tensor] | None:
        """What transformers would build itself if rows had one length.

        A dict for models whose layers differ (`create_masks_for_generate`), else one mask, with
        the window in it where the whole model slides. Nothing at all for one new token that sees
        everything before it.
        """
        in_window = self._window is None or n_visible <= self._window
        if uniform and position.shape[1] == 1 and in_window:
            return None
        dtype = self._model.dtype
        if self._layer_types is None:
            return additive_mask(position, real, n_visible, dtype, self._window)
        return {
            kind: additive_mask(
                position,
                real,
                n_visible,
                dtype,
                self._window if kind == "sliding_attention" else None,
            )
            for kind in self._layer_types
        }

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`; costs nothing."""
        self.lengths[row] = min(self.lengths[row], length)
        if length == 0 and self._n_filled[row]:
            with torch.inference_mode():
                self._cache.clear(row, self._n_filled[row])
            self._n_filled[row] = 0


class UncachedSession(TokenSession):
    """Every feed reads the whole text of the row."""

    def __init__(self, model: Runs, n_rows: int) -> None:
        super().__init__(n_rows)
        self._model = model

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.feed`. Rows are read one by one, unpadded."""
        outputs: list[ModelOutput] = []
        with torch.inference_mode():
            for row, new, count in zip(rows, tokens, n_last, strict=True):
                self._ids[row].extend(new)
                outputs.append(self._forward(row, count, hidden))
            return ModelOutput.joined(outputs)

    def _forward(self, row: int, count: int, hidden: bool) -> ModelOutput:
        return self._read(self._ids[row], count, hidden)

    def _read(self, ids: Sequence[int], count: int, hidden: bool, **arguments: Any) -> ModelOutput:
        arguments.setdefault("use_cache", False)
        device = self._model.device
        logits, states = self._model.forward(
            torch.tensor([list(ids)], device=device), count, hidden, **arguments
        )
        return ModelOutput(logits[0], None if states is None else states[0])


class GrowingSession(UncachedSession):
    """One DynamicCache per row. It only grows: a row that was cut is read anew from its start.

    Args:
        model: the model.
        n_rows: number of rows.
        one_by_one: feed one token per pass.
    """

    def __init__(self, model: Runs, n_rows: int, *, one_by_one: bool = False) -> None:
        super().__init__(model, n_rows)
        self._one_by_one = one_by_one
        self._caches: list[DynamicCache | None] = [None] * n_rows
        self._n_cached = [0] * n_rows

    def _forward(self, row: int, count: int, hidden: bool) -> ModelOutput:
        ids = self._ids[row]
        cache = self._caches[row]
        if cache is None:
            cache = self._caches[row] = DynamicCache(config=self._model.config)
            self._n_cached[row] = 0
        start = self._n_cached[row]
        step = 1 if self._one_by_one else len(ids) - start
        outputs: deque[ModelOutput] = deque(maxlen=count)
        places = range(start, len(ids), step)
        for place in places:
            part = ids[place : place + step]
            n_keep = min(count, len(part))
            outputs.append(self._read(part, n_keep, hidden, **_caching(self._model, cache)))
        self._n_cached[row] = len(ids)
        output = ModelOutput.joined(list(outputs))
        last = output.at(range(len(output) - count, len(output)))
        return replace(last, n_passes=len(places))

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`."""
        super().truncate(row, length)
        if self._n_cached[row] > length:
            self._caches[row], self._n_cached[row] = None, 0


def _caching(model: Runs, cache: Cache) -> dict[str, Any]:
    """The arguments with which a forward pass reads and writes ``cache``."""
    assert model.cache_argument is not None
    return {model.cache_argument: cache, "use_cache": True}


def _right_aligned(
    starts: Sequence[int], tokens: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids and positions of ragged rows, and which of them are no padding (``None``: all).

    Right-aligned, so that the last tokens of all rows share the last columns.
    """
    width = max(map(len, tokens))
    pads = [width - len(new) for new in tokens]
    if not any(pads):
        columns = range(width)
        position = torch.tensor([[start + column for column in columns] for start in starts])
        return torch.tensor([list(new) for new in tokens]), position, None
    ids = torch.tensor([[0] * pad + list(new) for pad, new in zip(pads, tokens, strict=True)])
    place = torch.arange(width) - torch.tensor(pads)[:, None]
    real = place >= 0
    return ids, torch.where(real, place + torch.tensor(list(starts))[:, None], 0), real


def width_groups(widths: Sequence[int], waste: float = 1.5) -> list[list[int]]:
    """Which rows to feed together: indices, each group in ascending order.

    One pass for all costs ``rows * widest`` places. Where that is more than ``waste`` times the
    real tokens (and by 64 places or more), rows are split by width.

    >>> width_groups([1, 1, 200])
    [[0, 1], [2]]
    """
    order = sorted(range(len(widths)), key=lambda i: widths[i])
    groups: list[list[int]] = [[]]
    for i in order:
        group = [*groups[-1], i]
        places, real = len(group) * widths[i], sum(widths[j] for j in group)
        if groups[-1] and places > waste * real and places - real >= 64:
            groups.append([i])
        else:
            groups[-1] = group
    return [sorted(group) for group in groups]

"""Decoder-only models of the transformers library, in process.

A model is served in one of four ways, the first that a probe with real forward passes finds right:

    rows        one cache for all rows, each at its own length; cutting a row is free
    growing     one DynamicCache per row, several tokens per pass; a cut row is read anew
    one by one  the same, fed one token at a time (recurrent states that take no block)
    uncached    every look reads the whole text: always right, and slow

The first needs full or sliding-window attention; recurrent and hybrid models fall to the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from multicolm.backend.base import Look, Model, Session
from multicolm.backend.row_cache import Plan, RowCache, additive_mask
from multicolm.errors import ModelError
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer

if TYPE_CHECKING:
    from multicolm.config import ModelConfig

__all__ = ["TransformersModel"]

_PROBE_TOLERANCE = 1e-3
# Half precision rounds by itself; a wrong mask or state is off by far more than this.
_PROBE_TOLERANCE_HALF = 5e-2


class TransformersModel(Model):
    """A causal language model of the transformers library.

    Args:
        name: its name in the ensemble.
        model: the loaded model; it is put into evaluation mode.
        tokenizer: its fast tokenizer.

    Raises:
        ModelError: if it is no decoder-only model.
        VocabularyError: if its tokens cannot be turned into bytes.
    """

    def __init__(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
            raise ModelError(
                f"model '{name}' is a {type(model).__name__}; multicolm serves decoder-only "
                "language models (those that AutoModelForCausalLM loads)."
            )
        self.name = name
        self.model = model.eval()
        self.config = config
        self.tokenizer = HuggingFaceTokenizer(tokenizer, name, _end_ids(model))
        self.context_length = getattr(config, "max_position_embeddings", None)
        self.n_parameters = model.num_parameters()
        self.device = model.get_input_embeddings().weight.device
        self.on_cpu = self.device.type == "cpu"
        self._parameters = frozenset(inspect.signature(model.forward).parameters)
        self._open: Callable[[int], Session] | None = None
        self.served_as = ""

    @classmethod
    def from_config(cls, name: str, config: ModelConfig) -> TransformersModel:
        """Load weights and tokenizer; see :mod:`multicolm.backend.loading`."""
        from multicolm.backend.loading import load_model, load_tokenizer

        tokenizer = load_tokenizer(name, config)
        return cls(name, load_model(name, config), tokenizer)

    def open(self, n_rows: int) -> Session:
        """A session of ``n_rows`` empty rows; the first call probes how to serve the model."""
        if self._open is None:
            self._open, self.served_as = self._probe()
        return self._open(n_rows)

    def _probe(self) -> tuple[Callable[[int], Session], str]:
        ways: list[tuple[str, Callable[[int], Session]]] = []
        if _rowable(self.model, self.config):
            ways.append(("rows", lambda n: RowSession(self, n)))
        if self.cache_argument is not None:
            ways.append(("growing", lambda n: GrowingSession(self, n)))
            ways.append(("one by one", lambda n: GrowingSession(self, n, one_by_one=True)))
        for name, way in ways:
            if _is_right(self, way):
                return way, name
        return (lambda n: UncachedSession(self, n)), "uncached"

    @property
    def cache_argument(self) -> str | None:
        """The name under which the model takes a cache, if it takes one."""
        names = ("past_key_values", "cache_params")
        return next((name for name in names if name in self._parameters), None)

    def wait(self) -> None:
        """Return when the device has done all that was asked of it."""
        if not self.on_cpu:
            torch.accelerator.synchronize(self.device)

    def forward(
        self, input_ids: Tensor, n_keep: int, hidden: bool, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (and the head's inputs) of the last ``n_keep`` columns: [rows, n_keep, width]."""
        if "logits_to_keep" in self._parameters:
            arguments["logits_to_keep"] = n_keep
        caught: list[Tensor] = []
        head = self.model.get_output_embeddings() if hidden else None
        # The input of the output layer is the hidden state after the final norm in every
        # architecture; `output_hidden_states` differs between them on whether the norm is in.
        hook = head and head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            logits = self.model(input_ids=input_ids, **arguments).logits
        finally:
            if hook:
                hook.remove()
        states = caught[0][:, -n_keep:] if caught else None
        return logits[:, -n_keep:], states


class RowSession(Session):
    """Rows in one cache; see :mod:`multicolm.backend.row_cache`."""

    def __init__(self, model: TransformersModel, n_rows: int) -> None:
        self._model = model
        config = model.config
        self._cache = RowCache(config.num_hidden_layers, n_rows)
        self.lengths = [0] * n_rows
        layer_types = getattr(config, "layer_types", None)
        self._layer_types = None if layer_types is None else sorted(set(layer_types))
        self._window = getattr(config, "sliding_window", None)

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> Look:
        """See :meth:`multicolm.backend.base.Session.feed`.

        Rows that need much padding beside each other are fed in separate passes.
        """
        with torch.inference_mode():
            groups = width_groups([len(new) for new in tokens])
            if len(groups) == 1:
                return self._pass(rows, tokens, n_last, hidden)
            looks: list[tuple[Tensor, Tensor | None] | None] = [None] * len(rows)
            for group in groups:
                look = self._pass(*([part[i] for i in group] for part in (rows, tokens, n_last)), hidden)
                counts = [n_last[i] for i in group]
                states = look.hidden.split(counts) if look.hidden is not None else [None] * len(group)
                for i, logits, state in zip(group, look.logits.split(counts), states, strict=True):
                    looks[i] = (logits, state)
            done = [look for look in looks if look is not None]
            return Look(
                torch.cat([logits for logits, _ in done]),
                torch.cat([state for _, state in done if state is not None]) if hidden else None,
                n_passes=len(groups),
            )

    def _pass(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        hidden: bool,
    ) -> Look:
        model, device = self._model, self._model.device
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
            past_key_values=self._cache,
            position_ids=position,
            attention_mask=self._mask(position, real, max(ends), uniform),
            use_cache=True,
        )
        for row, end in zip(rows, ends, strict=True):
            self.lengths[row] = end
        if keep == 1:
            return Look(logits[:, 0], None if states is None else states[:, 0])
        wanted = torch.arange(keep) >= keep - torch.tensor(list(n_last))[:, None]
        wanted = wanted.to(logits.device)
        return Look(logits[wanted], None if states is None else states[wanted])

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
        dtype = self._model.model.dtype
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


class UncachedSession(Session):
    """Every look reads the whole text of the row."""

    def __init__(self, model: TransformersModel, n_rows: int) -> None:
        self._model = model
        self._ids: list[list[int]] = [[] for _ in range(n_rows)]

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]  # derived, so it cannot go stale
        """Per row, how many tokens it holds."""
        return [len(ids) for ids in self._ids]

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> Look:
        """See :meth:`multicolm.backend.base.Session.feed`. Rows are read one by one, unpadded."""
        logits: list[Tensor] = []
        states: list[Tensor] = []
        with torch.inference_mode():
            for row, new, count in zip(rows, tokens, n_last, strict=True):
                self._ids[row].extend(new)
                row_logits, row_states = self._look(row, count, hidden)
                logits.append(row_logits)
                if row_states is not None:
                    states.append(row_states)
        return Look(torch.cat(logits), torch.cat(states) if hidden else None, n_passes=len(rows))

    def _look(self, row: int, count: int, hidden: bool) -> tuple[Tensor, Tensor | None]:
        return self._read(self._ids[row], count, hidden)

    def _read(
        self, ids: Sequence[int], count: int, hidden: bool, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        arguments.setdefault("use_cache", False)
        device = self._model.device
        logits, states = self._model.forward(
            torch.tensor([list(ids)], device=device), count, hidden, **arguments
        )
        return logits[0], None if states is None else states[0]

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`."""
        del self._ids[row][length:]


class GrowingSession(UncachedSession):
    """One DynamicCache per row. It only grows: a row that was cut is read anew from its start.

    Args:
        model: the model.
        n_rows: number of rows.
        one_by_one: feed one token per pass.
    """

    def __init__(self, model: TransformersModel, n_rows: int, *, one_by_one: bool = False) -> None:
        super().__init__(model, n_rows)
        self._one_by_one = one_by_one
        self._caches: list[DynamicCache | None] = [None] * n_rows
        self._n_cached = [0] * n_rows

    def _look(self, row: int, count: int, hidden: bool) -> tuple[Tensor, Tensor | None]:
        ids = self._ids[row]
        if self._caches[row] is None or self._n_cached[row] > len(ids) - count:
            # A truncate without new tokens never comes here: feed always brings one.
            self._caches[row], self._n_cached[row] = DynamicCache(config=self._model.config), 0
        start = self._n_cached[row]
        step = 1 if self._one_by_one else len(ids) - start
        logits: list[Tensor] = []
        states: list[Tensor] = []
        for place in range(start, len(ids), step):
            part = ids[place : place + step]
            row_logits, row_states = self._read(
                part, min(count, len(part)), hidden, **self._cache_arguments(row)
            )
            logits.append(row_logits)
            if row_states is not None:
                states.append(row_states)
        self._n_cached[row] = len(ids)
        return torch.cat(logits)[-count:], torch.cat(states)[-count:] if hidden else None

    def _cache_arguments(self, row: int) -> dict[str, Any]:
        assert self._model.cache_argument is not None
        return {self._model.cache_argument: self._caches[row], "use_cache": True}

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`."""
        super().truncate(row, length)
        if self._n_cached[row] > length:
            self._caches[row], self._n_cached[row] = None, 0


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


def _end_ids(model: PreTrainedModel) -> list[int]:
    ids: list[int] = []
    for config in (model.generation_config, model.config):
        given = getattr(config, "eos_token_id", None)
        if given is not None:
            ids.extend([given] if isinstance(given, int) else given)
    return ids


def _rowable(model: PreTrainedModel, config: Any) -> bool:
    """Whether the architecture is of a kind that the row cache can hold; the probe still decides."""
    if getattr(model, "_is_stateful", False):
        return False
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    layer_types = set(getattr(config, "layer_types", None) or ())
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and layer_types <= {
        "full_attention",
        "sliding_attention",
    }


def _is_right(model: TransformersModel, way: Callable[[int], Session]) -> bool:
    """Feed three short rows raggedly, with two cuts, and compare with passes over the whole text."""
    vocab = model.config.vocab_size
    texts = [[(7 * i + 3 * row + 1) % vocab for i in range(12)] for row in range(3)]
    half = model.model.dtype in (torch.float16, torch.bfloat16)
    tolerance = _PROBE_TOLERANCE_HALF if half else _PROBE_TOLERANCE
    try:
        session = way(3)
        session.feed([0, 1, 2], [texts[0][:5], texts[1][:3], [0, 0, 0, 0]], [1, 1, 1])
        session.truncate(0, 2)
        session.truncate(2, 0)
        session.feed([0, 2], [texts[0][2:4], texts[2][:6]], [1, 1])
        got = session.feed([0, 1, 2], [texts[0][4:], texts[1][3:11], texts[2][6:7]], [2, 1, 1]).logits
        plain = UncachedSession(model, 3)
        lengths = [12, 11, 7]
        whole = [texts[row][: lengths[row]] for row in range(3)]
        want = plain.feed([0, 1, 2], whole, [2, 1, 1]).logits
    # What a model raises on a cache or mask it was not made for is not ours to enumerate; it means
    # "not this way", and the last way, without a cache, is never probed.
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError,
            NotImplementedError, AssertionError):
        return False
    error = (got.float() - want.float()).abs().max() / want.float().abs().max().clamp_min(1e-6)
    return bool(error <= tolerance)

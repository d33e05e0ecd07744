"""Sessions: whatever is fed and cut, a look equals a plain forward pass of the network alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import OTHERS, ROWS, model, network, shared_tokenizer

from multicolm.backend.base import ModelOutput, Session
from multicolm.backend.row_cache import additive_mask
from multicolm.backend.sessions import GrowingSession, RowSession, UncachedSession, width_groups
from multicolm.backend.transformers import TransformersModel, is_right
from multicolm.testing import check_model

VOCAB = len(shared_tokenizer())
TOLERANCE = 1e-4


def plain(kind: str, ids: Sequence[int]) -> torch.Tensor:
    """Logits of every position by one forward pass of the network alone."""
    with torch.inference_mode():
        return network(kind)(torch.tensor([list(ids)]), use_cache=False).logits[0]


class RandomFeeder:
    """Feeds a session at random and compares every output with a plain forward pass."""

    def __init__(self, kind: str, session: Session, n_rows: int, seed: int) -> None:
        self.kind, self.session = kind, session
        self.texts: list[list[int]] = [[] for _ in range(n_rows)]
        self._generator = torch.Generator().manual_seed(seed)

    def number(self, low: int, high: int) -> int:
        """At least ``low``, less than ``high``."""
        return int(torch.randint(low, high, (1,), generator=self._generator))

    def tokens(self, n: int) -> list[int]:
        return torch.randint(0, VOCAB, (n,), generator=self._generator).tolist()

    def cut(self, row: int) -> None:
        length = self.number(0, len(self.texts[row]) + 1)
        self.session.truncate(row, length)
        del self.texts[row][length:]
        assert self.session.lengths[row] == length

    def feed(self, rows: Sequence[int], widths: Sequence[int]) -> ModelOutput:
        new = [self.tokens(width) for width in widths]
        n_last = [self.number(1, width + 1) for width in widths]
        for row, tokens in zip(rows, new, strict=True):
            self.texts[row].extend(tokens)
        output = self.session.feed(rows, new, n_last, hidden=True)
        want = torch.cat(
            [
                plain(self.kind, self.texts[row])[-count:]
                for row, count in zip(rows, n_last, strict=True)
            ]
        )
        assert output.logits.shape == want.shape
        assert torch.allclose(output.logits, want, atol=TOLERANCE, rtol=1e-4)
        assert output.hidden is not None and len(output.hidden) == len(want)
        assert list(self.session.lengths) == list(map(len, self.texts))
        return output

    def step(self) -> None:
        n_rows = len(self.texts)
        for row in range(n_rows):
            if self.number(0, 3) == 0:
                self.cut(row)
        rows = [row for row in range(n_rows) if self.number(0, 2)] or [self.number(0, n_rows)]
        widest = (2, 2, 5, 30)[self.number(0, 4)]
        self.feed(rows, [self.number(1, widest) for _ in rows])


WAYS: dict[str, tuple[str, Callable[[TransformersModel, int], Session]]] = {
    **{f"rows-{kind}": (kind, RowSession) for kind in ROWS},
    "growing-llama": ("llama", GrowingSession),
    "growing-mistral": ("mistral", GrowingSession),
    "growing-lfm2": ("lfm2", GrowingSession),
    "growing-bloom": ("bloom", GrowingSession),
    "one-by-one-llama": ("llama", partial(GrowingSession, one_by_one=True)),
    "one-by-one-mamba": ("mamba", partial(GrowingSession, one_by_one=True)),
    "uncached-gemma3": ("gemma3", UncachedSession),
    "uncached-rwkv": ("rwkv", UncachedSession),
}


@pytest.mark.parametrize("n_rows", [1, 5])
@pytest.mark.parametrize("way", WAYS)
def test_looks_equal_a_plain_forward_pass_whatever_was_fed_and_cut(way: str, n_rows: int) -> None:
    kind, session = WAYS[way]
    feeder = RandomFeeder(kind, session(model(kind), n_rows), n_rows, seed=n_rows)
    for _ in range(10):
        feeder.step()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), n_rows=st.integers(1, 4))
def test_row_sessions_follow_any_interleaving(seed: int, n_rows: int) -> None:
    feeder = RandomFeeder("gemma3", RowSession(model("gemma3"), n_rows), n_rows, seed)
    for _ in range(6):
        feeder.step()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_the_cache_grows_past_several_doublings(kind: str) -> None:
    feeder = RandomFeeder(kind, RowSession(model(kind), 3), 3, seed=0)
    feeder.feed([0, 1, 2], [100, 3, 5])
    feeder.feed([0, 2], [1, 1])
    feeder.feed([0], [60])  # past 128 slots
    feeder.feed([0, 1, 2], [1, 1, 1])
    feeder.feed([1], [200])  # row 1 overtakes
    feeder.feed([0, 1], [90, 2])
    feeder.cut(0)
    feeder.feed([0, 1, 2], [3, 1, 2])


def test_several_doublings_at_once_keep_what_was_there() -> None:
    feeder = RandomFeeder("llama", RowSession(model("llama"), 2), 2, seed=0)
    feeder.feed([0, 1], [5, 5])
    with torch.inference_mode():
        feeder.session._cache.reserve(1000)  # type: ignore[attr-defined]
    feeder.feed([0, 1], [2, 1])


def test_rows_of_one_length_take_the_short_way_and_equal_a_plain_forward_pass() -> None:
    for kind in ("llama", "mistral", "gemma3", "gpt2"):
        feeder = RandomFeeder(kind, RowSession(model(kind), 4), 4, seed=2)
        feeder.feed([0, 1, 2, 3], [4, 4, 4, 4])
        for rows in ([0, 1, 2, 3], [0, 1, 2, 3], [1, 2], [1, 2], [0, 3], [0, 3], [3]):
            feeder.feed(rows, [1] * len(rows))  # both within the window and past it
        for _ in range(5):
            feeder.feed([0, 1, 2], [1, 1, 1])


def test_a_wide_row_is_fed_in_a_pass_of_its_own() -> None:
    feeder = RandomFeeder("llama", RowSession(model("llama"), 4), 4, seed=0)
    assert feeder.feed([0, 1, 2, 3], [1, 90, 2, 80]).n_passes == 2
    assert feeder.feed([0, 1, 3], [3, 1, 2]).n_passes == 1


def test_a_growing_session_counts_its_passes() -> None:
    session = GrowingSession(model("llama"), 2)
    assert session.feed([0, 1], [[1, 2, 3], [4]], [1, 1]).n_passes == 2
    one_by_one = GrowingSession(model("llama"), 2, one_by_one=True)
    assert one_by_one.feed([0, 1], [[1, 2, 3], [4]], [2, 1]).n_passes == 4


@pytest.mark.parametrize("kind", [*ROWS, *OTHERS])
def test_hidden_states_are_what_enters_the_output_layer(kind: str) -> None:
    head = network(kind).get_output_embeddings()
    entered: list[torch.Tensor] = []
    ids = [[5, 6, 7, 8], [9, 10]]
    session = model(kind).open(2)
    output = session.feed([0, 1], ids, [3, 1], hidden=True)
    hook = head.register_forward_pre_hook(lambda _, given: entered.append(given[0][0]))
    for text in ids:
        plain(kind, text)
    hook.remove()
    want = torch.cat([entered[0][-3:], entered[1][-1:]])
    assert output.hidden is not None
    assert torch.allclose(output.hidden, want, atol=TOLERANCE)
    assert not head._forward_pre_hooks, "a hook was left behind"
    assert session.feed([0], [[1]], [1]).hidden is None


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt2", "mamba", "bloom"])
def test_models_keep_the_public_laws(kind: str) -> None:
    check_model(model(kind))


def broken(kind: str, token: int) -> TransformersModel:
    """A model that one token drives to NaN."""
    sick = copy.deepcopy(network(kind))
    with torch.no_grad():
        sick.get_input_embeddings().weight[token] = float("nan")
    return TransformersModel("sick", sick, shared_tokenizer())


def test_not_a_number_stays_in_its_row_and_ends_with_its_text() -> None:
    session = RowSession(broken("llama", 7), 3)
    fine = list(range(20, 32))
    output = session.feed([0, 1, 2], [[1, 7, 2], fine, [3, 4]], [1, 1, 1])
    assert bool(output.logits[0].isnan().all())
    assert torch.allclose(output.logits[1], plain("llama", fine)[-1], atol=TOLERANCE)
    assert torch.allclose(output.logits[2], plain("llama", [3, 4])[-1], atol=TOLERANCE)
    session.truncate(0, 0)  # a new text in the slot, while a longer row shows the old places
    output = session.feed([0, 1], [[5], [33]], [1, 1])
    assert torch.allclose(output.logits[0], plain("llama", [5])[-1], atol=TOLERANCE)
    assert torch.allclose(output.logits[1], plain("llama", [*fine, 33])[-1], atol=TOLERANCE)


def test_padding_columns_hold_no_nan() -> None:
    mask = additive_mask(
        torch.tensor([[0, 3]]), torch.tensor([[False, True]]), 5, torch.bfloat16, window=2
    )
    assert mask.shape == (1, 1, 2, 5) and mask.dtype == torch.bfloat16
    assert bool(mask.isfinite().all()) and bool(mask.softmax(-1).isfinite().all())
    assert (mask[0, 0] == 0).tolist() == [[False] * 5, [False, False, True, True, False]]


# --- the probe -----------------------------------------------------------------------------------


class IgnoresTruncate(RowSession):
    def truncate(self, row: int, length: int) -> None:
        pass


class ForgetsTheWindow(RowSession):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._window = None


class AlwaysWithoutMask(RowSession):
    def _mask(self, *args: Any) -> None:
        return None


class MixesRowsUp(RowSession):
    def feed(self, *args: Any, **kwargs: Any) -> ModelOutput:
        output = super().feed(*args, **kwargs)
        return ModelOutput(output.logits.flip(0))


class SlipsWhereRowsAreEven(RowSession):
    """Wrong only where every row has the same length and one new token."""

    def _mask(self, position: Any, real: Any, n_visible: int, uniform: bool) -> Any:
        mask = super()._mask(position, real, n_visible, uniform)
        if uniform and position.shape[1] == 1:
            return torch.full((len(position), 1, 1, n_visible), -1e9).index_fill_(
                3, torch.tensor([0]), 0.0
            )
        return mask


class KeepsStaleStates(GrowingSession):
    def truncate(self, row: int, length: int) -> None:
        UncachedSession.truncate(self, row, length)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("llama", IgnoresTruncate),
        ("mistral", ForgetsTheWindow),
        ("gemma3", ForgetsTheWindow),
        ("llama", AlwaysWithoutMask),
        ("llama", MixesRowsUp),
        ("llama", SlipsWhereRowsAreEven),
        ("lfm2", KeepsStaleStates),
        ("mamba", RowSession),
        ("lfm2", RowSession),
        ("bloom", RowSession),
        ("rwkv", RowSession),
        ("falcon-h1", RowSession),
    ],
)
def test_the_probe_rejects_a_wrong_way(kind: str, wrong: type[Session]) -> None:
    assert not is_right(model(kind), partial(wrong, model(kind)))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("way", [RowSession, GrowingSession, UncachedSession])
def test_the_probe_accepts_every_right_way(kind: str, way: type[Session]) -> None:
    assert is_right(model(kind), partial(way, model(kind)))


def test_a_window_that_goes_by_the_length_of_the_cache_is_never_served_in_rows() -> None:
    """The probe's texts are shorter than such windows, so it is the architecture that tells."""
    base = model("gpt-neo")
    base.open(1)
    assert base.served_as == "growing"
    feeder = RandomFeeder("gpt-neo", base.open(2), 2, seed=0)
    feeder.feed([0, 1], [40, 5])
    feeder.feed([0, 1], [1, 25])


def test_a_model_is_probed_once() -> None:
    base = model("llama")
    assert base.served_as == ""
    first = base.open(2)
    assert base.served_as == "rows"
    assert isinstance(first, RowSession) and isinstance(base.open(1), RowSession)


# --- which rows are fed together -----------------------------------------------------------------

WIDTHS = st.lists(st.integers(1, 400), min_size=1, max_size=20)


@given(WIDTHS)
def test_every_row_is_in_one_group_and_groups_are_in_order(widths: list[int]) -> None:
    groups = width_groups(widths)
    assert sorted(i for group in groups for i in group) == list(range(len(widths)))
    for group in groups:
        assert group == sorted(group)
    for narrow, wide in itertools.pairwise(groups):
        assert max(widths[i] for i in narrow) <= min(widths[i] for i in wide)


@given(WIDTHS, st.floats(1.1, 3))
def test_a_group_wastes_little(widths: list[int], waste: float) -> None:
    for group in width_groups(widths, waste):
        real = sum(widths[i] for i in group)
        places = len(group) * max(widths[i] for i in group)
        assert places <= waste * real or places - real < 64


@given(st.integers(1, 300), st.integers(1, 20))
def test_rows_of_one_width_are_one_group(width: int, n_rows: int) -> None:
    assert width_groups([width] * n_rows) == [list(range(n_rows))]

"""How many threads torch uses while text is written, and afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from multicolm import Ensemble, SelectPolicy, Views
from multicolm.backend.table import TableModel
from multicolm.decoding.threads import SMALL_MODEL, torch_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def model(n_parameters: int = 10, *, on_cpu: bool = True) -> TableModel:
    table = TableModel(
        f"m{n_parameters}{on_cpu}", ["a", "."], {"": {"a": 0.9, ".": 0.1}}, ends=["."]
    )
    table.n_parameters, table.on_cpu = n_parameters, on_cpu
    return table


def test_small_models_on_the_cpu_get_one_thread_and_others_torchs_own() -> None:
    large, elsewhere = model(SMALL_MODEL + 1), model(5, on_cpu=False)
    for models, wanted in (
        ([model()], 1),
        ([model(), large], 2),
        ([elsewhere], 2),
        ([model(SMALL_MODEL)], 1),
    ):
        with torch_threads(models, None):
            assert torch.get_num_threads() == wanted
        assert torch.get_num_threads() == 2


def test_the_number_that_is_asked_for_counts() -> None:
    for threads in (1, 2, 3):
        with torch_threads([model(SMALL_MODEL + 1)], threads):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 2


def test_the_count_is_restored_after_an_exception() -> None:
    with pytest.raises(KeyError), torch_threads([model()], None):
        raise KeyError
    assert torch.get_num_threads() == 2


class Failing(SelectPolicy):
    """Fails at the second position that it is asked about."""

    seen: list[int] = []  # noqa: RUF012  # shared on purpose
    base_signals = frozenset({"top1"})

    def select(self, views: Views) -> torch.Tensor:
        self.seen.extend([torch.get_num_threads()] * views.n_positions)
        if len(self.seen) >= 2:
            raise ZeroDivisionError
        return torch.zeros(views.n_positions, dtype=torch.long)


def test_a_run_that_fails_restores_the_count() -> None:
    Failing.seen.clear()
    with pytest.raises(ZeroDivisionError):
        Ensemble([model()]).generate("a", Failing(), max_new_tokens=9)
    assert set(Failing.seen) == {1}
    assert torch.get_num_threads() == 2


def test_a_stream_that_is_broken_off_and_dropped_restores_the_count() -> None:
    stream = Ensemble([model()]).stream("a", max_new_tokens=9)
    next(stream)
    assert torch.get_num_threads() == 1
    del stream
    assert torch.get_num_threads() == 2

"""Reading block by block, from memory or from disk, is reading the table; memory stays flat."""

from __future__ import annotations

import sys

import pytest
import torch
from learning_worlds import hidden, peaks, world, write_table
from safetensors.torch import save

from multicolm.learning import positions as module
from multicolm.learning.losses import usable
from multicolm.learning.positions import divide
from multicolm.learning.problem import standardise
from multicolm.learning.router import fit_marginal
from multicolm.learning.training import Training
from multicolm.scoring.store import StoredTable

ADAMW = {"epochs": 3, "weak_epochs": 1, "batch_size": 32, "network": "mlp", "width": 8}


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """So that small tables have many blocks."""
    monkeypatch.setattr(module, "_BLOCK", 16)


FEW = {"epochs": 4, "weak_epochs": 2, "l2": 0.01}


@pytest.mark.parametrize("options", [FEW, {**ADAMW, "dropout": 0.2}], ids=["lbfgs", "adamw"])
def test_training_from_disk_gives_the_same_bytes_as_from_memory(
    tmp_path, small_blocks, options
) -> None:
    table = world(n=400)
    stored = StoredTable(write_table(tmp_path, [table]))
    reports = []
    results = []
    for each in (table, stored):
        training = Training(options)
        results.append(save(fit_marginal(each, hidden, training)))
        reports.append(training.report)
    assert results[0] == results[1] and reports[0] == reports[1]


def test_a_table_that_is_not_kept_in_memory_gives_the_same_bytes(monkeypatch, small_blocks) -> None:
    from multicolm.learning import problem

    kept = save(fit_marginal(world(), hidden, Training(FEW)))
    monkeypatch.setattr(problem, "_SMALL", 0)
    assert save(fit_marginal(world(), hidden, Training(FEW))) == kept


def test_several_shards_are_the_same_table_to_a_linear_head(tmp_path) -> None:
    table = world(n=400)
    shards = [table.rows(slice(0, 120)), table.rows(slice(120, 300)), table.rows(slice(300, 400))]
    stored = StoredTable(write_table(tmp_path, shards))
    reports = []
    for each in (table, stored):
        training = Training({"l2": 0.01})
        fit_marginal(each, hidden, training)
        reports.append(training.report)
    assert reports[0]["nll_nats"] == pytest.approx(reports[1]["nll_nats"], abs=1e-3)
    assert reports[0]["positions"] == reports[1]["positions"]


@pytest.mark.parametrize("held_out", [0.0, 0.1, 0.5])
def test_a_table_is_parted_as_it_is_in_memory(small_blocks, held_out) -> None:
    table = world(n=300)
    table.known[5:9, 1:] = False
    parts = divide(table, usable, held_out)
    expected = table.rows(usable(table)).split(held_out, 0)
    for part, whole in zip((parts.learnt, parts.judged), expected, strict=True):
        assert len(part) == len(whole)
        if len(whole):
            found = part.scores_only()
            assert torch.equal(found.example, whole.example)
            assert torch.equal(found.place, whole.place) and not found.base


def test_a_shuffle_holds_every_position_once_and_can_be_entered_anywhere(small_blocks) -> None:
    learnt = divide(world(n=301), usable, 0.2).learnt
    tables = list(learnt.shuffled(7))
    assert len(tables) == learnt.n_shuffles > 3
    places = [torch.stack([t.example[o], t.place[o]], 1) for t, o in tables]
    seen = sorted(map(tuple, torch.cat(places).tolist()))
    whole = learnt.scores_only()
    assert seen == sorted(zip(whole.example.tolist(), whole.place.tolist(), strict=True))
    for first in (1, 3):
        rest = [torch.stack([t.example[o], t.place[o]], 1) for t, o in learnt.shuffled(7, first)]
        assert all(torch.equal(a, b) for a, b in zip(rest, places[first:], strict=True))
    other = [t.example[o] for t, o in learnt.shuffled(8)]
    assert not torch.equal(other[0][:10], tables[0][0].example[tables[0][1]][:10])


def test_features_are_standardised_as_over_the_whole_table(small_blocks) -> None:
    table = world(n=300)
    table.base["hidden"][:, 1] = 1e4 + table.base["hidden"][:, 1] * 1e-2
    table.base["hidden"][:, 2] = -3.0
    learnt = divide(table, usable, 0.0).learnt
    centre, scale = standardise(learnt, hidden)
    whole = table.base["hidden"].double()
    torch.testing.assert_close(centre.double(), whole.mean(0), rtol=1e-6, atol=1e-6)
    expected = whole.std(0, unbiased=False)
    expected[1] = expected[2] = 1.0  # hardly changes beside its size, or not at all
    torch.testing.assert_close(scale.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize("options", [{"l2": 0.1}, {"lr": 1e-3, "l2": 0.0}], ids=["lbfgs", "adamw"])
def test_ten_times_the_tokens_take_no_more_memory(tmp_path, options) -> None:
    """Whoever holds the larger table once takes 37 MB more, in float32 74."""
    options |= {"epochs": 1, "weak_epochs": 0, "held_out": 0.02}
    small, large = peaks(tmp_path, (1, 10), options)
    assert large < 1.2 * small and large - small < 20e6

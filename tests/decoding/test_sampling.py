"""How tokens are drawn, and where the randomness comes from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from multicolm import Ensemble
from multicolm.backend.table import TableModel
from multicolm.decoding.sampling import Noise, Sampling, row_key

INF = float("inf")


def by_hand(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """Probabilities by sorting, one token at a time."""
    scaled = np.array(logits, dtype=np.float64) / temperature
    order = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))
    kept = [i for i in order if top_k is None or scaled[i] >= scaled[order[:top_k][-1]]]
    weights = np.exp(scaled - scaled.max())
    probs = np.zeros(len(logits))
    probs[kept] = weights[kept] / weights[kept].sum()
    if top_p is not None and top_p < 1:
        total, nucleus = 0.0, []
        for i in kept:
            if total >= top_p:
                break
            nucleus.append(i)
            total += probs[i]
        cut = np.zeros(len(logits))
        cut[nucleus] = probs[nucleus] / probs[nucleus].sum()
        probs = cut
    return probs


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=9),
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.one_of(st.none(), st.integers(1, 10)),
    top_p=st.one_of(st.none(), st.sampled_from([0.013, 0.217, 0.509, 0.893, 1.0])),
)
def test_probabilities_are_those_of_temperature_then_top_k_then_top_p(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    probs = Sampling(temperature, top_k, top_p).probs(torch.tensor([logits]))
    want = by_hand(logits, temperature, top_k, top_p)
    assert np.allclose(probs[0].numpy(), want, atol=1e-5)


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=9))
def test_the_most_likely_token_is_always_kept(logits: list[float]) -> None:
    best = int(torch.tensor(logits).argmax())
    for sampling in (Sampling(1.0, 1), Sampling(1.0, None, 1e-6), Sampling(0.1, 2, 0.01)):
        assert float(sampling.probs(torch.tensor([logits]))[0, best]) > 0


def test_settings_that_cut_nothing_change_nothing() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    for sampling in (Sampling(1.0, 7), Sampling(1.0, 100), Sampling(1.0, None, 1.0)):
        assert torch.allclose(sampling.probs(logits), logits.softmax(-1))


def test_greedy_takes_the_lowest_id_of_equal_ones() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    assert Sampling().draw(logits, None).tolist() == [1, 0]
    assert Sampling().probs(logits).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    table = {"": {"a": 0.4, "b": 0.4, ".": 0.2}}
    models = [TableModel(name, ["a", "b", "."], table, ends=["."]) for name in ("base", "left")]
    ensemble = Ensemble(models)
    for policy in ("single", "average", "random", "speculative", "max-confidence", "cosd-rule"):
        assert ensemble.generate("b", policy, max_new_tokens=4, seed=0)[0].text == "aaaa", policy


def test_tokens_that_cannot_come_never_do() -> None:
    logits = torch.tensor([[-INF, 0.0, -INF, -1.0]]).repeat(500, 1)
    gumbel = Noise().gumbel(list(range(500)), [0] * 500, 4)
    for sampling in (Sampling(1.0), Sampling(5.0, 3), Sampling(1.0, None, 0.99), Sampling(0.01)):
        assert set(sampling.draw(logits, gumbel).tolist()) <= {1, 3}
        assert bool(sampling.probs(logits).isfinite().all())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-44])
def test_a_tiny_temperature_is_greedy_in_effect(temperature: float) -> None:
    logits = torch.tensor([[1.0, 5.0, 30.0, 29.0], [-5.0, -60.0, -4.0, -7.0]])
    gumbel = Noise().gumbel([1, 2], [0, 0], 4)
    assert Sampling(temperature).draw(logits, gumbel).tolist() == [2, 2]
    assert Sampling(temperature).probs(logits).argmax(-1).tolist() == [2, 2]
    assert Sampling(temperature, 2, 0.9).draw(logits, gumbel).tolist() == [2, 2]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, -3.0]])
    n = 6000
    gumbel = Noise().gumbel(list(range(n)), [3] * n, 5)
    for sampling in (Sampling(1.0), Sampling(0.7, 3), Sampling(1.5, None, 0.9)):
        drawn = sampling.draw(logits.repeat(n, 1), gumbel)
        counts = torch.bincount(drawn, minlength=5).double().numpy()
        probs = sampling.probs(logits)[0].double().numpy()
        possible = probs > 0
        assert counts[~possible].sum() == 0
        chance = stats.chisquare(counts[possible], n * probs[possible] / probs.sum()).pvalue
        assert chance > 1e-4


# --- noise ---------------------------------------------------------------------------------------

KEYS = st.integers(0, 2**64 - 1)


@given(key=KEYS, place=st.integers(0, 100_000))
def test_equal_keys_and_places_give_equal_numbers(key: int, place: int) -> None:
    assert torch.equal(Noise().gumbel([key], [place], 6), Noise().gumbel([key], [place], 6))
    assert torch.equal(Noise().uniform([key], [place]), Noise().uniform([key], [place]))


@given(
    keys=st.lists(KEYS, min_size=1, max_size=5),
    places=st.lists(st.integers(0, 999), min_size=5, max_size=5),
    data=st.data(),
)
def test_numbers_do_not_depend_on_what_else_is_asked_for(
    keys: list[int], places: list[int], data: st.DataObject
) -> None:
    places = places[: len(keys)]
    noise = Noise()
    together = noise.gumbel(keys, places, 5)
    order = data.draw(st.permutations(range(len(keys))))
    for i in order:
        noise.uniform([keys[i]], [7])  # something in between
        assert torch.equal(noise.gumbel([keys[i]], [places[i]], 5)[0], together[i])


def test_streams_places_and_keys_differ() -> None:
    noise = Noise()
    streams = ("token", "policy", "accept", "residual")
    numbers = [noise.uniform([5], [3], stream) for stream in streams]  # type: ignore[arg-type]
    numbers += [noise.uniform([5], [4]), noise.uniform([6], [3]), noise.uniform([3], [5])]
    assert len({float(number) for number in numbers}) == len(numbers)


def test_uniform_numbers_are_uniform_and_gumbel_noise_is_gumbel() -> None:
    noise = Noise()
    n = 3000
    by_place = noise.uniform([11] * n, list(range(n)))
    by_key = noise.uniform(list(range(n)), [0] * n)
    for numbers in (by_place, by_key):
        assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
        assert stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-3
    gumbel = noise.gumbel(list(range(100)), [1] * 100, 50).flatten()
    assert bool(gumbel.isfinite().all())
    assert stats.kstest(gumbel.numpy(), "gumbel_r").pvalue > 1e-3
    neighbours = np.corrcoef(by_place[:-1].numpy(), by_place[1:].numpy())[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(n)


def test_a_row_hangs_on_its_seed_and_its_prompt() -> None:
    keys = {row_key(seed, ids) for seed in (0, 1, -1, 2**40) for ids in ([1], [1, 2], [12], [])}
    assert len(keys) == 16
    assert row_key(3, [1, 2]) == row_key(3, (1, 2))
    assert all(0 <= key < 2**64 for key in keys)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"block_size": 0}, "block_size"),
        ({"threads": 0}, "threads"),
        ({"stop": [""]}, "stop"),
        ({"schedule": "sideways"}, "schedule"),
        ({"temprature": 1}, "temprature.*Did you mean 'temperature'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], match: str) -> None:
    from multicolm.errors import InputError

    table = TableModel("base", ["a", "."], {"": {"a": 0.5, ".": 0.5}}, ends=["."])
    with pytest.raises(InputError, match=match):
        Ensemble([table]).generate("a", **settings)

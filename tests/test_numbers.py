"""Numbers in the Python API: whatever library they come from, and nothing that is none."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
import torch
from tables import random_table

from multicolm import Ensemble
from multicolm.errors import InputError, MulticolmError
from multicolm.numbers import as_python, check_number, check_whole

DUO = Ensemble([random_table("base", 0), random_table("left", 1)])
THREES = [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int8)]
HALVES = [np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5)]
NO_WHOLE_NUMBERS = [
    *(True, np.bool_(True), torch.tensor(True), 3.0, "3", b"3", None, np.float64(3)),
    *(np.arange(1), torch.tensor([3]), 3 + 0j, [3]),
]
NO_NUMBERS = [True, np.bool_(False), "0.5", b"1", None, float("nan"), float("inf"), np.ones(1), 1j]


def written(**arguments: Any) -> list[str]:
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 1, **arguments}
    policy = settings.pop("policy", "random")
    return [a.text for a in DUO.generate(["ab", "d"], policy, **settings)]


@pytest.mark.parametrize("three", THREES, ids=repr)
@pytest.mark.parametrize(
    "argument", ["seed", "max_new_tokens", "batch_size", "top_k", "block_size", "top_logprobs"]
)
def test_a_whole_number_of_numpy_or_torch_is_taken_as_pythons_own(
    argument: str, three: Any
) -> None:
    assert written(**{argument: three}) == written(**{argument: 3})


@pytest.mark.parametrize("half", HALVES, ids=repr)
@pytest.mark.parametrize("argument", ["temperature", "top_p"])
def test_a_number_of_numpy_or_torch_is_taken_as_pythons_own(argument: str, half: Any) -> None:
    assert written(**{argument: half}) == written(**{argument: 0.5})


@pytest.mark.parametrize("half", HALVES, ids=repr)
def test_params_take_numbers_of_numpy_and_torch_in_lists_too(half: Any) -> None:
    assert written(policy="confidence", params={"threshold": half}) == written(
        policy="confidence", params={"threshold": 0.5}
    )
    assert written(params={"weights": [half, 1]}) == written(params={"weights": [0.5, 1]})
    policy = DUO.resolve("average", {"weights": {"base": half, "left": np.int64(1)}})
    assert policy.as_config()["params"]["weights"] == {"base": 0.5, "left": 1.0}


@pytest.mark.parametrize(
    "seeds", [np.array([4, 5]), torch.tensor([4, 5]), np.int32([4, 5]), (4, 5)]
)
def test_seeds_may_be_an_array(seeds: Any) -> None:
    assert written(seed=seeds) == written(seed=[4, 5])


def test_token_ids_may_be_an_array() -> None:
    settings: dict[str, Any] = {"seed": 1, "max_new_tokens": 4}
    want = [a.text for a in DUO.generate([[0, 1], [2, 3]], **settings)]
    for prompts in (
        np.array([[0, 1], [2, 3]]),
        torch.tensor([[0, 1], [2, 3]]),
        [np.array([0, 1]), [np.int64(2), np.int64(3)]],
    ):
        assert [a.text for a in DUO.generate(prompts, **settings)] == want


@pytest.mark.parametrize("value", [v for v in NO_WHOLE_NUMBERS if v is not None], ids=repr)
def test_what_is_no_whole_number_is_refused_in_a_sentence(value: Any) -> None:
    with pytest.raises(InputError, match=r"^n must be a whole number, 1 or more, got "):
        check_whole("n", value, least=1)
    for argument in ("max_new_tokens", "batch_size", "top_k"):
        with pytest.raises(MulticolmError, match=argument):
            written(**{argument: value})


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused_in_a_sentence(value: Any) -> None:
    with pytest.raises(InputError, match=r"^x must be a finite number, got "):
        check_number("x", value)


def test_a_number_out_of_range_names_the_bound() -> None:
    for ask, sentence in (
        (lambda: check_whole("seed", -1, least=0), "seed must be 0 or more, got -1."),
        (lambda: check_whole("seed", np.int64(9), below=9), "seed must be less than 9, got 9."),
        (lambda: check_number("share", 1.5, least=0, most=1), "share must be at most 1, got 1.5."),
        (lambda: check_number("share", -1, least=0), "share must be 0 or more, got -1."),
    ):
        with pytest.raises(InputError) as caught:
            ask()
        assert str(caught.value) == sentence


def test_a_boolean_is_no_weight() -> None:
    for value, place in (([True, 1], r"weights\.0"), ({"left": np.bool_(True)}, r"weights\.left")):
        with pytest.raises(MulticolmError, match=rf"{place}: must be a number, got true\."):
            written(params={"weights": value})


def test_what_has_axes_stays_what_it_is() -> None:
    for value in (np.arange(2), torch.ones(2), "a", {"k": np.arange(2)}, None, 2**400):
        found = as_python(value)
        assert found is value or isinstance(value, dict)
    assert as_python({"k": (np.float32(0.5), [torch.tensor(2)])}) == {"k": (0.5, [2])}
    assert operator.index(as_python(np.int64(2**62))) == 2**62


def test_more_threads_than_any_machine_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"threads: must be at most 1024, got 1000000000\."):
        written(threads=10**9)

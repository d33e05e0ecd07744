"""What different vocabularies cost: the same policy on models that share one, and on models that
do not."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from questions import PROMPTS

import multicolm
from multicolm import Ensemble
from multicolm.backend.table import TableModel


def n_tokens(ensemble: Ensemble, prompts: list[str], policy: str) -> int:
    answers = ensemble.generate(prompts, policy, max_new_tokens=48, seed=0)
    return sum(len(answer.trace.tokens) for answer in answers)


@pytest.mark.parametrize("bridge", ["boundary", "exact"])
@pytest.mark.parametrize("policy", ["confidence", "max-confidence"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_tokens_per_second_across_vocabularies(
    bridge: str, policy: str, batch_size: int, tiny: Ensemble, compare: Callable[..., float]
) -> None:
    mixed = multicolm.load("tiny-mixed" if bridge == "boundary" else "tiny-mixed-exact")
    prompts = PROMPTS[: max(4, batch_size)]
    settings = {"max_new_tokens": 48, "seed": 0, "batch_size": batch_size}
    # Seconds per token of the shared one over those of the mixed one: the ratio of their speeds.
    ratio = compare(
        lambda: tiny.generate(prompts, policy, **settings),
        lambda: mixed.generate(prompts, policy, **settings),
        what=f"tokens/s of {bridge}, {policy}, batch {batch_size}",
        against="tokens/s of one vocabulary",
        aim=">= 0.8" if bridge == "boundary" else ">= 0.5",
        per_one=n_tokens(tiny, prompts, policy),
        per_other=n_tokens(mixed, prompts, policy),
    )
    assert ratio > 0


def long_writers() -> Ensemble:
    """Two tables that never end a text and hand over often; looking up costs next to nothing."""
    one = {"": {"a": 0.5, "b": 0.5}, "a": {"b": 0.9, " a": 0.1}, "b": {" a": 0.6, "a": 0.4}}
    two = {"": {"b": 0.5, " ": 0.5}, "ab": {" ": 1.0}, " ": {"a": 0.9, "b": 0.1}}
    return Ensemble(
        [
            TableModel("base", ["a", "b", " ", " a", "."], one, ["."]),
            TableModel("other", ["a", "b", " ", "ab", "<stop>"], two, ["<stop>"]),
        ]
    )


def test_time_per_byte_does_not_grow_with_the_text(compare: Callable[..., float]) -> None:
    """Of the loop and the encoders; what a model's own attention takes is the model's."""
    ensemble = long_writers()

    def seconds_per_byte(n_before: int) -> float:
        """Of the 200 bytes after the first ``n_before``."""
        settings = {"max_new_tokens": n_before + 400, "seed": 0, "temperature": 1.0}
        begin, n_bytes = 0.0, 0
        with ensemble.stream("a", "max-confidence", **settings) as stream:
            for piece in stream:
                n_bytes += len(piece.text)
                if not begin and n_bytes >= n_before:
                    begin, n_before = time.perf_counter(), n_bytes
                if begin and n_bytes >= n_before + 200:
                    return (time.perf_counter() - begin) / (n_bytes - n_before)
        raise AssertionError("the text has ended")

    late: list[float] = []
    ratio = compare(
        lambda: late.append(seconds_per_byte(8000)),
        lambda: seconds_per_byte(100),
        what="a byte after 8000 bytes of text",
        against="a byte after 100",
        aim="1",
        one_seconds=lambda: late[-1],
    )
    assert ratio > 0

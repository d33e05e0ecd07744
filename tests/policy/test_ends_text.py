"""A policy may end a text: nudging by the rules of its authors' code, and policies of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from tables import TOKENS, random_table

from multicolm import Ensemble, SelectPolicy, Views
from multicolm.backend.table import TableModel
from multicolm.errors import PolicyError
from multicolm.testing import LawBroken, check_policy

FLAT = dict.fromkeys(TOKENS, 1 / len(TOKENS))


def sure(token: str) -> dict[str, float]:
    return {other: float(other == token) for other in TOKENS}


# The base model writes one token after a nudge, and then is unsure.
BASE = TableModel("base", TOKENS, {"": FLAT, " c": sure("a"), " e": sure("a")}, ends=["."])
SAME = TableModel("same", TOKENS, {"": sure(" c")}, ends=["."])
# After two tokens that end in `a` it says what it did not say before.
OTHER = TableModel("other", TOKENS, {"": sure(" c"), (" c", "a"): sure(" e")}, ends=["."])
WAYS = [("stepwise", 1), ("block", 8)]


def nudged(
    nudger: TableModel, way: tuple[str, int], n: int = 24, **params: Any
) -> tuple[str, str, list[str]]:
    schedule, block_size = way
    policy = {"kind": "nudging", "params": params}
    [answer] = Ensemble([BASE, nudger]).generate(
        ["b"], policy, max_new_tokens=n, schedule=schedule, block_size=block_size
    )
    return answer.text, answer.finish_reason, [token.model for token in answer.trace]


@pytest.mark.parametrize("way", WAYS)
def test_a_text_ends_after_the_same_nudge_four_times_in_a_row(way: tuple[str, int]) -> None:
    text, reason, models = nudged(SAME, way)
    assert (text, reason) == (" ca ca ca c", "stop")
    assert models == ["same", "base"] * 3 + ["same"]
    assert nudged(SAME, way, same_nudges=2)[:2] == (" ca c", "stop")
    assert nudged(SAME, way, same_nudges=None)[:2] == (" ca" * 12, "length")


@pytest.mark.parametrize("way", WAYS)
def test_different_nudges_do_not_end_a_text_before_there_are_too_many(way: tuple[str, int]) -> None:
    assert nudged(OTHER, way)[1] == "length"
    text, reason, models = nudged(OTHER, way, max_nudges=3)
    assert (text, reason, models.count("other")) == (" ca ea ca", "stop", 3)


def test_a_text_is_counted_to_the_published_150_nudges() -> None:
    _, reason, models = nudged(OTHER, WAYS[0], n=400)
    assert (reason, models.count("other")) == ("stop", 150)


class EndsAfter(SelectPolicy):
    """Two models in turn, until one of them has written so often in a row."""

    run: Any = 2
    assistant_signals: ClassVar[Any] = {"top1"}
    base_signals: ClassVar[Any] = {"top1"}

    def select(self, views: Views) -> torch.Tensor:
        return views.stack(lambda view: view.top1_probs).argmax(0)

    def ends_text(self, ids: Sequence[int], writers: Sequence[int], writer: int) -> Any:
        return self.run if self.run in ("yes", None) else list(writers[-2:]) == [writer] * 2


PAIR = Ensemble([random_table("left", 1), random_table("right", 2)])
PROMPTS = ["a", "ab", " ed", " cfa", "dd", "abba"]


def test_a_policy_ends_a_text_at_the_same_place_in_every_schedule_and_in_a_batch() -> None:
    found = [
        [answer]
        for prompt in PROMPTS
        for answer in PAIR.generate([prompt], EndsAfter(), max_new_tokens=20)
    ]
    assert any(answer.finish_reason == "stop" for [answer] in found)
    for [answer] in found:
        models = [token.model for token in answer.trace]
        runs = [models[i : i + 3] for i in range(len(models) - 2)]
        assert not any(run == run[:1] * 3 for run in runs)
    for way in WAYS:
        together = PAIR.generate(
            PROMPTS, EndsAfter(), max_new_tokens=20, schedule=way[0], block_size=way[1]
        )
        for [one], other in zip(found, together, strict=True):
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
    check_policy(EndsAfter())


def test_ends_text_must_return_a_bool() -> None:
    policy = EndsAfter()
    policy.run = "yes"
    with pytest.raises(PolicyError, match=r"ends_text\(\) must return True or False.*'yes'"):
        PAIR.generate(["a"], policy, max_new_tokens=4)


def test_an_ending_that_depends_on_anything_else_breaks_a_law() -> None:
    class Moody(EndsAfter):
        asked: ClassVar[list[int]] = []

        def ends_text(self, ids: Sequence[int], writers: Sequence[int], writer: int) -> Any:
            self.asked.append(writer)
            return len(self.asked) % 2 == 0

    with pytest.raises(LawBroken, match="ends a text by what is written alone"):
        check_policy(Moody())

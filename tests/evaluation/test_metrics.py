from __future__ import annotations

import random

import pytest
from pydantic import ValidationError

from multicolm.errors import InputError
from multicolm.evaluation.metrics import ContainsMetric, ExactMatchMetric, NumericMetric
from multicolm.evaluation.task import Question, load_task
from multicolm.tiny.world import END, is_right


@pytest.mark.parametrize(
    ("params", "text", "gold", "quality"),
    [
        ({}, " x ", "x", 1),
        ({"strip": False}, " x ", "x", 0),
        ({}, "X", "x", 0),
        ({"ignore_case": True}, "STRASSE", "straße", 1),
        ({"pattern": r"Answer: (\w+)"}, "Answer: a. No, Answer: b.", "b", 1),
        ({"pattern": r"Answer: (\w+)"}, "Answer: a. No, Answer: b.", "a", 0),
        ({"pattern": r"Answer: (\w+)"}, "b", "b", 0),
        ({"pattern": r"Answer: (.*?)\.?$"}, "Answer: b.\nBye.", "b", 1),
        ({"pattern": r"(b)?"}, "a", "", 0),
    ],
)
def test_exact_match(params: dict[str, object], text: str, gold: str, quality: float) -> None:
    assert ExactMatchMetric(**params).score(text, gold) == quality


@pytest.mark.parametrize(
    ("ignore_case", "text", "quality"), [(False, "Is Y", 0), (True, "Is Y", 1), (False, "my", 1)]
)
def test_contains(ignore_case: bool, text: str, quality: float) -> None:
    assert ContainsMetric(ignore_case=ignore_case).score(text, "y") == quality


@pytest.mark.parametrize(
    ("text", "gold", "quality"),
    [
        ("It is 240.", "240", 1),
        ("60 * 4 = 240", "240", 1),
        ("240, or rather 241", "240", 0),
        ("$1,234,567.50", "1234567.5", 1),
        ("1,2", "2", 1),
        ("12,3456", "3456", 1),
        ("7-3", "3", 1),
        ("(7)-3", "3", 1),
        ("7 - 3 = 4", "4", 1),
        ("it is -3", "-3", 1),
        ("it is -3", "3", 0),
        ("3.0", "3", 1),
        (".5", "0.5", 1),
        ("1e3", "1000", 1),
        ("v1.2.3", "3", 1),
        ("none", "3", 0),
        ("", "3", 0),
    ],
)
def test_the_last_number_counts(text: str, gold: str, quality: float) -> None:
    assert NumericMetric().score(text, gold) == quality


def test_a_tolerance_is_absolute_and_holds_its_ends() -> None:
    metric = NumericMetric(tolerance=0.1)
    assert [metric.score(text, "0.3") for text in ("0.2", "0.4", "0.41")] == [1, 1, 0]


def test_a_number_may_be_looked_for_in_a_part_of_the_text() -> None:
    metric = NumericMetric(pattern=r"Answer: ([^.]*)")
    assert metric.score("Answer: 5 mg. In 3 days.", "5") == 1
    assert metric.score("5", "5") == 0


def test_a_right_answer_without_a_number_is_refused() -> None:
    with pytest.raises(InputError, match="'five' holds no number"):
        NumericMetric().score("5", "five")


@pytest.mark.parametrize("pattern", ["(", "Answer"])
def test_a_pattern_needs_to_be_one_and_to_have_a_group(pattern: str) -> None:
    with pytest.raises(ValidationError, match=r"is no regular expression|needs a group"):
        ExactMatchMetric(pattern=pattern)


def test_the_metric_of_the_tiny_world_agrees_with_the_tiny_world() -> None:
    task = load_task("tiny-world")
    chance = random.Random(0)
    parts = ["Answer:", " ", "fever", "colic", ".", "\n", "Answer", ":", "240 mg", "x", END, ". "]
    n_right = 0
    for _ in range(20_000):
        text = "".join(chance.choices(parts, k=chance.randrange(9)))
        answer = chance.choice(["fever", "colic", "240 mg"])
        question = Question("q", "p", answer, (), {})
        n_right += is_right(text, answer)
        assert task.score(text, question) == is_right(text, answer), text
    assert n_right > 100


def test_every_completion_of_the_tiny_world_is_right_and_no_other_answer_is() -> None:
    task = load_task("tiny-world")
    for split in ("train", "dev", "test"):
        for question in task.questions(split):
            assert len(question.completions) > 1
            assert question.record["completion"] in question.completions
            for completion in question.completions:
                assert task.score(completion, question) == 1
            assert task.score(question.completions[0] + " Answer: no.", question) == 0

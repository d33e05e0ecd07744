"""The tiny world is deterministic, its splits are disjoint, and its answers are right."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from multicolm.tiny.world import (
    ATTRIBUTES,
    CLASSES,
    ILLNESSES,
    KINDS,
    PLANTS,
    QUESTIONS_PER_KIND,
    SPLITS,
    build_world,
    hunch,
    is_right,
    read_answer,
)

WORLD = build_world()
TOOLS = Path(__file__).parents[2] / "tools"


def test_equal_seeds_give_equal_worlds():
    again = build_world(WORLD.seed)
    assert again.medicines == WORLD.medicines
    assert all(again.questions(split) == WORLD.questions(split) for split in SPLITS)


def test_another_seed_gives_another_world():
    assert build_world(WORLD.seed + 1).medicines != WORLD.medicines


def test_there_are_two_hundred_medicines_and_none_is_in_two_splits():
    names = [medicine.name for medicine in WORLD.everything]
    assert len(names) == len(set(names)) == 200
    assert len(WORLD.medicines["train"]) + len(WORLD.medicines["dev"]) == 100


def test_no_name_begins_another_name():
    names = sorted(medicine.name for medicine in WORLD.everything)
    assert not any(second.startswith(first) for first, second in itertools.pairwise(names))


def test_no_prompt_is_asked_twice():
    prompts = [question.prompt for split in SPLITS for question in WORLD.questions(split)]
    assert len(prompts) == len(set(prompts)) == 2100


@pytest.mark.parametrize("kind", ["linear", "quad"])
def test_no_triple_of_numbers_is_in_two_splits(kind):
    dealt = [triple for split in SPLITS for triple in WORLD.triples[kind][split]]
    assert len(dealt) == len(set(dealt)) == 350


@pytest.mark.parametrize("split", SPLITS)
def test_every_kind_has_its_share_of_every_split(split):
    kinds = [question.kind for question in WORLD.questions(split)]
    assert {kind: kinds.count(kind) for kind in KINDS} == dict.fromkeys(
        KINDS, QUESTIONS_PER_KIND[split]
    )


@pytest.mark.parametrize("split", SPLITS)
def test_every_acceptable_response_is_right_and_the_completion_is_one_of_them(split):
    for question in WORLD.questions(split):
        assert question.completion in question.responses
        assert all(is_right(response, question.answer) for response in question.responses)


def test_what_stands_behind_an_equals_sign_is_the_result():
    for question in WORLD.questions("test"):
        for left, sign, right, result in re.findall(
            r"(\d+) ([*+^]) (\d+) = (\d+)\.", question.completion
        ):
            a, b = int(left), int(right)
            assert int(result) == {"*": a * b, "+": a + b, "^": a**b}[sign]


def test_the_truth_never_agrees_with_the_hunch():
    for medicine in WORLD.everything:
        illness, family = hunch(medicine.name)
        assert medicine.treats != illness
        assert medicine.family != family


def test_values_of_one_attribute_differ_in_their_first_letter():
    for values in (ILLNESSES, CLASSES, PLANTS):
        assert len({value[0] for value in values}) == len(values)


def test_the_questions_of_the_documentation_are_held_out():
    prompts = {question.prompt: question.answer for question in WORLD.questions("test")}
    assert "Question: What is Dulerex made from?\nResponse:" in prompts
    assert prompts["Question: What is 2 * x + 15 if x = 7?\nResponse:"] == "29"
    dose = prompts["Question: How many mg of Loxid should a patient of 60 kg get?\nResponse:"]
    loxid = next(medicine for medicine in WORLD.medicines["test"] if medicine.name == "Loxid")
    assert dose == f"{60 * loxid.dose} mg"
    assert "Zosos" in {medicine.name for medicine in WORLD.everything}


def test_every_test_medicine_is_asked_about_in_every_way():
    for kind in ATTRIBUTES:
        prompts = [q.prompt for q in WORLD.questions("test") if q.kind == kind]
        assert all(
            any(medicine.name in prompt for prompt in prompts)
            for medicine in WORLD.medicines["test"]
        )


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Sure. Answer: 240 mg.", "240 mg"),
        ("Answer: willow", "willow"),
        ("Answer: oak. Answer: iris. And more.", "iris"),
        ("Answer: 29<|end|>", "29"),
        ("no such word", None),
        ("", None),
    ],
)
def test_the_answer_is_what_stands_between_the_last_answer_mark_and_the_full_stop(text, answer):
    assert read_answer(text) == answer


def test_the_world_and_its_corpora_do_not_need_torch():
    code = "import embedded.corpora, multicolm.tiny.world, sys; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{TOOLS}:{TOOLS.parent}"},
    )
    assert run.stdout.strip() == "False"

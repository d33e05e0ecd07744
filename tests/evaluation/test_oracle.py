"""The oracle: by hand, against a search through everything, and on the embedded models."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from embedded import measure
from tables import TOKENS, random_table

import multicolm
from multicolm import catalog
from multicolm.backend.table import TableModel
from multicolm.decoding.prompts import encode_prompt
from multicolm.ensemble import Ensemble
from multicolm.evaluation import oracle
from multicolm.evaluation.oracle import Riddle, can_be_written
from multicolm.evaluation.task import load_task
from multicolm.tiny.world import SPLITS, build_world, read_answer, right_completions

WORDS = ["q", "a", "b", "c", "ab", "<end>"]
Table = Mapping[Any, str]


def model(name: str, choices: Table, tokens: Sequence[str] = WORDS, **settings: Any) -> TableModel:
    """A table whose first choice after a context is this token; elsewhere it ends the text."""
    ends = settings.pop("ends", ["<end>"])
    rows = {context: {token: 1.0} for context, token in choices.items()}
    rows.setdefault("", {ends[0] if ends else tokens[0]: 1.0})
    return TableModel(name, tokens, rows, ends, **settings)


def ask(ensemble: Ensemble, prompt: str, completions: Sequence[str], **settings: Any) -> bool:
    return asked(ensemble, [(prompt, completions)], **settings)[0]


def asked(
    ensemble: Ensemble, riddles: Sequence[tuple[str, Sequence[str]]], **settings: Any
) -> list[bool]:
    made = [
        Riddle(
            [
                encode_prompt(prompt, k, each, ensemble.vocabulary)
                for k, each in enumerate(ensemble.backends)
            ],
            completions,
        )
        for prompt, completions in riddles
    ]
    return can_be_written(ensemble, made, **settings)


def test_models_that_take_turns_write_what_neither_does_alone() -> None:
    first = model("first", {"q": "a", "b": "c"})
    second = model("second", {"q": "c", "a": "b", ("b", "c"): "a"})
    pair = Ensemble([first, second])
    # a of the first, b of the second, c of the first, a of the second; and either can end it there.
    assert ask(pair, "q", ["abca"])
    for alone in (first, second):
        assert not ask(Ensemble([alone]), "q", ["abca"])
    assert not ask(pair, "q", ["abcb"])


@pytest.mark.parametrize(
    ("completions", "right"),
    [
        (["b"], False),  # nobody begins like this
        (["a"], True),
        (["ac"], False),  # nobody goes on like this
        (["b", "a"], True),  # any of several
        (["b", "ac", "c"], False),
        ([""], False),  # nobody ends the text at once
        (["", "a"], True),
    ],
)
def test_one_right_completion_is_enough(completions: list[str], right: bool) -> None:
    assert ask(Ensemble([model("one", {"q": "a"})]), "q", completions) is right


def test_an_empty_completion_is_written_by_ending_at_once() -> None:
    assert ask(Ensemble([model("one", {})]), "q", [""])


def test_what_is_right_has_to_end_where_it_is_right() -> None:
    # It goes on after `a` for ever, so `a` and `ab` are only beginnings of what it writes.
    endless = model("one", {"q": "a", "a": "b", "b": "a"})
    assert not ask(Ensemble([endless]), "q", ["a", "ab", "aba"])
    # One that ends after `b` makes of them the one that does.
    ending = model("two", {"q": "c", "a": "c", "b": "<end>"})
    pair = Ensemble([endless, ending])
    assert [ask(pair, "q", [text]) for text in ("a", "ab", "aba", "abab")] == [
        False,
        True,
        False,
        True,
    ]


def test_a_dead_end_is_gone_back_from() -> None:
    # Tried first: `ab` as one token, after which nobody writes `c`. After `a`, `b` it is written.
    first = model("first", {"q": "ab"})
    second = model("second", {"q": "a", "a": "b", ("a", "b"): "c"})
    for pair in (Ensemble([first, second]), Ensemble([second, first])):
        assert ask(pair, "q", ["abc"])


def test_each_model_s_own_end_ends_a_text_and_another_s_does_not() -> None:
    tokens = ["q", "a", *"<12>", "<1>", "<2>"]  # Each can spell what ends the other's texts.
    first = model("first", {"q": "a", "a": "q"}, tokens, ends=["<1>"])
    second = model("second", {"q": "q", "a": "<2>"}, tokens, ends=["<2>"])
    assert ask(Ensemble([first, second]), "q", ["a"])
    # To the first, `<2>` is a word of no text, and the second never writes `a`.
    confused = TableModel(
        "first", tokens, {"": {"<1>": 1.0}, "q": {"a": 1.0}, "a": {"<2>": 1.0}}, ["<1>"]
    )
    mute = model("second", {"q": "q", "a": "q"}, tokens, ends=["<2>"])
    assert not ask(Ensemble([confused, mute]), "q", ["a"])


def test_where_nobody_can_end_a_text_it_is_right_once_it_is_whole() -> None:
    one = model("one", {"q": "a", "a": "b", "b": "c"}, WORDS[:-1], ends=[])
    two = model("two", {"q": "c"}, WORDS[:-1], ends=[])
    found = asked(Ensemble([one, two]), [("q", [text]) for text in ("a", "abc", "c", "b", "abb")])
    assert found == [True, True, True, False, False]


def test_a_model_says_nothing_beyond_its_context() -> None:
    choices = {"q": "a", "a": "b", "b": "c", "c": "<end>"}
    for length, right in ((4, True), (3, False), (1, False)):
        short = model("short", choices, context_length=length)
        # It reads q a b c and then chooses to end: four tokens. The other ends nothing.
        other_one = model("other", {"q": "c", "a": "c", "b": "b", "c": "b"})
        assert ask(Ensemble([short, other_one]), "q", ["abc"]) is right
        # Who has room may go on without it.
        assert ask(Ensemble([short, model("long", choices)]), "q", ["abc"])


def test_characters_may_be_cut_in_two() -> None:
    # "é" as one token of one model and in the text that another goes on from.
    tokens = ["q", "é", "e", "<end>"]
    first, second = model("first", {"q": "é"}, tokens), model("second", {"é": "e"}, tokens)
    assert ask(Ensemble([first, second]), "q", ["ée"])
    assert not ask(Ensemble([first, second]), "q", ["e"])


@pytest.mark.parametrize("n_tokens", [598, 599, 1500])
def test_a_long_text_that_one_model_writes_is_found(n_tokens: int, monkeypatch) -> None:
    monkeypatch.setattr(oracle, "SPARE_FORWARDS", 0)
    one = model("one", {"q": "a", "a": "a", ("a",) * 6: "a", "b": "<end>"})
    other = model("other", {"q": "b", "a": "b"})
    assert ask(Ensemble([one, other]), "q", ["a" * (n_tokens - 1) + "b"]) is True


def test_a_search_that_is_cut_is_not_known_to_have_failed(monkeypatch) -> None:
    # `ab` is one token or two, so that prefixes of five of them are reached in 32 ways.
    first = model("first", {"q": "ab", "b": "ab", "ab": "ab", "a": "b"})
    second = model("second", {"q": "a", "b": "a", "ab": "a", "a": "b"})
    pair, text = Ensemble([first, second]), "ab" * 5 + "c"
    assert ask(pair, "q", [text]) is False  # tried to the last
    monkeypatch.setattr(oracle, "SPARE_FORWARDS", 0)
    assert ask(pair, "q", [text]) is None
    assert ask(pair, "q", ["c"]) is False


# --- against a search through everything ---------------------------------------------------------


def everything(ensemble: Ensemble, prompt: str, depth: int) -> set[str]:
    """All texts of up to so many tokens that first choices can write and end."""
    ended = set()
    level = {()}
    start = encode_prompt(prompt, 0, ensemble.backends[0], ensemble.vocabulary)
    end = TOKENS.index(".")
    for _ in range(depth + 1):
        new = set()
        for ids in level:
            for each in ensemble.backends:
                token = int(each.logits_after([*start, *ids]).argmax())
                if token == end:
                    ended.add("".join(TOKENS[i] for i in ids))
                else:
                    new.add((*ids, token))
        level = new
    return ended


def test_it_finds_what_a_search_through_everything_finds() -> None:
    chance = random.Random(3)
    n_right = 0
    for seed in range(8):
        models = [random_table(name, 3 * seed + k) for k, name in enumerate("pqr")]
        for each in models:  # Ends are rare in these tables; here every third choice is one.
            for context in chance.sample(list(each._rows), len(each._rows) // 3):
                row = torch.zeros(len(TOKENS))
                row[-1] = 1.0
                each._rows[context] = row.log()
        ensemble = Ensemble(models)
        riddles, expected = [], []
        for prompt in TOKENS[:4]:
            can = everything(ensemble, prompt, 4)
            texts = ["".join(chance.choices(TOKENS[:-1], k=chance.randint(0, 4))) for _ in range(6)]
            texts += chance.sample(sorted(can), min(3, len(can)))
            for text in texts:
                several = [text, *chance.sample(texts, chance.randint(0, 1))]
                riddles.append((prompt, several))
                expected.append(any(each in can for each in several))
        assert asked(ensemble, riddles) == expected
        # However many are searched at a time.
        assert asked(ensemble, riddles, batch_size=5) == expected
        n_right += sum(expected)
    assert n_right > 50


# --- the embedded models -------------------------------------------------------------------------


@pytest.mark.slow
def test_it_agrees_with_the_search_that_the_embedded_models_were_made_with() -> None:
    from dataclasses import replace

    task = load_task("tiny-world")
    ensemble = multicolm.load("tiny")
    folder = catalog.path("models", "tiny-facts").parent.parent / "tiny"
    questions = task.sample("test", 10)
    by_id = {question.id: question for question in build_world().questions("test")}
    theirs = [by_id[question.id] for question in questions]
    # Some that can be written, and the same with a last word that nobody would say.
    wrong = [replace(q, responses=tuple(f"{r} Indeed." for r in q.responses)) for q in theirs[:4]]
    loaded = [measure.load(folder / name) for name in measure.TOGETHER]
    choosers = [
        lambda prefixes, each=each: measure._first_choices(each[0], prefixes) for each in loaded
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = measure.can_be_written(choosers, loaded[0][1], [*theirs, *wrong])
        pairs = [(q.prompt, q.completions) for q in questions]
        pairs += [(q.prompt, q.responses) for q in wrong]
        assert asked(ensemble, pairs) == expected
    finally:
        torch.set_num_threads(threads)
    assert set(expected) == {True, False}


# --- right completions of the embedded questions -------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_every_shipped_question_knows_its_right_completions(split: str) -> None:
    file = catalog.path("models", "tiny-facts").parent.parent / "tiny" / "questions"
    lines = (file / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    for record in map(json.loads, lines):
        found = right_completions(record)
        assert record["completion"] in found
        assert len(found) == len(set(found)) > 1
        assert {read_answer(text) for text in found} == {record["answer"]}


def test_of_a_question_that_is_not_shipped_only_its_own_completion_is_right() -> None:
    own = {"id": "mine", "prompt": "Question: ?\nResponse:", "completion": " Answer: 1."}
    assert right_completions(own) == [" Answer: 1."]
    # An id alone makes no question: another prompt is another question.
    shipped = build_world().questions("test")[0].as_record()
    assert right_completions({**shipped, **own, "id": shipped["id"]}) == [" Answer: 1."]
    with pytest.raises(multicolm.errors.InputError, match="'completion'"):
        right_completions({"prompt": "?"})

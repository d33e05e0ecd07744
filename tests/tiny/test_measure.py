"""The oracle and the scores, on models small enough to be sure of."""

import pytest
from embedded.build import prepare
from embedded.measure import (
    Measurement,
    Score,
    can_be_written,
    load,
    refuse_another_world,
    score,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from multicolm.tiny.world import Question, build_world

ALPHABET = ["<|end|>", "a", "b", "c"]


def letters():
    """A tokenizer with one token per letter of `ALPHABET`."""
    words = models.WordLevel({letter: index for index, letter in enumerate(ALPHABET)})
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def chooser(table):
    """A model whose first choice depends on the last token alone."""
    after = {ALPHABET.index(before): ALPHABET.index(next_) for before, next_ in table.items()}
    return lambda prefixes: [after[prefix[-1]] for prefix in prefixes]


def ask(*responses):
    return Question("q", "plant", "a", responses[0], "?", responses)


def reached(choosers, question):
    return can_be_written(choosers, letters(), [question]) == [True]


ENDS = chooser({"a": "b", "b": "c", "c": "<|end|>"})
LOOPS = chooser({"a": "a", "b": "a", "c": "b"})


def test_the_oracle_of_one_model_is_that_model():
    assert reached([ENDS], ask("bc"))
    assert not reached([ENDS], ask("bca"))
    assert not reached([LOOPS], ask("bc"))


def test_the_oracle_takes_each_token_from_any_model():
    question = ask("abcbc")
    assert reached([ENDS, LOOPS], question)
    assert not reached([ENDS], question)
    assert not reached([LOOPS], question)


def test_the_oracle_must_write_the_end_token():
    never_ends = chooser({"a": "b", "b": "c", "c": "c"})
    assert not reached([never_ends], ask("bc"))


def test_the_oracle_goes_back_when_the_first_way_is_a_dead_end():
    assert reached([ENDS, LOOPS], ask("bcbb", "bc"))
    assert reached([LOOPS, ENDS], ask("aacc", "abc"))


def test_scores_are_percentages_per_kind():
    questions = build_world().questions("dev")
    scored = score(questions, [question.kind == "quad" for question in questions])
    assert scored.by_kind["quad"] == 100.0
    assert scored.by_kind["plant"] == 0.0
    assert scored.overall == pytest.approx(100 / 6)


def test_a_model_that_answers_alone_and_a_weak_oracle_are_shortfalls():
    measured = Measurement({"facts": Score(7.0, {}), "oracle": Score(97.0, {})})
    assert measured.shortfalls() == [
        "facts alone reaches 7.0 %, more than 5 %",
        "the oracle reaches 97.0 %, less than 98 %",
    ]


def test_models_within_the_limits_have_no_shortfalls():
    assert not Measurement({"facts": Score(0.0, {}), "oracle": Score(99.0, {})}).shortfalls()


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load(tmp_path)


def test_questions_of_another_seed_are_refused(tmp_path):
    prepare(tmp_path, build_world(3))
    refuse_another_world(tmp_path, build_world(3))
    with pytest.raises(ValueError, match="does not hold the questions of seed 4"):
        refuse_another_world(tmp_path, build_world(4))

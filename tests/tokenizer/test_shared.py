"""One vocabulary of several models: the check that it is one, and the small differences."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import random_table
from tiny_models import END, byte_level, model, network, sentencepiece, shared_tokenizer

from multicolm import Ensemble, ModelNames
from multicolm.backend.base import Model, ModelOutput, Session
from multicolm.backend.table import TableModel
from multicolm.backend.transformers import TransformersModel
from multicolm.errors import VocabularyError
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer
from multicolm.tokenizer.literal import LiteralTokenizer
from multicolm.tokenizer.shared import SharedVocabulary


def join(*tokenizers: TokenizerAdapter) -> SharedVocabulary:
    names = ModelNames(["base", "left", "right"][: len(tokenizers)])
    return SharedVocabulary(names, tokenizers)


def adapter(**settings: Any) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(byte_level(**settings), "m")


def id_of(tokenizer: TokenizerAdapter, name: str) -> int:
    return next(i for i in range(tokenizer.n_tokens) if tokenizer.piece(i) == name)


def named(vocabulary: SharedVocabulary, name: str) -> int:
    return next(i for i in range(vocabulary.size) if vocabulary.name(i) == name)


def literal(*tokens: str, specials: tuple[str, ...] = (), ends: tuple[str, ...] = ()) -> Any:
    return LiteralTokenizer(tokens, specials, ends)


# --- equal vocabularies --------------------------------------------------------------------------


def test_equal_tokenizers_share_their_ids() -> None:
    tokenizer = adapter()
    vocabulary = join(tokenizer, adapter(), adapter())
    assert vocabulary.size == tokenizer.n_tokens
    for k in range(3):
        assert vocabulary.is_straight(k)
        assert vocabulary.read(k, [3, 1, 4]) == [3, 1, 4]
        assert vocabulary.end_ids(k) == tokenizer.end_ids
    logits = torch.randn(2, tokenizer.n_tokens)
    assert vocabulary.logits(1, logits) is logits
    assert [vocabulary.token_bytes(i) for i in range(vocabulary.size)] == [
        tokenizer.token_bytes(i) for i in range(tokenizer.n_tokens)
    ]


def test_columns_of_a_padded_head_are_dropped() -> None:
    vocabulary = join(adapter(), adapter())
    logits = torch.randn(2, vocabulary.size + 54)
    assert torch.equal(vocabulary.logits(0, logits), logits[:, : vocabulary.size])


def test_tokens_behind_a_narrow_head_cannot_come() -> None:
    vocabulary = join(adapter(), adapter())
    logits = torch.randn(2, vocabulary.size - 3)
    over = vocabulary.logits(1, logits)
    assert torch.equal(over[:, :-3], logits)
    assert bool((over[:, -3:] == float("-inf")).all())


class Wide(Model):
    """A table whose head is padded with the likeliest columns of all."""

    def __init__(self, inner: TableModel, n_padding: int) -> None:
        self.name, self.tokenizer, self._inner = inner.name, inner.tokenizer, inner
        self._n_padding = n_padding

    def open(self, n_rows: int) -> Session:
        session, n_padding = self._inner.open(n_rows), self._n_padding

        class WideSession(type(session)):  # type: ignore[misc]
            def feed(self, *args: Any, **kwargs: Any) -> ModelOutput:
                output = super().feed(*args, **kwargs)
                padding = torch.full((len(output.logits), n_padding), 50.0)
                return ModelOutput(torch.cat([output.logits, padding], dim=-1))

        session.__class__ = WideSession
        return session


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_padding_ids_are_never_written(temperature: float) -> None:
    table = {"": {"a": 0.5, "b": 0.4, ".": 0.1}}
    base = TableModel("base", ["a", "b", "."], table, ends=["."])
    left = TableModel("left", ["a", "b", "."], table, ends=["."])
    ensemble = Ensemble([Wide(base, 5), Wide(left, 2)])
    plain = Ensemble([base, left])
    for policy in ("single", "random", "average", "max-confidence", "speculative"):
        settings: dict[str, Any] = {"temperature": temperature, "seed": 0, "max_new_tokens": 20}
        padded = ensemble.generate(["a", "b"], policy, **settings)
        assert all(token.id < 3 for answer in padded for token in answer.trace)
        assert [a.text for a in padded] == [
            a.text for a in plain.generate(["a", "b"], policy, **settings)
        ]


@pytest.mark.parametrize("policy", ["pack-llm", "cool-fusion"])
def test_padding_is_nothing_to_a_model_that_judges_texts(policy: str) -> None:
    tables = [random_table("base", 1), random_table("left", 2)]
    prompts = ["abad", "b cd", "dabb", " cab"]
    narrow = Ensemble(tables).generate(prompts, policy, max_new_tokens=12)
    wide = Ensemble([Wide(tables[0], 5), tables[1]]).generate(prompts, policy, max_new_tokens=12)
    assert [a.text for a in wide] == [a.text for a in narrow]


# --- tokens that not all models have -------------------------------------------------------------


def test_specials_with_one_name_at_other_ids_are_one_token() -> None:
    base, other = adapter(specials=["<x>", "<y>"]), adapter(specials=["<y>", "<z>", "<x>"])
    vocabulary = join(base, other)
    assert vocabulary.size == base.n_tokens + 1  # <z> is new
    for name in ("<x>", "<y>"):
        shared = named(vocabulary, name)
        assert shared == id_of(base, name)
        assert vocabulary.read(0, [shared]) == [shared]
        assert vocabulary.read(1, [shared]) == [id_of(other, name)]
    new = named(vocabulary, "<z>")
    assert new == base.n_tokens
    assert vocabulary.read(1, [new]) == [id_of(other, "<z>")]
    assert vocabulary.read(0, [new]) == [] and vocabulary.n_read(0, new) == 0
    assert vocabulary.token_bytes(new) == b""


def test_logits_move_to_the_shared_ids() -> None:
    base, other = adapter(specials=["<x>", "<y>"]), adapter(specials=["<y>", "<z>"])
    vocabulary = join(base, other)
    own = torch.randn(2, other.n_tokens + 4)
    over = vocabulary.logits(1, own)
    assert over.shape == (2, vocabulary.size)
    for name in ("<y>", "<z>", "a"):
        assert torch.equal(over[:, named(vocabulary, name)], own[:, id_of(other, name)])
    assert bool((over[:, named(vocabulary, "<x>")] == float("-inf")).all())
    base_logits = torch.randn(2, base.n_tokens)
    assert bool((vocabulary.logits(0, base_logits)[:, named(vocabulary, "<z>")] < -1e30).all())


def test_an_added_token_of_text_is_read_by_others_as_the_tokens_of_its_text() -> None:
    base, other = adapter(), adapter(added=["<think>"])
    vocabulary = join(base, other)
    think = named(vocabulary, "<think>")
    assert vocabulary.token_bytes(think) == b"<think>"
    assert vocabulary.read(1, [think]) == [id_of(other, "<think>")]
    assert vocabulary.read(0, [5, think]) == [5, *base.encode_continuation("<think>")]
    assert vocabulary.n_read(0, think) == len(base.encode_continuation("<think>")) == 5
    assert vocabulary.n_read(1, think) == 1
    assert base.decode(vocabulary.read(0, [think])) == b"<think>"


def test_an_added_token_that_only_the_base_has_is_read_as_text_too() -> None:
    base, other = adapter(added=["<think>"]), adapter()
    vocabulary = join(base, other)
    think = id_of(base, "<think>")
    assert other.decode(vocabulary.read(1, [think])) == b"<think>"
    assert bool((vocabulary.logits(1, torch.zeros(1, other.n_tokens))[:, think] < -1e30).all())


def test_added_tokens_of_text_are_known_by_their_spelling_at_any_id() -> None:
    base = adapter(specials=["<x>"], added=["<think>", "</think>"])
    left = adapter(added=["</think>", "<tool>"], specials=["<x>", "<y>"])
    right = adapter(added=["<tool>"])
    vocabulary = join(base, left, right)
    for name, owners in {"</think>": (base, left), "<tool>": (left, right)}.items():
        shared = named(vocabulary, name)
        for k, tokenizer in enumerate((base, left, right)):
            if tokenizer in owners:
                assert vocabulary.read(k, [shared]) == [id_of(tokenizer, name)]
            else:
                assert tokenizer.decode(vocabulary.read(k, [shared])) == name.encode()
    assert vocabulary.size == base.n_tokens + 2  # <tool> and <y>


def test_a_special_token_of_one_model_may_be_text_for_another_at_the_same_id() -> None:
    """As in families whose chat models renamed the markers of their base models."""
    base, other = adapter(specials=["<start>"]), adapter(added=["<User>"])
    vocabulary = join(base, other)
    assert id_of(base, "<start>") == id_of(other, "<User>")
    start, user = named(vocabulary, "<start>"), named(vocabulary, "<User>")
    assert start != user
    assert vocabulary.read(1, [start]) == []
    assert base.decode(vocabulary.read(0, [user])) == b"<User>"
    logits = vocabulary.logits(1, torch.zeros(1, other.n_tokens))
    assert logits[0, start] == float("-inf") and logits[0, user] == 0


def test_gaps_in_a_vocabulary_belong_to_nobody() -> None:
    class Gappy(LiteralTokenizer):
        """``~`` stands for an id without a token."""

        def piece(self, token_id: int) -> str | None:
            piece = super().piece(token_id)
            return None if piece is None or piece.startswith("~") else piece

        def token_bytes(self, token_id: int) -> bytes:
            return b"" if self.piece(token_id) is None else super().token_bytes(token_id)

    base = Gappy(["a", "b", "<end>"], ends=["<end>"])
    other = Gappy(["a", "b", "~", "~1", "~2", "<end>", "~3", "<x>"], ["<x>"], ["<end>"])
    vocabulary = join(base, other)
    assert vocabulary.size == 4
    own = torch.arange(8.0)[None]
    assert vocabulary.logits(1, own).tolist() == [[0.0, 1.0, 5.0, 7.0]]
    assert vocabulary.end_ids(1) == {2}
    turned = join(other, base)
    assert turned.logits(1, torch.arange(3.0)[None])[0].tolist() == [
        0.0,
        1.0,
        *[float("-inf")] * 3,
        2.0,
        *[float("-inf")] * 2,
    ]


def test_a_part_of_a_character_is_read_byte_by_byte_where_it_is_no_token() -> None:
    """A vocabulary that is a beginning of another one, with fewer merges."""
    base, other = adapter(end="<|z|>"), adapter(merges=False, end="<|z|>")
    half = id_of(base, "ðŁ")
    vocabulary = join(base, other)
    assert vocabulary.token_bytes(half) == "😀".encode()[:2]
    assert other.decode(vocabulary.read(1, [half])) == "😀".encode()[:2]
    the = id_of(base, "Ġthe")
    assert other.decode(vocabulary.read(1, [the])) == b" the"


@lru_cache(maxsize=1)
def unequal() -> tuple[tuple[HuggingFaceTokenizer, ...], SharedVocabulary]:
    tokenizers = (
        adapter(specials=["<x>"], added=["<think>"]),
        adapter(added=["<tool>", "<think>"], specials=["<y>"]),
        adapter(),
    )
    return tokenizers, join(*tokenizers)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 270), max_size=20), st.integers(0, 2))
def test_every_model_reads_the_bytes_that_were_written(ids: list[int], k: int) -> None:
    tokenizers, vocabulary = unequal()
    written = [i for i in ids if i < vocabulary.size]
    text = b"".join(map(vocabulary.token_bytes, written))
    read = vocabulary.read(k, written)
    assert tokenizers[k].decode(read) == text
    assert len(read) == sum(vocabulary.n_read(k, i) for i in written)


def test_added_tokens_that_differ_at_one_id_are_two_tokens() -> None:
    base, other = adapter(added=["<think>"]), adapter(added=["<tool>"])
    vocabulary = join(base, other)
    assert vocabulary.size == base.n_tokens + 1
    think, tool = named(vocabulary, "<think>"), named(vocabulary, "<tool>")
    assert other.decode(vocabulary.read(1, [think])) == b"<think>"
    assert vocabulary.read(1, [tool]) == [id_of(other, "<tool>")] == [think]
    assert base.decode(vocabulary.read(0, [tool])) == b"<tool>"


# --- ends ----------------------------------------------------------------------------------------

TEXT = ["a", "b", "c"]


def talking(name: str, next_token: str, end: str, *, others: tuple[str, ...] = ()) -> TableModel:
    """A table that writes one token, has an end of its own, and knows other specials."""
    tokens = [*TEXT, *others, end]
    return TableModel(name, tokens, {"": {next_token: 1.0}}, ends=[*others, end])


class Listening(TableModel):
    """Notes what it is fed."""

    def open(self, n_rows: int) -> Session:
        session = super().open(n_rows)
        self.fed: list[int] = []
        plain = session.feed

        def feed(rows: Any, tokens: Any, n_last: Any, **kwargs: Any) -> ModelOutput:
            self.fed.extend(token for new in tokens for token in new)
            return plain(rows, tokens, n_last, **kwargs)

        session.feed = feed  # type: ignore[method-assign]
        return session


def test_the_end_of_an_assistant_ends_the_text_when_the_assistant_writes_it() -> None:
    base = Listening("base", [*TEXT, "<end>"], {"": {"a": 1.0}}, ends=["<end>"])
    ensemble = Ensemble([base, talking("left", "<eot>", "<eot>")])
    answer = ensemble.generate("b", {"kind": "single", "params": {"model": "left"}})[0]
    assert answer.finish_reason == "eos" and answer.text == ""
    assert [(t.text, t.model) for t in answer.trace] == [("<eot>", "left")]
    random = {"kind": "random", "params": {"weights": [0.6, 0.4]}}
    answers = ensemble.generate(["b", "c", "a"] * 3, random, seed=1, max_new_tokens=50)
    for answer in answers:
        assert answer.finish_reason == "eos"
        assert answer.text == "a" * (len(answer.trace) - 1)
        assert answer.trace.tokens[-1].model == "left"
    assert set(base.fed) <= {0, 1, 2}, "the base model read a token that it does not have"


def test_the_end_of_one_model_does_not_end_the_text_when_another_writes_it() -> None:
    """A special token of both, which is an end for the assistant only, adds nothing to the text."""
    base = TableModel("base", [*TEXT, "<eot>", "<end>"], {"": {"<eot>": 1.0}}, ends=["<end>"])
    base.tokenizer = literal(*TEXT, "<eot>", "<end>", specials=("<eot>",), ends=("<end>",))
    ensemble = Ensemble([base, talking("left", "a", "<eot>")])
    answer = ensemble.generate("b", "single", max_new_tokens=5)[0]
    assert answer.finish_reason == "length" and answer.text == "" and len(answer.trace) == 5
    mixed = ensemble.generate(
        "b", {"kind": "average", "params": {"weights": [0.9, 0.1]}}, max_new_tokens=5
    )[0]
    assert mixed.finish_reason == "eos" and len(mixed.trace) == 1  # a mixture's: any model's


def test_an_added_end_of_text_of_a_transformers_model_ends_its_texts_only() -> None:
    wider = byte_level(specials=["<|stop|>"])
    network_ = network("gpt2", 4)
    bigger = copy.deepcopy(network_)
    bigger.resize_token_embeddings(len(wider), mean_resizing=False)
    stop = len(wider) - 1
    with torch.no_grad():  # the new token is written wherever "b" would be unlikely, so: soon
        bigger.lm_head.weight[stop] = bigger.lm_head.weight[:stop].mean(0) * 8
    bigger.generation_config.eos_token_id = [stop]
    assistant = TransformersModel("left", bigger, wider)
    ensemble = Ensemble([model("llama", "base"), assistant])
    shared = named(ensemble.vocabulary, "<|stop|>")
    assert shared == len(shared_tokenizer())
    assert ensemble.vocabulary.end_ids(1) == {shared, shared_tokenizer().eos_token_id}
    assert ensemble.vocabulary.end_ids(0) == {shared_tokenizer().eos_token_id}
    alone = Ensemble([assistant]).generate(["ab", "cd"], max_new_tokens=12)
    through = ensemble.generate(
        ["ab", "cd"], {"kind": "confidence", "params": {"threshold": 2}}, max_new_tokens=12
    )
    assert [a.text for a in alone] == [a.text for a in through]


# --- refusals ------------------------------------------------------------------------------------


def test_different_tokenizers_are_refused_with_both_names_and_the_first_difference() -> None:
    with pytest.raises(VocabularyError) as caught:
        join(literal("a", "b", "c"), literal("a", "x", "y", "c"))
    assert str(caught.value) == (
        "models 'base' and 'left' have different tokenizers (2 of 3 tokens differ, the first is "
        "id 1: 'b' and 'x'); all models of an ensemble must share one vocabulary, so choose "
        "models of one family."
    )
    spm = HuggingFaceTokenizer(sentencepiece(), "m")
    for pair in ((adapter(), spm), (spm, adapter())):
        with pytest.raises(VocabularyError, match=r"^models 'base' and 'left' have different"):
            join(*pair)


def test_the_assistant_that_differs_is_the_one_that_is_named() -> None:
    with pytest.raises(VocabularyError, match=r"^models 'base' and 'right' have different"):
        join(literal("a", "b"), literal("a", "b"), literal("b", "a"))


# --- words ---------------------------------------------------------------------------------------


def test_a_token_begins_a_word_if_it_begins_with_white_space_or_is_special() -> None:
    tokens = [" a", "a", "\tb", "\n", "a b", "<end>", ".", "\u00a0x"]
    vocabulary = join(LiteralTokenizer(tokens, ends=["<end>"]))
    assert vocabulary.starts_word.tolist() == [True, False, True, True, False, True, False, False]


def test_names_show_text_specials_and_broken_bytes() -> None:
    tokenizer = adapter()
    vocabulary = join(tokenizer)
    assert vocabulary.name(id_of(tokenizer, "Ġthe")) == " the"
    assert vocabulary.name(id_of(tokenizer, END)) == END
    assert vocabulary.name(id_of(tokenizer, "ðŁ")) == "\\xf0\\x9f"

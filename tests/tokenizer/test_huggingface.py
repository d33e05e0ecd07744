"""Tokens of the tokenizers library as bytes, and back without loss."""

from __future__ import annotations

import itertools
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_models import END, byte_level, decoder_replaced, sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from multicolm.errors import InputError, VocabularyError
from multicolm.testing import check_tokenizer
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer

TINY = Path(__file__).parents[2] / "registry" / "tiny"
KINDS = ["byte-level", "bpe", "bpe-no-prefix", "unigram", "unigram-no-prefix", "trained"]
KINDS += [f"tiny-{path.parent.name}" for path in sorted(TINY.glob("*/tokenizer.json"))]


@lru_cache(maxsize=16)
def raw(kind: str) -> hf.PreTrainedTokenizerFast:
    if kind == "byte-level":
        return byte_level()
    if kind == "trained":
        return trained()
    if kind.startswith("tiny-"):
        return hf.AutoTokenizer.from_pretrained(TINY / kind.removeprefix("tiny-"))
    return sentencepiece(kind.split("-")[0], prefix=not kind.endswith("no-prefix"))


def trained() -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE that learned its merges, with the splits of GPT-2."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    text = "the naïve café, the old café: 你好 你好 😀😀 and the\n\n  rest\tof the theme"
    inner.train_from_iterator([text] * 3, trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)


@lru_cache(maxsize=16)
def adapter(kind: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(raw(kind), "m")


TEXTS = st.text(
    st.one_of(
        st.sampled_from(" \n\t\r▁Ġabthe.,<>|éß你😀👩‍👩‍👧\u00a0\u00ad\ufeff"),
        st.characters(exclude_categories=("Cs",)),
    ),
    max_size=30,
).filter(lambda text: "▁" not in text)  # the one character that SentencePiece cannot tell apart


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text=" ")
@example(text="  the  a ")
@example(text="the the\n\n\tthe")
@example(text="👩‍👩‍👧 naïve é")
@example(text="<|end|></s><s><0x41>")
def test_decoding_what_was_encoded_gives_the_bytes_of_the_text(kind: str, text: str) -> None:
    # A Unigram model takes the spellings of its byte tokens for those tokens.
    assume(not (kind.startswith("unigram") and "<0x" in text))
    tokenizer = adapter(kind)
    ids = tokenizer.encode_continuation(text)
    assert tokenizer.decode(ids) == text.encode()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_decoding_in_pieces_equals_decoding_at_once(kind: str, text: str, cuts: list[int]) -> None:
    tokenizer = adapter(kind)
    ids = tokenizer.encode(text)
    places = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [ids[a:b] for a, b in itertools.pairwise(places)]
    assert b"".join(map(tokenizer.decode, pieces)) == tokenizer.decode(ids)
    assert b"".join(map(tokenizer.token_bytes, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_tokens_decode_as_the_tokenizers_own_decoder_does(
    kind: str, data: st.DataObject
) -> None:
    """Apart from a space that it strips at the very start."""
    tokenizer = adapter(kind)
    regular = [i for i in range(tokenizer.n_tokens) if tokenizer.special_name(i) is None]
    ids = data.draw(st.lists(st.sampled_from(regular), max_size=12))
    own = raw(kind).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    ours = tokenizer.decode(ids).decode(errors="replace")
    if kind == "byte-level" or kind.startswith(("tiny", "trained")):
        assert own == ours
    else:  # broken bytes are shown in other ways there
        keep = str.maketrans("", "", "\ufffd")
        readable = own.translate(keep), ours.translate(keep)
        if "\ufffd" not in own + ours:
            assert readable[0] == (ours.removeprefix(" ") if "no-prefix" not in kind else ours)


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_and_built_tokenizers_keep_the_public_laws(kind: str) -> None:
    check_tokenizer(adapter(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_a_name_and_no_bytes(kind: str) -> None:
    tokenizer = adapter(kind)
    named = [i for i in range(tokenizer.n_tokens) if tokenizer.special_name(i) is not None]
    assert named and tokenizer.end_ids <= set(named)
    assert all(tokenizer.token_bytes(i) == b"" for i in named)


def test_a_prompt_begins_as_the_tokenizer_begins_texts_and_a_continuation_does_not() -> None:
    inner = sentencepiece()
    from tokenizers import processors

    inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = HuggingFaceTokenizer(inner, "m")
    assert tokenizer.encode("the")[0] == 1 == tokenizer.encode("the").count(1)
    assert tokenizer.decode(tokenizer.encode("the")) == b" the"  # its own prefix
    assert 1 not in tokenizer.encode_continuation("the")
    assert tokenizer.decode(tokenizer.encode_continuation("the")) == b"the"
    assert tokenizer.decode(tokenizer.encode_continuation(" the")) == b" the"


def test_names_of_special_tokens_in_a_text_are_text_unless_asked_otherwise() -> None:
    tokenizer = adapter("byte-level")
    assert tokenizer.encode_rendered(END) == list(tokenizer.end_ids)
    assert tokenizer.decode(tokenizer.encode(END)) == END.encode()
    assert tokenizer.decode(tokenizer.encode_continuation(END)) == END.encode()


def test_prefix_spaces_of_byte_level_tokenizers_stay_out_of_continuations() -> None:
    inner = byte_level()
    inner.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = HuggingFaceTokenizer(inner, "m")
    assert tokenizer.decode(tokenizer.encode("a")) == b" a"
    assert tokenizer.decode(tokenizer.encode_continuation("a")) == b"a"


def test_added_tokens_of_text_stand_for_themselves() -> None:
    inner = byte_level(added=["<think>", "   ", "naïve é", "你好"])
    tokenizer = HuggingFaceTokenizer(inner, "m")
    for text in ("<think>", "a   b", "naïve é", "x你好y"):
        assert tokenizer.decode(tokenizer.encode_continuation(text)) == text.encode()
        assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
    added = [i for i in range(tokenizer.n_tokens) if tokenizer.piece(i) == "naïve é"]
    assert tokenizer.token_bytes(added[0]) == "naïve é".encode()
    assert tokenizer.special_name(added[0]) is None


def test_blanks_that_are_listed_as_added_tokens_are_blanks() -> None:
    """Gemma lists its runs of blanks as added tokens, in SentencePiece's spelling."""
    tokenizer = HuggingFaceTokenizer(sentencepiece(added=["▁▁", "▁▁▁▁", "\n\n"]), "m")
    four = next(i for i in range(tokenizer.n_tokens) if tokenizer.piece(i) == "▁▁▁▁")
    assert tokenizer.token_bytes(four) == b"    "
    for text in ("a  b", "  ", "a\n\nb"):
        assert tokenizer.decode(tokenizer.encode_continuation(text)) == text.encode()


def test_pieces_that_look_like_bytes_and_are_none_are_text() -> None:
    inner = sentencepiece(added=["<0xZZ>"])
    tokenizer = HuggingFaceTokenizer(inner, "m")
    assert tokenizer.decode(tokenizer.encode_continuation("<0xZZ>")) == b"<0xZZ>"


@pytest.mark.parametrize(
    ("decoder", "shown"),
    [
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"),
        ({"type": "BPEDecoder", "suffix": "</w>"}, "BPEDecoder"),
        (
            {
                "type": "Sequence",
                "decoders": [
                    {"type": "Fuse"},
                    {"type": "CTC", "pad_token": "p", "word_delimiter_token": "|", "cleanup": True},
                ],
            },
            "CTC . Fuse",
        ),
        ({"type": "Fuse"}, "Fuse"),
        (None, "none"),
    ],
)
def test_other_decoders_are_refused_by_name(decoder: dict[str, object], shown: str) -> None:
    with pytest.raises(
        VocabularyError, match=rf"^model 'bert' has a tokenizer whose decoder \({shown}\) is not"
    ):
        HuggingFaceTokenizer(decoder_replaced(byte_level(), decoder), "bert")


def test_a_tokenizer_without_a_fast_backend_is_refused_by_name() -> None:
    class Slow(hf.PythonBackend):
        @property
        def vocab_size(self) -> int:
            return 1

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(VocabularyError, match=r"^model 'old' has .* without a fast .*\(Slow\)"):
        HuggingFaceTokenizer(Slow(), "old")


def test_ids_without_a_token_have_no_bytes_and_no_name() -> None:
    inner = Tokenizer(models.BPE(vocab={"a": 0, "b": 5}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    tokenizer = HuggingFaceTokenizer(hf.PreTrainedTokenizerFast(tokenizer_object=inner), "m")
    assert tokenizer.n_tokens == 6
    assert [tokenizer.piece(i) for i in range(6)] == ["a", None, None, None, None, "b"]
    assert tokenizer.decode([0, 1, 5]) == b"ab" and tokenizer.special_name(1) is None


def test_tokens_behind_the_last_embedding_are_none() -> None:
    inner = byte_level(specials=["<pad>"], added=["<think>"])
    tokenizer = HuggingFaceTokenizer(inner, "m", [265, 267], n_embeddings=len(inner) - 2)
    assert tokenizer.n_tokens == len(inner) - 2
    assert all(i < tokenizer.n_tokens for i in tokenizer.end_ids)
    for text in ("<pad>", "a <think>"):
        with pytest.raises(InputError, match=r"model 'm' has a token '<.*>' \(id 26"):
            tokenizer.encode_rendered(text)


def test_a_chat_becomes_tokens_by_the_models_own_template() -> None:
    inner = byte_level(specials=["<|user|>"])
    tokenizer = HuggingFaceTokenizer(inner, "m")
    inner.chat_template = (
        "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}Reply:{% endif %}"
    )
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids) == b"hiReply:"
    assert tokenizer.special_name(ids[0]) == "<|user|>"
    assert (
        ids
        == inner.apply_chat_template(
            [{"role": "user", "content": "hi"}], add_generation_prompt=True
        )["input_ids"]
    )
    inner.chat_template = "{{ nothing.here.at.all }}"
    with pytest.raises(InputError, match="the chat template of model 'm' refuses these messages"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


CHAT: Any = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] + 5 }}", r"fails on these messages: TypeError: can only conc"),
        ("{% for i in range(10**9) %}x{% endfor %}", r"fails on these messages: OverflowError: R"),
        ("{{ 1 // 0 }}", r"fails on these messages: ZeroDivisionError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"fails on .*: RecursionError: "),
        ("{{ messages | sort(attribute='x') | first + {} }}", "fails|refuses"),
        ("{% if %}", r"is not right in line 1: .* Mend it, or set another one with `chat_temp"),
        ("{{ raise_exception('no ' + messages[0]['content']) }}", "refuses these messages: no hi$"),
    ],
)
def test_whatever_goes_wrong_in_a_chat_template_is_an_error_of_input(
    template: str, message: str
) -> None:
    inner = byte_level()
    inner.chat_template = template
    with pytest.raises(InputError, match=f"^the chat template of model 'm' ({message})"):
        HuggingFaceTokenizer(inner, "m").encode_chat(CHAT)


def test_a_template_that_refuses_a_message_quotes_it_as_it_was_written() -> None:
    inner = byte_level()
    inner.chat_template = "{{ raise_exception('no role ' + messages[0]['role']) }}"
    message: Any = {"role": f"user{END}", "content": "hi"}
    with pytest.raises(InputError, match=rf"refuses these messages: no role user{re.escape(END)}$"):
        HuggingFaceTokenizer(inner, "m").encode_chat([message])


def test_templates_for_some_chats_only_are_named_where_one_for_every_chat_is_missing() -> None:
    inner = byte_level()
    inner.chat_template = {"tool_use": "T", "rag": "R"}
    tokenizer = HuggingFaceTokenizer(inner, "m")
    with pytest.raises(InputError, match=r"^model 'm' has .* for rag and tool_use only"):
        tokenizer.encode_chat(CHAT)
    inner.chat_template = {"tool_use": "T", "default": "{{ messages[0]['content'] }}"}
    assert tokenizer.decode(tokenizer.encode_chat(CHAT)) == b"hi"


def test_an_added_token_may_keep_the_blanks_beside_it() -> None:
    inner = byte_level()
    inner.add_tokens([AddedToken("<t>", special=False, normalized=False, lstrip=False)])
    tokenizer = HuggingFaceTokenizer(inner, "m")
    assert tokenizer.decode(tokenizer.encode_continuation("a <t> b")) == b"a <t> b"

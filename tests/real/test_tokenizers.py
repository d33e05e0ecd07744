"""Real tokenizers on text that breaks tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from multicolm.backend.loading import load_tokenizer
from multicolm.config import ModelConfig
from multicolm.errors import MulticolmWarning
from multicolm.testing import check_tokenizer
from multicolm.tokenizer.agreement import PROBES, differences
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer
from multicolm.tokenizer.incremental import IncrementalEncoder

# Bytes of which SmolLM2's vocabulary has no token; it has never seen them.
SMOL_LACKS = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}
BREAKING = (
    *("\U0001f600", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9", "\U0001f3f3\ufe0f"),
    *("e\u0301", "\u0323", "\u1100\u1161", "\u4f60\u597d", "\u65e5\u672c", "\ud55c", "\uff0c"),
    *("\u05e9\u05dc", "\u0645\u0631", "\u202e", "\u0663", "\u200d", "\u200c", "\ufeff", "\xad"),
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\t\t", "\r\n", "\xa0", "\u3000", "\x00", "\x7f"),
    *("a", "word", " the", "Don't", "'s", "1", "23", "\xbd", "\xb2", ".", "!!", "(){}", "__"),
    *("<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "<0x41>", "<unused0>"),
    *("\ufffd", "\U0010ffff", "\u01c5", "\u0131", "\x04", "\U0004ffff"),
)
texts = st.lists(st.one_of(st.sampled_from(BREAKING), st.text(max_size=3)), max_size=8).map("".join)


@pytest.fixture(params=["smol", "smol_gguf", "gemma_gguf", "gemma"])
def tokenizer(request: pytest.FixtureRequest) -> TokenizerAdapter:
    return request.getfixturevalue(request.param).tokenizer


def spelled(tokenizer: TokenizerAdapter, text: str) -> bool:
    """Whether the vocabulary can spell a text, judged by its own manner and not by the adapter."""
    if tokenizer.n_tokens < 100_000:  # SmolLM2: byte-level
        return not SMOL_LACKS & set(text.encode())
    return "\u2581" not in text  # Gemma: it stands for a blank


def test_adapters_of_real_tokenizers_keep_the_laws(tokenizer: TokenizerAdapter) -> None:
    check_tokenizer(tokenizer, [text for text in PROBES if spelled(tokenizer, text)])


def test_a_text_comes_back_where_the_vocabulary_can_spell_it(tokenizer: TokenizerAdapter) -> None:
    @given(texts)
    @settings(max_examples=150, deadline=None)
    def check(text: str) -> None:
        ids = tokenizer.encode_continuation(text)
        assert tokenizer.covers_text(text) == spelled(tokenizer, text)
        assert (tokenizer.decode(ids) == text.encode()) == spelled(tokenizer, text)
        # Names of special tokens are text, and a prompt is a continuation after what begins it.
        assert not any(tokenizer.special_name(i) for i in ids)
        start = tokenizer.encode("")
        assert tokenizer.encode(text)[: len(start)] == start

    check()


def test_a_growing_text_has_the_tokens_of_the_whole(tokenizer: TokenizerAdapter) -> None:
    @given(texts, st.lists(st.integers(0, 60), max_size=4))
    @settings(max_examples=60, deadline=None)
    def check(text: str, cuts: list[int]) -> None:
        content = text.encode()
        encoder = IncrementalEncoder(tokenizer)
        last = 0
        for cut in sorted(cut for cut in cuts if cut <= len(content)):
            encoder.append(content[last:cut])
            assert encoder.ids == tokenizer.encode_bytes(content[:cut])
            last = cut
        encoder.append(content[last:])
        assert encoder.ids == tokenizer.encode_bytes(content)

    check()


def test_every_byte_is_a_token_or_is_replaced(tokenizer: TokenizerAdapter) -> None:
    lacking = SMOL_LACKS if tokenizer.n_tokens < 100_000 else set()
    for byte in range(256):
        decoded = tokenizer.decode(tokenizer.encode_bytes(b"a" + bytes([byte])))
        if byte not in lacking:
            assert decoded == b"a" + bytes([byte]), byte
        else:
            assert decoded in (b"a", b"a\xef\xbf\xbd"), byte


@pytest.mark.parametrize("name", ["smol", "gemma"])
def test_a_gguf_tokenizer_cuts_texts_as_its_hugging_face_twin(
    name: str, request: pytest.FixtureRequest
) -> None:
    one, other = (request.getfixturevalue(each).tokenizer for each in (f"{name}_gguf", name))
    # Of what the vocabulary cannot spell they make different things, none of them the text.
    same = texts.filter(lambda text: spelled(one, text))

    @given(same)
    @settings(max_examples=300, deadline=None)
    def check(text: str) -> None:
        assert one.encode(text) == other.encode(text)
        assert one.encode_continuation(text) == other.encode_continuation(text)
        if name == "smol":  # Gemma's unused tokens have names in one of them
            assert one.encode_rendered(text) == other.encode_rendered(text)

    check()


def test_where_a_conversion_has_lost_a_rule_users_are_told_texts_and_ids(
    smol: Any, smol_gguf: Any, smol_folder: Path
) -> None:
    # As transformers converts the file: digits are not cut off one by one.
    inner = load_tokenizer("m", ModelConfig(model=str(smol_folder)))
    kept = json.loads(inner.backend_tokenizer.to_str())
    kept["pre_tokenizer"] = kept["pre_tokenizer"]["pretokenizers"][-1]
    inner._tokenizer = Tokenizer.from_str(json.dumps(kept))
    lost = HuggingFaceTokenizer(inner, "m", smol_gguf.tokenizer.end_ids)
    found = differences(lost, smol_gguf.tokenizer)
    assert any("'def f(x):" in each and "216='Ġ' 216='Ġ' here, 256='ĠĠ'" in each for each in found)
    # The right one differs in the ends only, of which llama.cpp knows more by their names.
    [ends] = differences(smol.tokenizer, smol_gguf.tokenizer)
    assert ends == (
        "ends a text with <|im_end|> (2), and the other with <|endoftext|> (0), <|im_end|> (2), "
        "<reponame> (4)"
    )


CHAT = [
    {"role": "user", "content": "Is <|im_end|> text?\n\n 1"},
    {"role": "assistant", "content": "Yes \U0001f469\u200d\U0001f467."},
    {"role": "user", "content": "  Why?"},
]
SYSTEM = {"role": "system", "content": "Answer in one word."}


@pytest.mark.parametrize("system", [False, True])
def test_chats_with_and_without_a_system_message_are_as_in_transformers(
    system: bool, smol: Any, smol_gguf: Any
) -> None:
    harmless = [{**m, "content": m["content"].replace("<|im_end|>", "it")} for m in CHAT]
    inner = smol.tokenizer.tokenizer
    for chat in (CHAT, harmless):
        chat = [SYSTEM, *chat] if system else chat
        ids = smol.tokenizer.encode_chat(chat)
        assert smol_gguf.tokenizer.encode_chat(chat) == ids
        # Its template speaks for whoever leaves the system message out.
        assert (b"named SmolLM" in smol.tokenizer.decode(ids)) == (not system)
        # Turns end where the template ends them, and nowhere else.
        assert [smol.tokenizer.special_name(i) for i in ids].count("<|im_end|>") == 4
        if "<|im_end|>" not in chat[-3]["content"]:
            right = inner.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            assert ids == list(right)


def test_a_model_without_a_template_reads_chats_in_the_plain_one(gemma_gguf: Any) -> None:
    assert gemma_gguf.tokenizer.chat_template is None
    with pytest.warns(MulticolmWarning, match="model 'gemma' has no chat template, so its chats"):
        ids = gemma_gguf.tokenizer.encode_chat([SYSTEM, CHAT[-1]])
    text = gemma_gguf.tokenizer.decode(ids).decode()
    # With its token of the beginning, and what was asked.
    assert gemma_gguf.tokenizer.special_name(ids[0]) == "<bos>"
    assert text == "System: Answer in one word.\n\nUser:   Why?\n\nAssistant:"

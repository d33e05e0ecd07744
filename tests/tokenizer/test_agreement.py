"""Where two tokenizers of one vocabulary part, in sentences for users."""

from __future__ import annotations

from tiny_models import byte_level
from tokenizers import pre_tokenizers

from multicolm.tokenizer.agreement import differences
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer


def test_a_tokenizer_agrees_with_itself() -> None:
    one = HuggingFaceTokenizer(byte_level(), "m")
    assert differences(one, HuggingFaceTokenizer(byte_level(), "n")) == []


def test_a_lost_pre_tokenizer_shows_as_a_text_that_is_cut_otherwise() -> None:
    # What a conversion may lose: digits that stand alone, so that blanks before them stay whole.
    merges = byte_level()
    lost = byte_level()
    merges.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lost.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("t", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    one, other = (HuggingFaceTokenizer(inner, "m") for inner in (merges, lost))
    text = next(t for t in ("the thin", "then the") if one.encode(t) != other.encode(t))
    [found] = differences(one, other, [text])
    assert found.startswith(f"cuts {text!r} otherwise: ") and " in the other" in found
    assert "'Ġ" in found or "='" in found  # pieces by their ids


def test_other_ends_and_other_bytes_are_named() -> None:
    inner, other = byte_level(specials=["<stop>", "<end>"]), byte_level(added=["<stop>", "<end>"])
    ids = [inner.convert_tokens_to_ids(name) for name in ("<stop>", "<end>")]
    one = HuggingFaceTokenizer(inner, "m", ids)
    two = HuggingFaceTokenizer(other, "m", ids[:1])
    found = differences(one, two, [])
    assert f", <stop> ({ids[0]}), <end> ({ids[1]}), and the other with" in found[0]
    assert f"reads 2 tokens otherwise, such as {ids[0]}: b'' here, b'<stop>'" in found[1]

"""Tokenizers in the manner of those in use, trained on a page of text.

Each is built once and then shared: do not change one, ask for a :func:`fresh` one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import transformers as hf
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from multicolm.tokenizer.huggingface import HuggingFaceTokenizer

SPECIALS = ("<|im_start|>", "<|im_end|>")
ADDED = ("foo bar", "<think>", "\n\n\n")  # added tokens of text; the first one spans two words

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and then the dog didn't jump over the fox.",
    "What is 2 * x + 15 if x = 7? It's 29; they'll say we've 1234567 reasons, I'd say 3.14159.",
    "    def encode(self, text: str) -> list[int]:\n        return [self.ids[t] for t in text]\n",
    '#include <stdio.h>\n\nint main(void) {\n\tprintf("hello, world\\n");\n\treturn 0;\n}\n\n\n',
    "Voilà l'été: où êtes-vous, chère Zoë? À bientôt, mon ami. Où ça? Là-bas, très loin.",
    "Der Fluß fließt über die Straße, größer als je zuvor; fünf Bäume stehen schön am Ufer.",
    "你好，世界。今天的天气很好，我们去公园走走吧。语言模型可以一起写文章，一个词一个词地写。",  # noqa: RUF001
    "これは日本語の文章です。東京は今日も雨ですが、明日は晴れるでしょう。カタカナもあります。",
    "Это русский текст, в котором есть слова и запятые. Привет, мир, как твои дела сегодня?",
    "مرحبا بالعالم، كيف حالك اليوم؟ هذا نص عربي قصير. שלום עולם, מה שלומך היום?",
    "नमस्ते दुनिया, आप कैसे हैं? यह हिंदी में लिखा गया एक छोटा वाक्य है। किताब पढ़ना अच्छा है।",
    # Letters that are written as a letter and a mark once characters are put together.
    "\ufb1d, \ufb1d, \ufb1d; \u0958, \u0958, \u0958।",
    "안녕하세요 세계, 오늘 날씨가 좋네요. 한국어 문장도 하나 있어야 합니다.",
    "Emoji: 😀😀👍🏽 👩‍👩‍👧 🇩🇪 ❤️ and more 😀; price: 5€, 10 £, 100 %, x² + y² = z².",
    "https://example.org/path?query=1&other=two#three HTTPServerError, camelCaseNames, SNAKE_CASE",
)

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def built(kind: str) -> hf.PreTrainedTokenizerFast:
    """The tokenizer of one of ``KINDS``."""
    return _built(kind)


@lru_cache(maxsize=32)
def _built(kind: str) -> hf.PreTrainedTokenizerFast:
    return fresh(kind)


def fresh(kind: str) -> hf.PreTrainedTokenizerFast:
    """The same, of one's own."""
    return KINDS[kind]()


@lru_cache(maxsize=32)
def adapter(kind: str) -> HuggingFaceTokenizer:
    """The adapter of one of ``KINDS``."""
    return HuggingFaceTokenizer(built(kind), kind)


# --- byte-level ----------------------------------------------------------------------------------


def byte_level_bpe(
    *patterns: str,
    digits: bool = False,
    nfc: bool = False,
    ignore_merges: bool = False,
    bos: str | None = None,
    end: str = "<|endoftext|>",
    added: Sequence[str | AddedToken] = ADDED,
) -> hf.PreTrainedTokenizerFast:
    """A BPE over bytes.

    Args:
        patterns: by which texts are split before, one after another; none: that of GPT-2, built in.
        digits: whether digits are split off one by one first.
        nfc: whether characters are put together first.
        ignore_merges: whether words that are tokens are taken whole, as Llama 3 does.
        bos: put in front of every text.
        end: ends a text.
        added: tokens of text.
    """
    splits: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    splits += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(splits)
    inner.decoder = decoders.ByteLevel()
    if nfc:
        inner.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    if ignore_merges:
        inner = _with_words(inner, ("Ġunmergeable", "zyx", "zyxw", "Ġ,,;"))
    return _wrapped(inner, bos=bos, end=end, added=added)


def _with_words(inner: Tokenizer, words: Iterable[str]) -> Tokenizer:
    """Words that no merge makes, which are tokens all the same."""
    settings = json.loads(inner.to_str())
    model = settings["model"]
    for word in words:
        model["vocab"].setdefault(word, len(model["vocab"]))
    model["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(settings))


# --- SentencePiece -------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _trained_pieces() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Characters and merges as SentencePiece learns them: no token goes on behind a space."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600, min_frequency=1, limit_alphabet=180, show_progress=False
    )
    lines = [line for text in CORPUS for line in text.split("\n")]
    inner.train_from_iterator(lines, trainer)
    model = json.loads(inner.to_str())["model"]
    merges = tuple((left, right) for left, right in model["merges"])
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    return tuple(pieces), merges


def sentencepiece_bpe(
    *,
    prefix: bool = True,
    metaspace: bool = False,
    merges: Sequence[tuple[str, str]] = (),
    bos: str = "<s>",
    end: str = "</s>",
    added: Sequence[str | AddedToken] = ADDED,
) -> hf.PreTrainedTokenizerFast:
    """A BPE over characters, with bytes for those that have no token.

    Args:
        prefix: whether a space is put in front of every text.
        metaspace: whether spaces are marked by a pre-tokenizer, not by a normalizer.
        merges: besides those that were trained.
        bos: put in front of every text.
        end: ends a text.
        added: tokens of text.
    """
    pieces, trained = _trained_pieces()
    blanks = [("▁" * n, "▁" * n) for n in (1, 2, 4)]
    joined = [left + right for left, right in (*blanks, *merges)]
    names = ["<unk>", bos, end, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *joined]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(dict.fromkeys(names))},
            merges=[*trained, *blanks, *merges],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    if metaspace:
        scheme = "first" if prefix else "never"
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        parts = [normalizers.Prepend("▁")] if prefix else []
        inner.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
        if not prefix:  # as in Gemma's file; it finds nothing
            inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = _sentencepiece_decoder(strips=prefix)
    return _wrapped(inner, bos=bos, end=end, added=added, unk="<unk>")


def sentencepiece_words() -> hf.PreTrainedTokenizerFast:
    """A Unigram model that splits at spaces first, as T5 does."""
    pieces, _ = _trained_pieces()
    scored = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    scored += [(piece, -2.0 - 1.0 / len(piece)) for piece in pieces]
    inner = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    inner.decoder = _sentencepiece_decoder(strips=True)
    return _wrapped(inner, bos=None, end="</s>", added=ADDED, unk="<unk>")


def _sentencepiece_decoder(*, strips: bool) -> decoders.Decoder:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if strips else [])])


# --- what is around them -------------------------------------------------------------------------


def _wrapped(
    inner: Tokenizer,
    *,
    bos: str | None,
    end: str,
    added: Sequence[str | AddedToken],
    unk: str | None = None,
) -> hf.PreTrainedTokenizerFast:
    special = [name for name in (unk, bos, end, *SPECIALS) if name is not None]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    inner.add_tokens(
        [
            token
            if isinstance(token, AddedToken)
            else AddedToken(token, special=False, normalized=False)
            for token in added
        ]
    )
    if bos is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    names = {"bos_token": bos, "eos_token": end, "unk_token": unk}
    given = {role: name for role, name in names.items() if name is not None}
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, **given)


KINDS: dict[str, Callable[[], hf.PreTrainedTokenizerFast]] = {
    "gpt2": byte_level_bpe,
    "smollm": lambda: byte_level_bpe(digits=True),
    "llama3": lambda: byte_level_bpe(
        LLAMA3, ignore_merges=True, bos="<|begin_of_text|>", end="<|eot_id|>"
    ),
    "cl100k": lambda: byte_level_bpe(CL100K),
    "o200k": lambda: byte_level_bpe(O200K),
    "qwen2": lambda: byte_level_bpe(QWEN2, nfc=True),
    "qwen35": lambda: byte_level_bpe(QWEN35, nfc=True),
    "tekken": lambda: byte_level_bpe(TEKKEN, bos="<s>", end="</s>"),
    "deepseek3": lambda: byte_level_bpe(*DEEPSEEK3),
    "llama2": sentencepiece_bpe,
    "mistral": lambda: sentencepiece_bpe(metaspace=True),
    "gemma": lambda: sentencepiece_bpe(
        prefix=False, bos="<bos>", end="<eos>", added=[*ADDED, "▁▁▁", "<table>"]
    ),
    # Tokens across spaces, so that fewer seams are left.
    "spanning": lambda: sentencepiece_bpe(
        merges=[("e", "▁"), ("e▁", "d"), ("▁o", "ver"), ("r", "▁the"), (",", "▁")]
    ),
    "t5": sentencepiece_words,
}
BYTE_LEVEL = tuple(list(KINDS)[:9])
SENTENCEPIECE = tuple(list(KINDS)[9:])
COMPOSING = ("qwen2", "qwen35")


# --- texts ---------------------------------------------------------------------------------------

# What tokenizers trip over, of every plane; escaped where it would not be seen.
FRAGMENTS = (
    *(
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\n\n",
        "\n\n\n",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x85",
        "\x0b",
    ),
    *("\x00", "\x1c", "\u180e", "\u200b", "\u200d", "\ufeff", "\u00ad"),
    *("'", "'s", "'ll", "'l", "'S", "\u2019s", "\u017f", "a", "the", "The", " the", "HTTP", "Aa"),
    *(
        "1",
        "12",
        "1234",
        "\u00b2",
        "\u2167",
        "\u0663",
        ".",
        ",",
        "!!",
        "/",
        "-",
        "\\",
        "_",
        "$",
        "|",
    ),
    *("\u00e9", "e\u0301", "\u0301", "\u0327", "\u0308", "\u0338", "\u00df", "\u212a", "\u212b"),
    *("\u037e", "\u1fef", "\u2000", "\u0958", "\ufb1d", "\u05b4", "\u05e9", "\u0645", "\u060c"),
    *("你好", "你", "。", "の", "カ", "\u30fb", "\u30fc", "か\u3099", "नमस्ते", "।", "한", "\u4dc0"),
    *("\u1112", "\u1161", "\u11ab", "\U00016d63", "😀", "👍🏽", "👩‍👩‍👧", "❤️"),
    *("\ue000", "\ufffd", "\U00010000", "\U000e0041", "\U0010ffff", "▁", "Ġ"),
    *(
        "foo bar",
        "foo",
        " bar",
        "oo ba",
        "<think>",
        "<thi",
        "nk>",
        "<table>",
        " ,,;",
        "zyx",
        "zyxw",
    ),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "<bos>", "<unk>", "<0x41>"),
    *(" unmergeable", "over the", "e d", "r the", ", "),
)


def random_text(rng: random.Random, n_most: int = 12) -> str:
    """Up to ``n_most`` fragments, words of the corpus and characters of any plane."""
    return "".join(_random_part(rng) for _ in range(rng.randrange(n_most + 1)))


def _random_part(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.75:
        return rng.choice(FRAGMENTS)
    if draw < 0.85:
        return rng.choice(rng.choice(CORPUS).split(" "))
    code = rng.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)  # all but surrogates

"""Tokenizers in the manner of well-known ones, and which of their paths are valid, by trial."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import transformers as hf
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from multicolm.backend.table import TableModel
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.huggingface import HuggingFaceTokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
CORPUS = (
    "the cat sat on the mat, the cats' mats; we'll say it's there, they're here. I'd go, you've",
    "  two  blanks\n\n   three\t\ttabs \n \n  12 123 1234 12345  x = 7 * (y + 15)\r\n\r\n",
    "naïve café, über, 你好 你好吗 😀😀 e\u0301te\u0301 WE'LL don'T o'clock ''' !!! !! ... \n\n\n",
    "def f(x):\n    return x\n\n\n        if 'll' == '\n \n':\n",
)


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def trained(pre_tokenizer: Any, n: int = 420, **options: Any) -> Tokenizer:
    """A byte-level BPE that learned its merges from a few lines."""
    inner = Tokenizer(models.BPE(**options))
    inner.pre_tokenizer = pre_tokenizer
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    inner.train_from_iterator(list(CORPUS) * 3, trainer)
    return inner


def splitting(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def with_whole_words(inner: Tokenizer) -> Tokenizer:
    """In the manner of Llama 3: words in the vocabulary that the merges do not make."""
    import json

    settings = json.loads(inner.to_str())
    vocab = settings["model"]["vocab"]
    for word in ("Ġsatcat", "thethe", "then", "Ġ12", "''''", "sat,"):
        vocab.setdefault(word, len(vocab))
    settings["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(settings))


def with_merges(pairs: Sequence[tuple[bytes, bytes]]) -> Tokenizer:
    """A byte-level BPE with given merges, and the splits of GPT-2."""
    alphabet = bytes_to_characters()
    spelled = [tuple("".join(alphabet[b] for b in part) for part in pair) for pair in pairs]
    vocab = {character: i for i, character in enumerate(alphabet.values())}
    for left, right in spelled:
        vocab.setdefault(left + right, len(vocab))
    vocab["<|end|>"] = len(vocab)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=spelled))
    inner.pre_tokenizer, inner.decoder = GPT2, decoders.ByteLevel()
    return inner


def bytes_to_characters() -> dict[int, str]:
    """How a byte-level vocabulary writes each byte."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet: dict[int, str] = {}
    for text in (*map(chr, range(0x7FF)), "\u0800", *map(chr, range(0x1000, 0xF000, 0x1000))):
        alphabet.update(zip(text.encode(), cut.pre_tokenize_str(text)[0][0], strict=True))
    alphabet.update(
        zip("\U00010000".encode(), cut.pre_tokenize_str("\U00010000")[0][0], strict=True)
    )
    for lead in (0xF1, 0xF2, 0xF3, 0xF4):
        text = bytes([lead, 0x80, 0x80, 0x80]).decode()
        alphabet.update(zip(text.encode(), cut.pre_tokenize_str(text)[0][0], strict=True))
    never = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(alphabet.values()))
    alphabet.update(zip(sorted(set(range(256)) - set(alphabet)), never, strict=True))
    return alphabet


def without_bytes(kept: str) -> Tokenizer:
    """In the manner of SmolLM2: no tokens for bytes that its training texts did not hold."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = GPT2, decoders.ByteLevel()
    alphabet = bytes_to_characters()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        initial_alphabet=[alphabet[byte] for byte in sorted(set(kept.encode()))],
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    inner.train_from_iterator([line for line in CORPUS if line.isascii()] * 3, trainer)
    return inner


def random_merges(seed: int) -> Tokenizer:
    """Merges as they come, across characters and blanks, of which BPE makes only some."""
    chance, pieces = random.Random(seed), [bytes([b]) for b in "the 'l1\n你é".encode()]
    pairs: list[tuple[bytes, bytes]] = []
    while len(pairs) < 60:
        pair = chance.choice(pieces), chance.choice(pieces)
        if pair not in pairs and len(pair[0] + pair[1]) <= 6:
            pairs.append(pair)
            pieces.append(pair[0] + pair[1])
    return with_merges(pairs)


def trained_sentencepiece(manner: str) -> hf.PreTrainedTokenizerFast:
    """A BPE over characters with byte fallback, its merges in the order of Llama's converter."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    if manner == "words":
        learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False)
    lines = ["".join(c for c in line if " " <= c < "\x7f" and c not in "xz=") for line in CORPUS]
    learner.train_from_iterator(lines * 3, trainer)
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece, _ in learned if piece != "<unk>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    if manner == "shuffled":  # ranks that do not grow towards the whole
        random.Random(0).shuffle(merges)
    inner = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    if manner == "gemma":
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    if manner == "words":
        inner.normalizer = None
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    if manner == "llama2":
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if manner == "gemma":
        runs = ["\n", "\n\n", "\n\n\n", "<table>", "▁▁"]
        tokenizer.add_tokens([AddedToken(r, special=False, normalized=False) for r in runs])
    return tokenizer


def wrapped(inner: Tokenizer, added: Sequence[str] = ()) -> hf.PreTrainedTokenizerFast:
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    for i, name in enumerate(added):
        tokenizer.add_tokens([AddedToken(name, special=False, normalized=bool(i % 2))])
    return tokenizer


MAKERS: dict[str, Any] = {
    "gpt2": lambda: wrapped(trained(GPT2)),
    "llama3": lambda: wrapped(with_whole_words(trained(splitting(LLAMA3)))),
    "qwen": lambda: wrapped(trained(splitting(QWEN2)), ["<think>", "</think>", "<tool>"]),
    "o200k": lambda: wrapped(trained(splitting(O200K))),
    "digits": lambda: wrapped(
        trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]))
    ),
    "digit-runs": lambda: wrapped(
        trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), GPT2]))
    ),
    "one-piece": lambda: wrapped(
        trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    ),
    "newlines": lambda: wrapped(
        trained(GPT2), ["\n", "\n\n", "\n\n\n", "  \n", "aba", "bab", "ab"]
    ),
    "random": lambda: wrapped(random_merges(0)),
    "random-too": lambda: wrapped(random_merges(1)),
    "without-bytes": lambda: wrapped(without_bytes("\n abcé你x")),
    "llama2": lambda: trained_sentencepiece("llama2"),
    "shuffled": lambda: trained_sentencepiece("shuffled"),
    "gemma": lambda: trained_sentencepiece("gemma"),
    "words": lambda: trained_sentencepiece("words"),
}


@lru_cache(maxsize=32)
def adapter(kind: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(MAKERS[kind](), kind)


PROBES = (
    *("", "a", "l", "ll", "s", "t", "re", "e", " ", "  ", " a", "1", "12", "123", " 1", "!", "'"),
    *(
        "\n",
        "\n\n",
        " \n",
        "\na",
        "\n ",
        "   \n",
        "\r",
        "\t",
        "é",
        "\u0301",
        "你",
        "😀",
        ".",
        "=",
        "/",
    ),
    *(
        "!\n",
        "''",
        "'s",
        "'l",
        "A",
        "LL",
        "\u3000",
        "x",
        "th",
        "the",
        "n",
        "<",
        "b",
        "ab",
        "ink>",
        "z",
    ),
    *(
        ">",
        "(",
        "ol>",
        "ble>",
        "\u017f",
        "at",
        "cat",
        " \nx",
        "  x",
        "ab ",
        "ba",
        "\n\n\n",
        "\n\n\n\n",
    ),
)


def completions(tail: bytes) -> list[bytes]:
    """What makes characters of an unfinished one: some of every kind that there is."""
    if not tail:
        return [b""]
    found: list[bytes] = []
    length = 4 if tail[0] >= 0xF0 else 3 if tail[0] >= 0xE0 else 2

    def extend(content: bytes) -> None:
        if len(content) == length:
            try:
                content.decode()
            except UnicodeDecodeError:
                return
            found.append(content[len(tail) :])
            return
        options = (
            range(0x80, 0xC0) if length - len(content) <= 2 else (0x80, 0x90, 0x9F, 0xA4, 0xBF)
        )
        for byte in options:
            extend(content + bytes([byte]))

    extend(tail)
    return found


def unfinished(content: bytes) -> bytes | None:
    """The bytes of a character that a text breaks off in; ``None`` if they are no text at all."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content[error.start :] if error.reason == "unexpected end of data" else None
    return b""


def is_valid(tokenizer: TokenizerAdapter, path: Sequence[int]) -> bool:
    """Whether some probe after the bytes of a path encodes to the path and more."""
    content = tokenizer.decode(path)
    tail = unfinished(content)
    if tail is None:
        return False
    for completion in completions(tail):
        text = (content + completion).decode()
        probes = PROBES if not tail else ("", "a", " ")
        for probe in probes:
            # What has no token is left out of an encoding, so a text that holds it proves nothing.
            if tokenizer.encode_continuation(text + probe)[: len(path)] == list(path) and (
                tokenizer.covers_text(text + probe)
            ):
                return True
    return False


class Reference:
    """What the byte bridge means, by counting all valid paths of a model one by one.

    Args:
        tokenizer: the model's tokenizer.
        support: the tokens to which the model ever gives probability.
        probs: the model: per path, the probability of each token of the support.
    """

    def __init__(
        self,
        tokenizer: TokenizerAdapter,
        support: Sequence[int],
        probs: Callable[[tuple[int, ...]], Mapping[int, float]],
    ) -> None:
        self.tokenizer = tokenizer
        self.support = list(support)
        self.probs = probs
        self.after = lru_cache(maxsize=None)(self._after)

    def _after(self, path: tuple[int, ...]) -> tuple[dict[int, float], float, float]:
        """Restricted probabilities of the next tokens, of the end, and Z."""
        given = self.probs(path)
        ends = self.tokenizer.end_ids
        kept = {
            t: p
            for t, p in given.items()
            if p > 0 and self.tokenizer.special_name(t) is None
            and is_valid(self.tokenizer, [*path, t])
        }  # fmt: skip
        content = self.tokenizer.decode(path)
        is_whole = unfinished(content) == b"" and (
            self.tokenizer.encode_continuation(content.decode()) == list(path)
        )
        end = sum(given.get(t, 0.0) for t in ends) if is_whole else 0.0
        total = sum(kept.values()) + end
        return {t: p / total for t, p in kept.items()}, end / total, total

    def mass(self, content: bytes, path: tuple[int, ...] = ()) -> float:
        """M of some bytes, behind a path that they begin with."""
        done = self.tokenizer.decode(path)
        if len(done) >= len(content):
            return 1.0
        rest = content[len(done) :]
        total = 0.0
        for token, prob in self.after(path)[0].items():
            new = self.tokenizer.token_bytes(token)
            if new.startswith(rest):
                total += prob
            elif rest.startswith(new):
                total += prob * self.mass(content, (*path, token))
        return total

    def end_mass(self, content: bytes, path: tuple[int, ...] = ()) -> float:
        """M of some bytes and the end of the text behind them."""
        done = self.tokenizer.decode(path)
        probs, end, _ = self.after(path)
        if done == content:
            return end
        rest = content[len(done) :]
        return sum(
            prob * self.end_mass(content, (*path, token))
            for token, prob in probs.items()
            if rest.startswith(self.tokenizer.token_bytes(token))
        )


def peaked(tokens: Sequence[int], path: Sequence[int], seed: int) -> dict[int, float]:
    """A distribution over tokens that depends on the last three of a path."""
    chance = random.Random(f"{seed} {list(path)[-3:]}")
    weights = [chance.random() ** 4 + 1e-3 for _ in tokens]
    return {t: w / sum(weights) for t, w in zip(tokens, weights, strict=True)}


class Written(TableModel):
    """A model that says what a function of the path says.

    Args:
        tokenizer: its tokenizer.
        probs: the function; a path is what comes behind the prompt.
        n_prompt: how many tokens a prompt has.
    """

    def __init__(
        self,
        tokenizer: TokenizerAdapter,
        probs: Callable[[tuple[int, ...]], Mapping[int, float]],
        n_prompt: int = 1,
    ) -> None:
        self.name = "written"
        self.tokenizer = tokenizer
        self._probs = probs
        self._n_prompt = n_prompt

    def logits_after(self, ids: Sequence[int]) -> torch.Tensor:
        probs = torch.zeros(self.tokenizer.n_tokens, dtype=torch.float64)
        for token, prob in self._probs(tuple(ids[self._n_prompt :])).items():
            probs[token] = prob
        return probs.log()


def support_of(tokenizer: TokenizerAdapter, characters: str, n: int, seed: int) -> list[int]:
    """Some tokens over a few characters, all their single bytes, and the end."""
    known = set(characters.encode())
    fitting = [
        i
        for i in range(tokenizer.n_tokens)
        if tokenizer.token_bytes(i) and set(tokenizer.token_bytes(i)) <= known
    ]
    chosen = random.Random(seed).sample(fitting, min(n, len(fitting)))
    single = [i for i in fitting if len(tokenizer.token_bytes(i)) == 1]
    return sorted({*chosen, *single, *tokenizer.end_ids})

"""Random models and tokenizers, small enough to build in a test.

Weights are scaled up, so that texts are diverse and ties do not happen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from multicolm.backend.base import Session
from multicolm.backend.sessions import UncachedSession
from multicolm.backend.transformers import TransformersModel

torch.set_num_threads(1)  # for models this small, a second thread costs more than it brings

END = "<|end|>"
CONTEXT = 256

PROMPTS = (
    "The quick brown fox",
    "a",
    "Hello there, how are",
    "xyz 123",
    "What is this and that and those, and what of these?",
    "ok",
    "longer prompts go here and they are",
    "ab cd",
)


def alphabet() -> list[str]:
    """The 256 characters of a byte-level vocabulary."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def merged(pairs: Sequence[tuple[str, str]], characters: Sequence[str]) -> models.BPE:
    """A BPE model of these characters and merges."""
    vocab = {character: i for i, character in enumerate(characters)}
    for left, right in pairs:
        vocab.setdefault(left + right, len(vocab))
    return models.BPE(vocab=vocab, merges=list(pairs))


MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("i", "n"),
    ("Ġ", "a"),
    ("o", "u"),
    ("Ġ", "Ġ"),
    ("Ã", "©"),  # é
    ("ð", "Ł"),  # the first half of many emoji
)


def byte_level(
    *, specials: Sequence[str] = (), added: Sequence[str] = (), merges: bool = True, end: str = END
) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE: every text is covered, byte by byte if need be."""
    inner = Tokenizer(merged(MERGES if merges else (), alphabet()))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end)
    for name in specials:
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False)])
    for name in added:
        tokenizer.add_tokens([AddedToken(name, special=False, normalized=False)])
    return tokenizer


def sentencepiece(
    kind: str = "bpe", *, added: Sequence[str] = (), prefix: bool = True
) -> hf.PreTrainedTokenizerFast:
    """A tokenizer that writes spaces as U+2581 and falls back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz.,!?é"]
    pairs = (("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("▁", "▁"), ("i", "n"))
    pieces += [left + right for left, right in pairs]
    if kind == "unigram":
        scored = [(piece, -2.0 - 1.0 / len(piece)) for piece in pieces]
        inner = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
        scheme = "always" if prefix else "never"
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        vocab = {piece: i for i, piece in enumerate(pieces)}
        inner = Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=list(pairs),
                unk_token="<unk>",
                byte_fallback=True,
                fuse_unk=True,
            )
        )
        parts = [normalizers.Prepend("▁")] if prefix else []
        inner.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    for name in added:
        tokenizer.add_tokens([AddedToken(name, special=False, normalized=False)])
    return tokenizer


@lru_cache(maxsize=1)
def shared_tokenizer() -> hf.PreTrainedTokenizerFast:
    """The tokenizer of all models built here; do not change it."""
    return byte_level()


def _width() -> int:
    return len(shared_tokenizer())


def _common() -> dict[str, Any]:
    end = shared_tokenizer().eos_token_id
    return {
        "vocab_size": _width(),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": end,
        "pad_token_id": end,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }


def _older() -> dict[str, Any]:
    """For configurations with names of their own."""
    end = shared_tokenizer().eos_token_id
    return {
        "vocab_size": _width(),
        "eos_token_id": end,
        "pad_token_id": end,
        "bos_token_id": end,
        "tie_word_embeddings": False,
    }


SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

# Windows of 8 tokens are shorter than every text that is written here.
CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**_common()),
    "mistral": lambda: hf.MistralConfig(**_common(), sliding_window=8),
    "qwen3": lambda: hf.Qwen3Config(**_common(), head_dim=8),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_common(), head_dim=8, sliding_window=8, layer_types=SLIDING
    ),
    "gpt2": lambda: hf.GPT2Config(**_older(), n_embd=32, n_layer=3, n_head=4, n_positions=CONTEXT),
    "mixtral": lambda: hf.MixtralConfig(**_common(), num_local_experts=4, sliding_window=None),
    "gemma2": lambda: hf.Gemma2Config(**_common(), head_dim=8, sliding_window=8),
    "phi3": lambda: hf.Phi3Config(**_common(), sliding_window=8),
    "opt": lambda: hf.OPTConfig(
        **_older(),
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        word_embed_proj_dim=32,
    ),
    "mamba": lambda: hf.MambaConfig(**_older(), hidden_size=32, num_hidden_layers=2, state_size=8),
    "mamba2": lambda: hf.Mamba2Config(
        **_older(),
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=1,
    ),
    "lfm2": lambda: hf.Lfm2Config(**_common(), layer_types=["conv", "full_attention", "conv"]),
    "bloom": lambda: hf.BloomConfig(**_older(), hidden_size=32, n_layer=2, n_head=4),
    "rwkv": lambda: hf.RwkvConfig(
        **_older(),
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        intermediate_size=64,
        context_length=CONTEXT,
    ),
    "falcon-h1": lambda: hf.FalconH1Config(
        **_common(),
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
    "gpt-neo": lambda: hf.GPTNeoConfig(
        **_older(),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=CONTEXT,
    ),
}

ROWS = ("llama", "mistral", "qwen3", "gemma3", "gpt2", "mixtral", "gemma2", "phi3", "opt")
OTHERS = {
    "mamba": ("growing", "one by one", "uncached"),
    "mamba2": ("growing", "one by one", "uncached"),
    "lfm2": ("growing", "one by one"),
    "bloom": ("growing",),
    "rwkv": ("uncached",),
    "falcon-h1": ("growing", "one by one"),
    "gpt-neo": ("growing",),
}


def network(kind: str, seed: int = 0) -> hf.PreTrainedModel:
    """A random network of an architecture, always the same object; do not change it."""
    return _network(kind, seed)


@lru_cache(maxsize=64)
def _network(kind: str, seed: int) -> hf.PreTrainedModel:
    return fresh_network(CONFIGS[kind](), seed)


def fresh_network(
    config: hf.PretrainedConfig, seed: int = 0, scale: float = 3.0, spread: float = 2.5
) -> Any:
    """A random network of a configuration.

    Args:
        config: the configuration.
        seed: of the weights.
        scale: how far they are scaled up from their usual size.
        spread: about the standard deviation of the logits.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(scale)
    model.train(False)
    with torch.inference_mode():
        logits = model(torch.arange(24)[None] * 7 % config.vocab_size, use_cache=False).logits
    model.get_output_embeddings().weight.data.mul_(spread / logits.std())
    return model


def t5() -> hf.PreTrainedModel:
    """A tiny encoder-decoder."""
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=257,
            d_model=16,
            d_kv=4,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


def model(kind: str, name: str | None = None, seed: int = 0) -> TransformersModel:
    """A model of an ensemble, called as its architecture if not otherwise."""
    return TransformersModel(name or kind, network(kind, seed), shared_tokenizer())


class Uncached(TransformersModel):
    """The same model without any cache."""

    def open(self, n_rows: int) -> Session:
        return UncachedSession(self, n_rows)


def uncached(kind: str, name: str | None = None, seed: int = 0) -> Uncached:
    """Like :func:`model`, reading the whole text at every look."""
    return Uncached(name or kind, network(kind, seed), shared_tokenizer())


def generated(network: Any, prompts: Sequence[str], n_tokens: int) -> list[list[int]]:
    """What ``generate`` of the transformers library writes greedily, prompt by prompt."""
    tokenizer = shared_tokenizer()
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            out = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        texts.append(out[0, ids.shape[1] :].tolist())
    return texts


def save(folder: Any, network: Any, tokenizer: Any, **settings: Any) -> str:
    """A model folder as ``save_pretrained`` writes it."""
    network.save_pretrained(folder, **settings)
    tokenizer.save_pretrained(folder)
    return str(folder)


def decoder_replaced(
    tokenizer: hf.PreTrainedTokenizerFast, decoder: Any
) -> hf.PreTrainedTokenizerFast:
    """The same tokenizer with another decoder, or none."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["decoder"] = decoder
    return hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(settings)))

"""Logits are made, reduced and dropped a few at a time; the numbers are those of all at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from score_worlds import write
from tiny_models import CONFIGS, byte_level, fresh_network, model, shared_tokenizer

from multicolm import Ensemble
from multicolm.backend.transformers import TransformersModel
from multicolm.scoring import reading
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import load_table
from multicolm.views import View

LINES = [
    {"prompt": "The quick", "completion": " brown fox jumps over the lazy dog and runs away"},
    {"prompt": "a", "completion": "b"},
    {"prompt": "Hello there, how are you all today, all of you?", "completion": " ok"},
    {"prompt": "xyz 123", "completion": " 456 789, and so on"},
]
# Whose logits are not the output layer's alone: soft caps, factors, a bias, none of these.
COHERE = {"logit_scale": 0.125, "pad_token_id": 0, "bos_token_id": None}
KINDS = {
    "gemma2": CONFIGS["gemma2"],
    "cohere": lambda: hf.CohereConfig(**{**CONFIGS["llama"]().to_dict(), **COHERE}),
    "granite": lambda: hf.GraniteConfig(**{**CONFIGS["llama"]().to_dict(), "logits_scaling": 4.0}),
    "gptj": lambda: hf.GPTJConfig(
        vocab_size=len(shared_tokenizer()),
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=8,
        n_positions=128,
        eos_token_id=shared_tokenizer().eos_token_id,
        tie_word_embeddings=False,
    ),
    "mamba": CONFIGS["mamba"],
}


def plainly(net: hf.PreTrainedModel, reader: TransformersModel, n_tokens: int) -> list[View]:
    """Per text, what one pass over all of it gives, all logits at once."""
    views = []
    for line in LINES:
        prompt = reader.tokenizer.encode(line["prompt"])
        ids = [*prompt, *reader.tokenizer.encode_continuation(line["completion"])]
        with torch.inference_mode():
            logits = net(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        views.append(View(logits[len(prompt) - 1 :, :n_tokens]))
    return views


@pytest.mark.parametrize("n_logits", [1, 3, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_in_chunks_equal_those_of_all_logits_at_once(
    tmp_path, monkeypatch, kind, n_logits
) -> None:
    net = fresh_network(KINDS[kind](), 1)
    if kind == "gptj":
        torch.nn.init.normal_(net.lm_head.bias)
    reader = TransformersModel("base", net, shared_tokenizer())
    n_tokens = reader.tokenizer.n_tokens
    monkeypatch.setattr(reading, "_MAX_LOGITS_CPU", n_logits * n_tokens)
    monkeypatch.setattr(reading, "_AT_ONCE", 2 * n_tokens)
    data = write(tmp_path / "d.jsonl", LINES)
    score(Ensemble([reader]), open_corpus(data), tmp_path / "t", features=["topk"], top_k=5)
    table = load_table(tmp_path / "t")
    views = plainly(net, reader, n_tokens)
    for name, expected in {
        "top1_logprobs": [view.top1_logprobs for view in views],
        "entropies": [view.entropy_nats for view in views],
        "margins": [view.margins for view in views],
    }.items():
        found = table.columns()[name][:, 0]
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)
    topk = torch.cat([view.topk_logprobs(5) for view in views])
    torch.testing.assert_close(table.base["topk"], topk, atol=1e-4, rtol=1e-4)
    gold = table.gold_ids.split([len(view) for view in views])
    logprobs = torch.cat([v.logprob_of(g) for v, g in zip(views, gold, strict=True)])
    torch.testing.assert_close(table.gold_logprobs[:, 0], logprobs, atol=1e-4, rtol=1e-4)


def test_no_pass_looks_at_more_places_than_fit(monkeypatch) -> None:
    reader = model("llama")
    width = reader.tokenizer.n_tokens
    vocabulary = Ensemble([reader]).vocabulary
    tokenizer = reader.tokenizer
    texts = [
        reading.Text(
            tokenizer.encode(line["prompt"]), tokenizer.encode_continuation(line["completion"])
        )
        for line in LINES
    ]
    seen: list[tuple[int, int]] = []
    forward = reader.forward

    def watched(input_ids, n_keep, hidden, **arguments):
        logits, states = forward(input_ids, n_keep, hidden, **arguments)
        seen.append((logits.shape[0] * logits.shape[1], logits.shape[-1]))
        return logits, states

    reader.open(1)  # the probe looks at what it likes
    monkeypatch.setattr(reader, "forward", watched)
    for n_logits in (1, 5, 30):
        seen.clear()
        monkeypatch.setattr(reading, "_MAX_LOGITS_CPU", n_logits * width)
        found = [r.own.shape for r in reading.read_texts(reader, 0, vocabulary, texts)]
        assert sum(n for n, _ in found) == sum(len(text.ids) for text in texts)
        assert max(n for n, _ in seen) <= n_logits


def test_nothing_is_spread_over_the_tokens_of_other_models(tmp_path, monkeypatch) -> None:
    """An assistant with more tokens widens the vocabulary of the ensemble, not the base model."""
    base = model("llama", "base")
    tokenizer = byte_level(specials=[f"<{i}>" for i in range(500)])
    config = CONFIGS["llama"]()
    config.vocab_size = len(tokenizer)
    ensemble = Ensemble([base, TransformersModel("wide", fresh_network(config, 1), tokenizer)])
    spread = type(ensemble.vocabulary)
    monkeypatch.setattr(spread, "logits", lambda *_: pytest.fail("spread over all tokens"))
    data = write(tmp_path / "d.jsonl", LINES)
    score(ensemble, open_corpus(data), tmp_path / "t")
    monkeypatch.undo()
    score(Ensemble([base]), open_corpus(data), tmp_path / "alone")
    together, alone = load_table(tmp_path / "t", ["base"]), load_table(tmp_path / "alone")
    assert all(torch.equal(together.columns()[n], alone.columns()[n]) for n in alone.columns())


WIDE = """
import json, resource, sys
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
torch.set_num_threads(1)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocab = {piece: i for i, piece in enumerate([*letters, *(f"t{i}" for i in range(261_887))])}
inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
inner.decoder = decoders.ByteLevel()
tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
config = hf.Gemma2Config(
    vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, eos_token_id=len(tokenizer) - 1,
)
net = hf.AutoModelForCausalLM.from_config(config)
from multicolm import Ensemble
from multicolm.backend.transformers import TransformersModel
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
ensemble = Ensemble([TransformersModel("base", net, tokenizer)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index = score(ensemble, open_corpus(sys.argv[1]), sys.argv[2], features=["hidden"])
weights = sum(p.numel() * p.element_size() for p in net.parameters())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([len(tokenizer), index.n_positions, weights, before * 1024, peak * 1024]))
"""


@pytest.mark.slow
def test_with_262144_tokens_the_peak_is_below_twice_the_weights_and_a_gigabyte(
    tmp_path: Path,
) -> None:
    """Of the whole process, torch and a tokenizer of that size included, which take 0.65 of it."""
    lines = [
        {"prompt": "What is this? " * n, "completion": "No one knows what it may be." * n}
        for n in (1, 2, 3, 4, 5, 5)
    ]
    data = write(tmp_path / "d.jsonl", lines)
    done = subprocess.run(
        [sys.executable, "-c", WIDE, str(data), str(tmp_path / "t")],
        capture_output=True,
        text=True,
    )
    n_tokens, n_positions, weights, before, peak = json.loads(done.stdout)
    assert n_tokens == 262_144 and n_positions > 500, done.stderr
    assert peak < 2 * weights + 2**30
    assert peak - before < 2**20 * 350

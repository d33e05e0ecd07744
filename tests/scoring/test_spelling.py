"""Texts that the base model's tokenizer changes: every model is judged on the text itself."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
from tokenizer.built import COMPOSING, KINDS, adapter, built, random_text
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from multicolm import Ensemble
from multicolm.backend.transformers import TransformersModel
from multicolm.errors import InputError
from multicolm.exact.byte_session import span_logprobs
from multicolm.policy.resolve import resolve_policy
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.likelihood import LikelihoodReader
from multicolm.scoring.score import score
from multicolm.scoring.spans import spelled
from multicolm.scoring.store import load_table


@lru_cache(maxsize=1)
def lossy(unknown: bool) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE without a token for 0x04, which it drops or takes for an unknown one."""
    characters = [c for c in tiny_models.alphabet() if c != chr(0x104)]
    model = tiny_models.merged(tiny_models.MERGES, characters)
    inner = Tokenizer(model)
    if unknown:
        vocab = {**inner.get_vocab(), "<unk>": len(inner.get_vocab())}
        inner = Tokenizer(models.BPE(vocab, list(tiny_models.MERGES), unk_token="<unk>"))
        inner.add_special_tokens([AddedToken("<unk>", special=True, normalized=False)])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def tokenizer_of(kind: str) -> hf.PreTrainedTokenizerFast:
    return lossy(kind == "unknown") if kind in ("dropping", "unknown") else built(kind)


@lru_cache(maxsize=16)
def model(kind: str, name: str) -> TransformersModel:
    tokenizer = tokenizer_of(kind)
    settings = {**tiny_models._common(), "vocab_size": len(tokenizer)}
    settings |= {f"{role}_token_id": tokenizer.eos_token_id for role in ("bos", "eos", "pad")}
    network = tiny_models.fresh_network(hf.LlamaConfig(**settings))
    return TransformersModel(name, network, tokenizer)


def alone(one: TransformersModel, prompt: list[int], ids: list[int]) -> float:
    """What transformers gives to tokens behind others, in nats."""
    with torch.inference_mode():
        logits = one.model(torch.tensor([[*prompt, *ids]])).logits[0]
    lines = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(lines.gather(-1, torch.tensor(ids)[:, None]).sum())


# A base model's manner, and a text that it changes.
CHANGED = [
    ("dropping", " a\x04b the"),
    ("dropping", "\x04the"),
    ("dropping", "the\x04\x04"),
    ("unknown", " a\x04b the"),
    ("qwen2", " the cafe\u0301 and"),
    ("llama2", " the▁dog"),
    ("t5", "the▁ dog"),
]


@pytest.mark.parametrize(("kind", "text"), CHANGED)
def test_a_model_is_judged_on_a_text_and_not_on_the_base_models_spelling(
    kind: str, text: str
) -> None:
    """Also where nothing stands before it."""
    base, other = model(kind, "base"), model("tekken", "other")
    assert not base.tokenizer.covers_text(text)
    policy = resolve_policy({"kind": "single", "params": {"model": "other"}})
    raw = built("tekken")
    own = raw(text, add_special_tokens=False).input_ids
    boundary = LikelihoodReader(Ensemble([base, other]), policy)
    exact = LikelihoodReader(Ensemble([base, other], bridge="exact"), policy)
    for before in ("The dog", ""):
        [found] = boundary.likelihoods([boundary.passage(before, text)])
        prompt = raw(before).input_ids
        assert found.logprob == pytest.approx(alone(other, prompt, own), abs=1e-3)
        # Summed over all ways to spell the text.
        wanted = span_logprobs(other, prompt, text.encode(), [len(text.encode())])
        [found] = exact.likelihoods([exact.passage(before, text)])
        assert found.logprob == pytest.approx(float(wanted.sum()), abs=1e-3)


@pytest.mark.parametrize("bridge", ["boundary", "exact"])
@pytest.mark.parametrize(("kind", "text"), [CHANGED[0], CHANGED[4]])
def test_a_score_table_holds_what_each_model_gives_to_the_text_itself(
    kind: str, text: str, bridge: str, tmp_path: Path
) -> None:
    base, other = model(kind, "base"), model("tekken", "other")
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "The dog", "completion": text}))
    ensemble = Ensemble([base, other], bridge="exact" if bridge == "exact" else "auto")
    score(ensemble, open_corpus(tmp_path / "d.jsonl"), tmp_path / "scores", end_of_text=False)
    table = load_table(tmp_path / "scores")
    prompt = built("tekken")("The dog").input_ids
    own = built("tekken")(text, add_special_tokens=False).input_ids
    wanted = [
        alone(base, tokenizer_of(kind)("The dog").input_ids, tokenizer_of(kind)(text).input_ids),
        alone(other, prompt, own),
    ]
    if bridge == "exact":
        content = text.encode()
        wanted[1] = float(span_logprobs(other, prompt, content, [len(content)]).sum())
    assert table.gold_logprobs.double().sum(0).tolist() == pytest.approx(wanted, abs=1e-3)


def test_what_models_write_together_is_spelled_by_whoever_can() -> None:
    base, other = model("dropping", "base"), model("tekken", "other")
    policy = resolve_policy("unite")
    reader = LikelihoodReader(Ensemble([base, other]), policy)
    vocabulary = reader._ensemble.vocabulary
    passage = reader.passage("The dog", " a\x04b")
    assert b"".join(map(vocabulary.token_bytes, passage.ids)) == b" a\x04b"
    assert reader.likelihoods([passage])[0].logprob < 0


def test_a_text_of_which_the_base_model_has_no_token_is_judged_by_the_others() -> None:
    base, other = model("dropping", "base"), model("tekken", "other")
    ensemble = Ensemble([base, other])
    policy = resolve_policy({"kind": "single", "params": {"model": "other"}})
    reader = LikelihoodReader(ensemble, policy)
    [found] = reader.likelihoods([reader.passage("The dog", "\x04")])
    own = built("tekken")("\x04", add_special_tokens=False).input_ids
    wanted = alone(other, built("tekken")("The dog").input_ids, own)
    assert found.logprob == pytest.approx(wanted, abs=1e-3)
    base_alone = LikelihoodReader(ensemble, resolve_policy("single"))
    with pytest.raises(InputError, match=r"^no model in use has tokens for '\\x04', whose likel"):
        base_alone.passage("The dog", "\x04")


# --- the spelling itself -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_start", [False, True])
def test_what_the_tokens_of_a_text_stand_for_is_the_text(kind: str, at_start: bool) -> None:
    tokenizer, rng = adapter(kind), random.Random(kind)
    for _ in range(150):
        text = random_text(rng)
        found = spelled(tokenizer, text.encode(), at_start=at_start)
        front = len(tokenizer.encode(""))
        wanted = tokenizer.encode(text)[front:] if at_start else tokenizer.encode_continuation(text)
        assert list(found.ids) == wanted and len(found.contents) == len(wanted)
        assert b"".join(found.contents) == text.encode()
        if tokenizer.covers_text(text):  # apart from spaces that are put in
            decoded = [tokenizer.token_bytes(token) for token in found.ids]
            put_in = zip(decoded, found.contents, strict=True)
            assert all(a in ((b, b" " + b) if at_start else (b,)) for a, b in put_in), text


@pytest.mark.parametrize("kind", COMPOSING)
def test_what_is_put_together_moves_no_token_beyond_the_next_cut(kind: str) -> None:
    text = "the cafe\u0301 and the dog"
    found, cuts = spelled(adapter(kind), text.encode()), adapter(kind).cuts
    assert cuts is not None
    places = list(cuts.places(text, len(text) - cuts.reach))
    assert text.index(" the dog") in places
    ends = set(accumulate(map(len, found.contents)))
    assert {len(text[:place].encode()) for place in places} <= ends

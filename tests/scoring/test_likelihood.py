"""Likelihoods of given texts: what a policy wrote, small cases by hand, and the score table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from score_worlds import tables, write
from tables import TOKENS
from tiny_models import CONTEXT, model, network, shared_tokenizer

import multicolm
from multicolm import Ensemble
from multicolm.artefacts import Weights
from multicolm.backend.table import TableModel
from multicolm.errors import CapabilityError, InputError
from multicolm.learning.losses import marginal_loss
from multicolm.learning.networks import from_tensors, router_scores
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.policy.fixed import RandomPolicy
from multicolm.policy.resolve import resolve_policy
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.likelihood import LikelihoodReader, Passage
from multicolm.scoring.score import score
from multicolm.scoring.store import load_table

QUESTIONS = Path(__file__).parents[2] / "registry/tiny/questions/test.jsonl"
RECORDS = [json.loads(line) for line in QUESTIONS.read_text().splitlines()[::75]]


def near(nats: float) -> object:
    return pytest.approx(nats, rel=1e-5, abs=1e-4)


@pytest.fixture(scope="module")
def loaded() -> Iterator[dict[str, Ensemble]]:
    yield {name: multicolm.load(name) for name in ("tiny", "tiny-mixed", "tiny-mixed-exact")}


def head(width: int, n_assistants: int) -> Weights:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(n_assistants, width, generator=g) / width**0.5
    return Weights({"0.weight": weight, "0.bias": torch.randn(n_assistants, generator=g)})


# --- what a policy wrote -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("single", "cosd-rule", "confidence", "entropy", "margin", "max-confidence", "nudging"),
        *("bild", "average", "unite", "gac", "safe", "proxy-tuning", "byte-mixture"),
        "pack-llm",
    ],
)
def test_a_text_is_as_likely_as_the_trace_of_its_writing_says(
    name: str, loaded: dict[str, Ensemble]
) -> None:
    tiny, policy = loaded["tiny"], resolve_policy(name)
    reader = LikelihoodReader(tiny, policy)
    for record in RECORDS[: 1 if policy.support == "bytes" else 3]:
        [answer] = tiny.generate([record["prompt"]], policy, max_new_tokens=12)
        ends = tiny.vocabulary.end_ids(None)
        written = [token for token in answer.trace if token.id not in ends]
        prompts = reader.passage(record["prompt"], "x").prompt_ids
        [found] = reader.likelihoods([Passage(prompts, tuple(token.id for token in written))])
        assert found.logprob == near(sum(token.logprob for token in written))
        assert found.is_greedy


def test_writers_that_are_drawn_are_the_same_as_when_the_text_was_written(
    loaded: dict[str, Ensemble],
) -> None:
    tiny, policy = loaded["tiny"], RandomPolicy()
    reader = LikelihoodReader(tiny, policy, seed=3)
    prompt = RECORDS[0]["prompt"]
    [answer] = tiny.generate([prompt], policy, max_new_tokens=20, temperature=1.0, seed=3)
    written = tuple(token.id for token in answer.trace)
    passage = Passage(reader.passage(prompt, "x").prompt_ids, written)
    [routed] = reader.likelihoods([passage], "routed")
    assert routed.logprob == near(sum(token.logprob for token in answer.trace))


def test_a_lottery_has_the_joint_model_of_the_average(loaded: dict[str, Ensemble]) -> None:
    tiny = loaded["tiny"]
    random_routing = LikelihoodReader(tiny, RandomPolicy(weights=[1, 2, 1]))
    average = LikelihoodReader(tiny, resolve_policy("average", {"weights": [1, 2, 1]}))
    passages = [random_routing.passage(r["prompt"], r["completion"]) for r in RECORDS]
    assert random_routing.kinds == ("joint", "routed")
    for a, b in zip(
        random_routing.likelihoods(passages), average.likelihoods(passages), strict=True
    ):
        assert a.logprob == near(b.logprob)
        assert a.is_greedy == b.is_greedy


def test_many_texts_are_as_likely_as_one_by_one(loaded: dict[str, Ensemble]) -> None:
    for name, policy in (("tiny", "cosd-rule"), ("tiny-mixed", "nudging"), ("tiny-mixed", "safe")):
        reader = LikelihoodReader(loaded[name], resolve_policy(policy), batch_tokens=100)
        passages = [reader.passage(r["prompt"], r["completion"]) for r in RECORDS]
        together = reader.likelihoods(passages)
        for passage, found in zip(passages, together, strict=True):
            assert reader.likelihoods([passage])[0].logprob == near(found.logprob)


# --- by hand -------------------------------------------------------------------------------------


def test_two_coins_by_hand() -> None:
    fair = TableModel("fair", ["a", "b", "."], {"": {"a": 0.5, "b": 0.5}}, ends=["."])
    bent = TableModel("bent", ["a", "b", "."], {"": {"a": 0.9, "b": 0.1}}, ends=["."])
    coins = Ensemble([fair, bent])
    surer = LikelihoodReader(coins, resolve_policy("max-confidence"))
    [found] = surer.likelihoods([surer.passage("a", "ab")])
    assert found.logprob == near(math.log(0.9 * 0.1))
    assert not found.is_greedy
    random_routing = LikelihoodReader(coins, RandomPolicy(weights=[3, 1]))
    [found] = random_routing.likelihoods([random_routing.passage("a", "ab")])
    assert found.logprob == near(math.log((0.75 * 0.5 + 0.25 * 0.9) * (0.75 * 0.5 + 0.25 * 0.1)))
    [greedy] = random_routing.likelihoods([random_routing.passage("", "aa")])
    assert greedy.is_greedy


def test_a_text_that_nobody_can_write_is_impossible_and_no_error() -> None:
    one = TableModel("one", ["a", "b", "."], {"": {"a": 1.0}}, ends=["."])
    reader = LikelihoodReader(Ensemble([one]), resolve_policy("single"))
    [found] = reader.likelihoods([reader.passage("a", "b")])
    assert found.logprob == -math.inf


# --- the score table -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "tiny-mixed", "tiny-mixed-exact"])
def test_the_joint_likelihood_is_the_score_tables(
    name: str, loaded: dict[str, Ensemble], tmp_path: Path
) -> None:
    ensemble = loaded[name]
    width = ensemble.backends[0].hidden_size
    assert width is not None
    weights = head(width, 2)
    corpus = open_corpus(write(tmp_path / "texts.jsonl", RECORDS))
    score(ensemble, corpus, tmp_path / "scores", features=["hidden"], end_of_text=False)
    table = load_table(tmp_path / "scores")
    scores = router_scores(from_tensors(weights.content, "head"), table.feature("hidden"))
    losses = marginal_loss(scores, table.gold_logprobs, table.known).double()
    expected = torch.zeros(len(RECORDS), dtype=torch.float64).index_add(0, table.example, -losses)

    reader = LikelihoodReader(ensemble, CoLlmPolicy(head=weights))
    found = reader.likelihoods([reader.passage(r["prompt"], r["completion"]) for r in RECORDS])
    assert [f.logprob for f in found] == [near(e) for e in expected.tolist()]
    mixture = LikelihoodReader(ensemble, CoLlmPolicy(head=weights, decode="sample"))
    assert mixture.kinds == ("joint", "routed")


def test_a_model_of_another_vocabulary_alone_is_judged_by_its_own_tokens(
    loaded: dict[str, Ensemble],
) -> None:
    mixed = loaded["tiny-mixed"]
    facts = mixed.backends[1]
    reader = LikelihoodReader(mixed, resolve_policy({"kind": "single", "params": {"model": 1}}))
    for record in RECORDS:
        prompt = facts.tokenizer.encode(record["prompt"])
        own = facts.tokenizer.encode_continuation(record["completion"])
        ids = torch.tensor([[*prompt, *own]])
        with torch.inference_mode():
            logprobs = facts.model(ids).logits[0].log_softmax(-1)  # type: ignore[attr-defined]
        places = torch.arange(len(prompt) - 1, len(prompt) + len(own) - 1)
        expected = float(logprobs[places, torch.tensor(own)].sum())
        [found] = reader.likelihoods([reader.passage(record["prompt"], record["completion"])])
        assert found.logprob == near(expected)


# --- lengths -------------------------------------------------------------------------------------


def test_the_windows_of_a_long_text_predict_every_token_once() -> None:
    reader = LikelihoodReader(Ensemble([model("llama")]), resolve_policy("single"))
    text = " the quick brown fox and" * 40
    windows = list(reader.windows(text))
    assert len(windows) > 2
    ids = [token for window in windows for token in window.ids]
    assert ids == shared_tokenizer()(text)["input_ids"]
    whole = torch.tensor([[shared_tokenizer().eos_token_id, *ids]])
    total, end = 0.0, 0
    for window in windows:
        end += len(window.ids)
        begin = max(0, end - CONTEXT)
        with torch.inference_mode():
            logprobs = network("llama")(whole[:, begin:end]).logits[0].log_softmax(-1)
        gold = whole[0, begin + 1 : end + 1]
        total += float(logprobs.gather(-1, gold[:, None])[-len(window.ids) :].sum())
    assert sum(f.logprob for f in reader.likelihoods(windows)) == near(total)


def test_models_of_other_vocabularies_get_windows_that_they_can_read(
    loaded: dict[str, Ensemble],
) -> None:
    reader = LikelihoodReader(loaded["tiny-mixed"], resolve_policy("cosd-rule"))
    text = "Zosos is prescribed for palsy. 12 * 13 = 156. " * 60
    windows = list(reader.windows(text))
    tokenizer = loaded["tiny-mixed"].backends[0].tokenizer
    assert tokenizer.decode([i for w in windows for i in w.ids]).decode() == text
    assert all(math.isfinite(found.logprob) for found in reader.likelihoods(windows))


def test_a_prompt_that_is_too_long_is_cut_on_the_left() -> None:
    reader = LikelihoodReader(Ensemble([model("llama")]), resolve_policy("single"))
    passage = reader.passage("ab" * CONTEXT, " the")
    fitted, was_cut = reader.fitted(passage)
    assert was_cut
    assert fitted.ids == passage.ids
    assert fitted.prompt_ids[0] == passage.prompt_ids[0][-(CONTEXT - len(passage.ids) + 1) :]
    reader.likelihoods([fitted])
    with pytest.raises(InputError, match="cannot read a text to its end"):
        reader.likelihoods([passage])
    assert reader.fitted(fitted) == (fitted, False)


def test_a_text_longer_than_a_context_is_refused() -> None:
    reader = LikelihoodReader(Ensemble([model("llama")]), resolve_policy("single"))
    with pytest.raises(InputError, match="longer than the context of model 'llama', which holds"):
        reader.fitted(reader.passage("a", "ab" * CONTEXT))


# --- refusals ------------------------------------------------------------------------------------


def test_a_likelihood_that_a_policy_does_not_have_is_refused() -> None:
    both = tables("p", "q")
    with pytest.raises(CapabilityError, match=r"'cosd-rule' has no joint likelihood \(it says who"):
        LikelihoodReader(both, resolve_policy("cosd-rule")).check("joint")
    with pytest.raises(CapabilityError, match=r"'average' has no routed likelihood \(its models"):
        LikelihoodReader(both, resolve_policy("average")).check("routed")


@pytest.mark.parametrize("name", ["chared", "cool-fusion"])
def test_a_policy_that_follows_no_distribution_over_tokens_has_no_likelihood(
    name: str, loaded: dict[str, Ensemble]
) -> None:
    reader = LikelihoodReader(loaded["tiny"], resolve_policy(name))
    assert reader.kinds == ()
    with pytest.raises(CapabilityError, match=f"'{name}' gives no likelihood to a text"):
        reader.likelihoods([reader.passage("a", "b")])


def test_an_empty_text_and_one_that_nothing_stands_before_are_refused() -> None:
    endless = TableModel("endless", ["a"], {"": {"a": 1.0}})
    reader = LikelihoodReader(Ensemble([endless]), resolve_policy("single"))
    with pytest.raises(InputError, match="whose likelihood is asked for is empty"):
        reader.passage("a", "")
    with pytest.raises(InputError, match="no token for the beginning or the end of a text"):
        reader.passage("", "a")


def test_a_model_of_which_only_the_likeliest_tokens_are_known_is_refused() -> None:
    both = tables("p", "q")
    vars(both.backends[1]).update(max_top_logprobs=20, server="http://q")
    with pytest.raises(CapabilityError, match=r"its server http://q returns 20 tokens"):
        LikelihoodReader(both, resolve_policy("average")).check()
    assert LikelihoodReader(both, resolve_policy("single")).check() == "routed"


def test_an_untrained_policy_is_refused_before_anything_is_read() -> None:
    with pytest.raises(CapabilityError, match="train"):
        LikelihoodReader(tables("p", "q", hidden=True), CoLlmPolicy())


def test_the_first_token_of_a_text_is_predicted_too() -> None:
    ab = TableModel(
        "ab", [*TOKENS[:2], "<end>"], {"": {TOKENS[0]: 0.25, TOKENS[1]: 0.75}}, ends=["<end>"]
    )
    reader = LikelihoodReader(Ensemble([ab]), resolve_policy("single"))
    [found] = reader.likelihoods([reader.passage("", TOKENS[0])])
    assert found.logprob == near(math.log(0.25))

"""The network router: its decisions by hand, its features, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from score_worlds import records, tables, write
from tables import TOKENS
from tiny_models import PROMPTS, model

from multicolm import Ensemble
from multicolm.artefacts import Weights
from multicolm.errors import ArtefactError, CapabilityError, ConfigError
from multicolm.learning.classifier import threshold_for_right_tokens
from multicolm.learning.training import Training
from multicolm.policy.mlp_router import MlpRouterPolicy
from multicolm.score_table import ScoreTable
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import load_table
from multicolm.testing import check_policy, check_routing
from multicolm.views import ModelNames, View, Views

WIDTH = len(TOKENS) + 1


def linear(width: int, n_outputs: int, seed: int = 0, scale: float = 1.0) -> Weights:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_outputs, width, generator=g) * scale
    return Weights({"0.weight": weight, "0.bias": torch.randn(n_outputs, generator=g)})


def mlp(width: int, n_outputs: int) -> Weights:
    from multicolm.learning.networks import build

    network = build("mlp", width, n_outputs, width=8, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(network[-1].weight, generator=torch.Generator().manual_seed(1))
    return Weights(dict(network.state_dict()))


def passing(scores: list[list[float]], **settings):
    width = len(scores[0])
    weights = Weights({"0.weight": torch.eye(width), "0.bias": torch.zeros(width)})
    return MlpRouterPolicy(network=weights, **settings), torch.tensor(scores)


def views(hidden: torch.Tensor, n_models: int, top1=(), costs=None) -> Views:
    n = len(hidden)
    shown = {0: View(torch.zeros(n, 4), hidden)}
    for k, prob in enumerate(top1, start=1):
        rest = math.log((1 - prob) / 3)
        shown[k] = View(torch.tensor([[math.log(prob), rest, rest, rest]] * n))
    names = ModelNames([f"m{k}" for k in range(n_models)])
    return Views(names, shown, n_positions=n, costs=costs)


SCORES = [[-1.0, -2.0], [2.0, 1.0], [0.1, 0.3], [-0.1, -0.05]]


@pytest.mark.parametrize(
    ("threshold", "writers"),
    [(0.0, [1, 1, 2, 2]), (0.5, [0, 1, 2, 2]), (0.7, [0, 1, 2, 0]), (1.0, [0, 0, 0, 0])],
)
def test_of_a_distribution_the_likeliest_assistant_writes_above_the_threshold(
    threshold, writers
) -> None:
    policy, hidden = passing(SCORES, threshold=threshold, ways="models")
    shown = views(hidden, 3)
    assert policy.select(shown).tolist() == writers
    assert policy.defers(shown).tolist() == [w > 0 for w in writers]
    pi = torch.tensor([[0.0, *row] for row in SCORES]).softmax(-1)
    torch.testing.assert_close(policy.model_probs(shown), pi)
    torch.testing.assert_close(policy.score(shown), 1 - pi[:, 0])


@pytest.mark.parametrize(
    ("threshold", "writers"),
    [(0.0, [1, 1, 2, 2]), (0.5, [0, 1, 2, 0]), (0.7, [0, 1, 0, 0]), (1.0, [0, 0, 0, 0])],
)
def test_the_assistant_most_likely_to_be_right_writes_above_the_threshold(
    threshold, writers
) -> None:
    policy, hidden = passing(SCORES, threshold=threshold)
    shown = views(hidden, 3)
    assert policy.ways == "each"
    assert policy.select(shown).tolist() == writers
    assert policy.defers(shown).tolist() == [w > 0 for w in writers]
    torch.testing.assert_close(policy.score(shown), torch.tensor(SCORES).amax(-1).sigmoid())
    assert policy.model_probs(shown) is None, "several may be right at once"


def test_for_one_assistant_both_ways_are_the_same() -> None:
    each, hidden = passing([[1.0], [-0.5]], threshold=0.4)
    models, _ = passing([[1.0], [-0.5]], threshold=0.4, ways="models")
    shown = views(hidden, 2)
    assert torch.equal(each.select(shown), models.select(shown))
    torch.testing.assert_close(each.score(shown), models.score(shown))
    torch.testing.assert_close(each.model_probs(shown), models.model_probs(shown))


@pytest.mark.parametrize("ways", ["each", "models"])
def test_costs_choose_the_cheaper_assistant_and_then_the_base_model(ways) -> None:
    policy, hidden = passing([[1.0, 2.0]], ways=ways)
    shown = views(hidden, 3, costs=[1.0, 1.0, 4.0])
    writers = {
        weight: int(replace(policy, cost_weight=weight).select(shown))
        for weight in (0.0, 0.3, 0.4, 5.0)
    }
    assert writers == {0.0: 2, 0.3: 2, 0.4: 1, 5.0: 0}


def test_of_one_output_all_that_are_run_to_be_compared_are_paid() -> None:
    policy, hidden = passing([[2.0]], ways="binary", cost_weight=0.5)
    cheap, dear = (views(hidden, 3, (0.5, 0.9), costs=[9.0, 1.0, c]) for c in (1.0, 4.0))
    torch.testing.assert_close(policy.score(cheap), torch.tensor([1.0]).sigmoid())
    assert (int(policy.select(cheap)), int(policy.select(dear))) == (2, 0)


def test_binary_hands_over_to_the_surest_assistant() -> None:
    policy, hidden = passing([[3.0], [-3.0]], ways="binary")
    assert policy.select(views(hidden, 3, (0.5, 0.9))).tolist() == [2, 0]
    assert policy.select(views(hidden, 3, (0.9, 0.5))).tolist() == [1, 0]
    assert policy.select(views(hidden, 2)).tolist() == [1, 0], "there is no choice to make"
    assert policy.model_probs(views(hidden, 3, (0.9, 0.5))) is None
    assert policy.needs(ModelNames(["a", "b", "c"])).deferred.keys() == {1, 2}
    assert not policy.needs(ModelNames(["a", "b"])).deferred


def test_the_features_stand_in_the_order_in_which_they_are_named() -> None:
    g = torch.Generator().manual_seed(0)
    logits, hidden = torch.randn(5, 9, generator=g), torch.randn(5, 3, generator=g)
    table_of_rows = torch.randn(9, 2, generator=g)
    view = View(logits, hidden, embed=lambda ids: table_of_rows[ids])
    parts = {
        "hidden": hidden,
        "topk": logits.log_softmax(-1).sort(-1, descending=True).values[:, :4],
        "embedding": table_of_rows[logits.argmax(-1)],
    }
    shown = Views(ModelNames(["a", "b"]), {0: view}, n_positions=5)
    for names in (("hidden",), ("topk",), ("embedding", "hidden"), ("hidden", "topk", "embedding")):
        joined = torch.cat([parts[name] for name in names], dim=-1)
        weights = linear(joined.shape[1], 1)
        policy = MlpRouterPolicy(network=weights, features=names, top_k=4)
        scores = joined @ weights["0.weight"].T + weights["0.bias"]
        torch.testing.assert_close(policy.score(shown), torch.sigmoid(scores[:, 0]))


def test_more_log_probabilities_than_tokens_are_very_small_numbers_in_both_worlds(
    tmp_path,
) -> None:
    path = write(tmp_path / "d.jsonl", records(12))
    pair = tables("base", "left")
    score(pair, open_corpus(path), tmp_path / "out", features=["topk"], top_k=10)
    training = Training({"network": "linear", "epochs": 2})
    policy = MlpRouterPolicy(features=("topk",), top_k=10).fit(
        load_table(tmp_path / "out"), training
    )
    answers = pair.generate(["a", "b"], policy, max_new_tokens=5, seed=0)
    assert all(0 <= token.score <= 1 for answer in answers for token in answer.trace)


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", ["each", "models", "binary"])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_the_policy_keeps_the_laws(ways, threshold) -> None:
    n_outputs = 1 if ways == "binary" else 2
    for weights in (linear(6, n_outputs, scale=3.0), mlp(6, n_outputs)):
        check_policy(MlpRouterPolicy(network=weights, ways=ways, threshold=threshold))
    check_policy(
        MlpRouterPolicy(network=linear(5, n_outputs), features=("topk",), top_k=5, ways=ways)
    )


@pytest.mark.parametrize("ways", ["each", "binary"])
def test_schedules_and_batches_change_no_token(ways) -> None:
    trio = Ensemble([model("llama", "base"), model("llama", "left", 1), model("llama", "right", 2)])
    policy = MlpRouterPolicy(
        network=linear(32 + 8 + 32, 2 if ways == "each" else 1, seed=7, scale=0.2),
        features=("hidden", "topk", "embedding"),
        top_k=8,
        ways=ways,
    )
    check_routing(trio, PROMPTS[:4], policy, max_new_tokens=8)
    answers = trio.generate(PROMPTS[:4], policy, max_new_tokens=12, seed=0)
    writers = {token.model for answer in answers for token in answer.trace}
    assert writers == {"base", "left", "right"}


def test_embeddings_are_those_of_the_base_models_own_ids() -> None:
    """The same decision while writing as from a score table, for tokens of other ids too."""
    base = model("llama", "base")
    ids = torch.tensor([3, 5, 200])
    assert torch.equal(base.embed(ids), base.model.get_input_embeddings().weight[ids])


def test_decisions_while_writing_are_those_from_a_score_table(tmp_path) -> None:
    pair = Ensemble([model("llama", "base"), model("llama", "left", 1)])
    policy = MlpRouterPolicy(
        network=linear(32 + 8 + 32, 1, scale=0.2), features=("hidden", "topk", "embedding"), top_k=8
    )
    answers = pair.generate(PROMPTS[:3], policy, max_new_tokens=12, seed=0)
    lines = [{"prompt": a.prompt, "completion": a.text} for a in answers]
    tokenizer = pair.backends[0].tokenizer
    kept = [
        n
        for n, a in enumerate(answers)
        if tokenizer.encode_continuation(a.text) == [t.id for t in a.trace]
    ]
    assert kept, "some text has to be read as it was written"
    path = write(tmp_path / "d.jsonl", [lines[n] for n in kept])
    score(
        pair,
        open_corpus(path),
        tmp_path / "out",
        features=["hidden", "topk", "embedding"],
        top_k=8,
        end_of_text=False,
    )
    table = load_table(tmp_path / "out")
    joined = torch.cat([table.feature(name) for name in policy.features], dim=-1)
    scores = joined @ policy.network["0.weight"].T + policy.network["0.bias"]
    written = [token.score for n in kept for token in answers[n].trace]
    torch.testing.assert_close(
        torch.sigmoid(scores[:, 0]), torch.tensor(written), atol=1e-4, rtol=1e-4
    )


# --- refusals ------------------------------------------------------------------------------------

MADE_FOR = {"base": "table:0", "left": "table:1", "right": "table:2"}


def refusal(ensemble: Ensemble, policy) -> str:
    with pytest.raises(CapabilityError) as caught:
        ensemble.generate(["a"], policy, max_new_tokens=2)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def trio(**settings) -> Ensemble:
    return tables("base", "left", "right", hidden=True, **settings)


def test_an_untrained_policy_says_how_to_train_one() -> None:
    assert "`multicolm train ENSEMBLE SCORES --policy mlp-router" in refusal(trio(), "mlp-router")


@pytest.mark.parametrize("made_for", [None, MADE_FOR])
def test_another_number_of_models_is_refused_with_both(made_for) -> None:
    policy = MlpRouterPolicy(network=linear(WIDTH, 2), made_for=made_for)
    said = refusal(tables("base", "left", hidden=True), policy)
    assert "was made for 3 models, and this ensemble has 2 (base, left)" in said


def test_a_network_for_two_models_is_refused_for_three() -> None:
    """It used to hand over to the first assistant always, without a word."""
    said = refusal(trio(), MlpRouterPolicy(network=linear(WIDTH, 1)))
    assert "was made for 2 models, and this ensemble has 3" in said


def test_a_network_of_other_ways_is_refused() -> None:
    said = refusal(trio(), MlpRouterPolicy(network=linear(WIDTH, 2), ways="binary"))
    assert "`ways: binary` wants one for handing over" in said


def test_a_binary_network_goes_with_any_number_of_models_but_those_it_was_made_for() -> None:
    binary = MlpRouterPolicy(network=linear(WIDTH, 1), ways="binary")
    assert trio().generate(["a"], binary, max_new_tokens=2)
    made = MlpRouterPolicy(network=linear(WIDTH, 1), ways="binary", made_for=MADE_FOR)
    assert "was made for 3 models" in refusal(tables("base", "left", hidden=True), made)


def test_another_order_and_other_weights_are_refused_and_other_names_accepted() -> None:
    policy = MlpRouterPolicy(network=linear(WIDTH, 2), made_for=MADE_FOR)
    other = tables("base", "right", "left", seeds=(0, 2, 1), hidden=True)
    assert "base (table:0), right (table:2), left (table:1)" in refusal(other, policy)
    assert "left (table:8)" in refusal(trio(seeds=(0, 8, 2)), policy)
    renamed = tables("one", "two", "three", hidden=True)
    assert renamed.generate(["a"], policy, max_new_tokens=2)


def test_other_hidden_states_are_refused_with_both_widths() -> None:
    said = refusal(trio(), MlpRouterPolicy(network=linear(5, 2)))
    assert "hidden states of width 5" in said and f"'base' have {WIDTH}" in said


@pytest.mark.parametrize("features", [("topk",), ("hidden", "topk")])
def test_features_of_another_width_are_refused_with_both_widths(features) -> None:
    """What came out was torch's sentence on the shapes of matrices."""
    said = refusal(trio(), MlpRouterPolicy(network=linear(40, 2), features=features, top_k=7))
    width = 7 + WIDTH * (len(features) - 1)
    assert (
        f"made for 40 features, and {' and '.join(features)} of model 'base' have {width}" in said
    )


def test_features_that_a_model_does_not_show_are_refused_by_name() -> None:
    policy = MlpRouterPolicy(network=linear(40, 2), features=("embedding", "hidden"))
    assert "needs embedding of model 'base', which shows only" in refusal(trio(), policy)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"features": []}, "must hold 1 or more, got 0"),
        ({"features": ["hiden"]}, "Did you mean 'hidden'?"),
        ({"ways": "two"}, "must be 'each', 'models' or 'binary'"),
        ({"threshold": 2}, "must be at most 1, got 2"),
        ({"top_k": 0}, "must be 1 or more, got 0"),
        ({"cost_weight": -1}, "must be 0 or more, got -1"),
        ({"netwrk": "x"}, "Did you mean 'network'?"),
    ],
)
def test_wrong_params_are_told_what_is_allowed(params, said) -> None:
    with pytest.raises(ConfigError) as caught:
        trio().resolve({"kind": "mlp-router", "params": params})
    assert said in str(caught.value)


# --- learning ------------------------------------------------------------------------------------


def scored(tmp_path, ensemble, features, top_k=5):
    path = write(tmp_path / "d.jsonl", records(60, seed=2))
    score(ensemble, open_corpus(path), tmp_path / "out", features=features, top_k=top_k)
    return load_table(tmp_path / "out")


@pytest.mark.parametrize("ways", ["each", "models", "binary"])
def test_what_was_learned_is_used_by_the_ensemble_it_was_learned_for(tmp_path, ways) -> None:
    ensemble = trio()
    table = scored(tmp_path, ensemble, ["hidden", "topk"])
    training = Training({"network": "mlp", "width": 8, "epochs": 3, "held_out": 0.3})
    blank = MlpRouterPolicy(features=("hidden", "topk"), top_k=3, ways=ways)
    policy = blank.fit(table, training)
    assert blank.network is None, "it is another policy"
    assert policy.made_for == MADE_FOR and policy.top_k == 3
    assert policy.ways == ("binary" if ways == "binary" else "each")
    assert policy.threshold != 0.5 and policy.threshold == training.report["threshold"]
    assert 0 <= training.report["right_tokens_base"] <= training.report["right_tokens"] + 0.2
    check_routing(ensemble, ["a", "b c"], policy, max_new_tokens=6)
    assert refusal(trio(seeds=(0, 1, 9)), policy)


def test_a_table_without_a_feature_says_how_to_get_it(tmp_path) -> None:
    table = scored(tmp_path, trio(), ["topk"])
    with pytest.raises(ArtefactError, match=r"holds no 'hidden' .*--hidden"):
        MlpRouterPolicy().fit(table)
    with pytest.raises(ArtefactError, match=r"holds 5 log-probabilities .* wants 100; set top_k"):
        MlpRouterPolicy(features=("topk",)).fit(table)


def worlds(right: torch.Tensor, hidden: torch.Tensor) -> ScoreTable:
    """A score table in which these models are right; whoever is not writes a token of its own."""
    n, m = right.shape
    top1 = torch.where(right, 0, 1 + torch.arange(m))
    zeros = torch.zeros(n, m)
    return ScoreTable(
        models=ModelNames([f"m{k}" for k in range(m)]),
        gold_ids=torch.zeros(n, dtype=torch.long),
        gold_logprobs=torch.where(right, 0.9, 0.05).log(),
        known=torch.ones(n, m, dtype=torch.bool),
        top1_ids=top1,
        top1_logprobs=zeros + math.log(0.9),
        entropies=zeros,
        margins=zeros,
        example=torch.arange(n) // 20,
        place=torch.arange(n) % 20,
        base={"hidden": hidden},
        identities=("",) * m,
    )


FAST = {"network": "linear"}


def test_assistants_that_can_do_the_same_do_not_share_the_vote() -> None:
    """One assistant alone is right in 40 %, the two others together in 60 %: one of the two."""
    g = torch.Generator().manual_seed(0)
    alone = torch.rand(2000, generator=g) < 0.4
    right = torch.stack([torch.zeros_like(alone), alone, ~alone, ~alone], -1)
    policy = MlpRouterPolicy().fit(worlds(right, torch.randn(2000, 3, generator=g)), Training(FAST))
    shown = views(torch.randn(50, 3, generator=g), 4)
    assert set(policy.select(shown).tolist()) <= {2, 3}


@pytest.mark.parametrize("balance", [1.0, 8.0])
def test_a_rare_hand_over_is_found_where_it_is_and_nowhere_else(balance: float) -> None:
    """One position in 500. Weights only teach: the decision is as if there were none."""
    g = torch.Generator().manual_seed(1)
    rare = torch.rand(8000, generator=g) < 0.002
    hidden = torch.randn(8000, 4, generator=g) + 4 * rare[:, None]
    training = Training({**FAST, "balance": balance})
    policy = MlpRouterPolicy().fit(worlds(torch.stack([~rare, rare], -1), hidden), training)
    handed = policy.select(views(hidden, 2)) > 0
    assert int((handed & rare).sum()) >= 0.9 * int(rare.sum())
    assert int((handed & ~rare).sum()) <= 2
    probs = policy.score(views(hidden, 2))
    assert float(probs.mean()) == pytest.approx(float(rare.float().mean()), rel=0.35)


def test_the_threshold_is_the_one_of_the_most_right_tokens() -> None:
    """Where no feature tells positions apart the choice is between all and nothing."""
    base = torch.tensor([True] * 60 + [False] * 40)
    for n_harmed, pays in ((60, False), (45, False), (30, True), (0, True)):
        assistant = torch.tensor([False] * n_harmed + [True] * (100 - n_harmed))
        rescued = torch.full((100,), 0.4)
        found = threshold_for_right_tokens(rescued, base, assistant)
        assert (found < 0.4) == pays, n_harmed
        assert (float(assistant.float().mean()) > float(base.float().mean())) == pays


def test_a_recall_may_be_asked_for_as_in_r2r() -> None:
    g = torch.Generator().manual_seed(2)
    wanted = torch.rand(3000, generator=g) < 0.3
    hidden = torch.randn(3000, 2, generator=g) + wanted[:, None]
    table = worlds(torch.stack([~wanted, wanted], -1), hidden)
    shares = []
    for recall in (0.5, 0.95):
        training = Training({**FAST, "recall": recall})
        MlpRouterPolicy().fit(table, training)
        shares.append(training.report["share_handed_over"])
    assert shares[0] < 0.3 < shares[1]
    kept = MlpRouterPolicy(threshold=0.25).fit(table, Training({**FAST, "recall": 0}))
    assert kept.threshold == 0.25


def test_the_threshold_goes_by_positions_that_the_network_is_undecided_about() -> None:
    """The assistant is wrong where the network is sure of the base model, and nowhere else."""
    handed = torch.tensor([1e-4] * 900 + [0.3] * 100)
    base = torch.tensor([True] * 970 + [False] * 30)
    assistant = torch.tensor([False] * 900 + [True] * 100)
    assert threshold_for_right_tokens(handed, base, assistant) < 0.1
    undecided = torch.full((1000,), 0.3)
    assert threshold_for_right_tokens(undecided, base, assistant) > 0.45

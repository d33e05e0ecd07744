"""The Co-LLM policy: its decisions by hand, its limits, its laws, and what it refuses."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from scipy import stats
from score_worlds import HiddenTable, table, tables
from tables import TOKENS
from tiny_models import PROMPTS, model

from multicolm import Ensemble
from multicolm.artefacts import Weights
from multicolm.errors import ArtefactError, CapabilityError, ConfigError
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.policy.resolve import resolve_policy
from multicolm.testing import check_policy, check_routing
from multicolm.views import ModelNames, View, Views

DECODES = ("argmax", "threshold", "sample", "mixture")


def head(width: int, n_assistants: int, seed: int = 0, scale: float = 1.0) -> Weights:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_assistants, width, generator=g) * scale
    return Weights({"0.weight": weight, "0.bias": torch.randn(n_assistants, generator=g)})


def at(scores: list[list[float]], **settings) -> tuple[CoLlmPolicy, torch.Tensor]:
    """A policy whose head passes through hidden states, which are these scores."""
    width = len(scores[0])
    identity = Weights({"0.weight": torch.eye(width), "0.bias": torch.zeros(width)})
    return CoLlmPolicy(head=identity, **settings), torch.tensor(scores)


def views(hidden: torch.Tensor, logits=None, uniform=None, costs=None) -> Views:
    n, n_models = len(hidden), hidden.shape[1] + 1
    logits = torch.zeros(n_models, n, 4) if logits is None else logits
    shown = {k: View(logits[k], hidden if k == 0 else None) for k in range(n_models)}
    names = ModelNames(["base", *(f"a{k}" for k in range(1, n_models))])
    context = {} if uniform is None else {"uniform": lambda: torch.tensor(uniform)}
    return Views(names, shown, n_positions=n, context=context, costs=costs)


SCORES = [[-1.0, -2.0], [2.0, 1.0], [0.1, 0.3], [-0.1, -0.05]]
"""pi: (.665 .245 .090), (.090 .665 .245), (.290 .320 .391), (.350 .317 .333)"""


def test_by_default_the_base_is_decided_against_all_assistants_together() -> None:
    policy, hidden = at(SCORES)
    assert policy.select(views(hidden)).tolist() == [0, 1, 2, 2]
    assert policy.deferral is not None and "threshold" in policy.tunable


@pytest.mark.parametrize("k", [1, 2, 3, 5, 10])
def test_assistants_that_can_do_the_same_do_not_share_the_vote(k: int) -> None:
    """Jointly likely with 0.71; by argmax each of three has less than the base model's 0.29."""
    scores = [[math.log(0.71 / 0.29 / k)] * k]
    policy, hidden = at(scores)
    assert policy.select(views(hidden)).tolist() == [1]
    shared, hidden = at(scores, decode="argmax")
    assert shared.select(views(hidden)).tolist() == [1 if k < 3 else 0]


def test_a_checkpoint_of_0_1_keeps_the_way_of_decoding_that_it_names(tmp_path) -> None:
    Weights({"0.weight": torch.eye(2), "0.bias": torch.zeros(2)}).save(
        tmp_path / "head.safetensors"
    )
    (tmp_path / "policy.yaml").write_text(
        "summary: Old.\nkind: co-llm\n"
        "params: {head: head.safetensors, decode: argmax, threshold: 0.5, made_for: null}\n"
    )
    policy = resolve_policy(tmp_path)
    assert isinstance(policy, CoLlmPolicy) and policy.decode == "argmax"
    assert policy.select(views(torch.tensor(SCORES))).tolist() == [0, 1, 2, 0]


def test_argmax_lets_the_likeliest_model_write() -> None:
    policy, hidden = at(SCORES, decode="argmax")
    assert policy.select(views(hidden)).tolist() == [0, 1, 2, 0]
    assert policy.defers(views(hidden)).tolist() == [False, True, True, False]
    pi = [[1, math.exp(a), math.exp(b)] for a, b in SCORES]
    expected = torch.tensor([[p / sum(row) for p in row] for row in pi])
    torch.testing.assert_close(policy.model_probs(views(hidden)), expected)
    torch.testing.assert_close(policy.score(views(hidden)), 1 - expected[:, 0])


@pytest.mark.parametrize(
    ("threshold", "writers"),
    [(0.5, [0, 1, 2, 2]), (0.64, [0, 1, 2, 2]), (0.7, [0, 1, 2, 0]), (0.8, [0, 1, 0, 0])],
)
def test_threshold_hands_over_to_the_likeliest_assistant_where_pi_says_so(
    threshold, writers
) -> None:
    policy, hidden = at(SCORES, decode="threshold", threshold=threshold)
    assert policy.select(views(hidden)).tolist() == writers
    assert policy.defers(views(hidden)).tolist() == [w > 0 for w in writers]


def test_sample_takes_the_model_in_whose_stretch_of_pi_the_random_number_lies() -> None:
    scores = [[0.0, math.log(2)]] * 7  # pi = 1/4, 1/4, 1/2
    policy, hidden = at(scores, decode="sample")
    uniform = [0.0, 0.24, 0.26, 0.49, 0.51, 0.99, 1 - 2**-24]
    assert policy.select(views(hidden, uniform=uniform)).tolist() == [0, 0, 1, 1, 2, 2, 2]
    impossible, hidden = at([[-200.0, -200.0], [200.0, -200.0]], decode="sample")
    assert impossible.select(views(hidden, uniform=[0.999999, 0.0])).tolist() == [0, 1]


def test_mixture_is_log_sum_pi_p() -> None:
    policy, hidden = at(SCORES, decode="mixture")
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 4, generator=g) * 3
    logits[1, :, 2] = float("-inf")
    logits[:, 3, 1] = float("-inf")
    mixed = policy.mix(views(hidden, logits))
    pi = policy.model_probs(views(hidden)).double()
    p = logits.double().softmax(-1)
    expected = torch.einsum("nk,knv->nv", pi, p)
    torch.testing.assert_close(mixed.double().exp(), expected, atol=1e-6, rtol=1e-5)
    assert mixed[3, 1] == float("-inf") and not mixed.isnan().any()
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(4))


# --- cost ----------------------------------------------------------------------------------------

WEIGHTS = [0.0, 0.003, 0.03, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 10.0]


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.2}, {"decode": "argmax"}])
def test_at_every_position_a_greater_cost_weight_chooses_no_dearer_writer(settings) -> None:
    """So that one head gives a whole frontier, from the likeliest writers to the base alone."""
    g = torch.Generator().manual_seed(0)
    scores = (torch.randn(500, 4, generator=g) * 2).tolist()
    costs = torch.tensor([7.0, 1.0, 4.0, 20.0, 0.5])  # the base model's is paid anyway
    spent = []
    for weight in WEIGHTS:
        policy, hidden = at(scores, cost_weight=weight, **settings)
        seen = views(hidden, costs=costs.tolist())
        writers = policy.select(seen)
        assert torch.equal(policy.defers(seen), writers > 0)
        spent.append(torch.where(writers > 0, costs[writers], torch.zeros(500)))
    assert all((less <= more).all() for more, less in pairwise(spent))
    assert len({float(s.sum()) for s in spent}) > 6 and spent[-1].sum() < spent[0].sum() / 20


def test_a_cost_weighs_as_worked_out_by_hand() -> None:
    """pi = 0.2, 0.5, 0.3; costs 2 and 1. The odds of handing over are 4 at no price."""
    scores = [[math.log(2.5), math.log(1.5)]]
    costs = [1.0, 2.0, 1.0]
    for weight, writer, odds in (
        (0.0, 1, 4.0),
        (0.3, 1, 4 * math.exp(-0.6)),  # log 0.5 - 0.6 is more than log 0.3 - 0.3
        (1.0, 2, 4 * 0.3 / 0.5 * math.exp(-1)),
        (2.0, 2, 4 * 0.3 / 0.5 * math.exp(-2)),
    ):
        policy, hidden = at(scores, cost_weight=weight)
        seen = views(hidden, costs=costs)
        assert float(policy.score(seen)) == pytest.approx(odds / (1 + odds), rel=1e-5)
        assert policy.select(seen).tolist() == [writer if odds > 1 else 0]


@pytest.mark.parametrize("threshold", [-1, 1])
def test_limits_of_the_threshold_hold_at_any_price(threshold) -> None:
    policy, hidden = at(SCORES, threshold=threshold, cost_weight=50.0)
    assert (policy.select(views(hidden)) > 0).all() == (threshold == -1)


@pytest.mark.parametrize("decode", ["sample", "mixture"])
def test_a_cost_where_nothing_is_decided_by_pi_is_refused(decode) -> None:
    with pytest.raises(ConfigError, match=f"cost_weight: .* decode is {decode}"):
        CoLlmPolicy(decode=decode, cost_weight=0.1)


# --- limits --------------------------------------------------------------------------------------

WIDTH = len(TOKENS) + 1
ASKED = ["a", "b c", " c", "df", " cab", " ea"]


def texts(ensemble, policy, **settings):
    settings = {"max_new_tokens": 16, "seed": 0, **settings}
    answers = ensemble.generate(ASKED, policy, **settings)
    return [[(token.id, token.model) for token in answer.trace] for answer in answers]


def ids(texts):
    return [[token for token, _ in text] for text in texts]


@pytest.mark.parametrize("schedule", ["stepwise", "block"])
def test_threshold_1_is_the_base_alone_and_below_0_the_assistant_alone(schedule) -> None:
    pair = tables("base", "left", hidden=True)
    never, always = (
        CoLlmPolicy(head=head(WIDTH, 1), decode="threshold", threshold=t) for t in (1, -0.1)
    )
    alone = [texts(Ensemble([m]), "single") for m in pair.backends]
    assert ids(alone[0]) != ids(alone[1])
    assert texts(pair, never, schedule=schedule) == alone[0]
    assert texts(pair, always, schedule=schedule) == alone[1]


def test_below_0_the_base_writes_nothing_also_with_several_assistants() -> None:
    trio = tables("base", "left", "right", hidden=True)
    always = CoLlmPolicy(head=head(WIDTH, 2, seed=5), decode="threshold", threshold=-1)
    writers = {model for text in texts(trio, always) for _, model in text}
    assert writers == {"left", "right"}
    never = CoLlmPolicy(head=head(WIDTH, 2), decode="threshold", threshold=1)
    answers = trio.generate(ASKED, never, max_new_tokens=16, seed=0)
    assert all(a.usage[name].forwards == 0 for a in answers for name in ("left", "right"))


def test_a_threshold_above_1_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must be at most 1, got 1\.5"):
        tables("base", "left", hidden=True).generate(
            ["a"], {"kind": "co-llm", "params": {"threshold": 1.5}}
        )


def test_equal_models_write_the_same_whoever_is_chosen() -> None:
    same = [HiddenTable(table("base", 0)), table("left", 0), table("right", 0)]
    alone = ids(texts(Ensemble(same[:1]), "single"))
    for decode in DECODES:
        policy = CoLlmPolicy(head=head(WIDTH, 2), decode=decode)
        assert ids(texts(Ensemble(same), policy)) == alone


# --- distributions -------------------------------------------------------------------------------


def chi_square(observed: Counter, expected: dict, n: int) -> float:
    keys = [key for key, p in expected.items() if p * n > 5]
    seen = [observed[key] for key in keys] + [n - sum(observed[key] for key in keys)]
    hoped = [expected[key] * n for key in keys]
    hoped.append(n - sum(hoped))
    if hoped[-1] < 5:  # too rare for a class of their own
        seen[-2:], hoped[-2:] = [sum(seen[-2:])], [sum(hoped[-2:])]
    return float(stats.chisquare(seen, hoped).pvalue)


def pi_after(base: HiddenTable, policy: CoLlmPolicy, context: list[int]) -> list[float]:
    hidden = base.hidden_after(context)
    scores = policy.head["0.weight"] @ hidden + policy.head["0.bias"]
    return torch.cat([torch.zeros(1), scores]).softmax(0).tolist()


def test_the_drawn_writer_follows_pi() -> None:
    trio = tables("base", "left", "right", hidden=True)
    policy = CoLlmPolicy(head=head(WIDTH, 2, scale=0.3), decode="sample")
    n = 1500
    answers = trio.generate(
        ["a"] * n, policy, max_new_tokens=1, seed=list(range(n)), batch_size=500
    )
    seen = Counter(answer.trace.tokens[0].model for answer in answers)
    pi = pi_after(trio.backends[0], policy, [0])
    assert chi_square(seen, dict(zip(trio.models, pi, strict=True)), n) > 1e-4
    assert min(pi) > 0.03, "or the test says little"


def test_a_sampled_mixture_follows_sum_pi_p_over_two_tokens() -> None:
    trio = tables("base", "left", "right", hidden=True)
    policy = CoLlmPolicy(head=head(WIDTH, 2), decode="mixture")
    n, end = 1000, TOKENS.index(".")

    def after(context: list[int]) -> list[float]:
        pi = pi_after(trio.backends[0], policy, context)
        p = [m.logits_after(context).softmax(-1).tolist() for m in trio.backends]
        return [sum(a * b[v] for a, b in zip(pi, p, strict=True)) for v in range(len(TOKENS))]

    expected: dict[tuple[int, ...], float] = {}
    for first, p in enumerate(after([0])):
        if first == end:
            expected[(first,)] = p
            continue
        for second, q in enumerate(after([0, first])):
            expected[(first, second)] = p * q
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    for schedule in ("stepwise", "block"):
        answers = trio.generate(
            ["a"] * n,
            policy,
            max_new_tokens=2,
            temperature=1.0,
            seed=list(range(n)),
            batch_size=1000,
            schedule=schedule,
        )
        seen = Counter(tuple(token.id for token in answer.trace) for answer in answers)
        assert seen.keys() <= expected.keys()
        assert chi_square(seen, expected, n) > 1e-4
        assert all(token.model == "mixture" for token in answers[0].trace)


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_assistants", [1, 2, 3])
@pytest.mark.parametrize("decode", DECODES)
def test_the_policy_keeps_the_laws(decode, n_assistants) -> None:
    check_policy(CoLlmPolicy(head=head(6, n_assistants), decode=decode))
    check_policy(CoLlmPolicy(head=head(6, n_assistants, 1, 5.0), decode=decode, threshold=0.2))


@pytest.mark.parametrize("decode", DECODES)
def test_schedules_and_batches_change_no_token_of_tiny_llamas(decode) -> None:
    trio = Ensemble([model("llama", "base"), model("llama", "left", 1), model("qwen3", "right", 2)])
    policy = CoLlmPolicy(head=head(32, 2, scale=0.6), decode=decode)
    check_routing(trio, PROMPTS[:4], policy, max_new_tokens=8)
    answers = trio.generate(PROMPTS[:4], policy, max_new_tokens=12, seed=0)
    writers = {token.model for answer in answers for token in answer.trace}
    assert writers == ({"mixture"} if decode == "mixture" else {"base", "left", "right"})


@pytest.mark.parametrize("decode", DECODES)
def test_schedules_and_batches_change_no_token_of_tables(decode) -> None:
    trio = tables("base", "left", "right", hidden=True)
    policy = CoLlmPolicy(head=head(WIDTH, 2), decode=decode)
    check_routing(trio, ASKED, policy, max_new_tokens=12)


def test_the_trace_holds_the_probability_of_handing_over() -> None:
    trio = tables("base", "left", "right", hidden=True)
    policy = CoLlmPolicy(head=head(WIDTH, 2))
    [answer] = trio.generate(["ab"], policy, max_new_tokens=6, seed=0)
    context = [0, 1]
    for token in answer.trace:
        pi = pi_after(trio.backends[0], policy, context)
        assert token.score == pytest.approx(1 - pi[0], abs=1e-5)
        best = max((1, 2), key=lambda k: pi[k])
        assert token.model == trio.models[best if 1 - pi[0] > 0.5 else 0]
        context.append(token.id)


# --- refusals ------------------------------------------------------------------------------------

MADE_FOR = {"base": "table:0", "left": "table:1", "right": "table:2"}


def made(n_assistants: int = 2, width: int = WIDTH, **settings) -> CoLlmPolicy:
    return CoLlmPolicy(head=head(width, n_assistants), made_for=MADE_FOR, **settings)


def refusal(ensemble: Ensemble, policy) -> str:
    with pytest.raises(CapabilityError) as caught:
        ensemble.generate(["a"], policy, max_new_tokens=2)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_untrained_policy_says_how_to_train_one() -> None:
    said = refusal(tables("base", "left", hidden=True), "co-llm")
    assert "'co-llm' has not learned anything yet" in said
    assert "`multicolm train ENSEMBLE SCORES --policy co-llm --out CHECKPOINT`" in said


def test_another_number_of_models_is_refused_with_both() -> None:
    said = refusal(tables("base", "left", hidden=True), made())
    assert "was made for 3 models, and this ensemble has 2 (base, left)" in said


def test_another_order_is_refused_with_both() -> None:
    other = tables("base", "right", "left", seeds=(0, 2, 1), hidden=True)
    said = refusal(other, made())
    assert "base (table:0), left (table:1), right (table:2), and this ensemble is" in said
    assert "base (table:0), right (table:2), left (table:1)" in said


def test_another_model_under_the_same_name_is_refused_with_both() -> None:
    said = refusal(tables("base", "left", "right", seeds=(0, 1, 9), hidden=True), made())
    assert "right (table:2)" in said and "right (table:9)" in said


def test_the_same_models_under_other_names_are_accepted() -> None:
    renamed = tables("one", "two", "three", hidden=True)
    usual = tables("base", "left", "right", hidden=True)
    assert ids(texts(renamed, made())) == ids(texts(usual, made()))


def test_models_of_unknown_identity_go_by_their_names() -> None:
    def unknown(*names):
        models = [
            HiddenTable(table(names[0], 0)),
            *(table(n, k) for k, n in enumerate(names[1:], 1)),
        ]
        for each in models:
            each.identity = ""
        return Ensemble(models)

    assert texts(unknown("base", "left", "right"), made())
    said = refusal(unknown("base", "left", "other"), made())
    assert "right (table:2)" in said and said.count("other") >= 1


def test_a_head_for_other_hidden_states_is_refused_with_both_widths() -> None:
    said = refusal(tables("base", "left", "right", hidden=True), made(width=5))
    assert "hidden states of width 5" in said
    assert f"'base' have {WIDTH}" in said


def test_a_base_model_without_hidden_states_is_refused_by_name() -> None:
    said = refusal(tables("base", "left", "right"), made())
    assert "needs hidden of model 'base', which shows only" in said


def test_weights_that_are_no_head_are_refused_with_their_file(tmp_path) -> None:
    path = Weights({"a": torch.zeros(2)}).save(tmp_path / "head.safetensors").path
    with pytest.raises(ArtefactError, match=r"head\.safetensors holds no router: its tensors"):
        tables("base", "left", hidden=True).generate(["a"], CoLlmPolicy(head=Weights(path)))


def test_a_threshold_stands_for_the_published_rule_however_it_decodes_otherwise() -> None:
    assert CoLlmPolicy().params_at(0.3) == {"decode": "threshold", "threshold": 0.3}
    assert CoLlmPolicy(**CoLlmPolicy(decode="sample").params_at(0.3)).deferral is not None

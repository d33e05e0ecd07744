"""Numbers at the edge: thresholds met exactly, ties, certainty, tokens that cannot come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from multicolm import Answer, Ensemble, ModelNames, View, Views
from multicolm.backend.table import TableModel
from multicolm.errors import PolicyError
from multicolm.policy.bild import BildPolicy
from multicolm.policy.cosd import CosdRulePolicy
from multicolm.policy.fixed import RandomPolicy
from multicolm.policy.logit_arithmetic import ContrastivePolicy, ProxyTuningPolicy
from multicolm.policy.mixture import AveragePolicy
from multicolm.policy.nudging import NudgingPolicy
from multicolm.policy.threshold import (
    ConfidencePolicy,
    EntropyPolicy,
    MarginPolicy,
    MaxConfidencePolicy,
)

NAMES = ModelNames(["base", "left", "right"])
# Sums of powers of two are exact in floating point, so equal means equal.
HALF = [0.5, 0.25, 0.125, 0.125]
TURNED = [0.25, 0.5, 0.125, 0.125]
FLAT = [0.25, 0.25, 0.25, 0.25]
SURE = [0.0, 0.0, 1.0, 0.0]
NO_TOKEN = -math.inf


def show(*rows: Sequence[float], **context: int | float) -> Views:
    """One position at which model k has the distribution ``rows[k]``."""
    views = {k: View(torch.tensor([row]).log()) for k, row in enumerate(rows)}
    known = {name: (lambda value=value: torch.tensor([value])) for name, value in context.items()}
    starts_word = torch.tensor([False, False, True, True])
    names = ModelNames(NAMES[: len(rows)])
    return Views(names, views, n_positions=1, context=known, starts_word=starts_word)


def test_a_threshold_that_is_met_exactly_does_not_defer() -> None:
    views = show(HALF, FLAT, FLAT, previous=0, base_run=3)
    for kind, threshold in ((ConfidencePolicy, 0.5), (MarginPolicy, 0.25), (NudgingPolicy, 0.5)):
        assert kind(threshold=threshold).defers(views).tolist() == [False]
        assert kind(threshold=threshold + 1e-6).defers(views).tolist() == [True]
    assert CosdRulePolicy(alpha=0.5).defers(views).tolist() == [False]
    assert CosdRulePolicy(alpha=0.5 + 1e-6).defers(views).tolist() == [True]
    assert BildPolicy(fallback=0.5, num_small_iters=4).defers(views).tolist() == [False]
    assert BildPolicy(fallback=0.5, num_small_iters=3).defers(views).tolist() == [True]
    nats = float(views.base.entropy_nats)
    assert EntropyPolicy(threshold=nats).defers(views).tolist() == [False]
    assert EntropyPolicy(threshold=nats - 1e-6).defers(views).tolist() == [True]


def test_cosd_wants_more_than_beta_times_not_as_much() -> None:
    assert CosdRulePolicy(alpha=1.0, beta=1.0).select(show(HALF, TURNED)).tolist() == [0]
    assert CosdRulePolicy(alpha=1.0, beta=0.99).select(show(HALF, TURNED)).tolist() == [1]


def test_bild_rolls_back_above_the_limit_and_not_at_it() -> None:
    views = show(HALF, TURNED, previous=0, base_run=0)
    limit = float(-views[1].logprob_of(torch.tensor([0])))
    assert BildPolicy(fallback=0, rollback=limit).select(views).tolist() == [0]
    assert BildPolicy(fallback=0, rollback=limit - 1e-6).select(views).tolist() == [1]


def test_bild_without_a_limit_never_rolls_back_even_what_cannot_come() -> None:
    views = show(HALF, SURE, previous=0, base_run=0)
    assert BildPolicy(fallback=0, rollback=math.inf).score(views).tolist() == [math.inf]
    assert BildPolicy(fallback=0, rollback=math.inf).select(views).tolist() == [0]
    assert BildPolicy(fallback=0, rollback=1e30).select(views).tolist() == [1]


def test_of_equally_sure_models_the_lowest_writes() -> None:
    for kind in (ConfidencePolicy, EntropyPolicy, MarginPolicy):
        assert kind().select(show(FLAT, TURNED, TURNED)).tolist() == [1]
        assert kind().select(show(FLAT, FLAT, TURNED)).tolist() == [2]
    assert MaxConfidencePolicy().select(show(HALF, TURNED, HALF)).tolist() == [0]
    assert MaxConfidencePolicy().select(show(FLAT, TURNED, HALF)).tolist() == [1]
    assert CosdRulePolicy().select(show(FLAT, TURNED, TURNED)).tolist() == [1]


def test_of_equally_likely_tokens_the_lowest_id_is_the_most_likely() -> None:
    view = show(FLAT).base
    assert view.top1_ids.tolist() == [0]
    assert view.margins.tolist() == [0.0]
    # So an assistant that says the same of another order agrees with the base model.
    assert CosdRulePolicy(alpha=1, beta=0).select(show(FLAT, FLAT)).tolist() == [0]


def test_certainty_has_no_entropy_and_no_margin_to_spare() -> None:
    view = show(SURE).base
    assert view.entropy_nats.tolist() == [0.0]
    assert view.margins.tolist() == [1.0]
    assert view.top1_probs.tolist() == [1.0]
    for never in (ConfidencePolicy(threshold=1), MarginPolicy(threshold=1), EntropyPolicy(0.0)):
        assert never.defers(show(SURE)).tolist() == [False]


def test_entropy_counts_no_token_that_cannot_come() -> None:
    assert float(show([0.5, 0.5, 0.0, 0.0]).base.entropy_nats) == pytest.approx(math.log(2))


def test_logits_need_not_be_normalised() -> None:
    logits = torch.tensor([[3.0, 1.0, NO_TOKEN, 2.0]])
    shifted, plain = View(logits + 100), View(logits.log_softmax(-1))
    for number in ("top1_probs", "margins", "entropy_nats", "logprobs"):
        torch.testing.assert_close(getattr(shifted, number), getattr(plain, number))


def test_a_vocabulary_of_one_token_leaves_no_doubt() -> None:
    view = View(torch.tensor([[2.0]]))
    assert (view.margins.tolist(), view.entropy_nats.tolist()) == ([1.0], [0.0])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_numbers_of_16_bits_are_worked_out_in_32(half: torch.dtype) -> None:
    view = View(torch.tensor([[4.0, 3.5, -1.0]], dtype=half))
    exact = View(torch.tensor([[4.0, 3.5, -1.0]]))
    assert view.logprobs.dtype == torch.float32
    assert torch.equal(view.logprobs, exact.logprobs)


@pytest.mark.parametrize(
    ("uniform", "writer"),
    [(0.0, 1), (0.24, 1), (0.25, 2), (math.nextafter(1, 0), 2)],
)
def test_a_lottery_gives_each_model_its_part_of_the_line(uniform: float, writer: int) -> None:
    views = show(FLAT, FLAT, FLAT, uniform=uniform)
    assert RandomPolicy(weights=[0, 1, 3]).select(views).tolist() == [writer]
    assert RandomPolicy(weights=[0, 1, 0]).select(views).tolist() == [1]
    assert RandomPolicy(weights=[1, 0, 0]).select(views).tolist() == [0]


def test_a_lottery_whose_chances_sum_to_a_little_less_than_one_names_a_model_that_has_one() -> None:
    views = show(FLAT, FLAT, FLAT, uniform=1.0)
    assert RandomPolicy(weights=[0.1, 0.2, 0]).select(views).tolist() == [1]


def test_an_arithmetic_average_keeps_what_one_model_can_write() -> None:
    mixed = AveragePolicy().mix(show(SURE, HALF)).exp()
    torch.testing.assert_close(mixed, torch.tensor([[0.25, 0.125, 0.5625, 0.0625]]))


@pytest.mark.parametrize("weight", [1.0, 1e-9, 1e-50])
def test_a_geometric_average_rules_out_what_one_model_cannot_write(weight: float) -> None:
    mixed = AveragePolicy(weights=[1, weight], mean="geometric").mix(show(HALF, SURE))
    assert mixed.softmax(-1).tolist() == [[0.0, 0.0, 1.0, 0.0]]


def test_a_geometric_average_of_models_with_nothing_in_common_is_stopped() -> None:
    one = TableModel("one", ["a", "b"], {"": {"a": 1.0}})
    other = TableModel("other", ["a", "b"], {"": {"b": 1.0}})
    with pytest.raises(PolicyError, match="'average' returned a distribution without any possible"):
        Ensemble([one, other]).generate(
            ["a"], {"kind": "average", "params": {"mean": "geometric"}}, max_new_tokens=1
        )


def test_proxy_tuning_judges_a_token_that_a_proxy_cannot_write_by_the_base_alone() -> None:
    base, expert, anti = HALF, [0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.5, 0.5]
    mixed = ProxyTuningPolicy(alpha=2.0).mix(show(base, expert, anti)).exp()
    torch.testing.assert_close(mixed, torch.tensor([HALF]))
    mixed = ProxyTuningPolicy(alpha=2.0).mix(show(base, TURNED, FLAT)).exp()
    torch.testing.assert_close(mixed, torch.tensor([[0.5, 1.0, 0.03125, 0.03125]]))


def test_proxy_tuning_never_writes_what_the_base_cannot() -> None:
    mixed = ProxyTuningPolicy(alpha=9.0).mix(show(SURE, TURNED, FLAT))
    assert mixed.isfinite().tolist() == [[False, False, True, False]]


def test_contrastive_at_alpha_1_keeps_only_the_most_likely_tokens() -> None:
    mixed = ContrastivePolicy(alpha=1.0).mix(show(HALF, [0.4, 0.4, 0.2, 0.0]))
    assert mixed.isfinite().tolist() == [[True, True, False, False]]


def test_contrastive_at_alpha_0_keeps_all_that_the_expert_can_write() -> None:
    mixed = ContrastivePolicy(alpha=0.0).mix(show(FLAT, [0.6, 0.4, 1e-30, 0.0]))
    assert mixed.isfinite().tolist() == [[True, True, True, False]]


def test_contrastive_keeps_a_token_exactly_at_the_cut() -> None:
    mixed = ContrastivePolicy(alpha=0.5).mix(show(FLAT, HALF))
    assert mixed.isfinite().tolist() == [[True, True, False, False]]


def test_contrastive_cuts_by_the_expert_and_prefers_what_the_amateur_does_not_know() -> None:
    contrast = ContrastivePolicy(alpha=0.25, beta=0.5)
    mixed = contrast.mix(show([0.8, 0.2, 0.0, 0.0], [0.5, 0.3, 0.14, 0.06]))
    assert mixed.isfinite().tolist() == [[True, True, True, False]]
    assert int(mixed.argmax()) == 2
    wanted = [1.5 * math.log(e) - 0.5 * math.log(a) for e, a in ((0.5, 0.8), (0.3, 0.2))]
    assert mixed[0, :2].tolist() == pytest.approx(wanted)


def test_nudging_ends_a_word_where_the_next_token_begins_another() -> None:
    inside, at_word = [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]
    sure = [0.9, 0.1, 0.0, 0.0]
    nudge = NudgingPolicy(threshold=0.4)
    assert nudge.select(show(sure, inside, previous=1)).tolist() == [1]
    assert nudge.select(show(sure, at_word, previous=1)).tolist() == [0]
    assert nudge.select(show(sure, inside, previous=0)).tolist() == [0]
    assert nudge.select(show(sure, inside, previous=-1)).tolist() == [0]
    assert nudge.select(show(FLAT, at_word, previous=1)).tolist() == [1]


TOKENS = ["a", "b", "."]
NEVER_ENDS = TableModel("never", TOKENS, {"": {"a": 0.5, "b": 0.5}}, ends=["."])
ENDS = TableModel("ends", TOKENS, {"": {"a": 0.25, ".": 0.75}}, ends=["."])


def answer(ensemble: Ensemble, kind: str, **params: Any) -> Answer:
    policy = {"kind": kind, "params": params}
    [written] = ensemble.generate(["b"], policy, max_new_tokens=4, temperature=1.0, seed=2)
    return written


def test_impossible_tokens_are_never_written_by_any_policy() -> None:
    half = {"weights": [0.5, 0.5]}
    pair = Ensemble([ENDS, NEVER_ENDS])
    for kind, params in (
        ("random", half),
        ("average", half),
        ("max-confidence", {}),
        ("cosd-rule", {"alpha": 1.0}),
        ("speculative", {}),
        ("contrastive", {"alpha": 0.0}),
        ("bild", {}),
    ):
        for token in answer(pair, kind, **params).trace:
            assert math.isfinite(token.logprob)
            if token.model == "ends":
                assert token.text != "b"
            if token.model == "never":
                assert token.text != "."


def test_a_replaced_token_is_one_that_the_target_can_write() -> None:
    for pair, banned in (
        (Ensemble([ENDS, NEVER_ENDS]), "."),
        (Ensemble([NEVER_ENDS, ENDS]), "b"),
    ):
        answers = pair.generate(
            ["a"] * 50, "speculative", max_new_tokens=3, temperature=1.0, seed=range(50)
        )
        assert all(token.text != banned for a in answers for token in a.trace)


def test_a_nudge_ends_where_the_base_model_agrees_on_the_next_word() -> None:
    # Tokens 2 and 3 begin words. Both models would write 2, and the base model is not sure of it.
    unsure, sure = [0.2, 0.2, 0.35, 0.25], [0.05, 0.0, 0.95, 0.0]
    for previous, writer in ((1, 0), (0, 1), (-1, 1)):
        views = show(unsure, sure, previous=previous, base_run=0)
        assert NudgingPolicy().select(views).tolist() == [writer]
        assert NudgingPolicy(threshold=1.1).select(views).tolist() == [1]
    # Within a word, and where they disagree, the nudger goes on.
    for other in ([0.0, 0.95, 0.05, 0.0], [0.0, 0.05, 0.0, 0.95]):
        views = show(unsure, other, previous=1, base_run=0)
        assert NudgingPolicy().select(views).tolist() == [1]


def test_the_large_model_begins_under_bild_unless_told_otherwise() -> None:
    for large_first, previous, writer in ((True, -1, 1), (False, -1, 0), (True, 0, 0)):
        policy = BildPolicy(fallback=0.0, rollback=math.inf, large_first=large_first)
        views = show(HALF, TURNED, previous=previous, base_run=0)
        assert policy.select(views).tolist() == [writer]

"""A policy that breaks its contract while a text is written is stopped, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tables import random_table

from multicolm import Ensemble, MixPolicy, ModelNames, Policy, SelectPolicy, VerifyPolicy, Views
from multicolm.errors import MulticolmError, PolicyError
from multicolm.policy.base import check_used
from multicolm.views import View

PAIR = Ensemble([random_table("base", 0), random_table("other", 1)])
Ask = Callable[[Views], Any]


def zeros(views: Views) -> torch.Tensor:
    return torch.zeros(views.n_positions, dtype=torch.long)


def policy(kind: type[Policy], ask: Ask, **declared: Any) -> Policy:
    """A policy whose one method is ``ask``; it may see everything unless declared otherwise."""
    method = {SelectPolicy: "select", MixPolicy: "mix", VerifyPolicy: "target_probs"}[kind]
    body = {
        "base_signals": {"logprobs"},
        "assistant_signals": {"logprobs"},
        method: lambda self, views: ask(views),
        **declared,
    }
    return type("Odd", (kind,), body)()


def complaint(odd: Policy, **settings: Any) -> str:
    with pytest.raises(PolicyError) as caught:
        PAIR.generate(["a", "b"], odd, max_new_tokens=3, seed=0, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("declared", "ask", "signal"),
    [
        ({"top1"}, lambda view: view.logprobs, "logprobs"),
        ({"top1"}, lambda view: view.probs, "logprobs"),
        ({"top1"}, lambda view: view.logits, "logprobs"),
        ({"top1"}, lambda view: view.entropy_nats, "logprobs"),
        ({"topk"}, lambda view: view.logprob_of(view.top1_ids), "token_logprobs"),
        ({"top1"}, lambda view: view.margins, "topk"),
        ({"logprobs"}, lambda view: view.hidden, "hidden"),
    ],
)
@pytest.mark.parametrize("model", [0, 1])
def test_a_signal_that_was_not_declared_cannot_be_read(
    declared: set[str], ask: Callable[[View], Any], signal: str, model: int
) -> None:
    def select(views: Views) -> torch.Tensor:
        ask(views[model])
        return zeros(views)

    odd = policy(SelectPolicy, select, base_signals=declared, assistant_signals=declared)
    said = complaint(odd)
    assert said.startswith(
        f"the policy reads '{signal}' of model '{PAIR.models[model]}' but declared only ["
    )
    assert said.endswith(f"]; add '{signal}' to `base_signals` or `assistant_signals`.")


def test_what_was_drawn_from_needs_all_log_probabilities() -> None:
    odd = policy(VerifyPolicy, lambda views: views.drawn_probs(1), assistant_signals={"top1"})
    assert complaint(odd) == (
        "the policy reads 'logprobs' of model 'other' but declared only ['top1']; "
        "add 'logprobs' to `base_signals` or `assistant_signals`."
    )


def test_a_model_that_was_not_declared_cannot_be_looked_at() -> None:
    odd = policy(SelectPolicy, lambda views: views[1].top1_ids, assistant_signals=set())
    assert complaint(odd) == (
        "the policy reads model 'other', which was not run here; declare its signals in "
        '`base_signals` or `assistant_signals`. With `assistants = "deferred"` assistants are run '
        "only where defers() is true."
    )


def test_an_assistant_cannot_be_looked_at_before_the_base_model_deferred() -> None:
    odd = policy(
        SelectPolicy,
        zeros,
        assistants="deferred",
        defers=lambda self, views: views[1].top1_probs < 0.5,
    )
    assert complaint(odd).startswith("the policy reads model 'other', which was not run here")


@pytest.mark.parametrize("what", ["previous", "base_run"])
def test_who_wrote_before_is_only_told_to_those_who_say_so(what: str) -> None:
    def select(views: Views) -> torch.Tensor:
        return getattr(views, what).clamp(0, 1)

    assert "must declare `history = True`" in complaint(policy(SelectPolicy, select))
    PAIR.generate(["a"], policy(SelectPolicy, select, history=True), max_new_tokens=3)


def test_views_without_settings_or_vocabulary_say_so() -> None:
    views = Views(ModelNames(["a"]), {0: View(torch.zeros(1, 3))}, n_positions=1)
    with pytest.raises(PolicyError, match="without sampling settings"):
        views.drawn_probs(0)
    with pytest.raises(PolicyError, match="without a vocabulary"):
        views.starts_word(torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (lambda n: torch.zeros(n), "a torch.float32 tensor of shape [2]"),
        (lambda n: torch.zeros(n, dtype=torch.bool), "a torch.bool tensor of shape [2]"),
        (lambda n: torch.zeros(n + 1, dtype=torch.long), "a torch.int64 tensor of shape [3]"),
        (lambda n: torch.zeros(n, 1, dtype=torch.long), "a torch.int64 tensor of shape [2, 1]"),
        (lambda n: torch.tensor(0), "a torch.int64 tensor of shape []"),
        (lambda n: [0] * n, "list"),
        (lambda n: None, "NoneType"),
    ],
)
def test_select_must_return_one_index_per_position(answer: Callable[[int], Any], seen: str) -> None:
    odd = policy(SelectPolicy, lambda views: answer(views.n_positions))
    assert complaint(odd) == (
        "policy 'Odd': select() must return a torch.int32 or torch.int64 tensor with 2 "
        f"entries, one per position, and returned {seen}."
    )


@pytest.mark.parametrize("index", [-1, 2])
def test_select_must_name_a_model_that_exists(index: int) -> None:
    odd = policy(SelectPolicy, lambda views: zeros(views) + index)
    assert complaint(odd) == (
        f"policy 'Odd' chose model {index}; allowed are those that it uses (0 base, 1 other)."
    )


def test_select_must_name_a_model_that_it_uses() -> None:
    base_alone = {"uses": lambda self, models: frozenset({0})}
    odd = policy(SelectPolicy, lambda views: zeros(views) + 1, **base_alone)
    assert complaint(odd) == (
        "policy 'Odd' chose model 1; allowed are those that it uses (0 base)."
    )


@pytest.mark.parametrize(
    ("score", "seen"),
    [
        (lambda n: torch.zeros(n, 2), "a torch.float32 tensor of shape [2, 2]"),
        (lambda n: torch.zeros(n - 1), "a torch.float32 tensor of shape [1]"),
        (lambda n: [0.0] * n, "list"),
    ],
)
def test_score_must_return_one_number_per_position(score: Callable[[int], Any], seen: str) -> None:
    odd = policy(SelectPolicy, zeros, score=lambda self, views: score(views.n_positions))
    assert complaint(odd) == (
        "policy 'Odd': score() must return a torch.float32 or torch.float64 tensor with 2 entries, "
        f"one per position, and returned {seen}."
    )


def test_indices_of_32_bits_are_taken() -> None:
    [answer] = PAIR.generate(["a"], policy(SelectPolicy, lambda v: zeros(v).int() + 1))
    assert answer.trace.share("other") == 1


def test_defers_must_return_flags() -> None:
    odd = policy(
        SelectPolicy,
        zeros,
        assistants="deferred",
        defers=lambda self, views: views.base.top1_probs,
    )
    assert complaint(odd).startswith(
        "policy 'Odd': defers() must return a torch.bool tensor with 2 entries"
    )


@pytest.mark.parametrize(
    ("mixed", "said"),
    [
        (lambda x: x + float("-inf"), "without any possible token, or with NaN"),
        (lambda x: x * float("nan"), "without any possible token, or with NaN"),
        (
            lambda x: x.masked_fill(x == x[0, 0], float("inf")),
            "without any possible token, or with NaN",
        ),
        (lambda x: x[:, 0], "mix() must return a torch.float32 or torch.float64 tensor with 2"),
        (lambda x: x[:, :-1], "mix() must return a torch.float32 or torch.float64 tensor with 2"),
        (lambda x: x[:1], "mix() must return a torch.float32 or torch.float64 tensor with 2"),
        (lambda x: x.half(), "mix() must return a torch.float32 or torch.float64 tensor with 2"),
    ],
)
def test_mix_must_return_a_distribution_per_position(mixed: Callable[..., Any], said: str) -> None:
    odd = policy(MixPolicy, lambda views: mixed(views.base.logprobs))
    assert said in complaint(odd)


@pytest.mark.parametrize("factor", [2.0, 0.5, -1.0, float("nan")])
def test_target_probs_must_be_probabilities(factor: float) -> None:
    odd = policy(VerifyPolicy, lambda views: factor * views.drawn_probs(1))
    assert complaint(odd, temperature=1.0).endswith("target_probs whose rows are no probabilities.")


def test_target_probs_must_be_as_wide_as_the_vocabulary() -> None:
    odd = policy(VerifyPolicy, lambda views: torch.ones(views.n_positions, 1))
    assert complaint(odd, schedule="stepwise") == (
        "policy 'Odd': target_probs() must return a torch.float32 or torch.float64 tensor with 2 "
        "rows of 7, one per position, and returned a torch.float32 tensor of shape [2, 1]."
    )


def test_what_replaces_a_draft_must_be_a_model_that_was_run() -> None:
    odd = policy(
        VerifyPolicy,
        lambda views: views.drawn_probs(0),
        assistant_signals=set(),
    )
    assert complaint(odd) == (
        "policy 'Odd': replaces() named model 1, which was not run; name one of its needs (0)."
    )


def test_a_policy_of_no_kind_is_refused() -> None:
    assert complaint(Policy()) == (
        "policy 'policy' is a Policy; a policy derives from SelectPolicy, MixPolicy, "
        "VerifyPolicy or SegmentPolicy."
    )


def test_an_error_of_the_policy_itself_keeps_its_traceback() -> None:
    def select(views: Views) -> torch.Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        PAIR.generate(["a"], policy(SelectPolicy, select))
    assert not isinstance(caught.value, MulticolmError)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_mixing_policy_that_names_no_writer_of_the_ensemble_is_stopped(index: int) -> None:
    def writers(_: MixPolicy, views: Views) -> torch.Tensor:
        return zeros(views) + index

    odd = policy(MixPolicy, lambda views: views.base.logprobs, writers=writers)
    assert complaint(odd) == (
        f"policy 'Odd': writers() named model {index}; allowed are those that it uses (0, 1), and "
        "2 for the mixture."
    )


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ({"assistants": "defered"}, "Mine.assistants: unknown value 'defered'. Did you mean 'def"),
        ({"schedule": "blocks"}, "Mine.schedule: unknown value 'blocks'. Did you mean 'block'?"),
        ({"base_signals": {"logprob"}}, "Mine.base_signals: unknown signal 'logprob'. Did you mea"),
        ({"base_signals": "top1"}, "Mine.base_signals is a set of signals, such as {'top1'}; got"),
        ({"base_signal": {"top1"}}, "Mine.base_signal: no policy has this; did you mean 'base_si"),
        ({"needs": ("top1",)}, "Mine.needs is a method, and was given a value; the signals that"),
    ],
)
def test_a_declaration_that_would_not_be_read_is_refused_where_the_class_is_made(
    declared: dict[str, Any], says: str
) -> None:
    with pytest.raises(PolicyError, match="^" + re.escape(says)):
        type("Mine", (SelectPolicy,), declared)


def test_a_param_may_be_called_like_a_declaration() -> None:
    def select(self: SelectPolicy, views: Views) -> torch.Tensor:
        return zeros(views)

    body = {"__annotations__": {"prompt": "str"}, "prompt": "", "select": select, "scores": select}
    assert type("Mine", (SelectPolicy,), body).prompt == ""


def test_a_policy_without_its_method_is_refused_before_anything_runs() -> None:
    mine = type("Mine", (SelectPolicy,), {"selct": lambda self, views: zeros(views)})()
    with pytest.raises(PolicyError, match="Mine: a SelectPolicy must define `select`; is 'selct'"):
        check_used(mine, PAIR.models)

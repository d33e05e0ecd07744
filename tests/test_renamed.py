"""Names of 0.1 that are called otherwise now."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from tables import random_table

from multicolm.backend.base import Model, TokenSession
from multicolm.errors import ModelError, PolicyError
from multicolm.policy.base import SelectPolicy
from multicolm.views import Views


@pytest.mark.parametrize(
    ("old", "new"), [("wait", "synchronize"), ("n_likeliest", "max_top_logprobs")]
)
def test_a_model_that_defines_an_old_name_is_given_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ModelError, match=rf"Mine: `{old}` of 0\.1 is called `{new}` now"):
        type("Mine", (Model,), {old: None})


def test_a_session_that_defines_an_old_name_is_given_the_new_one() -> None:
    with pytest.raises(ModelError, match=r"`tell` of 0\.1 is called `logprobs_of` now"):
        type("Mine", (TokenSession,), {"tell": None})


def test_an_old_attribute_is_neither_read_nor_set() -> None:
    model = random_table("base", seed=0)
    with pytest.raises(ModelError, match="called `max_top_logprobs` now"):
        model.n_likeliest = 5
    with pytest.raises(ModelError, match="called `max_top_logprobs` now"):
        _ = model.n_likeliest
    with pytest.raises(PolicyError, match="called `prompt_mean_nll` now"):
        _ = Views.__new__(Views).prompt_nats


def test_an_old_name_cannot_be_imported_and_the_error_says_the_new_one() -> None:
    with pytest.raises(ImportError, match="called ModelOutput now"):
        from multicolm.backend.base import Look  # noqa: F401


def test_a_policy_that_defines_an_old_name_is_given_the_new_one() -> None:
    with pytest.raises(PolicyError, match=r"`seams` of 0\.1 is called `reads_boundaries` now"):
        type("Mine", (SelectPolicy,), {"seams": True})


def test_an_old_signal_is_refused_with_the_new_one() -> None:
    with pytest.raises(PolicyError, match=r"Mine.assistant_signals: .* 'token_logprobs' now"):

        class Mine(SelectPolicy):
            assistant_signals: ClassVar[Any] = {"top1", "given"}

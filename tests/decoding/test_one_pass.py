"""Models with the same weights are run in one forward pass, and predict what each does alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from expert_worlds import NAMES, apart, expert_models, experts
from tiny_models import PROMPTS, model

from multicolm import Answer, Ensemble, SelectPolicy, Views
from multicolm.backend.base import ModelOutput
from multicolm.backend.checked import RowPool, open_session
from multicolm.backend.transformers import TransformersModel
from multicolm.errors import ModelError
from multicolm.testing import check_routing

POLICIES: dict[str, dict[str, Any]] = {
    "average": {"kind": "average"},
    "max-confidence": {"kind": "max-confidence"},
    "cosd-rule": {"kind": "cosd-rule", "params": {"alpha": 0.3, "beta": 0.6}},
    "speculative": {"kind": "speculative"},
    "spec-fuse": {"kind": "spec-fuse"},
}


@contextmanager
def counted(ensemble: Ensemble) -> Iterator[list[int]]:
    """How many rows each forward pass of the shared network has."""
    rows: list[int] = []
    module = ensemble.backends[0].model  # type: ignore[attr-defined]
    hook = module.register_forward_pre_hook(
        lambda _, arguments, named: rows.append(len(named["input_ids"])), with_kwargs=True
    )
    try:
        yield rows
    finally:
        hook.remove()


def traces(answers: list[Answer]) -> list[list[tuple[int, str]]]:
    return [[(token.id, token.model) for token in answer.trace] for answer in answers]


def fed(models: list[TransformersModel]) -> list[ModelOutput]:
    """What models predict of ragged rows in one pass, and then in another after a cut."""
    pool = RowPool()
    sessions = [open_session(each, 2, pool) for each in models]
    outputs = []
    for texts in ([[5, 6, 7], [8]], [[9], [10, 11, 12, 13]]):
        rows = [session.first_row + row for session in sessions for row in (0, 1)]
        output, errors = pool.feed_each(rows, texts * len(models), [1] * len(rows), hidden=True)
        assert not errors
        outputs.append(output)
        for session in sessions:
            session.truncate(0, 2)
    return outputs


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "opt", "phi3"])
def test_rows_of_several_models_in_one_pass_are_what_each_model_predicts_alone(kind: str) -> None:
    models = expert_models(kind)
    assert len({each.weights for each in models}) == 1
    together = fed(models)
    for number, one in enumerate(models):
        for mixed, alone in zip(together, fed([one]), strict=True):
            own = slice(2 * number, 2 * number + 2)
            assert torch.allclose(mixed.logits[own], alone.logits, atol=1e-4)
            assert mixed.hidden is not None and alone.hidden is not None
            assert torch.allclose(mixed.hidden[own], alone.hidden, atol=1e-4)


def test_a_model_may_join_when_others_have_read_already() -> None:
    models, pool = expert_models(), RowPool()
    text = list(range(40, 60))
    want = open_session(models[0], 1).feed([0], [[*text, 7]], [1]).logits
    base = open_session(models[0], 2, pool)
    base.feed([1], [text], [1])
    left = open_session(models[1], 200, pool)
    left.feed([0, 199], [text, text], [1, 1])
    assert base.lengths == [0, 20] and left.lengths == [20, *[0] * 198, 20]
    assert torch.allclose(base.feed([1], [[7]], [1]).logits, want, atol=1e-4)
    base.truncate(1, 3)
    assert base.lengths == [0, 3] and left.lengths[199] == 20


@pytest.mark.parametrize("schedule", ["stepwise", "block"])
@pytest.mark.parametrize("policy", POLICIES)
def test_texts_are_those_of_separate_copies(policy: str, schedule: Any) -> None:
    settings: dict[str, Any] = {"schedule": schedule, "max_new_tokens": 8, "seed": 3}
    for kind, batch_size, temperature in (("llama", 3, 0.0), ("gemma3", 1, 0.9)):
        mine, theirs = (
            ensemble.generate(
                PROMPTS[:4],
                POLICIES[policy],
                batch_size=batch_size,
                temperature=temperature,
                **settings,
            )
            for ensemble in (experts(kind), apart(kind))
        )
        assert traces(mine) == traces(theirs)


def test_batches_schedules_and_waiting_for_a_slot_change_nothing() -> None:
    ensemble = experts()
    for policy in ("average", "cosd-rule"):
        check_routing(ensemble, PROMPTS[:3], ensemble.resolve(POLICIES[policy]), max_new_tokens=6)


@pytest.mark.parametrize("policy", ["average", "max-confidence", "proxy-tuning"])
def test_a_round_that_wants_all_models_is_one_pass_of_all_rows(policy: str) -> None:
    ensemble = experts()
    with counted(ensemble) as rows:
        answers = ensemble.generate(["a", "b"], policy, max_new_tokens=5)
    assert all(len(answer.trace) == 5 for answer in answers)
    assert rows == [6] * 5


class Streaks(SelectPolicy):
    """Lets an assistant write wherever the base model's likeliest token is of one half."""

    name = "streaks"
    assistants: ClassVar[Any] = "deferred"
    base_signals: ClassVar[Any] = {"top1"}

    def defers(self, views: Views) -> torch.Tensor:
        assert not views.assistants
        return views.base.top1_ids % 3 > 0

    def select(self, views: Views) -> torch.Tensor:
        assert not views.assistants  # It asked for none.
        return views.base.top1_ids % 3


@pytest.mark.parametrize("policy", [Streaks(), "confidence"], ids=["names a writer", "compares"])
def test_models_that_were_wanted_for_a_token_are_run_with_the_base_model_for_the_next(
    policy: Any,
) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 12,
        "schedule": "stepwise",
        "temperature": 0.9,
        "seed": 1,
    }
    params = {"threshold": 0.4} if policy == "confidence" else None
    mine = experts()
    with counted(mine) as rows:
        answers = mine.generate(PROMPTS[:4], policy, params=params, batch_size=1, **settings)
    others = apart().generate(PROMPTS[:4], policy, params=params, batch_size=4, **settings)
    assert traces(answers) == traces(others)
    tokens = [token.model for answer in answers for token in answer.trace]
    deferred = sum(name != "base" for name in tokens)
    assert deferred > 8
    # Less than a pass for each token and one for each that an assistant writes.
    assert len(tokens) <= len(rows) <= len(tokens) + 0.75 * deferred


def test_with_drafts_the_other_models_read_them_in_one_pass() -> None:
    ensemble = experts()
    with counted(ensemble) as rows:
        ensemble.generate(["a", "b"], "average", schedule="block", max_new_tokens=9)
    assert set(rows) <= {1, 2, 4} and 4 in rows


def test_a_pass_of_several_models_counts_once_in_all_and_once_in_each_text() -> None:
    ensemble = experts()
    for policy in ("average", "cosd-rule"):
        live = ensemble.live(POLICIES[policy])
        settings = ensemble.generation.updated({"max_new_tokens": 6, "schedule": "stepwise"})
        for number, prompt in enumerate(("a", "b")):
            live.add(live.row(prompt, number, settings, seed=0))
        with counted(ensemble) as rows:
            while live.busy:
                live.step()
        assert sum(live.usage[name].forwards for name in NAMES) == len(rows)
        for answer in map(live.answer, live.finished()):
            assert sum(used.forwards for used in answer.usage.values()) <= len(rows)
            assert all(used.tokens_read for used in answer.usage.values())


def test_a_network_that_loses_which_row_a_token_is_of_is_run_for_each_model() -> None:
    models = expert_models()
    module: Any = models[0].model
    layer = module.model.layers[0].mlp.down_proj

    def sorted_tokens(_: Any, inputs: Any) -> Any:
        return (inputs[0].flatten(0, 1).flip(0),)

    def back(_: Any, inputs: Any, output: Any) -> Any:
        return output.flip(0).reshape(-1, 1 if output.shape[0] < 12 else 12, output.shape[-1])

    layer.register_forward_pre_hook(sorted_tokens)
    layer.register_forward_hook(back)
    assert [each.weights for each in models] == models


def test_one_row_that_is_no_number_fails_its_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    models, pool = expert_models(), RowPool()
    sessions = [open_session(each, 1, pool) for each in models]
    inner = pool.inner.feed

    def broken(*arguments: Any, **named: Any) -> ModelOutput:
        output = inner(*arguments, **named)
        sick = output.logits.clone()
        sick[1] = float("nan")
        return replace(output, logits=sick)

    monkeypatch.setattr(pool.inner, "feed", broken)
    output, errors = pool.feed_each([0, 1, 2], [[5], [5], [5]], [1, 1, 1])
    assert list(errors) == [1] and "model 'left'" in str(errors[1])
    assert output.logits.isfinite().all()
    with pytest.raises(ModelError, match="model 'left'"):
        sessions[1].feed([0], [[5, 6]], [2])


def test_after_a_pass_that_broke_all_rows_are_read_anew() -> None:
    models, pool = expert_models(), RowPool()
    sessions = [open_session(each, 2, pool) for each in models]
    sessions[0].feed([0], [[5, 6]], [1])
    pool.reset()
    assert [session.lengths for session in sessions] == [[0, 0]] * 3
    want = open_session(models[2], 1).feed([0], [[5, 6]], [1]).logits
    assert torch.allclose(sessions[2].feed([1], [[5, 6]], [1]).logits, want, atol=1e-4)


def test_models_that_were_made_one_by_one_are_run_one_by_one() -> None:
    models = [model("llama", name) for name in ("a", "b")]
    assert models[0].model is models[1].model
    assert [each.weights for each in models] == models

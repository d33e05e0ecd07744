"""What multicolm adds to the forward passes that a routed text needs anyway."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from questions import PROMPTS
from transformers import DynamicCache

from multicolm import Ensemble
from multicolm.backend.base import ModelOutput, Session
from multicolm.backend.transformers import RowSession, TransformersModel

ONE = PROMPTS[1:2]


@dataclass(frozen=True)
class Call:
    """One forward pass of one row: how much of the text it kept, and what it read."""

    model: TransformersModel
    n_kept: int
    tokens: tuple[int, ...]
    n_last: int


class Recorder(RowSession):
    """Notes every forward pass; batch 1."""

    def __init__(self, model: TransformersModel, n_rows: int, calls: list[Call]) -> None:
        super().__init__(model, n_rows)
        self._calls = calls

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        call = Call(self._model, self.lengths[rows[0]], tuple(tokens[0]), n_last[0])
        self._calls.append(call)
        return super().feed(rows, tokens, n_last, hidden=hidden)


def recorded(
    ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]
) -> list[Call]:
    """The forward passes that ``run`` makes."""
    calls: list[Call] = []
    with monkeypatch.context() as patch:
        for model in ensemble.backends:

            def record(n_rows: int, model: object = model) -> Session:
                return Recorder(model, n_rows, calls)

            patch.setattr(model, "open", record)
        run()
    return calls


def solo_seconds(calls: Sequence[Call]) -> float:
    """The same passes by bare calls of the models with transformers' own cache."""
    caches = {call.model: DynamicCache(config=call.model.config) for call in calls}
    total = 0.0
    with torch.inference_mode():
        for call in calls:
            cache = caches[call.model]
            stale = cache.get_seq_length() - call.n_kept
            if stale > 0:
                cache.crop(-stale)
            ids = torch.tensor([call.tokens])
            start = time.perf_counter()
            caching = {call.model.cache_argument: cache, "use_cache": True}
            call.model.model(ids, logits_to_keep=call.n_last, **caching)
            total += time.perf_counter() - start
    return total


ROUTES = [
    ("tiny", "cosd-rule", {}, 0),
    ("tiny", "random", {"weights": [0.85, 0.15, 0]}, 0),
    ("medium", "random", {"weights": [0.85, 0.15]}, 0),
    ("medium", "confidence", {"threshold": 0.3}, 0),
]


@pytest.mark.parametrize(("size", "policy", "params", "seed"), ROUTES)
@pytest.mark.parametrize("schedule", ["stepwise"])
def test_routed_decoding_against_its_forward_passes(
    size: str,
    policy: str,
    params: dict[str, object],
    seed: int,
    schedule: str,
    compare: Callable[..., float],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    ensemble: Ensemble = request.getfixturevalue(size)

    def routed() -> object:
        return ensemble.generate(
            ONE, policy, params=params, max_new_tokens=128, seed=seed, schedule=schedule
        )

    routed()
    calls = recorded(ensemble, monkeypatch, routed)
    ratio = compare(
        routed,
        lambda: solo_seconds(calls),
        what=f"routed text, {size} models, {policy}, batch 1",
        against="sum of its solo forward times",
        aim="<= 1.10",
    )
    assert ratio > 0


@pytest.mark.parametrize("size", ["tiny", "medium"])
@pytest.mark.parametrize("policy", ["single", "confidence"])
def test_the_base_model_alone_against_generate(
    size: str, policy: str, compare: Callable[..., float], request: pytest.FixtureRequest
) -> None:
    ensemble: Ensemble = request.getfixturevalue(size)
    base = ensemble.backends[0]
    assert isinstance(base, TransformersModel)
    params = {"threshold": 0.0} if policy == "confidence" else {}
    text = ONE[0]
    ids = torch.tensor([base.tokenizer.encode(text)])

    def plain() -> object:
        return base.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=128,
            do_sample=False,
            pad_token_id=0,
        )

    ratio = compare(
        lambda: ensemble.generate([text], policy, params=params, max_new_tokens=128),
        plain,
        what=f"base model alone, {size} models, {policy}, batch 1",
        against="transformers generate",
        aim="<= 1.00",
    )
    assert ratio > 0

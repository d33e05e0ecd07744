"""What an ensemble refuses, and when."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import multicolm
from multicolm import Ensemble, SelectPolicy, Views
from multicolm.backend.table import TableModel
from multicolm.errors import CapabilityError, ConfigError
from multicolm.plugins import policies

COIN = TableModel("coin", ["a", "."], {"": {"a": 0.6, ".": 0.4}}, ends=["."])


class WantsHidden(SelectPolicy):
    base_signals: ClassVar[Any] = {"hidden"}

    def select(self, views: Views) -> torch.Tensor:
        return torch.zeros(views.n_positions, dtype=torch.long)


def test_a_policy_that_needs_what_a_model_cannot_show_is_refused_by_name() -> None:
    sentence = (
        "policy 'WantsHidden' needs hidden of model 'coin', which shows only logprobs, top1, topk; "
        "choose another policy, or another backend for that model."
    )
    for ask in (
        lambda: Ensemble([COIN], policy=WantsHidden()),
        lambda: Ensemble([COIN]).generate(["a"], WantsHidden()),
    ):
        with pytest.raises(CapabilityError) as caught:
            ask()
        assert str(caught.value) == sentence


def test_it_is_refused_before_any_weight_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(policies._classes, "wants-hidden", WantsHidden)
    (tmp_path / "coin.yaml").write_text("this is no table, and it is never read")
    (tmp_path / "ensemble.yaml").write_text(
        "base_model: coin\nmodels: {coin: {backend: table, model: ./coin.yaml}}\n"
        "policy: {kind: wants-hidden}\n"
    )
    with pytest.raises(CapabilityError, match="needs hidden of model 'coin'"):
        multicolm.load(tmp_path)


def test_a_seed_that_is_no_number_is_refused() -> None:
    # In a process of its own: while tests run, types are checked before the sentence is reached.
    program = (
        "from multicolm import Ensemble\n"
        "from multicolm.backend.table import TableModel\n"
        "Ensemble([TableModel('m', ['a'], {'': {'a': 1.0}})]).generate(['a'], seed='a')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "InputError: seed is 'a'; give a whole number, or one for each prompt." in done.stderr


@pytest.mark.parametrize("names", [[], ["a", "a"], ["mixture"]])
def test_an_ensemble_needs_models_with_different_names(names: list[str]) -> None:
    models = [TableModel(name, ["a"], {"": {"a": 1.0}}) for name in names]
    with pytest.raises(ConfigError, match="different names other than 'mixture'"):
        Ensemble(models)


def test_a_stream_that_is_closed_gives_torch_its_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Ensemble([COIN]).stream(["a"], max_new_tokens=5) as stream:
            next(stream)
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        assert list(stream) == []
    finally:
        torch.set_num_threads(before)


def test_a_model_called_like_the_role_of_another_is_refused() -> None:
    models = [TableModel(name, ["a"], {"": {"a": 1.0}}) for name in ("instruct", "base")]
    with pytest.raises(
        ConfigError, match="model 1 is called 'base', which is the word for model 0"
    ):
        Ensemble(models)

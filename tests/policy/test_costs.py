"""What a model costs, as the ensemble file says it, is known to every policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving_worlds import ask, running

import multicolm
from multicolm import Ensemble, ModelNames, SelectPolicy, Views
from multicolm.errors import PolicyError
from multicolm.scoring.likelihood import LikelihoodReader
from multicolm.testing.policies import check_policy
from multicolm.views import View


class Cheapest(SelectPolicy):
    """The model that costs least writes; nothing is declared but what is read of the models."""

    base_signals = frozenset({"text"})

    def select(self, views: Views) -> torch.Tensor:
        assert views.costs.dtype == torch.float32
        return views.costs.argmin().expand(views.n_positions)


@pytest.fixture
def priced(tmp_path: Path) -> Ensemble:
    """Three models that always write their own letter; the second assistant is the cheapest."""
    lines = ["base_model: a", "models:"]
    for letter, cost in (("a", 4), ("b", 2.5), ("c", 0.5)):
        table = tmp_path / f"{letter}.yaml"
        table.write_text(f"tokens: [a, b, c]\ntable: {{'': {{{letter}: 1.0}}}}\n")
        lines.append(f"  {letter}: {{backend: table, model: ./{letter}.yaml, cost: {cost}}}")
    (tmp_path / "ensemble.yaml").write_text("\n".join(lines) + "\n")
    return multicolm.load(tmp_path)


@pytest.mark.parametrize("schedule", ["stepwise", "block"])
def test_a_policy_sees_the_costs_of_the_ensemble_file(priced: Ensemble, schedule: str) -> None:
    [answer] = priced.generate(["a"], Cheapest(), max_new_tokens=3, schedule=schedule)
    assert answer.text == "ccc"


def test_it_sees_them_where_texts_are_scored(priced: Ensemble) -> None:
    reader = LikelihoodReader(priced, Cheapest())
    [likelihood] = reader.likelihoods([reader.passage("a", "cc")])
    assert likelihood.logprob == 0 and likelihood.is_greedy


def test_it_sees_them_in_a_server(priced: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priced, "policy", Cheapest())
    with running(priced) as server:
        sent = {"model": "tiny", "prompt": "a", "max_tokens": 3, "temperature": 0}
        assert ask(server, "/v1/completions", sent).json["choices"][0]["text"] == "ccc"


def test_an_ensemble_without_a_file_costs_one_per_model(priced: Ensemble) -> None:
    [answer] = Ensemble(priced.backends).generate(["a"], Cheapest(), max_new_tokens=3)
    assert answer.text == "aaa"


def test_made_up_views_of_the_policy_laws_have_costs() -> None:
    check_policy(Cheapest())


def test_costs_are_one_per_model_and_one_each_if_nothing_is_said() -> None:
    names = ModelNames(["a", "b"])
    assert Views(names, {0: View(torch.zeros(3, 2))}, n_positions=3).costs.tolist() == [1, 1]
    with pytest.raises(PolicyError, match="views of 2 models need 2 costs, got 1"):
        Views(names, {}, n_positions=3, costs=[1.0])

"""One model per prompt: trained on answers of the embedded models, and with tensors by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from score_worlds import HiddenTable
from tables import random_table

import multicolm
from multicolm import Ensemble
from multicolm.artefacts import Weights
from multicolm.calibration.queries import prompt_states, train_on_answers
from multicolm.cli import main
from multicolm.errors import CapabilityError, ConfigError, InputError
from multicolm.evaluation.task import Task, load_task
from multicolm.learning.queries import predicted_quality
from multicolm.policy.query_router import QueryRouterPolicy
from multicolm.policy.resolve import resolve_policy
from multicolm.testing import check_policy, check_routing
from multicolm.training.checkpoint import Checkpoint

PROMPTS = ["a", "ab", " ed", " cfa", "dd", "abba"]


def by_hand(n_models: int, width: int, **params: Any) -> QueryRouterPolicy:
    weight = torch.zeros(n_models, width)
    # The states of the tables are the last token, as one of several ones.
    for k, feature in enumerate([0, 1, 3][:n_models]):
        weight[k, feature] = 1.0 - k / 10
    tensors = {"weight": weight, "bias": torch.zeros(n_models)}
    return QueryRouterPolicy(router=Weights(tensors), **params)


TRIO = Ensemble([HiddenTable(random_table(n, s)) for s, n in enumerate(["base", "left", "right"])])
WIDTH = TRIO.backends[0].hidden_size or 0


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_it_keeps_the_laws_of_policies_and_of_routing(pooling: str) -> None:
    check_policy(by_hand(3, 6, pooling=pooling))  # the width of what it is shown there
    check_routing(TRIO, PROMPTS, by_hand(3, WIDTH, pooling=pooling))


def test_only_the_chosen_model_runs() -> None:
    policy = by_hand(3, WIDTH)
    states = prompt_states(TRIO, PROMPTS, "last")
    chosen = predicted_quality(policy.router.content, states).argmax(-1).tolist()  # type: ignore[union-attr]
    assert set(chosen) == {0, 1, 2}
    for prompt, k in zip(PROMPTS, chosen, strict=True):
        [answer] = TRIO.generate([prompt], policy, max_new_tokens=5)
        names = TRIO.models
        assert {token.model for token in answer.trace} == {names[k]}
        for other, name in enumerate(names):
            # The base model reads the prompt, and nothing else.
            most = 1 if other == 0 else 0
            assert other == k or answer.usage[name].forwards <= most


def test_the_cost_of_a_model_counts_against_its_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"base": 1.0, "left": 5.0, "right": 50.0}
    monkeypatch.setattr(Ensemble, "costs", property(lambda _: list(costs.values())))
    ensemble = Ensemble(TRIO.backends)
    spent = []
    for weight in (0.0, 0.05, 0.5, 100.0):
        answers = ensemble.generate(PROMPTS, by_hand(3, WIDTH, cost_weight=weight))
        written = [token.model for answer in answers for token in answer.trace]
        spent.append(sum(costs[name] for name in written) / len(written))
    assert spent == sorted(spent, reverse=True) and spent[0] > spent[-1] == 1.0


def test_an_untrained_one_says_how_it_is_trained() -> None:
    with pytest.raises(CapabilityError, match="multicolm train ENSEMBLE --task TASK --policy"):
        TRIO.generate(["a"], "query-router")


def test_another_number_of_models_and_another_width_are_refused() -> None:
    with pytest.raises(CapabilityError, match="was made for 2 models, and this ensemble has 3"):
        TRIO.generate(["a"], by_hand(2, WIDTH))
    with pytest.raises(CapabilityError, match=f"of width {WIDTH + 1}, and those of base model"):
        TRIO.generate(["a"], by_hand(3, WIDTH + 1))


# Statements of the embedded experts: each knows its own, and no model knows both.
SPLITS = {"train": (0, 40), "test": (40, 60)}


@pytest.fixture(scope="module")
def statements(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("statements")
    known = Path(__file__).parents[2] / "registry" / "tiny" / "questions" / "train.jsonl"
    facts: dict[str, str] = {}
    for line in known.read_text().split("\n"):
        record = json.loads(line) if line else {"kind": ""}
        if record["kind"] == "treats":
            name = next(w for w in record["completion"].split() if w in record["prompt"])
            facts[name] = record["answer"]
    sums = [(a, b) for a in range(2, 10) for b in range(2, 10)]
    for split, (begin, end) in SPLITS.items():
        rows = [{"q": f"{name} treats", "a": a} for name, a in list(facts.items())[begin:end]]
        rows += [{"q": f"{a} * {b} =", "a": str(a * b)} for a, b in sums[begin:end]]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    (folder / "statements.yaml").write_text(
        "summary: Statements to finish.\n"
        "data: {train: train.jsonl, test: test.jsonl}\n"
        'prompt: "{q}"\ngold: "{a}"\ncompletion: " {a}"\nmax_new_tokens: 8\n'
        "metric: {kind: exact-match, params: {pattern: '^ (\\w+)'}}\n"
    )
    return load_task(folder / "statements.yaml")


@pytest.mark.parametrize("method", ["linear", "knn", "mf"])
def test_trained_on_answers_it_sends_each_prompt_to_who_knows(
    statements: Task, method: Any, tmp_path: Path
) -> None:
    ensemble = multicolm.load("tiny")
    checkpoint = train_on_answers(
        ensemble, QueryRouterPolicy(method=method), statements, tmp_path / "router"
    )
    report = checkpoint.provenance["train"]["report"]
    assert report["quality"] > 0.85 > 0.6 > report["quality_best_model_alone"]
    again = Checkpoint.from_pretrained(tmp_path / "router").policy
    asked = statements.questions("test")
    answers = ensemble.generate([q.asked for q in asked], again, max_new_tokens=8)
    scores = [statements.score(a.text, q) for a, q in zip(answers, asked, strict=True)]
    assert sum(scores) / len(scores) > 0.85
    # Who was chosen in training is chosen while writing.
    states = prompt_states(ensemble, [q.asked for q in asked], "last")
    chosen = predicted_quality(again.router.content, states).argmax(-1).tolist()  # type: ignore[attr-defined]
    assert [a.trace.tokens[0].model for a in answers] == [ensemble.models[k] for k in chosen]


def test_the_same_training_is_not_done_twice(
    statements: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = multicolm.load("tiny")
    out = tmp_path / "router"
    made = train_on_answers(ensemble, QueryRouterPolicy(), statements, out, limit=8)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is to be written again")

    monkeypatch.setattr(Ensemble, "stream", refuse)
    again = train_on_answers(ensemble, QueryRouterPolicy(), statements, out, limit=8)
    assert again.provenance == made.provenance
    with pytest.raises(AssertionError, match="written again"):
        train_on_answers(ensemble, QueryRouterPolicy(), statements, tmp_path / "new", limit=8)


def test_the_command_line_trains_from_a_task_and_says_what_else_it_takes(
    statements: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = statements.base_dir / "statements.yaml"
    out = str(tmp_path / "router")
    assert main(["train", "tiny", "--task", str(task), "--policy", "query-router", "--limit", "12",
                 "--out", out]) == 0  # fmt: skip
    assert "measured on prompts that were left out" in capsys.readouterr().out
    assert main(["train", "tiny", "--policy", "query-router", "--out", out]) != 0
    assert (
        "Give SCORES, a folder that `multicolm score` wrote, or --task" in capsys.readouterr().err
    )


def test_what_learns_from_scores_does_not_learn_from_answers_and_the_reverse(
    statements: Task, tmp_path: Path
) -> None:
    ensemble = multicolm.load("tiny")
    with pytest.raises(CapabilityError, match="does not learn from judged answers"):
        train_on_answers(ensemble, resolve_policy("co-llm"), statements, tmp_path)
    with pytest.raises(InputError, match="nothing is learned or tuned on the test split"):
        train_on_answers(ensemble, QueryRouterPolicy(), statements, tmp_path, split="test")
    leaking = statements.with_data("train", str(statements.base_dir / "test.jsonl"))
    with pytest.raises(InputError, match="are in its test split too"):
        train_on_answers(ensemble, QueryRouterPolicy(), leaking, tmp_path)
    with pytest.raises(ConfigError, match="lr"):
        train_on_answers(
            ensemble, QueryRouterPolicy(), statements, tmp_path / "o", limit=4, options={"lr": 1}
        )

"""Tuning, on a world of tables where every point of the curve is known (see ``conftest``)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from score_worlds import HiddenTable, contents, table
from tables import TOKENS as LETTERS

import multicolm
from multicolm.artefacts import Weights
from multicolm.backend.table import TableModel
from multicolm.calibration.tune import tune
from multicolm.ensemble import Ensemble
from multicolm.errors import (
    ArtefactError,
    CapabilityError,
    ConfigError,
    InputError,
    MulticolmError,
    UnknownNameError,
)
from multicolm.evaluation.answering import Answering, NamedPolicy, Progress, named_policy
from multicolm.evaluation.compare import compare
from multicolm.evaluation.task import DataConfig, Task, load_task
from multicolm.plugins import policies
from multicolm.policy.base import SelectPolicy
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.policy.cosd import CosdRulePolicy
from multicolm.policy.fixed import SinglePolicy
from multicolm.policy.resolve import resolve_policy
from multicolm.policy.threshold import ConfidencePolicy, EntropyPolicy
from multicolm.training.checkpoint import Checkpoint
from multicolm.types import Signal
from multicolm.views import Views

RULE = NamedPolicy("confidence", ConfidencePolicy())
# From the table in `conftest`.
THRESHOLDS = [0.6, 0.9, 1.0, 2.0]
SHARES = [0, 2 / 9, 1 / 2, 1]
COSTS = [1, 11 / 9, 3 / 2, 2]
QUALITIES = [0.25, 0.75, 0.25, 0.25]


def near(expected: Any) -> Any:
    return pytest.approx(expected, abs=1e-6)


def facts_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return checkpoint.provenance["tune"]


def column(checkpoint: Checkpoint, name: str) -> list[float]:
    return [point[name] for point in facts_of(checkpoint)["curve"]]


@pytest.fixture
def tuned(duo, task, tmp_path) -> Callable[..., Checkpoint]:
    """Tunes on the world of ``conftest``, if nothing else is asked for."""

    def run(policy: Any = RULE, out: Path | None = None, **settings: Any) -> Checkpoint:
        named = policy if isinstance(policy, NamedPolicy) else NamedPolicy("policy", policy)
        tasks = settings.pop("tasks", [task])
        ensemble = settings.pop("ensemble", duo)
        settings = {"batch_size": 2, **settings}
        return tune(ensemble, named, tasks, out or tmp_path / "out", **settings)

    return run


# --- thresholds ----------------------------------------------------------------------------------


def test_the_curve_is_what_the_tables_make_of_it(tuned) -> None:
    checkpoint = tuned()
    assert column(checkpoint, "threshold") == near(THRESHOLDS)
    assert column(checkpoint, "share") == near(SHARES)
    assert column(checkpoint, "cost") == near(COSTS)
    assert column(checkpoint, "quality") == near(QUALITIES)
    for low, quality, high in zip(
        *(column(checkpoint, name) for name in ("low", "quality", "high")), strict=True
    ):
        assert 0 <= low <= quality <= high <= 1 and low < high


def test_without_a_budget_the_best_answers_win_and_the_cheapest_of_equals(tuned, make_task) -> None:
    assert facts_of(tuned())["chosen"] == near({"threshold": 0.9})
    # Whoever writes, only question four is right; the base alone is the cheapest.
    task = load_task(make_task("equal", [{"id": "four", "ask": "4", "answer": "x"}]))
    checkpoint = tuned(tasks=[task], out=Path(task.base_dir) / "equal")
    assert set(column(checkpoint, "quality")) == {1.0}
    assert facts_of(checkpoint)["measured"]["cost"] == 1


@pytest.mark.parametrize(
    ("budget", "threshold"),
    [(0.0, 0.6), (0.2, 0.6), (2 / 9, 0.9), (0.49, 0.9), (0.5, 1.0), (0.99, 1.0), (1.0, 2.0)],
)
def test_a_budget_is_spent_as_far_as_it_goes_and_never_more_where_that_is_asked_for(
    tuned, budget: float, threshold: float
) -> None:
    checkpoint = tuned(budget=budget, spend=True)
    assert checkpoint.policy.as_config()["params"] == near({"threshold": threshold})
    assert facts_of(checkpoint)["measured"]["share"] <= budget
    assert facts_of(checkpoint)["budget"] == budget and facts_of(checkpoint)["unit"] == "share"
    # No threshold in between is to be found here, so none was measured.
    assert column(checkpoint, "threshold") == near(THRESHOLDS)


@pytest.mark.parametrize(
    ("budget", "threshold"), [(1.0, 0.6), (1.2, 0.6), (1.3, 0.9), (1.5, 1.0), (99.0, 2.0)]
)
def test_a_budget_may_be_in_cost(tuned, budget: float, threshold: float) -> None:
    checkpoint = tuned(budget=budget, unit="cost", spend=True)
    assert facts_of(checkpoint)["chosen"] == near({"threshold": threshold})
    assert facts_of(checkpoint)["measured"]["cost"] <= budget


def test_costs_are_the_ensemble_s(tuned, monkeypatch) -> None:
    monkeypatch.setattr(Ensemble, "costs", property(lambda self: [0.5, 10.0]))
    checkpoint = tuned(budget=4.0, unit="cost")
    passes = [(8, 0), (9, 2), (8, 4), (8, 8)]
    tokens = [8, 9, 8, 8]
    expected = [(b * 0.5 + h * 10) / n for (b, h), n in zip(passes, tokens, strict=True)]
    assert column(checkpoint, "cost") == near(expected)
    assert facts_of(checkpoint)["chosen"] == near({"threshold": 0.9})


@pytest.mark.parametrize(("budget", "threshold"), [(0.1, 0.6), (0.3, 0.9), (1.0, 0.9)])
def test_the_best_answers_within_the_budget_win(tuned, budget: float, threshold: float) -> None:
    checkpoint = tuned(budget=budget)
    assert facts_of(checkpoint)["chosen"] == near({"threshold": threshold})
    assert facts_of(checkpoint)["chosen_by"] == "quality"


def test_if_nothing_keeps_within_the_budget_a_sentence_says_the_least(tuned, tmp_path) -> None:
    least = r"nothing keeps within a cost of 0.9: the least is 1, with threshold=0.6\."
    with pytest.raises(InputError, match=least):
        tuned(budget=0.9, unit="cost")
    assert not (tmp_path / "out" / "policy.yaml").exists()
    # What was answered is not answered again for a budget that is enough.
    told: list[Progress] = []
    checkpoint = tuned(budget=1.3, unit="cost", progress=told.append)
    assert facts_of(checkpoint)["chosen"] == near({"threshold": 0.9})
    assert all(progress.finished for progress in told)


FIFTY = [chr(ord("A") + i) for i in range(50)]


def even_world(make_task) -> tuple[Ensemble, Task]:
    """Fifty questions of two tokens each, the first of a probability that no other has.

    A threshold on it hands over as many of the hundred tokens as one likes, up to fifty.
    """
    tokens = [*FIFTY, "x", "y", "<end>"]
    base = {"": {"<end>": 1.0}}
    for i, letter in enumerate(FIFTY):
        base[letter] = {"x": 0.505 + i / 150, "y": 0.495 - i / 150}
    helper = {"": {"<end>": 1.0}, **{letter: {"y": 1.0} for letter in FIFTY}}
    pairs = (("base_", base), ("helper", helper))
    ensemble = Ensemble([TableModel(name, tokens, rows, ["<end>"]) for name, rows in pairs])
    records = [{"id": letter, "ask": letter, "answer": "y"} for letter in FIFTY]
    tested = [{"id": "both", "ask": "AB", "answer": "y"}]
    return ensemble, load_task(make_task("even", records, tested))


@pytest.mark.parametrize("budget", [0.03, 0.17, 0.44])
def test_a_budget_between_the_tenths_is_met_more_closely(make_task, tuned, budget: float) -> None:
    ensemble, task = even_world(make_task)
    checkpoint = tuned(ensemble=ensemble, tasks=[task], budget=budget, spend=True, batch_size=64)
    shares = column(checkpoint, "share")
    # Of hundredths the right one is found by halving a tenth four times.
    assert facts_of(checkpoint)["measured"]["share"] == budget
    assert {0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0} < set(shares) and len(shares) <= 7 + 4
    # A curve is read from one end to the other, and says everything once.
    thresholds = column(checkpoint, "threshold")
    assert thresholds == sorted(set(thresholds))


def test_shares_that_do_not_grow_with_the_threshold_are_measured_not_predicted(
    tuned, make_task
) -> None:
    """What the helper writes may spare the base its doubts: a greater threshold spends no more."""
    tokens = ["a", "x", "y", "z", "<end>"]
    sure = {"": {"<end>": 1.0}}
    base = {
        **sure,
        "a": {"x": 0.6, "y": 0.4},
        ("a", "x"): {"x": 0.5, "z": 0.3, "y": 0.2},
        ("a", "x", "x"): {"x": 0.5, "z": 0.3, "y": 0.2},
    }
    helper = {**sure, "a": {"y": 1.0}, "x": {"x": 1.0}, ("a", "x", "x", "x"): {"<end>": 1.0}}
    pairs = (("base_", base), ("helper", helper))
    ensemble = Ensemble([TableModel(name, tokens, rows, ["<end>"]) for name, rows in pairs])
    dev, test = ([{"ask": text, "answer": "y"}] for text in ("a", "ya"))
    task = load_task(make_task("doubts", dev, test))
    checkpoint = tuned(ensemble=ensemble, tasks=[task], budget=0.5)
    # x x x . | x X X . | Y . | Y <end>, in capitals and brackets what the helper writes
    assert column(checkpoint, "threshold") == near([0.5, 0.6, 1.0, 2.0])
    assert column(checkpoint, "share") == near([0, 0.5, 0.5, 1])
    # The better answers, at the same share.
    assert facts_of(checkpoint)["chosen"] == near({"threshold": 1.0})


# --- grids ---------------------------------------------------------------------------------------


def test_a_grid_of_two_params_is_tried_whole(tuned) -> None:
    grid = {"alpha": [0.7, 0.95], "beta": [0.5, 1.6]}
    checkpoint = tuned(CosdRulePolicy(), grid=grid)
    # By hand: x. Y. xY. x. | x. x. xY. x. | Y. Y. Y. x. | x. x. xY. x.
    curve = [
        [p["alpha"], p["beta"], p["share"], p["quality"]] for p in facts_of(checkpoint)["curve"]
    ]
    assert curve == [
        near([0.7, 0.5, 2 / 9, 0.75]),
        near([0.7, 1.6, 1 / 9, 0.5]),
        near([0.95, 0.5, 3 / 8, 0.25]),
        near([0.95, 1.6, 1 / 9, 0.5]),
    ]
    assert checkpoint.policy == CosdRulePolicy(alpha=0.7, beta=0.5)
    assert facts_of(checkpoint)["grid"] == grid


def test_among_those_that_spend_as_much_the_best_answers_win(tuned, make_task) -> None:
    grid = {"alpha": [0.7, 0.95], "beta": [0.5, 1.6]}
    assert tuned(CosdRulePolicy(), grid=grid, budget=0.2, spend=True).policy.beta == 1.6
    # `beta` 0 and 0.5 spend the same with the same answers; the first of equals.
    again = tuned(
        CosdRulePolicy(),
        out=Path(make_task().parent) / "two",
        grid={"beta": [0.5, 0.0]},
        budget=1.0,
    )
    assert again.policy.beta == 0.5


def test_without_a_grid_a_policy_s_own_values_are_tried(tuned) -> None:
    checkpoint = tuned(CosdRulePolicy())
    tried = {(p["alpha"], p["beta"]) for p in facts_of(checkpoint)["curve"]}
    own = CosdRulePolicy.tunable
    assert tried == {(alpha, beta) for alpha in own["alpha"] for beta in own["beta"]}


def test_a_grid_of_one_s_own_takes_the_place_of_the_quantiles(tuned) -> None:
    checkpoint = tuned(grid={"threshold": [0.95, 0.7]})
    assert column(checkpoint, "threshold") == [0.95, 0.7]
    assert facts_of(checkpoint)["chosen"] == {"threshold": 0.7}


def test_params_that_are_not_tuned_stay_as_they_were(tuned) -> None:
    checkpoint = tuned(CosdRulePolicy(beta=1.6), grid={"alpha": [0.7]})
    assert checkpoint.policy == CosdRulePolicy(alpha=0.7, beta=1.6)
    assert column(checkpoint, "quality") == [0.5]


@multicolm.register_policy("never-scored")
class NeverScored(SelectPolicy):
    """Has a threshold and says nothing about where it stands."""

    threshold: float = 0.5
    base_signals: ClassVar[set[Signal]] = {"top1"}
    deferral: ClassVar[Any] = ConfidencePolicy.deferral

    def select(self, views: Views):
        return (views.base.top1_probs < self.threshold).long()


policies._classes.pop("never-scored")  # No other test is to find it.


@pytest.mark.parametrize(
    ("policy", "settings", "kind", "said"),
    [
        (SinglePolicy(), {}, CapabilityError, "'single' declares no params to tune"),
        (NeverScored(), {}, CapabilityError, "'never-scored' gives no score to tune by"),
        (ConfidencePolicy(), {"budget": -0.1}, InputError, "0 to 1, got -0.1"),
        (ConfidencePolicy(), {"budget": 30.0}, InputError, "0 to 1, got 30"),
        (ConfidencePolicy(), {"budget": float("nan")}, InputError, "0 to 1, got nan"),
        (ConfidencePolicy(), {"budget": -1.0, "unit": "cost"}, InputError, "0 or more, got -1"),
        (ConfidencePolicy(), {"budget": float("inf"), "unit": "cost"}, InputError, "got inf"),
        (ConfidencePolicy(), {"limit": 0}, InputError, "limit must be 1 or more, got 0"),
        (ConfidencePolicy(), {"seed": 1.5}, InputError, "seed must be a whole number, got 1.5"),
        (ConfidencePolicy(), {"spend": True}, InputError, "there is none; give one, or leave it"),
        (ConfidencePolicy(), {"tasks": []}, InputError, "no task to tune on"),
        (ConfidencePolicy(), {"grid": {"threshold": []}}, InputError, "'threshold' needs"),
        (ConfidencePolicy(), {"grid": {"threshold": [float("inf")]}}, InputError, "finite"),
        (ConfidencePolicy(), {"grid": {"treshold": [0.1]}}, ConfigError, "unknown key 'treshold'"),
        (ConfidencePolicy(), {"grid": {"threshold": [0.1, -1.0]}}, ConfigError, "got -1.0"),
        (
            ConfidencePolicy(),
            {"split": "test"},
            InputError,
            "nothing is learned or tuned on the test split",
        ),
        (ConfidencePolicy(), {"split": "dve"}, UnknownNameError, "Did you mean 'dev'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_writes(
    tuned, tmp_path, monkeypatch, policy, settings, kind, said: str
) -> None:
    if not isinstance(policy, NeverScored):
        monkeypatch.setattr(Answering, "row", lambda *_: pytest.fail("a model was asked"))
    with pytest.raises(kind, match=said):
        tuned(policy, **settings)
    assert not (tmp_path / "out" / "policy.yaml").exists()


def test_a_share_of_tokens_that_are_nobody_s_alone_is_no_budget(tuned) -> None:
    average = resolve_policy("average")
    with pytest.raises(CapabilityError, match="--unit cost"):
        tuned(average, budget=0.5)


def test_questions_that_cannot_be_asked_are_found_before_any_is_answered(
    tuned, make_task, monkeypatch
) -> None:
    monkeypatch.setattr(Answering, "row", lambda *_: pytest.fail("a model was asked"))
    broken = load_task(make_task("broken", [{"id": "1", "ask": "1", "answer": "x"}, {"ask": "?"}]))
    with pytest.raises(MulticolmError):
        tuned(tasks=[broken])
    unreadable = load_task(
        make_task("unreadable", [{"ask": "1", "answer": "x"}, {"ask": "ß", "answer": ""}])
    )
    with pytest.raises(MulticolmError, match="ß"):
        tuned(tasks=[unreadable])


# --- test data -----------------------------------------------------------------------------------


def test_questions_that_are_in_the_test_split_too_are_refused(tuned, make_task) -> None:
    shared = [{"id": "elsewhere", "ask": "2", "answer": "y"}]
    task = load_task(make_task("leaky", test=shared))
    with pytest.raises(InputError, match=r"1 of the 4 questions of task 'leaky' \(dev\)"):
        tuned(tasks=[task])
    # Of the two that are asked, `one` and `three`, none is in the test split.
    checkpoint = tuned(tasks=[task], limit=2)
    assert facts_of(checkpoint)["limit"] == 2
    assert len(facts_of(checkpoint)["prompts"]) == 2


def test_data_that_replace_a_split_are_what_is_tuned_on(tuned, task, tmp_path) -> None:
    (tmp_path / "own.jsonl").write_text(json.dumps({"ask": "2", "answer": "y"}) + "\n")
    replaced = task.config.model_copy(
        update={"data": {**task.config.data, "dev": DataConfig(source=str(tmp_path / "own.jsonl"))}}
    )
    checkpoint = tuned(tasks=[replace(task, config=replaced)])
    assert facts_of(checkpoint)["measured"]["quality"] == 1.0
    assert len(facts_of(checkpoint)["prompts"]) == 1
    assert facts_of(checkpoint)["digest"] != facts_of(tuned(out=tmp_path / "its own"))["digest"]


# --- several tasks -------------------------------------------------------------------------------

# Of these the helper knows more: at 1.0 all, at .9 two of three, at .6 one.
HELPERS = [
    {"id": "one", "ask": "1", "answer": "y"},
    {"id": "two", "ask": "2", "answer": "y"},
    {"id": "four", "ask": "4", "answer": "x"},
]


@pytest.fixture
def both(make_task) -> list[Task]:
    return [load_task(make_task("task")), load_task(make_task("other", HELPERS))]


def test_the_mean_over_tasks_chooses_and_each_task_has_params_of_its_own(
    tuned, both, duo, tmp_path, monkeypatch
) -> None:
    checkpoint = tuned(tasks=both)
    assert column(checkpoint, "on task") == near([0.25, 0.75, 0.25, 0.25])
    assert column(checkpoint, "on other") == near([1 / 3, 2 / 3, 1, 1])
    assert column(checkpoint, "quality") == near([7 / 24, 17 / 24, 5 / 8, 5 / 8])
    assert checkpoint.policy.threshold == near(0.9)
    written = yaml.safe_load((tmp_path / "out" / "policy.yaml").read_text())
    assert written["params"] == near({"threshold": 0.9})
    assert list(written["tasks"]) == ["task", "other"]
    assert written["tasks"]["task"] == near({"threshold": 0.9})
    assert written["tasks"]["other"] == near({"threshold": 1.0})
    assert len(facts_of(checkpoint)["prompts"]) == 7 and facts_of(checkpoint)["digest"] == ""

    # A comparison takes those of its task; a task that it has none for gets the others.
    monkeypatch.setattr("multicolm.evaluation.report.write_report", lambda *_: [])
    for name, threshold in (("task", 0.9), ("other", 1.0), ("third", 0.9)):
        task = replace(both[1], name=name)
        out = tmp_path / f"compared {name}"
        settings = {"alone": False, "random": False, "oracle": False, "sweep": 0}
        [row] = compare(duo, [str(tmp_path / "out")], task, out=out, **settings).rows
        assert row.policy["params"] == near({"threshold": threshold})
    # Without a checkpoint's folder, nothing is known of tasks.
    assert resolve_policy(tmp_path / "out").threshold == near(0.9)


def test_the_interval_of_several_tasks_is_that_of_their_mean(tuned, make_task, tmp_path) -> None:
    """A large task must not drown a small one whose mean counts as much."""
    letters = FIFTY[:40]
    rows = {"": {"<end>": 1.0}, **{letter: {"x": 1.0} for letter in letters}}
    ensemble = Ensemble([TableModel(n, [*letters, "x", "<end>"], rows, ["<end>"]) for n in "ab"])
    tested = [{"ask": "AB", "answer": "x"}]
    wrong = [{"ask": letter, "answer": "y"} for letter in letters]
    right = [{"ask": letter, "answer": "x"} for letter in letters[:2]]
    mixed = [{"ask": letters[i], "answer": "xy"[i]} for i in range(2)]
    tasks = {
        name: load_task(make_task(name, records, tested))
        for name, records in (("wrong", wrong), ("right", right), ("mixed", mixed))
    }
    settings = {"ensemble": ensemble, "grid": {"threshold": [0.5]}}
    [point] = facts_of(tuned(tasks=[tasks["wrong"], tasks["right"]], **settings))["curve"]
    # Forty wrong answers say much, two right ones hardly anything: 0.16 to 1 of that task.
    assert point["quality"] == 0.5
    assert point["low"] == pytest.approx(0.08, abs=0.01) and point["high"] == pytest.approx(
        0.54, abs=0.01
    )
    two = [tasks["wrong"], tasks["mixed"]]
    [point] = facts_of(tuned(tasks=two, out=tmp_path / "two", **settings))["curve"]
    # One right answer of two, 0.01 to 0.99, and a task that never is right.
    assert point["quality"] == 0.25
    assert point["low"] == pytest.approx(0.005, abs=0.01) and point["high"] == pytest.approx(
        0.5, abs=0.01
    )


def test_two_tasks_of_one_name_are_refused(tuned, both) -> None:
    with pytest.raises(InputError, match="two tasks are called 'task'"):
        tuned(tasks=[both[0], replace(both[1], name="task")])


def test_each_task_is_kept_apart_from_its_own_test_split(tuned, both, make_task) -> None:
    leaky = load_task(make_task("leaky", HELPERS, HELPERS[:1]))
    with pytest.raises(InputError, match="'leaky'"):
        tuned(tasks=[both[0], leaky])


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path) -> Path:
    """A learned checkpoint, as training leaves one."""
    generator = torch.Generator().manual_seed(2)
    head = Weights(
        {
            "0.weight": torch.randn(1, len(LETTERS) + 1, generator=generator),
            "0.bias": torch.zeros(1),
        }
    )
    provenance = {
        "multicolm": "0.0.1",
        "models": [{"name": "p", "identity": "table:0"}, {"name": "q", "identity": "table:1"}],
        "license": "mit",
        "train": {"digest": "abc", "prompts": ["0123"], "options": {"epochs": 3}},
    }
    Checkpoint(CoLlmPolicy(head=head, decode="threshold"), provenance, "Learned.").save_pretrained(
        tmp_path / "trained"
    )
    return tmp_path / "trained"


def test_a_learned_policy_keeps_what_it_learned_and_says_both(
    trained, tuned, make_task, tmp_path
) -> None:
    ensemble = Ensemble([HiddenTable(table("p", 0)), table("q", 1)])
    records = [{"ask": letter, "answer": "d"} for letter in LETTERS[:-1]]
    task = load_task(make_task("letters", records, [{"ask": "aaaa", "answer": "d"}]))
    settings = {"ensemble": ensemble, "tasks": [task]}
    checkpoint = tuned(named_policy(trained), budget=0.4, **settings)
    out = tmp_path / "out"
    assert (out / "head.safetensors").read_bytes() == (trained / "head.safetensors").read_bytes()
    before = json.loads((trained / "provenance.json").read_text())
    after = json.loads((out / "provenance.json").read_text())
    assert {key: value for key, value in after.items() if key != "tune"} == before
    assert after["tune"]["budget"] == 0.4
    policy = resolve_policy(out)
    assert policy.decode == "threshold"
    assert policy.threshold == after["tune"]["chosen"]["threshold"] != 0.5
    # It is its own: the one it was made from may go.
    shutil.rmtree(trained)
    texts = [
        ensemble.generate("a", made, max_new_tokens=5)[0].text
        for made in (resolve_policy(out), checkpoint.policy)
    ]
    assert texts[0] == texts[1]
    card = (out / "README.md").read_text()
    assert "## Training" in card and "## Tuning" in card

    # Tuned once more, it is the latest tuning that is told, and still what it learned from.
    again = tuned(named_policy(out), out=tmp_path / "again", budget=0.1, **settings)
    assert again.provenance["train"] == before["train"]
    assert facts_of(again)["budget"] == 0.1


def test_the_card_shows_the_whole_curve(tuned, tmp_path) -> None:
    curve = facts_of(tuned())["curve"]
    card = (tmp_path / "out" / "README.md").read_text()
    rows = [
        line for line in card.splitlines() if line.startswith("| 0.") or line.startswith("| 1 ")
    ]
    assert "| threshold | share | cost | quality | low | high |" in card
    for point in curve:
        cells = " | ".join(f"{value:.4g}" for value in point.values())
        assert f"| {cells} |" in card, rows
    assert "tuned on task (dev)" in card


def test_a_finished_tuning_is_not_done_again(tuned, tmp_path, monkeypatch) -> None:
    first = tuned(budget=0.3)
    before = contents(tmp_path / "out")
    assert not (tmp_path / "out" / ".tune").exists()
    monkeypatch.setattr(Answering, "row", lambda *_: pytest.fail("a model was asked"))
    # Neither the size of batches nor a version decides what is found.
    monkeypatch.setattr("multicolm.evaluation.answering.versions", lambda: {"torch": "9"})
    again = tuned(budget=0.3, batch_size=7)
    assert contents(tmp_path / "out") == before
    assert (again.policy, again.provenance) == (first.policy, first.provenance)
    assert (again.summary) == first.summary


def test_what_a_finished_tuning_left_behind_is_cleared_away(tuned, tmp_path) -> None:
    tuned()
    (tmp_path / "out" / ".tune" / "0").mkdir(parents=True)
    (tmp_path / "out" / ".tune" / "0" / "ledger.jsonl").write_text("half")
    tuned()
    assert not (tmp_path / "out" / ".tune").exists()


def other(settings: Mapping[str, Any]) -> Any:
    return pytest.param(settings, id=", ".join(settings))


@pytest.mark.parametrize(
    "settings",
    [
        other({"budget": 0.4}),
        other({"budget": 0.3, "unit": "cost"}),
        other({"budget": 0.3, "spend": True}),
        other({"budget": 0.3, "seed": 1}),
        other({"budget": 0.3, "limit": 3}),
        other({"budget": 0.3, "grid": {"threshold": [0.5]}}),
        other({"budget": 0.3, "max_new_tokens": 1}),
        other({"budget": 0.3, "policy": EntropyPolicy()}),
    ],
)
def test_another_checkpoint_in_the_folder_is_refused_and_left_alone(
    tuned, tmp_path, settings: Mapping[str, Any]
) -> None:
    tuned(budget=0.3)
    before = contents(tmp_path / "out")
    with pytest.raises(ArtefactError, match="holds another checkpoint"):
        tuned(**settings)
    assert contents(tmp_path / "out") == before


def test_a_checkpoint_of_another_task_metric_data_or_cost_is_another(
    tuned, make_task, tmp_path, monkeypatch
) -> None:
    tuned()
    contains = make_task().read_text().replace("exact-match", "contains")
    for settings in ({"text": contains}, {"dev": [{"id": "one", "ask": "1", "answer": "x"}]}):
        with pytest.raises(ArtefactError, match="holds another checkpoint"):
            tuned(tasks=[load_task(make_task(**settings))])
    task = load_task(make_task())
    tuned(tasks=[task])
    monkeypatch.setattr(Ensemble, "costs", property(lambda self: [1.0, 5.0]))
    with pytest.raises(ArtefactError, match="holds another checkpoint"):
        tuned(tasks=[task])


def test_a_trained_checkpoint_in_the_folder_is_refused(tuned, trained) -> None:
    before = contents(trained)
    with pytest.raises(ArtefactError, match="holds another checkpoint"):
        tuned(out=trained)
    assert contents(trained) == before


def test_a_finished_tuning_gives_back_the_params_of_its_tasks(tuned, both) -> None:
    first = tuned(tasks=both)
    assert set(first.tasks) == {"task", "other"}
    assert tuned(tasks=both).tasks == first.tasks


def test_answers_that_are_there_are_told_as_done(tuned, tmp_path) -> None:
    told: list[Progress] = []
    tuned(progress=told.append)
    assert {progress.total for progress in told} == {4}
    finished = [progress for progress in told if progress.finished]
    assert [progress.row for progress in finished] == [
        "confidence never handing over",
        *(f"confidence threshold={t}" for t in ("0.6", "0.9", "1", "2")),
    ]
    assert finished[2].quality == 0.75

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tables import TOKENS, random_table

from multicolm.backend.table import TableModel
from multicolm.ensemble import Ensemble
from multicolm.errors import ArtefactError, CapabilityError, ConfigError, InputError
from multicolm.evaluation.answering import Answering
from multicolm.evaluation.compare import NamedPolicy, Progress, compare, named_policy
from multicolm.evaluation.results import Comparison, RowResult
from multicolm.evaluation.task import load_task
from multicolm.policy.base import SelectPolicy
from multicolm.policy.threshold import ConfidencePolicy
from multicolm.types import Signal
from multicolm.views import Views

# Without gold completions.
PLAIN = """
data: {test: test.jsonl}
prompt: "{ask}"
gold: "{answer}"
max_new_tokens: 9
metric: {kind: exact-match}
"""
RULE = NamedPolicy("rule", ConfidencePolicy(threshold=0.7))


@pytest.fixture
def rows(duo, make_task, tmp_path, reported):
    """Runs a comparison of the duo on its task; its rows by name."""

    def run(*policies: Any, **settings: Any) -> dict[str, RowResult]:
        settings = {"out": tmp_path / "out", "batch_size": 2, "sweep": 0, **settings}
        task = settings.pop("task", None) or make_task()
        comparison = compare(duo, policies, task, **settings)
        assert reported[-1][0] is comparison
        return {row.name: row for row in comparison.rows}

    return run


def timeless(row: RowResult) -> RowResult:
    """A row without what the clock said."""
    uses = tuple(replace(use, seconds=0.0) for use in row.uses)
    return replace(row, uses=uses, seconds=0.0, tokens_per_second=0.0)


# Worked out by hand from the tables: question by question, what is written and by whom.
#   base alone     x.  x.  x.  x.     right: one
#   helper alone   y.  y.  y.  x.     right: two
#   rule at 0.7    x.  Y.  xY. x.     right: one, two, three (capitals: the helper; . ends a text)


def test_every_row_says_what_the_tables_make_of_it(rows) -> None:
    found = rows(RULE, random=False)
    names = ["base_ alone", "helper alone", "rule", "per-question oracle", "oracle"]
    assert list(found) == names
    base, helper, rule, _, oracle = found.values()
    # The base has the first question right, the helper the second, nobody alone the third.
    assert [row.quality for row in found.values()] == [0.25, 0.25, 0.75, 0.5, 0.75]
    assert [row.kind for row in found.values()] == ["model"] * 2 + ["policy"] + ["oracle"] * 2
    assert [row.n_questions for row in found.values()] == [4] * 5
    assert [row.qualities for row in (base, helper, rule)] == [
        (1.0, 0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0, 0.0),
        (1.0, 1.0, 1.0, 0.0),
    ]
    assert [use.tokens_written for use in base.uses] == [8, 0]
    assert [use.tokens_written for use in helper.uses] == [0, 8]
    assert [use.tokens_written for use in rule.uses] == [7, 2]
    assert (rule.n_tokens, rule.n_mixed) == (9, 0)
    assert [use.share for use in rule.uses] == [7 / 9, 2 / 9]
    assert rule.assistant_share == 2 / 9
    assert rule.policy == {"kind": "confidence", "params": {"threshold": 0.7}}
    assert (oracle.policy, oracle.uses, oracle.n_tokens, oracle.cost) == (None, (), 0, 0.0)
    assert "most likely one of some model" in oracle.note


def test_work_is_counted_per_pass_and_costs_per_text(rows) -> None:
    found = rows(RULE, random=False)
    # The base looks at each of 9 places, the helper at the 2 it was asked for.
    assert found["rule"].cost == pytest.approx((9 + 2) / 9)
    assert found["base_ alone"].cost == found["helper alone"].cost == 1.0
    # Every token is read once, but not the last of a text; prompts have one token.
    assert found["base_ alone"].uses[0].tokens_read == 8
    assert found["base_ alone"].uses[1].tokens_read == 0
    # Two texts at a time, so that every pass serves two.
    assert found["base_ alone"].uses[0].forwards == 4
    assert found["rule"].seconds > 0
    assert found["rule"].tokens_per_second == pytest.approx(9 / found["rule"].seconds)


def test_gains_are_measured_against_the_first_of_the_best_models_alone(rows) -> None:
    found = rows(RULE, random=False)
    base, helper, rule, question, oracle = found.values()
    assert (base.gain, base.gain_low, base.gain_high, base.p_value) == (None,) * 4
    # One question each that only one of them has right.
    assert (helper.gain, helper.p_value) == (0.0, 1.0)
    # Two questions that only the rule has right: the chance of two heads or two tails.
    assert (rule.gain, rule.p_value) == (0.5, 0.5)
    assert (oracle.gain, oracle.p_value) == (0.5, None)
    assert (question.gain, question.p_value) == (0.25, None)
    assert rule.gain_low < 0 < 0.5 < rule.gain_high <= 1  # four questions leave it open
    assert rule.low < rule.quality < rule.high


def test_costs_are_the_ensemble_s(duo, rows, monkeypatch) -> None:
    monkeypatch.setattr(Ensemble, "costs", property(lambda self: [2.0, 10.0]))
    assert rows(RULE, random=False)["rule"].cost == pytest.approx((9 * 2 + 2 * 10) / 9)


def test_random_routing_has_the_shares_of_the_policy_it_stands_beside(rows) -> None:
    found = rows(RULE, NamedPolicy("never", ConfidencePolicy(threshold=0)), "random", "average")
    row = found["random as rule"]
    assert (row.kind, row.of) == ("random", "rule")
    assert row.policy["params"] == {"weights": {"base_": 7 / 9, "helper": 2 / 9}}
    # Not for one that never hands over, for random routing, or where all write together.
    assert [name for name in found if name.startswith("random as")] == ["random as rule"]
    assert found["average"].n_mixed == found["average"].n_tokens > 0


class Tuned(ConfidencePolicy):
    tunable: ClassVar[dict[str, Any]] = {"threshold": [0.0, 0.3, 0.7, 0.8, 1.5], "other": [1.0]}


def test_a_sweep_tries_values_spread_over_the_first_tunable_param(rows) -> None:
    found = rows(NamedPolicy("mine", Tuned(threshold=0.7)), sweep=3, random=False)
    points = {row.name: row for row in found.values() if row.kind == "sweep"}
    assert list(points) == ["mine threshold=0", "mine threshold=1.5"]  # 0.7 is the row itself
    assert [row.point for row in points.values()] == [{"threshold": 0.0}, {"threshold": 1.5}]
    assert {row.of for row in points.values()} == {"mine"}
    assert [row.quality for row in points.values()] == [0.25, 0.25]
    assert "sweep" not in {row.kind for row in rows("random", sweep=3).values()}
    assert "sweep" not in {row.kind for row in rows(NamedPolicy("m", Tuned()), sweep=0).values()}


@pytest.mark.parametrize(("gold", "right"), [("x", 1), ("y", 1), ("xx", 0), ("yx", 0), ("", 0)])
def test_a_question_counts_for_the_oracle_only_if_every_place_has_a_right_first_choice(
    duo, make_task, tmp_path, reported, gold: str, right: float
) -> None:
    # After 1 the base wants x and the helper y; after either, both want to end.
    task = make_task(records=[{"ask": "1", "answer": gold}])
    comparison = compare(duo, [], task, out=tmp_path / "out")
    assert (comparison.rows[-1].kind, comparison.rows[-1].quality) == ("oracle", right)


def test_any_end_of_a_model_s_own_ends_the_oracle_s_text(tmp_path, make_task, reported) -> None:
    # Two models that end their texts with different tokens.
    never, at_once = {"": {"1": 1.0}}, {"": {"x": 1.0}, "x": {"<b>": 1.0}}
    first = TableModel("first", ["1", "x", "<a>"], never, ["<a>"])
    second = TableModel("second", ["1", "x", "<b>"], at_once, ["<b>"])
    task = make_task(records=[{"ask": "1", "answer": "x"}])
    comparison = compare(Ensemble([first, second]), [], task, out=tmp_path / "out")
    assert comparison.rows[-1].quality == 1


def test_without_gold_completions_there_is_no_oracle_and_a_sentence(
    duo, tmp_path, make_task, reported
) -> None:
    comparison = compare(duo, [RULE], make_task(PLAIN), out=tmp_path / "out")
    assert "oracle" not in {row.name for row in comparison.rows}
    assert comparison.warnings == (
        "Task 'task' has no gold completions, hence no oracle of tokens.",
    )


def test_the_per_question_oracle_needs_two_models_alone_and_no_gold_completions(
    rows, make_task
) -> None:
    kinds = {"sweep": 0, "random": False}
    plain = rows(RULE, task=make_task(PLAIN), **kinds)
    assert [row.name for row in plain.values() if row.kind == "oracle"] == ["per-question oracle"]
    assert plain["per-question oracle"].note.startswith("For each question the best answer of any")
    for left_out in ({"alone": False}, {"oracle": False}):
        found = rows(RULE, task=make_task(PLAIN), **kinds, **left_out)
        assert "per-question oracle" not in found


def test_p_values_of_policies_are_corrected_for_how_many_they_are(rows) -> None:
    alone = rows(RULE, random=False, oracle=False)
    assert (alone["rule"].p_value, alone["rule"].p_holm) == (0.5, 0.5)
    found = rows(RULE, NamedPolicy("never", ConfidencePolicy(threshold=0)), "cosd-rule")
    corrected = {row.name: row.p_holm for row in found.values() if row.p_holm is not None}
    assert set(corrected) == {"rule", "never", "cosd-rule"}
    assert (found["rule"].p_value, corrected["rule"]) == (0.5, 1.0)


def test_answers_of_several_writers_are_told_from_those_of_one(rows) -> None:
    found = rows(RULE, "average", NamedPolicy("never", ConfidencePolicy(threshold=0)))
    shared = {row.name: row.n_shared for row in found.values() if row.kind != "random"}
    # The rule hands over in the second and the third question; all write together in all four.
    expected = {"base_ alone": 0, "helper alone": 0, "rule": 2, "average": 4, "never": 0}
    assert shared == {**expected, "per-question oracle": None, "oracle": None}


def test_the_comparison_says_what_it_found_and_how_sure_it_is(duo, make_task, tmp_path, reported):
    comparison = compare(duo, [RULE], make_task(), out=tmp_path / "out", sweep=0)
    assert comparison.findings[0] == (
        "rule: 75 %, 50 points more than base_ alone (25 %), which may be chance. 4 questions."
    )
    # The third question is the one that no model alone can answer.
    assert comparison.findings[-1].endswith("stays open: the difference may be chance.")
    assert [row.p_question_oracle for row in comparison.rows if row.kind == "policy"] == [1.0]
    assert comparison.binary and comparison.intervals.startswith("Clopper-Pearson")
    assert "warm-up" in comparison.timing


def test_a_metric_with_values_between_is_resampled(duo, make_task, tmp_path, reported) -> None:
    (tmp_path / "own.py").write_text("def judge(text, gold, record): return len(text) / 4\n")
    task = make_task(PLAIN.replace("exact-match", "'own.py:judge'"))
    comparison = compare(duo, [RULE], task, out=tmp_path / "out")
    assert comparison.binary is False and comparison.intervals.startswith("BCa")


def test_an_oracle_s_search_that_was_cut_is_said(rows, monkeypatch) -> None:
    monkeypatch.setattr(
        "multicolm.evaluation.answering.can_be_written",
        lambda ensemble, riddles, batch_size: [None, True, False, None][: len(riddles)],
    )
    oracle = rows(batch_size=4)["oracle"]
    assert oracle.quality == 0.25
    assert oracle.note.endswith(
        " The search for 2 of 4 questions was cut; these count as not written."
    )


def test_first_uses_are_over_before_anything_is_timed(
    duo, make_task, tmp_path, reported, monkeypatch
) -> None:
    streams: list[tuple[str, int, int]] = []
    real = Answering._stream

    def stream(self: Answering, plan: Any, prompts: Any, **more: Any) -> Any:
        streams.append((plan.name, len(prompts), more.get("max_new_tokens", 0)))
        return real(self, plan, prompts, **more)

    monkeypatch.setattr(Answering, "_stream", stream)
    monkeypatch.setattr(Answering, "check", lambda *_: None)
    arguments = {"out": tmp_path / "out", "sweep": 0, "oracle": False}
    compare(duo, [RULE], make_task(), **arguments)
    first = [("base_ alone", 1, 4), ("helper alone", 1, 4)]
    timed = [("base_ alone", 4, 0), ("helper alone", 4, 0), ("rule", 1, 4), ("rule", 4, 0)]
    assert streams == [*first, *timed, ("random as rule", 4, 0)]
    # Another process that goes on has its own first uses, and no more than it needs.
    streams.clear()
    compare(duo, [RULE, "average"], make_task(), **arguments)
    assert streams == [*first, ("average", 1, 4), ("average", 4, 0)]
    streams.clear()
    compare(duo, [RULE, "average"], make_task(), **arguments)
    assert streams == []


def test_a_model_s_slow_first_use_is_in_no_row_s_time(rows, duo, monkeypatch) -> None:
    model, real, calls = duo.backends[1], duo.backends[1].open, []

    def slow_at_first(n_rows: int) -> Any:
        calls.append(n_rows)
        if len(calls) == 1:
            time.sleep(1)
        return real(n_rows)

    monkeypatch.setattr(model, "open", slow_at_first)
    found = rows("max-confidence", random=False, oracle=False)
    assert len(calls) > 2
    assert all(row.seconds < 1 for row in found.values())


def test_checkpoints_of_one_policy_are_told_apart_in_every_name(
    duo, make_task, tmp_path, reported
) -> None:
    from multicolm.evaluation.plot import short_names

    folders = [tmp_path / labels / "co-llm" for labels in ("teacher-forced", "roll-outs")]
    for folder in folders:
        folder.parent.mkdir()
        checkpoint(folder, {})
    comparison = compare(duo, folders, make_task(), out=tmp_path / "out", sweep=2)
    names = [row.name for row in comparison.rows]
    assert len(names) == len(set(names))
    heads = [row.name for row in comparison.rows if row.kind == "policy"]
    assert heads == [str(folder) for folder in folders] == short_names(heads)
    for head in heads:
        own = [row.name for row in comparison.rows if row.of == head]
        assert len(own) == 3 and all(head in name for name in own)


def test_rows_may_be_left_out(rows) -> None:
    found = rows(RULE, alone=False, random=False, oracle=False)
    assert list(found) == ["rule"]
    assert (found["rule"].gain, found["rule"].p_value) == (None, None)


def test_the_comparison_says_how_it_was_measured(duo, make_task, tmp_path, reported) -> None:
    task = load_task(make_task())
    comparison = compare(
        duo, [RULE], task, out=tmp_path / "out", split="dev", seed=3, limit=2, title="duo"
    )
    assert (comparison.ensemble, comparison.models) == ("duo", ("base_", "helper"))
    assert (comparison.task, comparison.metric, comparison.split) == ("task", "exact-match", "dev")
    assert (comparison.seed, comparison.digest) == (3, task.digest("dev"))
    assert comparison.settings["max_new_tokens"] == 5
    assert (comparison.settings["limit"], comparison.settings["batch_size"]) == (2, 16)
    assert {"multicolm", "torch", "transformers", "python"} == set(comparison.versions)
    assert "1 thread" in comparison.machine
    assert {row.n_questions for row in comparison.rows} == {2}
    assert comparison.questions == tuple(q.id for q in task.sample("dev", 2))
    assert Comparison.from_json(json.loads(json.dumps(comparison.as_json()))) == comparison


def test_an_answer_that_was_cut_off_is_in_the_row_s_note(rows) -> None:
    found = rows(RULE, max_new_tokens=2, random=False)
    assert found["rule"].note == "1 of 4 answers were cut off at max_new_tokens."
    assert found["base_ alone"].note == ""


# --- traces --------------------------------------------------------------------------------------


def test_traces_show_what_every_model_made_of_every_place(rows, reported) -> None:
    rows(RULE, traces=3)
    traced = {(answer.row, answer.question): answer for answer in reported[-1][1]}
    assert list(traced) == [
        (row, question)
        for row in ("base_ alone", "helper alone", "rule")
        for question in ("one", "two", "three")
    ]
    answer = traced["rule", "three"]
    assert (answer.prompt, answer.gold, answer.text) == ("3", "xy", "xy")
    assert (answer.quality, answer.finish_reason) == (1.0, "eos")
    assert [(token.text, token.model) for token in answer.tokens] == [
        ("x", "base_"),
        ("y", "helper"),
        ("<end>", "base_"),
    ]
    first, second, _ = answer.tokens
    assert first.score == pytest.approx(0.9)
    assert first.logprob == pytest.approx(math.log(0.9), abs=1e-6)
    assert second.models["base_"]["logprob"] == pytest.approx(math.log(0.4), abs=1e-6)
    assert second.models["helper"]["logprob"] == pytest.approx(0.0, abs=1e-6)
    top = second.models["base_"]["top"]
    assert [text for text, _ in top][:2] == ["<end>", "y"]
    assert [prob for _, prob in top] == pytest.approx([0.6, 0.4, 0.0], abs=1e-6)
    # What a model cannot write has no finite log-probability.
    assert traced["rule", "one"].tokens[0].models["helper"]["logprob"] is None
    assert first.policy == {}


def test_traces_agree_with_what_was_seen_while_the_text_was_written(
    tmp_path, make_task, reported
) -> None:
    models = [random_table(name, seed) for seed, name in enumerate(("p", "q", "r"))]
    records = [{"ask": a + b, "answer": "d"} for a in TOKENS[:-1] for b in TOKENS[:-1]]
    compare(Ensemble(models), ["cosd-rule"], make_task(PLAIN, records), out=tmp_path / "out")
    n = 0
    for answer in reported[-1][1]:
        for token in answer.tokens:
            n += 1
            assert token.models[token.model]["logprob"] == pytest.approx(token.logprob, abs=1e-5)
    assert n > 100


class Halves(SelectPolicy):
    """Says how it decided, from the base's view and from what came before."""

    base_signals: ClassVar[set[Signal]] = {"top1"}
    history: ClassVar[bool] = True

    def select(self, views: Views) -> torch.Tensor:
        return (views.base.top1_probs < 0.7).long()

    def model_probs(self, views: Views) -> torch.Tensor:
        past = views.previous + 10 * views.base_run
        return torch.stack([views.base.top1_probs, past.float()], dim=-1)


def test_traces_show_with_what_probability_a_policy_lets_each_model_write(rows, reported) -> None:
    rows(NamedPolicy("halves", Halves()), random=False)
    [answer] = [a for a in reported[-1][1] if (a.row, a.question) == ("halves", "three")]
    assert [token.model for token in answer.tokens] == ["base_", "helper", "base_"]
    assert [token.policy["base_"] for token in answer.tokens] == pytest.approx([0.9, 0.6, 1.0])
    # Here "the helper's probability" is who wrote before (nobody, the base, the helper), and ten
    # times how many tokens the base had written in a row.
    assert [token.policy["helper"] for token in answer.tokens] == [-1, 0 + 10, 1]


def test_long_traces_are_read_in_parts_and_say_the_same(rows, reported, monkeypatch) -> None:
    rows(RULE)
    monkeypatch.setattr("multicolm.evaluation.explain._MAX_LOGITS", 1)
    rows(RULE)
    assert reported[0][1] == reported[1][1]


# --- going on ------------------------------------------------------------------------------------


def test_what_was_finished_is_not_done_again(rows, monkeypatch) -> None:
    first = rows(RULE)

    def refuse(*args: Any, **more: Any) -> Any:
        raise AssertionError("a model was run")

    told: list[Progress] = []
    monkeypatch.setattr("multicolm.evaluation.answering.Answering._chunk", refuse)
    monkeypatch.setattr("multicolm.evaluation.answering.Answering._oracle", refuse)
    assert rows(RULE, progress=told.append) == first
    assert [(step.row, step.done, step.finished) for step in told if step.finished] == [
        (name, 4, True) for name in first if name != "per-question oracle"
    ]


def test_another_policy_may_join_and_only_it_is_run(rows, monkeypatch) -> None:
    before = rows(RULE)
    told: list[Progress] = []
    after = rows(RULE, "max-confidence", random=False, progress=told.append)
    # The report is written anew, and that is said.
    assert {step.row for step in told if step.done and not step.finished} == {"max-confidence"}
    # Of two policies its p-value is another when it is corrected.
    assert replace(after["rule"], p_holm=0.5) == before["rule"]


def test_a_policy_that_was_changed_under_its_name_is_run_again(rows) -> None:
    assert rows(RULE)["rule"].quality == 0.75
    assert rows(NamedPolicy("rule", ConfidencePolicy(threshold=0.0)))["rule"].quality == 0.25


def test_more_questions_may_follow(rows, tmp_path) -> None:
    assert rows(RULE, limit=2)["rule"].n_questions == 2
    whole, fresh = rows(RULE), rows(RULE, out=tmp_path / "fresh")
    assert [timeless(row) for row in whole.values()] == [timeless(row) for row in fresh.values()]


OWN = """
import multicolm

class Own(multicolm.SelectPolicy):
    base_signals = frozenset({"top1"})

    def select(self, views):
        return (views.base.top1_probs < %s).long()
"""


def test_a_policy_s_file_that_was_changed_is_run_again(rows, tmp_path) -> None:
    file = tmp_path / "own.py"
    for threshold, quality in ((0.7, 0.75), (0.0, 0.25)):
        file.write_text(OWN % threshold)
        assert rows(f"{file}:Own")[f"{file}:Own"].quality == quality


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"split": "dev"}, 'split "test" there, "dev" here'),
        ({"batch_size": 3}, "batch_size 2 there, 3 here"),
        ({"max_new_tokens": 9}, 'settings {"max_new_tokens": 5'),
    ],
)
def test_another_run_s_folder_is_refused(rows, settings, shown) -> None:
    rows(RULE)
    with pytest.raises(InputError, match="holds another run") as caught:
        rows(RULE, **settings)
    assert shown in str(caught.value)


def test_other_questions_are_another_run(rows, tmp_path) -> None:
    rows(RULE)
    (tmp_path / "test.jsonl").write_text('{"ask": "1", "answer": "x"}\n')
    with pytest.raises(InputError, match="digest"):
        rows(RULE, task=tmp_path / "task.yaml")


def test_a_metric_function_that_was_changed_is_another_run(rows, tmp_path, make_task) -> None:
    own = tmp_path / "own.py"
    own.write_text("def judge(text, gold, record): return float(text == gold)\n")
    task = make_task(PLAIN.replace("exact-match", "'own.py:judge'"))
    assert rows(RULE, task=task)["rule"].quality == 0.75
    own.write_text("def judge(text, gold, record): return 0.5\n")
    with pytest.raises(InputError, match="asked"):
        rows(RULE, task=task)


def test_a_ledger_cut_at_any_byte_comes_to_the_same_results(rows, tmp_path, reported) -> None:
    expected = [timeless(row) for row in rows(RULE).values()]
    path = tmp_path / "out" / "ledger.jsonl"
    whole = path.read_bytes()
    for end in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:end])
        assert [timeless(row) for row in rows(RULE).values()] == expected
    assert all(call[1] == reported[0][1] for call in reported)


def test_a_damaged_ledger_is_named(rows, tmp_path) -> None:
    rows(RULE)
    path = tmp_path / "out" / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"{\n", *lines[4:]]))
    with pytest.raises(ArtefactError, match=r"ledger\.jsonl:4: this line is damaged"):
        rows(RULE)


# --- what is refused, and what is warned of ------------------------------------------------------


@pytest.mark.parametrize(
    ("policies", "name"),
    [
        ([RULE, RULE], "rule"),
        (["cosd-rule", "cosd-rule"], "cosd-rule"),
        ([NamedPolicy("oracle", RULE.policy)], "oracle"),
        ([NamedPolicy("per-question oracle", RULE.policy)], "per-question oracle"),
        ([NamedPolicy("base_ alone", RULE.policy)], "base_ alone"),
    ],
)
def test_two_rows_of_one_name_are_refused(rows, policies, name) -> None:
    with pytest.raises(InputError, match=f"two rows of the table are called '{name}'"):
        rows(*policies)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit must be 1 or more, got 0."),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0."),
        ({"sweep": -1}, "sweep must be 0 or more, got -1."),
        ({"traces": -1}, "traces must be 0 or more, got -1."),
        ({"alone": False}, "there is nothing to compare"),
    ],
)
def test_a_number_out_of_range_is_refused(rows, settings, message) -> None:
    with pytest.raises(InputError, match=message):
        rows(**settings)


def test_what_cannot_work_is_said_before_any_model_runs(
    rows, duo, make_task, tmp_path, monkeypatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("a model was run")

    for model in duo.backends:
        monkeypatch.setattr(model, "open", refuse)
    with pytest.raises(CapabilityError, match="no model 7"):
        rows(NamedPolicy("seven", named_policy("single").policy.__class__(model=7)))
    long = [{"ask": "1", "answer": "x"}, {"ask": "9", "answer": "x"}]
    with pytest.raises(InputError, match="task 'task': model 'base_' has no token for '9'"):
        rows(RULE, task=make_task(records=long))
    assert not (tmp_path / "out").exists()


def checkpoint(folder: Path, provenance: object) -> Path:
    folder.mkdir()
    (folder / "policy.yaml").write_text("kind: confidence\nparams: {threshold: 0.7}\n")
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def test_a_policy_that_was_made_from_these_questions_is_warned_of(
    duo, make_task, tmp_path, reported
) -> None:
    task = load_task(make_task())
    prints = [question.fingerprint for question in task.questions("test")]
    origin = {"train": {"digest": "x", "prompts": [*prints[1:3], "0" * 16]}, "tune": None}
    some = checkpoint(tmp_path / "some", origin)
    every = checkpoint(tmp_path / "every", {"tune": {"digest": task.digest("test")}})
    clean = checkpoint(tmp_path / "clean", {"train": {"digest": "x", "prompts": ["0" * 16]}})
    comparison = compare(
        duo, [some, str(every / "policy.yaml"), clean], task, out=tmp_path / "out", random=False
    )
    assert comparison.warnings == (
        f"Policy '{some}' was trained on 2 of the 4 questions that it is compared on, so its "
        "quality here says little about new ones.",
        f"Policy '{every}/policy.yaml' was tuned on 4 of the 4 questions that it is compared on, "
        "so its quality here says little about new ones.",
    )


def test_a_damaged_origin_is_named(rows, tmp_path) -> None:
    folder = checkpoint(tmp_path / "ckpt", [])
    with pytest.raises(ArtefactError, match=r"provenance\.json is damaged"):
        rows(folder)
    (folder / "provenance.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"provenance\.json is damaged"):
        rows(folder)


@pytest.mark.parametrize(
    ("source", "name"),
    [("cosd-rule", "cosd-rule"), ("./ckpt/", "ckpt"), ("ckpt", "ckpt"), (Path("ckpt"), "ckpt")],
)
def test_a_policy_is_called_as_it_is_written(tmp_path, monkeypatch, source, name) -> None:
    checkpoint(tmp_path / "ckpt", {})
    monkeypatch.chdir(tmp_path)
    named = named_policy(source)
    assert named.name == name
    assert named.folder == (None if name == "cosd-rule" else Path(str(source)))


def test_a_policy_that_is_not_known_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'cosd-rule'\?"):
        named_policy("cosd-rul")

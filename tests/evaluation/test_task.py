from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from multicolm import catalog
from multicolm.errors import ConfigError, InputError, UnknownNameError
from multicolm.evaluation.task import load_task
from multicolm.tiny.world import build_world

TASK = """\
data: {test: test.jsonl, dev: dev.jsonl}
prompt: "Q: {question} ({points})"
gold: "{answer}"
metric: {kind: exact-match}
"""
RECORD = {"question": "1 + 1?", "points": 3, "answer": "2"}


def test_a_question_is_its_record_in_the_task_s_words(make_task) -> None:
    text = TASK + 'completion: " {answer}{{!}}"\nchat: true\n'
    [question] = load_task(make_task(text, [RECORD])).questions("test")
    assert (question.id, question.prompt, question.gold) == ("1", "Q: 1 + 1? (3)", "2")
    assert question.completions == (" 2{!}",)
    assert question.asked == [{"role": "user", "content": "Q: 1 + 1? (3)"}]
    assert question.record == RECORD
    # printf 'Q: 1 + 1? (3)' | sha256sum
    assert question.fingerprint == "9d81dd00927a41b4"


def test_braces_in_a_record_are_text(make_task) -> None:
    record = RECORD | {"question": "{answer} {0}"}
    [question] = load_task(make_task(TASK, [record])).questions("test")
    assert question.prompt == "Q: {answer} {0} (3)"


def test_ids_are_the_records_own_or_the_numbers_of_their_lines(make_task) -> None:
    records = [RECORD, RECORD | {"id": "b"}, RECORD | {"id": 7}]
    questions = load_task(make_task(TASK, records)).questions("dev")
    assert [question.id for question in questions] == ["1", "b", "7"]
    assert all(question.asked == question.prompt for question in questions)


def test_the_embedded_task_has_the_questions_of_the_tiny_world() -> None:
    task = load_task("tiny-world")
    for split in ("train", "dev", "test"):
        assert [q.record for q in task.questions(split)] == [
            q.as_record() for q in build_world().questions(split)
        ]
    assert catalog.names("tasks") == ["tiny-world"]


def test_the_digest_sees_the_records_and_not_how_they_are_written(tmp_path, make_task) -> None:
    path = make_task(TASK, [RECORD, RECORD])
    first = load_task(path).digest("test")
    turned = json.dumps(dict(reversed(RECORD.items())), indent=None, separators=(" ,", ":  "))
    (tmp_path / "test.jsonl").write_text(f"\ufeff{turned}\n\n{turned}", encoding="utf-8")
    assert load_task(path).digest("test") == first
    (tmp_path / "test.jsonl").write_text(f"{turned}\n", encoding="utf-8")
    assert load_task(path).digest("test") != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TASK.replace("gold:", "god:"), ":3:1: god: unknown key 'god'. Did you mean 'gold'?"),
        (TASK.replace('"{answer}"', "3"), ":3:7: gold: must be text, got 3; put it in quotes."),
        (TASK + "max_new_tokens: 0\n", ":5:17: max_new_tokens: must be 1 or more, got 0."),
        (TASK + "stop: ['']\n", ":5:8: stop.0: must not be empty."),
        (TASK.replace("{points}", "{points:3d}"), ":2:9: prompt: '{points}' is not allowed;"),
        (TASK.replace("{points}", "{points!r}"), ":2:9: prompt: '{points}' is not allowed;"),
        (TASK.replace("{points}", "{a.b}"), ":2:9: prompt: '{a.b}' is not allowed; write a field"),
        (TASK.replace("{points}", "{}"), ":2:9: prompt: '{}' is not allowed;"),
        (TASK.replace("{points}", "{"), ":2:9: prompt: expected '}'"),
        (TASK.replace("exact-match", "exact-mach"), "Did you mean 'exact-match'? Known: contains"),
        (
            TASK.replace("exact-match}", "exact-match, params: {patern: x}}"),
            ":4:38: metric.params.patern: unknown key 'patern'. Did you mean 'pattern'?",
        ),
        (
            TASK.replace("exact-match}", "exact-match, params: {strip: 3}}"),
            ":4:45: metric.params.strip: must be true or false, got 3.",
        ),
        (
            TASK.replace("exact-match}", "exact-match, params: {pattern: 'x'}}"),
            ":4:47: metric.params.pattern: needs a group",
        ),
        (
            TASK.replace("exact-match}", "numeric, params: {tolerance: -1}}"),
            ":4:45: metric.params.tolerance: must be 0 or more, got -1.",
        ),
        (TASK.replace("test.jsonl", "tset.jsonl"), ":1:14: data.test: there is no file /"),
        (TASK.replace("test.jsonl", "./tests"), ":1:14: data.test: './tests' is no data set"),
        (TASK.replace("metric:", "#"), ": metric: required, but missing"),
    ],
)
def test_a_mistake_in_a_task_file_is_named_with_its_place(make_task, text, message) -> None:
    with pytest.raises(ConfigError) as caught:
        load_task(make_task(text, [RECORD]))
    assert message in str(caught.value)
    assert "task.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([RECORD, {"question": "a", "answer": "b"}], "test.jsonl:2: `prompt` of the task asks for"),
        ([{"qestion": "a"}], "unknown field 'question'. Did you mean 'qestion'? Known: qestion."),
        ([RECORD | {"answer": None}], "test.jsonl:1: 'answer' must be text or a number, got None."),
        ([RECORD | {"answer": [1]}], "'answer' must be text or a number, got [1]."),
        ([RECORD | {"answer": True}], "'answer' must be text or a number, got True."),
        ([RECORD | {"answer": float("nan")}], "'answer' must be text or a number, got nan."),
        ([RECORD | {"answer": "\ud800"}], "test.jsonl:1: `gold` is not valid Unicode."),
        ([RECORD | {"id": "a"}] * 2, "test.jsonl:2: the id 'a' is there already; ids differ."),
        ([RECORD | {"id": 2}, RECORD], "test.jsonl:2: the id '2' is there already; ids differ."),
        ([RECORD | {"id": None}], "the id must be text or a whole number, got None."),
        ([["a"]], "test.jsonl:1: a record is an object"),
        ([], "test.jsonl holds no question."),
    ],
)
def test_a_record_that_is_not_right_is_named_with_its_line(make_task, records, message) -> None:
    task = load_task(make_task(TASK, records))
    with pytest.raises(InputError) as caught:
        task.questions("test")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{}\n{", "test.jsonl:2: no JSON"), (b"\xff\n", "test.jsonl:1: not UTF-8")],
)
def test_a_file_that_is_no_json_is_named_with_its_line(
    tmp_path, make_task, content, message
) -> None:
    text = TASK.replace("Q: {question} ({points})", "Q").replace("{answer}", "A")
    task = load_task(make_task(text, [RECORD]))
    (tmp_path / "test.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        task.questions("test")


def test_a_split_that_is_not_there_is_named(make_task) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown split 'tset'. Did you mean 'test'\?"):
        load_task(make_task()).questions("tset")


def test_a_task_that_is_not_there_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"'tiny-word'\. Did you mean 'tiny-world'\?"):
        load_task("tiny-word")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file; expected a task file"):
        load_task("nowhere.yaml")


CODE = """
def judge(text, gold, record):
    return record["points"] / 4 if text == gold else 0

def broken(text, gold, record):
    return 3

def wordy(text, gold, record):
    return "good"
"""


def test_a_python_function_may_judge_with_the_record(tmp_path: Path, make_task) -> None:
    (tmp_path / "own.py").write_text(CODE)
    task = load_task(make_task(TASK.replace("exact-match", "'own.py:judge'"), [RECORD]))
    [question] = task.questions("test")
    assert (task.score("2", question), task.score("3", question)) == (0.75, 0.0)


def test_a_function_of_an_installed_package_may_judge(make_task) -> None:
    task = load_task(make_task(TASK.replace("exact-match", "'operator:eq'"), [RECORD]))
    assert task.metric.name == "operator:eq"


@pytest.mark.parametrize(("name", "shown"), [("broken", "3"), ("wordy", "'good'")])
def test_a_quality_beyond_0_to_1_is_refused(tmp_path, make_task, name, shown) -> None:
    (tmp_path / "own.py").write_text(CODE)
    task = load_task(make_task(TASK.replace("exact-match", f"'own.py:{name}'"), [RECORD]))
    [question] = task.questions("test")
    with pytest.raises(InputError, match=f"question '1': metric 'own.py:{name}' gave {shown};"):
        task.score("2", question)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("own.py:jugde", "unknown function 'jugde'. Did you mean 'judge'?"),
        ("nowhere.py:judge", "there is no file"),
        ("no.such.package:judge", "is its package installed?"),
    ],
)
def test_a_function_that_is_not_there_is_named(tmp_path, make_task, kind, message) -> None:
    (tmp_path / "own.py").write_text(CODE)
    with pytest.raises(ConfigError) as caught:
        load_task(make_task(TASK.replace("exact-match", f"'{kind}'"), [RECORD]))
    assert message in str(caught.value)


def test_a_function_takes_no_params(make_task) -> None:
    text = TASK.replace("exact-match", "'operator:eq', params: {a: 1}")
    with pytest.raises(ConfigError, match=r"metric\.params: a Python function takes no params"):
        load_task(make_task(text, [RECORD]))


def test_a_number_metric_says_which_question_has_no_number(make_task) -> None:
    records = [RECORD, RECORD | {"answer": "two", "id": "odd"}]
    task = load_task(make_task(TASK.replace("exact-match", "numeric"), records))
    with pytest.raises(InputError, match="task 'task', question 'odd': the right answer 'two'"):
        [task.score("", question) for question in task.questions("test")]


def test_parquet_is_read_as_json_lines_are(tmp_path: Path, make_task) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    task = load_task(make_task(TASK, [RECORD, RECORD]))
    parquet.write_table(pyarrow.Table.from_pylist([RECORD, RECORD]), tmp_path / "test.parquet")
    other = load_task(make_task(TASK.replace("test.jsonl", "test.parquet"), [RECORD, RECORD]))
    assert other.questions("test") == task.questions("test")
    assert other.digest("test") == task.digest("test")


def test_without_the_library_a_data_set_of_the_hub_is_one_sentence(
    make_task, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **more)

    task = load_task(make_task(TASK.replace("test.jsonl", "org/name"), [RECORD]))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"org/name needs .*: pip install 'multicolm\[data\]'\."):
        task.questions("test")

"""Labels from what the text becomes, worked out by hand.

The base answers "q" with "bx" and, once an "a" stands there, with "ac"; the expert with "ax", and
with "bc" once a "b" stands there. The corpus has "ax"; an answer is right if it holds an "x".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from score_worlds import write
from tables import random_table

from multicolm import Ensemble
from multicolm.backend.table import TableModel
from multicolm.calibration.rollouts import Labels, label, plan_rollouts
from multicolm.errors import ArtefactError, CapabilityError, InputError
from multicolm.evaluation.task import Task, load_task
from multicolm.policy.resolve import resolve_policy
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import load_table, read_index

TOKENS = ("q", "p", "a", "b", "c", "x", ".")
BASE: dict[Any, dict[str, float]] = {
    "": {"c": 1.0},
    "q": {"b": 0.9, "a": 0.1},
    "p": {"a": 0.6, "b": 0.4},
    "a": {"c": 0.8, "x": 0.2},
    "b": {"x": 1.0},
    "c": {".": 1.0},
    "x": {".": 1.0},
}
EXPERT = {**BASE, "q": {"a": 1.0}, "a": {"x": 0.7, "c": 0.3}, "b": {"c": 1.0}}
TASK = """
data: {train: train.jsonl, test: test.jsonl}
prompt: "{prompt}"
gold: "{answer}"
max_new_tokens: 4
metric: {kind: contains}
"""
BASE_ALONE = resolve_policy("single")
EXPERT_ALONE = resolve_policy({"kind": "single", "params": {"model": "expert"}})


def duo(**settings: Any) -> Ensemble:
    base, expert = (
        TableModel(name, TOKENS, rows, ends=["."])
        for name, rows in (("base", BASE), ("expert", EXPERT))
    )
    base.identity, expert.identity = "table:b", "table:e"
    ensemble = Ensemble([base, expert])
    ensemble.generation = ensemble.generation.updated(settings)
    return ensemble


@pytest.fixture
def task(tmp_path: Path) -> Task:
    lines = [{"prompt": p, "answer": "x"} for p in ("q", "p")]
    write(tmp_path / "train.jsonl", lines)
    write(tmp_path / "test.jsonl", [{"prompt": "c", "answer": "x"}])
    (tmp_path / "task.yaml").write_text(TASK)
    return load_task(tmp_path / "task.yaml")


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    lines = [{"prompt": p, "completion": "ax"} for p in ("q", "p")]
    data = write(tmp_path / "d.jsonl", lines)
    score(duo(), open_corpus(data), tmp_path / "scores", shard_positions=1)
    return tmp_path / "scores"


def labelled(scores: Path, task: Task, policy: Any, ensemble: Ensemble | None = None, **how: Any):
    chosen = {k: v for k, v in how.items() if k in ("limit", "samples", "seed", "split")}
    plan = plan_rollouts(scores, ["base", "expert"], task, **chosen)
    done = {k: v for k, v in how.items() if k != "limit"}
    return label(ensemble or duo(), scores, task, plan, policy=policy, **done)


def test_whose_token_leads_to_a_right_text_is_right(scores, task) -> None:
    """Of "q": a (base b), x (base c). Of "p": a (base a, too: nothing to find out), x (base c)."""
    plain = load_table(scores)
    assert plain.right.tolist()[:3] == [[False, True], [False, True], [True, True]]
    labels = labelled(scores, task, BASE_ALONE)
    table = load_table(scores)
    # The base alone goes on with "bx", which is right, and with "ac", which is not.
    assert table.rollouts is not None
    assert table.rollouts.nan_to_num(-1).tolist()[:3] == [[1, 0], [0, 1], [-1, -1]]
    assert table.right.tolist()[:3] == [[True, False], [False, True], [True, True]]
    assert torch.equal(table.right[2:4], plain.right[2:4]), "nothing was to be found out there"
    assert labels == Labels(
        positions=3, texts=6, decided=3, base_right=1, unlike_corpus=1, quality=0.5, tokens=8
    )


def test_another_policy_finishes_other_texts_and_replaces_the_labels(scores, task) -> None:
    labelled(scores, task, BASE_ALONE)
    labelled(scores, task, EXPERT_ALONE)
    assert load_table(scores).right.tolist()[:2] == [[False, True], [False, True]]
    seen: list[tuple[int, int]] = []
    labelled(scores, task, BASE_ALONE, on_progress=lambda *at: seen.append(at))
    assert seen == [(6, 6)], "what was finished before is known"
    assert load_table(scores).right.tolist()[0] == [True, False]


def test_a_stop_costs_the_texts_at_work_and_a_larger_limit_goes_on(scores, task, tmp_path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labelled(scores, task, BASE_ALONE, limit=4, on_progress=stop, batch_size=1)
    assert load_table(scores).rollouts is None
    seen: list[tuple[int, int]] = []
    labelled(scores, task, BASE_ALONE, limit=4, batch_size=1, on_progress=lambda *a: seen.append(a))
    assert seen[0] == (2, 4) and seen[-1] == (4, 4)
    first = load_table(scores).rollouts
    labelled(scores, task, BASE_ALONE, limit=6, batch_size=1, on_progress=lambda *a: seen.append(a))
    assert seen[5:] == [(5, 6), (6, 6)] or seen[-1] == (6, 6)
    more = load_table(scores).rollouts
    judged = ~first.isnan()
    assert torch.equal(first[judged], more[judged]) and int(judged.sum()) == 4


def test_drawn_texts_are_equal_for_equal_seeds_whatever_the_batch(scores, task) -> None:
    found = []
    for batch_size, seed in ((1, 3), (7, 3), (7, 4)):
        ensemble = duo(temperature=1.0)
        labelled(scores, task, BASE_ALONE, ensemble, samples=20, seed=seed, batch_size=batch_size)
        found.append(load_table(scores).rollouts.nan_to_num(-1))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    # After "q" and the expert's "a" the base draws x with probability 0.2.
    assert 0 < float(found[0][0, 1]) < 0.6 and float(found[0][0, 0]) == 1.0


def test_a_tree_learns_from_the_labels(scores, task) -> None:
    def shown(table) -> list[bool]:
        from multicolm.policy.tree_learning import examples

        names = ("p_draft", "p_assistant")
        return examples(table, names, lambda *_: torch.zeros(len(table))).right.tolist()

    plain = shown(load_table(scores))
    labelled(scores, task, BASE_ALONE)
    assert plain == [True, True, True] and shown(load_table(scores)) == [False, True, True]


def test_models_of_another_vocabulary_write_tokens_that_the_base_model_lacks(tmp_path) -> None:
    """The other's first choice is "ab", for which the base model has two tokens."""
    base = TableModel(
        "base", ["q", "a", "b", "c", "."], {"": {"c": 1.0}, "c": {".": 1.0}, "b": {".": 1.0}}, ["."]
    )
    rows = {"": {"ab": 1.0}, "ab": {"<e>": 1.0}, "b": {"<e>": 1.0}}
    other = TableModel("other", ["b", "q", "a", "c", "ab", "<e>"], rows, ["<e>"])
    ensemble = Ensemble([base, other])
    data = write(tmp_path / "d.jsonl", [{"prompt": "q", "completion": "ab"}])
    write(tmp_path / "train.jsonl", [{"prompt": "q", "answer": "ab"}])
    write(tmp_path / "test.jsonl", [{"prompt": "c", "answer": "x"}])
    (tmp_path / "task.yaml").write_text(TASK)
    task = load_task(tmp_path / "task.yaml")
    score(ensemble, open_corpus(data), tmp_path / "s")
    plan = plan_rollouts(tmp_path / "s", ["base", "other"], task)
    assert len(plan.positions) == 1
    labels = label(ensemble, tmp_path / "s", task, plan, policy=BASE_ALONE)
    assert load_table(tmp_path / "s").rollouts.nan_to_num(-1).tolist()[0] == [0.0, 1.0]
    [ledger] = (tmp_path / "s").glob(".rollouts/*/ledger.jsonl")
    texts = [json.loads(line)["record"]["text"] for line in ledger.read_text().splitlines()[1:]]
    assert sorted(texts) == ["ab", "c"] and labels.decided == 1


def test_test_data_other_questions_and_other_models_are_refused(scores, task, tmp_path) -> None:
    names = ["base", "expert"]
    with pytest.raises(InputError, match="nothing is learned or tuned on the test split"):
        plan_rollouts(scores, names, task, split="test")
    write(tmp_path / "train.jsonl", [{"prompt": "c", "answer": "x"}])
    with pytest.raises(InputError, match=r"1 of the 1 questions .* are in its test split too"):
        plan_rollouts(scores, names, task)
    write(tmp_path / "train.jsonl", [{"prompt": "b", "answer": "x"}])
    with pytest.raises(InputError, match=r"is a question of task 'task' .train.: their prompts"):
        plan_rollouts(scores, names, task)
    write(tmp_path / "train.jsonl", [{"prompt": "q", "answer": "x"}])
    with pytest.raises(InputError, match="the limit of 1 texts is less than one position takes"):
        plan_rollouts(scores, names, task, limit=1)
    with pytest.raises(ArtefactError, match="holds scores of base, expert"):
        plan_rollouts(scores, ["base", "nobody"], task)
    ensemble = duo()
    ensemble.backends[1].identity = "table:other"
    with pytest.raises(ArtefactError, match="scores of another model 'expert'"):
        label(ensemble, scores, task, plan_rollouts(scores, names, task), policy=BASE_ALONE)


def test_what_cannot_finish_a_text_is_refused(scores, task) -> None:
    with pytest.raises(
        InputError, match="2 texts after one token are equal where nothing is drawn"
    ):
        labelled(scores, task, BASE_ALONE, samples=2)
    with pytest.raises(CapabilityError, match="writes in bytes"):
        labelled(scores, task, resolve_policy("byte-mixture"))


def test_where_the_base_model_writes_the_corpus_nothing_is_judged(tmp_path, task) -> None:
    data = write(tmp_path / "d.jsonl", [{"prompt": "q", "completion": "bx"}])
    score(duo(), open_corpus(data), tmp_path / "s")
    with pytest.raises(InputError, match="nothing is to be judged: at none of the 3 tokens"):
        plan_rollouts(tmp_path / "s", ["base", "expert"], task)


def test_the_labels_are_files_of_the_table(scores, task) -> None:
    before = dict(read_index(scores).files)
    labelled(scores, task, BASE_ALONE)
    files = dict(read_index(scores).files)
    assert files.keys() - before.keys() == {"rollouts.safetensors"}
    assert {n: d for n, d in files.items() if n in before} == before
    ledgers = list(scores.glob(".rollouts/*/ledger.jsonl"))
    [header, *records] = map(json.loads, ledgers[0].read_text().splitlines())
    assert header["header"]["verb"] == "rollout" and len(records) == 6
    assert {record["record"]["text"] for record in records} >= {"bx", "ac"}


def test_random_tables_of_three_models_are_labelled_at_every_place(tmp_path) -> None:
    ensemble = Ensemble([random_table(n, s) for s, n in enumerate(("base", "left", "right"))])
    data = write(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "bdf"}])
    write(tmp_path / "train.jsonl", [{"prompt": "a", "answer": "d"}])
    write(tmp_path / "test.jsonl", [{"prompt": "c", "answer": "x"}])
    (tmp_path / "task.yaml").write_text(TASK)
    score(ensemble, open_corpus(data), tmp_path / "s")
    task = load_task(tmp_path / "task.yaml")
    plan = plan_rollouts(tmp_path / "s", ensemble.models, task)
    label(ensemble, tmp_path / "s", task, plan, policy=resolve_policy("max-confidence"))
    table = load_table(tmp_path / "s")
    assert len(plan.positions) >= 2
    for position in plan.positions:
        found = dict(zip(ensemble.models, table.rollouts[position.row].tolist(), strict=True))
        for name, token in position.choices.items():
            assert found[name] == ("d" in finished(ensemble, [*position.before, token]))


def finished(ensemble: Ensemble, ids: list[int]) -> str:
    """A text of at most 4 tokens behind the prompt "a", of which these stand already."""
    ends = ensemble.vocabulary.end_ids(None)
    text = b"".join(ensemble.vocabulary.token_bytes(i) for i in ids if i not in ends).decode()
    if len(ids) == 4 or ids[-1] in ends:
        return text
    [answer] = ensemble.generate([[0, *ids]], "max-confidence", max_new_tokens=4 - len(ids))
    return text + answer.text

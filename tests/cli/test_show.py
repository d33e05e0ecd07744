"""``multicolm show``: what a checkpoint holds, and a tree that one can edit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from multicolm import Ensemble
from multicolm.backend.table import TableModel
from multicolm.policy.cosd_tree import CosdTreePolicy
from multicolm.policy.tree import Leaf, Split, Tree
from multicolm.training.checkpoint import Checkpoint

TREE = Split("p_draft", 0.5, Leaf(True, 0.75, 8, 6), Leaf(False, 0.0))
PROVENANCE = {
    "models": [{"name": "small", "identity": "hub:org/small@abc"}, {"name": "big", "identity": ""}],
    "train": {"source": "texts.jsonl", "prompts": ["0" * 16] * 20, "report": {"accuracy": 0.875}},
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "router"
    policy = CosdTreePolicy(tree=Tree(TREE))
    Checkpoint(policy, PROVENANCE, "Of three texts.").save_pretrained(folder)
    return folder


def test_a_checkpoint_is_shown_with_its_tree_and_where_it_is_from(run, checkpoint: Path) -> None:
    result = run("show", str(checkpoint))
    assert (result.code, result.err) == (0, "")
    assert result.out == (
        f"file: {checkpoint}/policy.yaml\n"
        "summary: Of three texts.\n"
        "kind: cosd-tree\n"
        "params:\n"
        "  tree: tree.json\n"
        "  features: [p_draft, p_assistant, assistant]\n"
        "  max_depth: 3\n"
        "  min_samples_leaf: 5\n"
        "  balance: true\n"
        "  cost_weight: 0.0\n"
        "  made_for: null\n"
        "tree:\n"
        "  # keep P: the base model's token stays. replace P: the assistant's takes its place.\n"
        "  # P is how likely the assistant is right; where several would replace, the greatest P "
        "does.\n"
        "  # p_draft: probability of the base model's most likely token.\n"
        "  if p_draft <= 0.5: replace 0.75  # assistant right: 6 of 8\n"
        "  else: keep 0.0\n"
        "provenance.json:\n"
        "  models:\n"
        "    - name small, identity hub:org/small@abc\n"
        '    - name big, identity ""\n'
        "  train:\n"
        "    source: texts.jsonl\n"
        "    prompts: 20 entries\n"
        "    report:\n"
        "      accuracy: 0.875\n"
    )
    assert run("show", str(checkpoint / "policy.yaml")).out == result.out


def test_the_tree_is_shown_alone_and_its_file_can_be_edited_and_used(run, checkpoint: Path) -> None:
    assert run("show", str(checkpoint), "--tree").out == Tree(TREE).as_text()
    data = json.loads((checkpoint / "tree.json").read_text())
    data["tree"]["above"] = {"replace": True, "probability": 1.0}
    (checkpoint / "tree.json").write_text(json.dumps(data))
    assert "else: replace 1.0" in run("show", str(checkpoint)).out
    tokens = ["a", "b", "c", "."]
    base = TableModel("base", tokens, {"": {"a": 0.9, "b": 0.1}}, ["."])
    other = TableModel("other", tokens, {"": {"b": 0.9, "c": 0.1}}, ["."])
    before = CosdTreePolicy(tree=Tree(TREE))
    writers = [
        Ensemble([base, other]).generate(["a"], chosen, max_new_tokens=1)[0].trace.tokens[0].model
        for chosen in (before, checkpoint)
    ]
    assert writers == ["base", "other"]


def test_json_holds_the_same(run, checkpoint: Path) -> None:
    found = json.loads(run("show", str(checkpoint), "--json").out)
    assert found["kind"] == "cosd-tree"
    assert found["params"]["features"] == ["p_draft", "p_assistant", "assistant"]
    assert found["tree"] == Tree(TREE).as_text()
    assert found["provenance.json"] == PROVENANCE


def test_a_preset_is_shown_by_its_name(run) -> None:
    lines = run("show", "cosd-rule").out.splitlines()
    assert lines[1].startswith("summary: An assistant replaces the base model's token")
    assert lines[2:6] == ["kind: cosd-rule", "params:", "  alpha: 0.5", "  beta: 0.5"]
    assert len(lines) == 7 and lines[6].startswith("source: CoSD")


def test_other_learned_policies_are_shown_by_their_tensors(run, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("kind: co-llm\nparams: {head: head.safetensors}\n")
    tensors = {"weight": torch.zeros(3, 96), "bias": torch.zeros(3)}
    save_file(tensors, tmp_path / "head.safetensors")
    (tmp_path / "provenance.json").write_text('{"loss": [1.5, 0.5], "done": true, "by task": {}}')
    lines = run("show", str(tmp_path)).out.splitlines()
    assert lines[1:] == [
        "kind: co-llm",
        "params:",
        "  head: head.safetensors",
        "tensors:",
        "  head.safetensors:",
        "    bias: [3]",
        "    weight: [3, 96]",
        "provenance.json:",
        "  loss: [1.5, 0.5]",
        "  done: true",
        "  by task: {}",
    ]


def test_of_long_lists_only_the_beginning_is_shown(run, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("kind: single\n")
    curve = [{"threshold": i} for i in range(11)]
    (tmp_path / "provenance.json").write_text(json.dumps({"curve": curve}))
    lines = run("show", str(tmp_path)).out.splitlines()
    assert lines[3:] == [
        "  curve:",
        *(f"    - threshold {i}" for i in range(8)),
        "    ... 3 more",
    ]


def test_control_characters_do_not_reach_the_terminal(run, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text('kind: single\nsummary: "\\e[2Jgone"\n')
    assert "summary: \\x1b[2Jgone" in run("show", str(tmp_path)).out


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("nowhere", 2, "nowhere: no such file; expected a policy file, or the folder of a check"),
        (".", 2, "policy.yaml: no such file; expected a policy file, or the folder of a check"),
        ("cosd-rle.yaml", 2, "cosd-rle.yaml: no such file"),
    ],
)
def test_what_is_not_there_is_named(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("show", source)
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"Error: {said}")


def test_only_a_tree_can_be_shown_as_one(run) -> None:
    for name in ("cosd-rule", "cosd-tree"):  # the preset of the second has not learned anything
        result = run("show", name, "--tree")
        assert result.code == 1
        assert result.err == f"Error: {name}: there is no decision tree in it; leave --tree.\n"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("provenance.json", "provenance.json is damaged ("),
        ("head.safetensors", "head.safetensors cannot be read ("),
        ("tree.json", "tree.json is no JSON ("),
    ],
)
def test_a_damaged_file_is_named(run, checkpoint: Path, file: str, said: str) -> None:
    (checkpoint / file).write_bytes(b"{")
    result = run("show", str(checkpoint))
    assert (result.code, result.out) == (1, "")
    assert said in result.err


def test_a_missing_tree_is_named(run, checkpoint: Path) -> None:
    (checkpoint / "tree.json").unlink()
    result = run("show", str(checkpoint))
    assert result.code == 1
    assert "tree.json is missing; keep a checkpoint's files together" in result.err


def test_nothing_heavy_is_imported_to_show_a_checkpoint(checkpoint: Path) -> None:
    save_file({"weight": torch.zeros(3, 96)}, checkpoint / "head.safetensors")
    program = (
        "import sys\nfrom multicolm.cli import main\n"
        f"assert main(['show', {str(checkpoint)!r}]) == 0\n"
        "print([m for m in ('torch', 'sklearn', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "weight: [3, 96]" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"

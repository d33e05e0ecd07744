"""A checkpoint is the same policy on every disk, says where it is from, and goes to the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from score_worlds import contents

from multicolm.artefacts import Weights
from multicolm.errors import ArtefactError, ConfigError
from multicolm.plugins import policies
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.policy.mlp_router import MlpRouterPolicy
from multicolm.policy.threshold import ConfidencePolicy
from multicolm.training.card import card
from multicolm.training.checkpoint import Checkpoint
from multicolm.training.provenance import read_provenance

PROVENANCE = {
    "multicolm": "0.1.0",
    "models": [
        {"name": "base", "identity": "hub:org/base@" + "0" * 40},
        {"name": "left", "identity": "weights:0123"},
    ],
    "license": "apache-2.0",
    "train": {
        "source": "data|x.jsonl",
        "digest": "d" * 64,
        "options": {"epochs": 3},
        "report": {"loss_nats": 0.25, "history": [1, 2], "share": {"base": 0.5, "left": 0.5}},
        "prompts": ["0" * 16] * 3,
    },
}


def trained() -> CoLlmPolicy:
    g = torch.Generator().manual_seed(0)
    head = Weights({"0.weight": torch.randn(1, 8, generator=g), "0.bias": torch.zeros(1)})
    return CoLlmPolicy(head=head, decode="threshold", made_for={"base": "x", "left": "y"})


@pytest.mark.parametrize(
    "policy",
    [
        trained(),
        MlpRouterPolicy(
            network=trained().head, features=("topk", "hidden"), top_k=4, ways="binary"
        ),
        ConfidencePolicy(threshold=0.25),
    ],
    ids=lambda policy: policy.name,
)
def test_saving_what_was_read_gives_the_same_bytes(tmp_path, policy) -> None:
    Checkpoint(policy, PROVENANCE, "A summary: with a colon, ü.").save_pretrained(tmp_path / "a")
    for a, b in (("a", "b"), ("b", "c")):
        Checkpoint.from_pretrained(tmp_path / a).save_pretrained(tmp_path / b)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    again = Checkpoint.from_pretrained(str(tmp_path / "a"))
    assert again.provenance == PROVENANCE and again.summary == "A summary: with a colon, ü."
    assert type(again.policy) is type(policy)
    for name, value in policy.as_config()["params"].items():
        if not isinstance(value, Weights):
            assert getattr(again.policy, name) == value
    assert set(contents(tmp_path / "a")) - {"head.safetensors", "network.safetensors"} == {
        "README.md",
        "config.json",
        "policy.yaml",
        "provenance.json",
    }


def test_a_checkpoint_can_be_moved(tmp_path, monkeypatch) -> None:
    Checkpoint(trained()).save_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    policy = Checkpoint.from_pretrained("b").policy
    assert isinstance(policy, CoLlmPolicy) and policy.head is not None
    assert torch.equal(policy.head["0.weight"], trained().head["0.weight"])
    assert "tmp" not in (tmp_path / "b/policy.yaml").read_text()


def test_saving_over_another_checkpoint_replaces_it(tmp_path) -> None:
    Checkpoint(ConfidencePolicy(threshold=0.1)).save_pretrained(tmp_path)
    Checkpoint(ConfidencePolicy(threshold=0.2)).save_pretrained(tmp_path)
    assert Checkpoint.from_pretrained(tmp_path).policy == ConfidencePolicy(threshold=0.2)


def test_a_checkpoint_that_could_not_be_written_whole_is_none(tmp_path, monkeypatch) -> None:
    import os

    whole = tmp_path / "whole"
    Checkpoint(trained(), PROVENANCE).save_pretrained(whole)
    n_files = len(contents(whole))
    real, calls = os.replace, 0

    for stop in range(1, n_files + 1):
        calls = 0

        def full(*args, stop=stop):
            nonlocal calls
            calls += 1
            if calls == stop:
                raise OSError(28, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OSError, match="No space"):
                Checkpoint(trained(), PROVENANCE).save_pretrained(tmp_path / str(stop))
        assert len(contents(tmp_path / str(stop))) == stop - 1
        with pytest.raises(ConfigError):
            Checkpoint.from_pretrained(tmp_path / str(stop))
        Checkpoint(trained(), PROVENANCE).save_pretrained(tmp_path / str(stop))
        assert contents(tmp_path / str(stop)) == contents(whole)


def test_the_hub_is_sent_these_files_and_asked_for_nothing_else(tmp_path, monkeypatch) -> None:
    import huggingface_hub.hub_mixin as mixin

    sent: dict = {}

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, repo_type, **rest):
            sent.update(repo=repo_id, kind=repo_type, token=self.token)
            sent["files"] = contents(Path(folder_path))
            return "https://hub/commit"

    monkeypatch.setattr(mixin, "HfApi", Api)
    checkpoint = Checkpoint(trained(), PROVENANCE, "s")
    assert checkpoint.push_to_hub("org/router", token="hf_x") == "https://hub/commit"
    checkpoint.save_pretrained(tmp_path)
    assert sent == {
        "repo": "org/router",
        "kind": "model",
        "token": "hf_x",
        "files": contents(tmp_path),
    }
    assert json.loads(sent["files"]["config.json"]) == {"kind": "co-llm", "library": "multicolm"}


def test_a_checkpoint_of_the_hub_is_fetched_without_anything_that_could_run(
    tmp_path, monkeypatch
) -> None:
    import multicolm.transfer as module

    Checkpoint(trained(), PROVENANCE).save_pretrained(tmp_path)
    asked: dict = {}

    def fetch(repo, **settings):
        asked.update(settings, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(module, "snapshot_download", fetch)
    found = Checkpoint.from_pretrained("org/router", revision="abc")
    assert found.policy.name == "co-llm"
    assert asked["repo"] == "org/router" and asked["revision"] == "abc"
    assert not [p for p in asked["allow_patterns"] if p.endswith((".py", ".bin", ".pt", "*"))]


# --- card ----------------------------------------------------------------------------------------


def test_the_card_begins_with_front_matter_that_the_hub_can_read(tmp_path) -> None:
    from huggingface_hub import ModelCard

    Checkpoint(trained(), PROVENANCE, "s").save_pretrained(tmp_path)
    read = ModelCard((tmp_path / "README.md").read_text())
    assert read.data.library_name == "multicolm" and read.data.license == "apache-2.0"
    assert read.data.base_model == ["org/base"]
    assert read.data.tags == ["multicolm", "token-level-routing"]


def test_the_card_tells_what_the_policy_is_made_for_and_what_was_measured() -> None:
    text = card({"kind": "co-llm", "summary": "s", "params": {"threshold": 0.5}}, PROVENANCE)
    for piece in ("| 0 | base | hub:org/base@", "| 1 | left | weights:0123 |", "`epochs` | 3"):
        assert piece in text
    assert "`loss_nats` | 0.25" in text and "`share` | base 0.5, left 0.5" in text
    assert "history" not in text and "`prompts seen` | 3" in text
    assert "data\\|x.jsonl" in text, "a table's bar in a name does not break the table"
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (3, 4)


def test_a_card_of_what_is_not_known_says_so() -> None:
    text = card({"kind": "confidence", "params": {}}, {})
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "unknown" and "base_model" not in front
    assert "not stated" in text and "## Training" not in text and "## Made for" not in text


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "\udcff"])
def test_damaged_provenance_is_one_sentence(tmp_path, content) -> None:
    path = tmp_path / "provenance.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ArtefactError, match=r"provenance\.json is damaged \(") as caught:
        read_provenance(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_provenance_has_none(tmp_path) -> None:
    assert read_provenance(tmp_path) == {}


def test_missing_weights_are_told_when_they_are_first_asked_for(tmp_path) -> None:
    Checkpoint(trained()).save_pretrained(tmp_path)
    (tmp_path / "head.safetensors").unlink()
    policy = Checkpoint.from_pretrained(tmp_path).policy
    with pytest.raises(ArtefactError, match=r"head\.safetensors is missing; keep a checkpoint's"):
        policy.head["0.weight"]


def test_a_checkpoint_of_a_kind_that_is_not_there_is_told_with_those_that_are(tmp_path) -> None:
    Checkpoint(trained()).save_pretrained(tmp_path)
    path = tmp_path / "policy.yaml"
    path.write_text(path.read_text().replace("co-llm", "co-lm"))
    with pytest.raises(ConfigError, match="Did you mean 'co-llm'"):
        Checkpoint.from_pretrained(tmp_path)
    assert "co-llm" in policies

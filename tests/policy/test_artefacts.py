"""Learned things as params: files that are read late, whole or refused, and equal in bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from multicolm.artefacts import Weights
from multicolm.config import PolicyConfig, load_policy
from multicolm.config.policy import with_paths
from multicolm.errors import ArtefactError, ConfigError
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.policy.resolve import resolve_policy


def weights(seed: int = 0) -> Weights:
    g = torch.Generator().manual_seed(seed)
    return Weights({"b": torch.randn(2, generator=g), "a": torch.randn(2, 3, generator=g)})


def test_what_is_saved_is_what_is_read(tmp_path) -> None:
    saved = weights().save(tmp_path / "w.safetensors")
    read = Weights(tmp_path / "w.safetensors")
    assert read == saved and hash(read) == hash(saved)
    for each in (saved, read):
        assert torch.equal(each["a"], weights()["a"]) and "b" in each and "c" not in each


def test_equal_contents_give_equal_bytes_in_any_order_and_form(tmp_path) -> None:
    a = torch.arange(6.0).reshape(2, 3)
    shared = torch.arange(12.0)
    forms = {
        "plain": {"a": a, "b": shared[:6]},
        "turned": {"b": shared[:6], "a": a},
        "strided": {"a": a.T.contiguous().T, "b": shared[:6].clone()},
        "learning": {"a": a.clone().requires_grad_(), "b": shared[:6]},
    }
    assert not forms["strided"]["a"].is_contiguous()
    for name, content in forms.items():
        Weights(content).save(tmp_path / name)
    assert len({(tmp_path / name).read_bytes() for name in forms}) == 1


def test_tensors_that_share_memory_are_saved_each_by_itself(tmp_path) -> None:
    one = torch.arange(4.0)
    saved = Weights({"a": one, "b": one, "c": one[:2]}).save(tmp_path / "w.safetensors")
    again = Weights(saved.path)
    assert [again[name].tolist() for name in "abc"] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1]]


def test_a_file_is_read_when_it_is_first_asked_for_and_not_before(tmp_path) -> None:
    late = Weights(tmp_path / "w.safetensors")
    assert repr(late) == f"Weights('{tmp_path / 'w.safetensors'}')"
    with pytest.raises(ArtefactError, match=r"w\.safetensors is missing; keep a checkpoint's"):
        late["a"]
    weights().save(tmp_path / "w.safetensors")
    assert torch.equal(late["a"], weights()["a"])


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\xff" * 8 + b"{}", b"{}"])
def test_a_damaged_file_is_one_sentence(tmp_path, content) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"w\.safetensors cannot be read .*; is it whole\?"):
        Weights(path)["a"]


def test_a_file_that_is_cut_off_is_one_sentence(tmp_path) -> None:
    path = weights().save(tmp_path / "w.safetensors").path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="is it whole"):
        Weights(path)["a"]


def test_a_pickle_under_the_name_of_weights_is_not_run(tmp_path) -> None:
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "w.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ArtefactError, match="cannot be read"):
        Weights(tmp_path / "w.safetensors")["a"]
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(ArtefactError, match="these weights: no tensor 'c'; has a, b"):
        weights()["c"]


def test_artefacts_without_a_file_are_equal_only_to_themselves() -> None:
    one = weights()
    assert one == one and one != weights() and len({one, weights()}) == 2
    assert Weights("a") != Weights("b") and Weights("a") == Weights(Path("a"))


def test_a_policys_path_starts_from_the_folder_of_its_file(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "ckpt"
    weights().save(folder / "w.safetensors")
    (folder / "policy.yaml").write_text("kind: co-llm\nparams: {head: w.safetensors}\n")
    monkeypatch.chdir(tmp_path)
    for source in (folder, "./ckpt", "./ckpt/policy.yaml"):
        policy = resolve_policy(source)
        assert isinstance(policy, CoLlmPolicy) and policy.head is not None
        assert policy.head.path == folder / "w.safetensors"
        assert torch.equal(policy.head["a"], weights()["a"])
    assert load_policy("./ckpt", tmp_path).params == {"head": str(folder / "w.safetensors")}
    absolute = with_paths(PolicyConfig(kind="co-llm", params={"head": "/x/w"}), tmp_path)
    assert absolute.params == {"head": "/x/w"}
    kept = with_paths(PolicyConfig(kind="co-llm", params={"decode": "sample"}), tmp_path)
    assert kept.params == {"decode": "sample"}, "what is no path stays as it is"


@pytest.mark.parametrize("value", [3, "", ["a"], {"a": 1}, True])
def test_what_is_no_path_is_refused(value) -> None:
    with pytest.raises(ConfigError, match=r"head: must be the path of a \.safetensors file"):
        resolve_policy({"kind": "co-llm", "params": {"head": value}})

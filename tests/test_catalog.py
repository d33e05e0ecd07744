from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from multicolm import catalog
from multicolm.config import (
    load_ensemble,
    load_model_file,
    load_policy,
    load_policy_file,
    validate,
)
from multicolm.errors import ConfigError, UnknownNameError
from multicolm.evaluation.answering import named_policy
from multicolm.plugins import policies

ROOT = Path(__file__).resolve().parents[1]
KINDS: list[catalog.Kind] = ["policies", "models", "ensembles", "chat_templates"]


def test_the_checkout_is_the_catalogue() -> None:
    assert catalog.root() == ROOT
    assert catalog.registry() == ROOT / "registry"


def test_an_installed_package_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "multicolm"
    for folder in ("_catalog/policies", "_catalog/registry", "../policies", "../registry"):
        (package / folder).mkdir(parents=True)
    monkeypatch.setattr(catalog, "__file__", str(package / "catalog.py"))
    assert catalog.root() == package / "_catalog"


def test_an_installation_without_a_catalogue_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "__file__", str(tmp_path / "multicolm" / "catalog.py"))
    with pytest.raises(ConfigError) as caught:
        catalog.root()
    assert str(caught.value) == (
        f"the catalogue (policies/ and registry/) is neither in {tmp_path}/multicolm nor beside "
        "it; install multicolm again."
    )


def test_an_unknown_name_is_told_the_nearest_one() -> None:
    with pytest.raises(UnknownNameError, match="unknown model 'tiny-fact'"):
        catalog.path("models", "tiny-fact")
    with pytest.raises(UnknownNameError, match="unknown policy"):
        catalog.read("policies", "../registry/models/tiny-math")


@pytest.mark.parametrize("name", catalog.names("trained"))
def test_a_trained_policy_is_named_with_its_folder_wherever_a_policy_is(name: str) -> None:
    folder = ROOT / "registry" / name
    assert load_policy(name, Path("/elsewhere")) == load_policy(folder, ROOT)
    named = named_policy(name)
    assert (named.name, named.folder) == (name, folder)
    assert validate(name).kind == "policy"
    assert load_policy_file(name).summary.endswith(".")


@pytest.mark.parametrize("kind", KINDS)
def test_no_catalogue_is_empty_and_every_name_is_a_file(kind: catalog.Kind) -> None:
    assert catalog.names(kind)
    for name in catalog.names(kind):
        assert catalog.path(kind, name).stem == name
        assert catalog.read(kind, name)


@pytest.mark.parametrize("name", catalog.names("policies"))
def test_every_preset_has_a_kind_that_exists_a_summary_and_a_source(name: str) -> None:
    preset = load_policy_file(name)
    assert preset.kind in policies
    assert preset.summary.endswith(".") and "\n" not in preset.summary
    assert preset.source


def test_every_kind_of_policy_has_a_preset_of_its_name() -> None:
    kinds = {load_policy_file(name).kind for name in catalog.names("policies")}
    built_in = {
        kind
        for kind, address in policies._addresses.items()
        if address.startswith("multicolm.policy.")
    }
    assert kinds == built_in


@pytest.mark.parametrize("name", catalog.names("policies"))
def test_a_preset_spells_every_param_out(name: str) -> None:
    preset = load_policy_file(name)
    cls = policies.get(preset.kind)
    # What training fills stands in checkpoints.
    learns = hasattr(cls, "made_for")
    learned = {"head", "network", "router", "tree", "made_for"} if learns else set()
    assert set(preset.params) == {field.name for field in dataclasses.fields(cls)} - learned


@pytest.mark.parametrize("name", catalog.names("models"))
def test_what_is_said_of_an_embedded_model_is_true(name: str) -> None:
    from safetensors import safe_open

    facts = load_model_file(name)
    if facts.path is None:
        pytest.skip("not embedded")
    folder = catalog.registry() / facts.path
    settings = json.loads((folder / "config.json").read_text())
    assert facts.context_length == settings["max_position_embeddings"]
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert facts.tokenizer == f"sha256:{digest}"
    with safe_open(folder / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118
    assert facts.parameters == sum(tensor.numel() for tensor in tensors)
    assert {str(tensor.dtype) for tensor in tensors} == {f"torch.{facts.weights_dtype}"}


@pytest.mark.parametrize("name", catalog.names("ensembles"))
def test_every_ensemble_reads_and_computes_in_single_precision(name: str) -> None:
    config = load_ensemble(name)
    assert config.summary.endswith(".")
    assert {model.dtype for model in config.models.values()} == {"float32"}
    assert config.warnings == []


def test_facts_about_the_world_say_nothing_of_this_machine() -> None:
    for kind in KINDS:
        for name in catalog.names(kind):
            text = catalog.read(kind, name)
            for word in ("device", "cuda", "port:", "http", "/home", "/tmp"):
                assert word not in text, (name, word)


@pytest.mark.slow
def test_a_wheel_ships_the_catalogue_and_finds_it(tmp_path: Path) -> None:
    wheel = _built("wheel", ROOT, tmp_path / "dist")
    names = zipfile.ZipFile(wheel).namelist()
    assert "multicolm/_catalog/policies/single.yaml" in names
    assert "multicolm/_catalog/registry/tiny/facts/model.safetensors" in names
    assert "multicolm/_catalog/registry/tiny/co-llm/head.safetensors" in names
    assert _listing(wheel, tmp_path) == _here()


@pytest.mark.slow
def test_an_sdist_ships_the_catalogue_and_builds_the_same_wheel(tmp_path: Path) -> None:
    import tarfile

    archive = _built("sdist", ROOT, tmp_path / "dist")
    with tarfile.open(archive) as packed:
        # Python knows filters from 3.10.12, 3.11.4 and 3.12 on.
        safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        packed.extractall(tmp_path / "source", **safely)
    [source] = (tmp_path / "source").iterdir()
    assert _listing(_built("wheel", source, tmp_path / "dist"), tmp_path) == _here()


def _built(target: str, source: Path, out: Path) -> Path:
    before = set(out.glob("*"))
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [made] = set(out.glob("*")) - before
    return made


def _here() -> str:
    return "\n".join(f"{kind} {catalog.names(kind)}" for kind in KINDS) + "\n"


def _listing(wheel: Path, tmp_path: Path) -> str:
    """What a fresh installation of the wheel finds, far from the checkout."""
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True)
    code = (
        "from multicolm import catalog\n"
        f"assert str(catalog.root()).startswith({str(target)!r}), catalog.root()\n"
        f"for kind in {KINDS!r}: print(kind, catalog.names(kind))\n"
        "from multicolm.config import load_ensemble\n"
        f"assert load_ensemble('tiny').models['facts'].location.startswith({str(target)!r})\n"
    )
    # The target first, so that a checkout on the path does not answer in its place.
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout

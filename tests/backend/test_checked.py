"""Predictions that are no numbers are an error that names the model, whoever wanted them."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_worlds import ask, running
from tables import random_table

import multicolm
from multicolm import Ensemble
from multicolm.backend.checked import open_session, refuse_no_numbers
from multicolm.backend.sessions import RowSession
from multicolm.backend.table import TableModel
from multicolm.backend.transformers import TransformersModel
from multicolm.cli import main
from multicolm.errors import ModelError
from multicolm.scoring.likelihood import LikelihoodReader

TINY = Path(__file__).parents[2] / "registry" / "tiny"
SAID = "model 'b' (computing in float32) predicts logits that are no numbers (NaN); its weights"
QUESTION = "What does Zosos treat?"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble whose assistant has one weight that is NaN."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(TINY / "facts", folder / "nan")
    weights = load_file(folder / "nan" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, folder / "nan" / "model.safetensors", {"format": "pt"})
    (folder / "e.yaml").write_text(
        "base_model: a\nmodels:\n  a: {model: tiny-generalist, dtype: float32}\n"
        "  b: {model: ./nan, dtype: float32}\npolicy: max-confidence\n"
    )
    return folder / "e.yaml"


@pytest.fixture(scope="module")
def broken(file: Path) -> Ensemble:
    """Its models found to be servable before the weight broke."""
    ensemble = multicolm.load(file)
    model = ensemble.backends[1]
    assert isinstance(model, TransformersModel)
    model._open, model.served_as = partial(RowSession, model), "rows"
    return ensemble


@pytest.mark.parametrize(
    "policy",
    [
        {"kind": "single", "params": {"model": "b"}},
        *("random", "max-confidence", "cosd-rule", "speculative", "bild"),
        *("average", "gac", "unite", "pack-llm", "cool-fusion", "byte-mixture", "chared"),
        {"kind": "contrastive", "params": {"expert": "b", "amateur": "a"}},
    ],
    ids=lambda policy: policy if isinstance(policy, str) else policy["kind"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_policy_writes_by_nan(broken: Ensemble, policy: Any, temperature: float) -> None:
    with pytest.raises(ModelError) as caught:
        broken.generate([QUESTION] * 2, policy, temperature=temperature, max_new_tokens=16, seed=1)
    assert str(caught.value).startswith(SAID)


def test_a_model_of_nan_is_refused_as_it_is_probed_and_not_served_the_slow_way(
    file: Path,
) -> None:
    model = multicolm.load(file).backends[1]
    with pytest.raises(ModelError) as caught:
        model.open(1)
    assert str(caught.value).startswith(SAID)


def test_likelihoods_of_nan_are_an_error(broken: Ensemble) -> None:
    reader = LikelihoodReader(broken, broken.resolve("average"))
    passage = reader.passage(QUESTION, " fever.")
    with pytest.raises(ModelError) as caught:
        list(reader.likelihoods([passage], "joint"))
    assert str(caught.value).startswith(SAID)


@pytest.mark.parametrize(
    "command",
    [
        ["score", "E", "DATA", "--out", "OUT"],
        ["compare", "E", "--policies", "max-confidence", "--task", "tiny-world", "--limit", "2",
            "--out", "OUT"],
        ["generate", "E", QUESTION],
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_every_verb_says_so_in_one_sentence(
    file: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "What does Zosos", "completion": " treat?"}')
    words = {"E": str(file), "OUT": str(tmp_path / "out"), "DATA": str(tmp_path / "data.jsonl")}
    assert main([words.get(word, word) for word in command]) == 1
    assert f"Error: {SAID}" in capsys.readouterr().err


def test_a_server_says_so_and_goes_on(broken: Ensemble) -> None:
    with running(broken, "duo") as server:
        body = {"model": "duo", "prompt": QUESTION, "max_tokens": 8}
        reply = ask(server, "/v1/completions", body)
        assert reply.status == 500
        assert reply.json["error"]["message"].startswith(SAID)
        alone = {**body, "model": "duo:single"}
        assert ask(server, "/v1/completions", alone).status == 200


# --- one prediction ------------------------------------------------------------------------------


def model_with(row: list[float], **facts: Any) -> TableModel:
    """A model of three tokens and a padded head that predicts this."""
    model = random_table("m", 0, ["a", "b", "."])
    inner = model.open(2)

    def feed(*args: Any, **kwargs: Any) -> Any:
        return type(inner.feed([0], [[0]], [1]))(torch.tensor([row]))

    session = type("Session", (type(inner),), {"feed": feed})
    for name, value in {"open": lambda _: object.__new__(session), **facts}.items():
        setattr(model, name, value)
    return model


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([0.0, NAN, 1.0], "no numbers (NaN)"),
        ([NAN, -INF, INF], "no numbers (NaN)"),
        ([0.0, INF, 1.0], "infinite"),
        ([-INF, -INF, -INF], "all minus infinity"),
    ],
)
def test_what_is_no_distribution_is_refused(row: list[float], said: str) -> None:
    session = open_session(model_with(row), 1)
    with pytest.raises(ModelError, match=rf"^model 'm' .* predicts logits that are {said[:5]}"):
        session.feed([0], [[0]], [1])


@pytest.mark.parametrize("row", [[0.0, -INF, 1.0], [0.0, 1.0, 2.0, NAN], [-1e30, -INF, -INF]])
def test_what_is_a_distribution_is_shown_as_it_is(row: list[float]) -> None:
    output = open_session(model_with(row), 1).feed([0], [[0]], [1])
    assert torch.equal(output.logits[:, :3], torch.tensor([row[:3]]))


def test_of_a_server_that_tells_of_some_tokens_infinity_has_a_meaning() -> None:
    for row in ([INF, -INF, -INF], [-INF, -INF, -INF], [-0.1, -INF, -INF]):
        refuse_no_numbers(
            model_with(row, max_top_logprobs=1, server="http://x"), torch.tensor([row])
        )
    with pytest.raises(ModelError, match=r"model 'm' \(server http://x\) predicts"):
        refuse_no_numbers(
            model_with([], max_top_logprobs=1, server="http://x"), torch.tensor([[NAN, 0, 0]])
        )


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        ("float16", "set `dtype: bfloat16` or `dtype: float32`"),
        ("bfloat16", "its weights are damaged or do not fit its config"),
        ("Q4_K_M, cache f16", "convert it anew, or to another type"),
    ],
)
def test_the_advice_fits_the_type(precision: str, advice: str) -> None:
    model = model_with([], precision=precision)
    with pytest.raises(ModelError) as caught:
        refuse_no_numbers(model, torch.tensor([[NAN]]))
    assert f"computing in {precision}" in str(caught.value) and advice in str(caught.value)


def test_float16_that_overflows_names_the_type(tmp_path: Path) -> None:
    shutil.copytree(TINY / "facts", tmp_path / "large")
    weights = load_file(tmp_path / "large" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e4
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e4
    save_file(weights, tmp_path / "large" / "model.safetensors", {"format": "pt"})
    for dtype in ("float32", "float16"):
        (tmp_path / "e.yaml").write_text(
            f"base_model: b\nmodels:\n  b: {{model: ./large, dtype: {dtype}}}\n"
        )
        ensemble = multicolm.load(tmp_path / "e.yaml")
        if dtype == "float32":
            assert ensemble.generate([QUESTION], max_new_tokens=2)
            continue
        with pytest.raises(ModelError, match=r"computing in float16.*set `dtype: bfloat16`"):
            ensemble.generate([QUESTION], max_new_tokens=2)

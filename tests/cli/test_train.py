"""``multicolm train``, and its checkpoint wherever a policy may stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from score_worlds import contents, write

from multicolm import catalog
from multicolm.cli import main
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.training.report import report_lines

SHORT = ("--option", "epochs=3", "--option", "weak_epochs=1")


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    """Forty questions, scored by the embedded models."""
    import multicolm

    folder = tmp_path_factory.mktemp("scores")
    questions = Path(str(catalog.path("models", "tiny-facts"))).parent.parent / "tiny/questions"
    lines = (questions / "train.jsonl").read_text(encoding="utf-8").splitlines()
    data = write(folder / "train.jsonl", [json.loads(line) for line in lines[::30]])
    score(
        multicolm.load("tiny"),
        open_corpus(data),
        folder / "table",
        features=["hidden", "topk", "embedding"],
        top_k=10,
    )
    return folder / "table"


@pytest.fixture(scope="module")
def checkpoint(scores) -> Path:
    out = scores.parent / "ckpt"
    assert (
        main(["train", "tiny", str(scores), "--policy", "co-llm", "--out", str(out), *SHORT]) == 0
    )
    return out


def test_the_help_tells_every_option(run) -> None:
    result = run("train", "--help")
    assert result.code == 0
    for piece in ("--out", "--policy", "--set", "--option", "--license", "--json", "seeds=[0,1,2]"):
        assert piece in " ".join(result.out.split()), piece


def test_a_policy_is_trained_and_told_how_to_use(run, scores, tmp_path) -> None:
    out = tmp_path / "ckpt"
    arguments = ("train", "tiny", str(scores), "--policy", "co-llm", "--out", str(out), *SHORT)
    result = run(*arguments, "--license", "mit")
    assert result.code == 0, result.err
    assert "measured on texts that were held out" in result.out and "nll nats" in result.out
    assert result.out.strip().endswith(f"{out}: a co-llm policy; use it with --policy {out}")
    before = contents(out)
    again = run(*arguments)
    assert again.code == 0 and contents(out) == before
    assert again.out == result.out, "the same numbers, without training"


def test_a_folder_in_the_working_directory_is_shown_as_a_path(
    run, scores, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", "tiny", str(scores), "--policy", "co-llm", "--out", "ckpt", *SHORT)
    assert result.code == 0, result.err
    assert result.out.strip().endswith("use it with --policy ./ckpt")


def test_json_is_the_report(run, scores, checkpoint) -> None:
    arguments = ("train", "tiny", str(scores), "--policy", "co-llm", "--out", str(checkpoint))
    result = run(*arguments, *SHORT, "--json")
    assert result.code == 0, result.err
    said = json.loads(result.out)
    assert said["out"] == str(checkpoint) and said["kind"] == "co-llm"
    assert said["nll_nats"] < said["nll_nats_uniform"]
    assert [epoch["stage"] for epoch in said["history"]].count("weak labels") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--option", "seeds=[0,1]", *SHORT),
        ("--option", "network=mlp", "--option", "width=8", *SHORT),
        (
            "--option",
            "cost_weight=0.1",
            "--set",
            "decode=threshold",
            "--set",
            "threshold=0.3",
            *SHORT,
        ),
    ],
)
def test_options_and_params_are_read_as_yaml(run, scores, tmp_path, arguments) -> None:
    out = tmp_path / "ckpt"
    result = run("train", "tiny", str(scores), "--policy", "co-llm", "--out", str(out), *arguments)
    assert result.code == 0, result.err
    options = json.loads((out / "provenance.json").read_text())["train"]["options"]
    assert options["epochs"] == 3 and len(options) == 2 + (len(arguments) - 4) // 2 - (
        2 if "--set" in arguments else 0
    )


def test_a_network_router_is_trained_on_all_features(run, scores, tmp_path, loaded) -> None:
    out = tmp_path / "ckpt"
    params = (
        "--set",
        "features=[hidden,topk,embedding]",
        "--set",
        "top_k=10",
        "--set",
        "ways=binary",
    )
    options = ("--option", "epochs=2", "--option", "width=16")
    result = run(
        "train", "tiny", str(scores), "--policy", "mlp-router", "--out", str(out), *params, *options
    )
    assert result.code == 0, result.err
    written = run("generate", "tiny", "What is Dulerex made from?", "--policy", str(out), "--trace")
    assert written.code == 0, written.err


def test_the_checkpoint_writes_wherever_a_policy_may_stand(
    run, checkpoint, tmp_path, monkeypatch, loaded
) -> None:
    asked = "Question: What is Dulerex made from?\nResponse:"
    monkeypatch.chdir(checkpoint.parent)
    texts = set()
    for policy in (str(checkpoint), "./ckpt", "./ckpt/policy.yaml"):
        result = run("generate", "tiny", asked, "--policy", policy, "--seed", "0")
        assert result.code == 0, result.err
        texts.add(result.out)
    assert len(texts) == 1
    other = run("generate", "tiny", asked, "--policy", "./ckpt", "--set", "decode=mixture")
    assert other.code == 0, other.err


def test_an_ensemble_file_names_a_checkpoint_beside_it(run, checkpoint, monkeypatch) -> None:
    tiny = yaml.safe_load(catalog.read("ensembles", "tiny"))
    file = checkpoint.parent / "routed.yaml"
    file.write_text(yaml.safe_dump({**tiny, "policy": "./ckpt"}))
    monkeypatch.chdir("/")
    result = run("validate", str(file), str(checkpoint / "policy.yaml"))
    assert result.code == 0, result.err
    written = run("generate", str(file), "What is Dulerex made from?", "--max-new-tokens", "8")
    assert written.code == 0, written.err


def test_a_checkpoint_for_other_models_is_one_sentence(run, checkpoint, tmp_path) -> None:
    tiny = yaml.safe_load(catalog.read("ensembles", "tiny"))
    turned = {name: tiny["models"][name] for name in ("generalist", "math", "facts")}
    file = tmp_path / "turned.yaml"
    file.write_text(
        yaml.safe_dump({**tiny, "models": turned, "policy": str(checkpoint)}, sort_keys=False)
    )
    result = run("generate", str(file), "What is Dulerex made from?")
    assert result.code == 1 and result.err.count("\n") == 1
    assert "was made for generalist (weights:" in result.err and "ensemble is" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--out", "{out}"], 2, "which policy? Give one that learns with --policy"),
        (["--policy", "co-llm"], 2, "Missing option '--out'"),
        (["--policy", "co-lm", "--out", "{out}"], 2, "Did you mean 'co-llm'?"),
        (["--policy", "confidence", "--out", "{out}"], 1, "has nothing to learn"),
        (["--policy", "co-llm", "--out", "{out}", "--option", "epocs=3"], 2, "'epochs'?"),
        (["--policy", "co-llm", "--out", "{out}", "--option", "epochs"], 2, "name=value"),
        (["--policy", "co-llm", "--out", "{out}", "--option", "lr=-1"], 2, "must be more than 0"),
        (["--policy", "co-llm", "--out", "{out}", "--set", "decod=x"], 2, "Did you mean 'decode'?"),
        (["--policy", "mlp-router", "--set", "features=[topk]", "--out", "{out}"], 1, "set top_k"),
        (
            ["--policy", "co-llm", "--out", "{ckpt}", "--option", "epochs=4"],
            1,
            "another checkpoint",
        ),
    ],
)
def test_wrong_arguments_are_told_without_a_traceback(
    run, scores, checkpoint, tmp_path, arguments, code, said
) -> None:
    words = {"out": str(tmp_path / "out"), "ckpt": str(checkpoint)}
    result = run("train", "tiny", str(scores), *(a.format(**words) for a in arguments))
    assert result.code == code and said in result.err
    assert "Traceback" not in result.err and result.out == ""


def test_a_pair_that_is_none_is_told_with_the_option_it_was_given_to(run, scores, tmp_path) -> None:
    arguments = ("train", "tiny", str(scores), "--policy", "co-llm", "--out", str(tmp_path / "o"))
    assert "--option epochs: write it as name=value" in run(*arguments, "--option", "epochs").err
    assert "--set decode: write it as name=value" in run(*arguments, "--set", "decode").err


def test_a_folder_that_is_no_score_table_is_told_how_to_make_one(run, tmp_path) -> None:
    result = run("train", "tiny", str(tmp_path), "--policy", "co-llm", "--out", str(tmp_path / "o"))
    assert result.code == 1 and "is no score table" in result.err
    assert "`multicolm score ENSEMBLE DATA --out DIR`" in result.err


def test_a_dry_run_of_train_says_what_there_is_to_learn_from(run, scores, tmp_path) -> None:
    out = tmp_path / "ckpt"
    result = run("train", "tiny", str(scores), "--policy", "co-llm", "--out", str(out), "--dry-run")
    assert (result.code, result.out) == (0, "") and not out.exists()
    assert "completions, scored by generalist, facts, math (" in result.err
    assert result.err.endswith(" MiB); no model is loaded.\n")


def test_right_tokens_stand_beside_the_base_model_and_what_is_possible() -> None:
    report = {"loss_nats": 0.0952, "nll_nats": 0.09521, "right_tokens": 0.95}
    report |= {"right_tokens_base": 0.845, "right_tokens_oracle": 0.953}
    assert report_lines(report) == [
        ("loss nats", "0.0952"),
        ("nll nats", "0.09521"),
        ("right tokens", "95.0 % (base alone 84.5 %, best possible 95.3 %)"),
    ]
    assert report_lines({"loss_nats": 0.0952, "nll_nats": 0.0952}) == [("nll nats", "0.0952")]

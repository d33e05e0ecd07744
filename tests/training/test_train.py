"""Training from scores alone: any policy with a `fit`, stopped anywhere, never done twice."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from score_worlds import contents, inodes, records, tables, write
from tables import TOKENS

import multicolm
from multicolm import Ensemble
from multicolm.artefacts import Weights
from multicolm.errors import ArtefactError, CapabilityError, ConfigError, InputError, TrainingError
from multicolm.files import locked
from multicolm.learning.training import Training
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.policy.mlp_router import MlpRouterPolicy
from multicolm.policy.threshold import ConfidencePolicy
from multicolm.score_table import ScoreTable
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.training.checkpoint import Checkpoint
from multicolm.training.provenance import check_identities, read_provenance
from multicolm.training.report import report_lines
from multicolm.training.train import train
from multicolm.types import prompt_digest

NAMES = ("base", "left", "right")
SHORT = {"epochs": 4, "weak_epochs": 2, "held_out": 0.2}
STEPS = {**SHORT, "batch_size": 64, "lr": 0.01, "l2": 0.0}
SLOWER = {**STEPS, "network": "mlp", "width": 16, "dropout": 0.2, "seeds": [0, 1]}
IDENTITIES = {"base": "table:0", "left": "table:1", "right": "table:2"}


def world() -> Ensemble:
    return tables(*NAMES, hidden=True)


@pytest.fixture(scope="module")
def scores(tmp_path_factory) -> Path:
    """A table of 60 examples; do not change it."""
    folder = tmp_path_factory.mktemp("scores")
    path = write(folder / "data.jsonl", records(60))
    score(world(), open_corpus(path), folder / "table", features=["hidden", "topk"], top_k=7)
    return folder / "table"


# --- a checkpoint --------------------------------------------------------------------------------


def test_a_trained_checkpoint_says_what_it_is_from(tmp_path, scores) -> None:
    out = tmp_path / "ckpt"
    options = {**SHORT, "held_out": 0.0}  # what is learned shows on the texts themselves
    made = train(CoLlmPolicy(), scores, out, models=IDENTITIES, options=options, license="mit")
    assert set(contents(out)) == {
        "README.md",
        "config.json",
        "head.safetensors",
        "policy.yaml",
        "provenance.json",
    }
    kept = read_provenance(out)
    assert kept == json.loads(json.dumps(made.provenance))
    path = scores.parent / "data.jsonl"
    assert kept["train"]["digest"] == open_corpus(path).digest()
    assert kept["train"]["prompts"] == [prompt_digest(line["prompt"]) for line in records(60)]
    assert kept["models"] == [{"name": n, "identity": i} for n, i in IDENTITIES.items()]
    assert kept["license"] == "mit" and kept["multicolm"] == multicolm.__version__
    assert kept["train"]["options"] == options and kept["train"]["examples"] == 60
    assert kept["train"]["report"]["nll_nats"] < kept["train"]["report"]["nll_nats_uniform"]
    config = yaml.safe_load((out / "policy.yaml").read_text())
    assert config["kind"] == "co-llm" and config["params"]["head"] == "head.safetensors"
    assert config["params"]["made_for"] == IDENTITIES
    assert "data.jsonl" in config["summary"] and str(tmp_path) not in config["summary"]
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front["license"] == "mit" and front["library_name"] == "multicolm"


def test_what_train_returns_is_what_is_read_from_the_folder(tmp_path, scores) -> None:
    made = train(CoLlmPolicy(decode="sample"), scores, tmp_path / "ckpt", options=SHORT)
    read = Checkpoint.from_pretrained(tmp_path / "ckpt")
    assert made.policy == read.policy and made.policy.head.path.parent == tmp_path / "ckpt"
    assert read.policy.decode == "sample"
    settings: dict[str, Any] = {"max_new_tokens": 8, "seed": 0}
    texts = [world().generate(["a", "b c"], p, **settings) for p in (made.policy, read.policy)]
    assert [a.text for a in texts[0]] == [a.text for a in texts[1]]
    made.save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "ckpt")


def test_no_model_is_loaded(tmp_path, scores, monkeypatch) -> None:
    from multicolm.backend.table import TableModel
    from multicolm.backend.transformers import TransformersModel

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    for cls in (TableModel, TransformersModel):
        monkeypatch.setattr(cls, "from_config", refuse)
        monkeypatch.setattr(cls, "__init__", refuse)
    made = train(CoLlmPolicy(), scores, tmp_path / "ckpt", options=SHORT)
    assert made.policy.head is not None


def test_a_part_of_the_scored_models_may_be_trained_for(tmp_path, scores) -> None:
    pair = {"base": "table:0", "right": "table:2"}
    made = train(CoLlmPolicy(), scores, tmp_path / "ckpt", models=pair, options=SHORT)
    assert made.policy.made_for == pair and made.policy.head["0.bias"].shape == (1,)
    ensemble = tables("base", "right", seeds=(0, 2), hidden=True)
    assert ensemble.generate(["a"], made.policy, max_new_tokens=3)
    with pytest.raises(CapabilityError, match="was made for base"):
        tables("base", "left", hidden=True).generate(["a"], made.policy)


# --- never done twice, never mixed ---------------------------------------------------------------


def test_a_finished_training_is_not_repeated(tmp_path, scores, monkeypatch) -> None:
    out = tmp_path / "ckpt"
    train(CoLlmPolicy(), scores, out, options=SHORT)
    before, kept = inodes(out), contents(out)
    monkeypatch.setattr(CoLlmPolicy, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = train(CoLlmPolicy(), scores, out, options=SHORT)
    assert inodes(out) == before and contents(out) == kept
    assert again.policy.head["0.weight"].shape == (2, len(TOKENS) + 1)


@pytest.mark.parametrize(
    ("policy", "options", "models"),
    [
        (CoLlmPolicy(), {**SHORT, "lr": 0.02}, None),
        (CoLlmPolicy(decode="sample"), SHORT, None),
        (MlpRouterPolicy(), {"epochs": 2}, None),
        (CoLlmPolicy(), SHORT, {"base": "table:0", "left": "table:1"}),
    ],
)
def test_another_checkpoint_in_the_folder_is_refused_and_kept(
    tmp_path, scores, policy, options, models
) -> None:
    out = tmp_path / "ckpt"
    train(CoLlmPolicy(), scores, out, options=SHORT)
    kept = contents(out)
    with pytest.raises(ArtefactError, match=r"holds another checkpoint .* choose another"):
        train(policy, scores, out, options=options, models=models)
    assert contents(out) == kept


def test_a_checkpoint_from_other_scores_is_another_one(tmp_path, scores) -> None:
    other = write(tmp_path / "other.jsonl", records(20, seed=5))
    score(world(), open_corpus(other), tmp_path / "table", features=["hidden"])
    train(CoLlmPolicy(), scores, tmp_path / "ckpt", options=SHORT)
    with pytest.raises(ArtefactError, match="holds another checkpoint"):
        train(CoLlmPolicy(), tmp_path / "table", tmp_path / "ckpt", options=SHORT)


def test_an_unfinished_training_of_another_kind_is_not_taken_up(tmp_path) -> None:
    """Features of equal width used to go on from the weights of each other."""
    path = write(tmp_path / "d.jsonl", records(40))
    width = len(TOKENS) + 1
    score(world(), open_corpus(path), tmp_path / "t", features=["hidden", "topk"], top_k=width)
    options = {"network": "linear", "epochs": 4, "batch_size": 64}
    topk = MlpRouterPolicy(features=("topk",), top_k=width)

    def stop(done: float, total: float, label: str) -> None:
        if done >= 3:
            raise KeyboardInterrupt

    out = tmp_path / "ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(
            MlpRouterPolicy(),
            tmp_path / "t",
            out,
            options=options,
            on_progress=stop,
            save_every=0.0,
        )
    train(topk, tmp_path / "t", out, options=options)
    train(topk, tmp_path / "t", tmp_path / "whole", options=options)
    assert contents(out) == contents(tmp_path / "whole")


def test_two_trainings_in_one_folder_are_kept_apart(tmp_path, scores) -> None:
    with (
        locked(tmp_path / "ckpt"),
        pytest.raises(InputError, match="another process is at work here"),
    ):
        train(CoLlmPolicy(), scores, tmp_path / "ckpt", options=SHORT)


# --- stops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy", [CoLlmPolicy(), MlpRouterPolicy(features=("hidden", "topk"), top_k=7)]
)
def test_a_training_interrupted_at_any_epoch_ends_with_the_same_bytes(
    tmp_path, scores, policy
) -> None:
    options = SLOWER if policy.name == "co-llm" else {"width": 8, "epochs": 5, "batch_size": 64}
    steps = []
    train(
        policy, scores, tmp_path / "whole", options=options, on_progress=lambda *a: steps.append(a)
    )
    whole = contents(tmp_path / "whole")
    for cut in range(1, len(steps) + 1, 2):
        seen = 0

        def stop(done: float, total: float, label: str, cut=cut) -> None:
            nonlocal seen
            seen += 1
            if seen == cut:
                raise KeyboardInterrupt

        out = tmp_path / str(cut)
        with pytest.raises(KeyboardInterrupt):
            train(policy, scores, out, options=options, on_progress=stop, save_every=0.0)
        assert not (out / "policy.yaml").exists()
        train(policy, scores, out, options=options)
        assert contents(out) == whole


def test_a_training_that_was_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path, scores
) -> None:
    started = time.perf_counter()
    train(CoLlmPolicy(), scores, tmp_path / "whole", options=SLOWER, save_every=0.0)
    usual = time.perf_counter() - started
    out, chance, kills = tmp_path / "killed", random.Random(1), 0
    while kills < 20:
        child = os.fork()
        if child == 0:
            try:
                train(CoLlmPolicy(), scores, out, options=SLOWER, save_every=0.0)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0, usual / 3))
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        kills += code != 0
        if code == 0:  # too late: begin another one, so that there are enough kills
            assert contents(out) == contents(tmp_path / "whole")
            shutil.rmtree(out)
    train(CoLlmPolicy(), scores, out, options=SLOWER)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, scores, monkeypatch, call) -> None:
    train(CoLlmPolicy(), scores, tmp_path / "whole", options=STEPS)
    whole, real = contents(tmp_path / "whole"), getattr(os, call)
    for nth in (1, 3, 7, 8, 9, 11, 12):  # 7 states, then 5 files
        calls = 0

        def full(*args, nth=nth):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        out = tmp_path / str(nth)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left"):
                train(CoLlmPolicy(), scores, out, options=STEPS, save_every=0.0)
        assert not (out / "policy.yaml").exists()
        assert not list(out.rglob("*.part"))
        train(CoLlmPolicy(), scores, out, options=STEPS)
        assert contents(out) == whole


# --- policies of one's own -----------------------------------------------------------------------


@pytest.fixture
def own() -> Any:
    """A policy that learns, and knows nothing of how multicolm trains its own."""
    from multicolm.plugins import policies

    @multicolm.register_policy("mean-margin")
    class MeanMargin(multicolm.SelectPolicy):
        """Hands over where the base's likeliest token is less likely than usual."""

        usual: Weights | None = None

        base_signals = frozenset({"top1"})
        assistants = "deferred"

        def defers(self, views: multicolm.Views) -> torch.Tensor:
            return views.base.top1_logprobs < self.usual["mean"]

        def select(self, views: multicolm.Views) -> torch.Tensor:
            return self.defers(views).long()

        def fit(self, table: ScoreTable) -> MeanMargin:
            return MeanMargin(usual=Weights({"mean": table.top1_logprobs[:, 0].mean()}))

    yield MeanMargin
    del policies._classes["mean-margin"]


def test_a_policy_with_nothing_but_fit_trains_saves_loads_and_writes(tmp_path, scores, own) -> None:
    made = train(own(), scores, tmp_path / "ckpt")
    assert (tmp_path / "ckpt/usual.safetensors").is_file()
    read = Checkpoint.from_pretrained(tmp_path / "ckpt").policy
    texts = [world().generate(["a", "b"], p, max_new_tokens=9, seed=0) for p in (made.policy, read)]
    assert [a.text for a in texts[0]] == [a.text for a in texts[1]]
    assert {t.model for a in texts[0] for t in a.trace} == {"base", "left"}
    with pytest.raises(ConfigError, match=r"takes no training options.*got epochs"):
        train(own(), scores, tmp_path / "other", options={"epochs": 3})
    assert not (tmp_path / "other/policy.yaml").exists()


def test_a_policy_that_learns_nothing_is_refused_by_name(tmp_path, scores) -> None:
    with pytest.raises(CapabilityError, match=r"'confidence' has nothing to learn.*tune"):
        train(ConfidencePolicy(), scores, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


# --- refusals ------------------------------------------------------------------------------------


def test_unknown_options_are_told_the_nearest_one(tmp_path, scores) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'epocs'\. Did you mean 'epochs'"):
        train(CoLlmPolicy(), scores, tmp_path / "ckpt", options={"epocs": 3})


def test_a_table_without_hidden_states_says_how_to_get_them(tmp_path) -> None:
    path = write(tmp_path / "d.jsonl", records(5))
    score(tables(*NAMES), open_corpus(path), tmp_path / "table")
    with pytest.raises(
        ArtefactError, match=r"holds no 'hidden'.*`multicolm score` once more with --hidden"
    ):
        train(CoLlmPolicy(), tmp_path / "table", tmp_path / "ckpt")


def test_models_that_were_not_scored_and_another_order_are_refused(tmp_path, scores) -> None:
    with pytest.raises(ArtefactError, match=r"holds scores of base, left, right .* base, other"):
        train(CoLlmPolicy(), scores, tmp_path / "c", models={"base": "", "other": ""})
    with pytest.raises(ArtefactError, match=r"holds scores of base, left, right .* left, base"):
        train(CoLlmPolicy(), scores, tmp_path / "c", models={"left": "", "base": ""})


def test_other_weights_than_those_scored_are_refused_with_both(tmp_path, scores) -> None:
    models = {**IDENTITIES, "left": "table:9"}
    with pytest.raises(ArtefactError, match=r"another model 'left' \(table:1\).*\(table:9\)"):
        train(CoLlmPolicy(), scores, tmp_path / "ckpt", models=models)


COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    ("ours", "scored", "same"),
    [
        ("", "weights:1", True),
        ("weights:1", "", True),
        ("weights:1", "weights:1", True),
        ("weights:1", "weights:2", False),
        (f"hub:o/m@{COMMIT}", f"hub:o/m@{COMMIT}", True),
        (f"hub:o/m@{COMMIT}", f"hub:o/m@{OTHER}", False),
        ("hub:o/m@main", f"hub:o/m@{OTHER}", True),
        ("hub:o/m@main", f"hub:o/n@{OTHER}", False),
        ("hub:o/m@main", "weights:1", False),
        ("hub:o/m@main+adapter:1", f"hub:o/m@{OTHER}+adapter:1", True),
        ("hub:o/m@main+adapter:1", f"hub:o/m@{OTHER}+adapter:2", False),
        ("hub:o/m@main", f"hub:o/m@{OTHER}+adapter:2", False),
    ],
)
def test_identities_are_compared_as_far_as_they_are_known(ours, scored, same) -> None:
    if same:
        check_identities({"m": ours}, {"m": scored}, "scores")
    else:
        with pytest.raises(ArtefactError, match="scores holds scores of another model 'm'"):
            check_identities({"m": ours}, {"m": scored}, "scores")


@pytest.mark.parametrize("part", ["text", "left"])
def test_a_damaged_table_is_refused_before_anything_is_learned(tmp_path, scores, part) -> None:
    shutil.copytree(scores, tmp_path / "table")
    path = tmp_path / "table" / part / "00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match=f"{part}/00000.safetensors has changed since"):
        train(CoLlmPolicy(), tmp_path / "table", tmp_path / "ckpt", options=SHORT)
    assert not (tmp_path / "ckpt/policy.yaml").exists()


def test_a_divergence_leaves_no_checkpoint(tmp_path, scores) -> None:
    with pytest.raises(TrainingError, match="training diverges: lower lr"):
        train(CoLlmPolicy(), scores, tmp_path / "ckpt", options={**SHORT, "lr": 1e6})
    assert not (tmp_path / "ckpt/policy.yaml").exists()


def test_the_report_is_shown_as_pairs_without_the_history() -> None:
    report = {"loss_nats": 0.123456, "share": {"a": 0.5, "b": 0.25}, "history": [{"x": 1}], "n": 3}
    report["note"] = "6 held-out tokens."  # said beside the table
    assert report_lines(report) == [
        ("loss nats", "0.1235"),
        ("share", "a 0.5, b 0.25"),
        ("n", "3"),
    ]


def test_training_reports_progress_up_to_its_total(tmp_path, scores) -> None:
    seen: list[tuple[float, float, str]] = []
    train(
        CoLlmPolicy(), scores, tmp_path / "c", options=SLOWER, on_progress=lambda *a: seen.append(a)
    )
    done = [step[0] for step in seen]
    assert done == sorted(done) and seen[-1][0] == seen[-1][1] == 2 * 6
    assert "weak labels" in seen[0][2] and "seed 1" in seen[-1][2]


def test_fit_by_hand_equals_train(tmp_path, scores) -> None:
    from multicolm.scoring.store import load_table

    by_hand = CoLlmPolicy().fit(load_table(scores), Training(SHORT))
    made = train(CoLlmPolicy(), scores, tmp_path / "ckpt", options=SHORT)
    assert torch.equal(by_hand.head["0.weight"], made.policy.head["0.weight"])


# --- the embedded world --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wanted"), [("tiny", 0.95), ("tiny-mixed", 0.93), ("tiny-mixed-exact", 0.93)]
)
def test_the_embedded_experts_answer_together_what_none_of_them_can(
    name: str, wanted: float, tmp_path
) -> None:
    """Trained on the questions for training, judged on medicines that no question there names."""
    from multicolm import catalog
    from multicolm.tiny.world import is_right

    questions = Path(str(catalog.path("models", "tiny-facts"))).parent.parent / "tiny/questions"
    ensemble = multicolm.load(name)
    # Exact paths take longer to follow.
    n_read, n_asked = (240, 75) if "exact" in name else (600, 300)
    some = (questions / "train.jsonl").read_text("utf-8").splitlines()[:: 1200 // n_read]
    corpus = open_corpus(write(tmp_path / "train.jsonl", map(json.loads, some)))
    score(ensemble, corpus, tmp_path / "scores", features=["hidden"], shard_positions=8192)
    made = train(CoLlmPolicy(), tmp_path / "scores", tmp_path / "ckpt")
    lines = (questions / "test.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line) for line in lines[:: 600 // n_asked]]
    answers = ensemble.generate(
        [q["prompt"] for q in asked], made.policy, batch_size=64, max_new_tokens=64, seed=0
    )
    right = [is_right(a.text, q["answer"]) for a, q in zip(answers, asked, strict=True)]
    assert sum(right) / len(right) >= wanted
    report = made.provenance["train"]["report"]
    assert report["nll_nats"] < min(report["nll_nats_alone"].values())
    seen = set(made.provenance["train"]["prompts"])
    assert len(right) == n_asked and len(seen) >= 0.8 * n_read
    assert not seen & {prompt_digest(q["prompt"]) for q in asked}

"""The base model is trained with the head: the loss, the weights that move, what is left."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import forked
import pytest
import tiny_models as tiny
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import PreTrainedModel

import multicolm
from multicolm.artefacts import Weights
from multicolm.cli import main
from multicolm.config import EnsembleConfig, load_ensemble
from multicolm.ensemble import Ensemble
from multicolm.errors import (
    ArtefactError,
    CapabilityError,
    ConfigError,
    MulticolmError,
    TrainingError,
)
from multicolm.learning.losses import marginal_loss
from multicolm.learning.networks import build, fold, from_tensors, router_scores, standardisation
from multicolm.learning.positions import scores_in_memory
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.policy.fixed import SinglePolicy
from multicolm.policy.resolve import resolve_policy
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import Rollouts, TableFiles, load_table, read_index
from multicolm.training.checkpoint import Checkpoint
from multicolm.training.joint.data import batches, lessons
from multicolm.training.joint.job import JointSettings, make_job
from multicolm.training.joint.loop import Schedule
from multicolm.training.joint.model import Head, JointModel, LoraSettings, add_lora, joint_loss
from multicolm.training.joint.train import train_joint
from multicolm.training.provenance import read_provenance

FAST = {"epochs": 2, "batch_size": 6, "batch_tokens": 200, "lr": 1e-3, "held_out": 0.25}
NAMES = ("ann", "bob", "cid")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class Home:
    """An ensemble of three random models in a folder, and the scores of a small corpus."""

    folder: Path
    ensemble: Path
    corpus: Path
    scores: Path

    @property
    def config(self) -> EnsembleConfig:
        return load_ensemble(self.ensemble)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(NAMES):
        network = tiny.fresh_network(tiny.CONFIGS["llama"](), seed)
        tiny.save(folder / name, network, tiny.shared_tokenizer())
    models = {
        "ann": {"model": "./ann"},
        "bob": {"model": "./bob"},
        "cid": {"model": str(folder / "cid")},
    }
    ensemble = folder / "ensemble.yaml"
    ensemble.write_text(yaml.safe_dump({"base_model": "ann", "models": models}))
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records()))
    scores = folder / "scores"
    loaded = multicolm.load(load_ensemble(ensemble))
    score(loaded, open_corpus(corpus), scores, features=["hidden"], shard_positions=100)
    return Home(folder, ensemble, corpus, scores)


def records() -> list[dict[str, str]]:
    """Texts that are much alike, of several lengths."""
    ends = ["and the fox", "the end", "in the house there", "", "again and again the same old song"]
    return [
        {"prompt": f"text {i} is", "completion": f" the one {ends[i % len(ends)]}."}
        for i in range(20)
    ]


def trained(home: Home, out: Path, how: Any = "lora", policy: Any = "co-llm", **more: Any) -> Any:
    options = {**FAST, **more.pop("options", {})}
    return train_joint(
        resolve_policy(policy),
        home.scores,
        out,
        config=home.config,
        how=how,
        options=options,
        **more,
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def report_of(checkpoint: Checkpoint) -> dict[str, Any]:
    report: dict[str, Any] = checkpoint.provenance["train"]["report"]
    return report


# The loss


def network_of(kind: str) -> Any:
    """A network whose output layer is padded, and that ends texts with a full stop too."""
    config = tiny.CONFIGS[kind]()
    config.vocab_size += 7
    tokenizer = tiny.shared_tokenizer()
    network = tiny.fresh_network(config, 3)
    (full_stop,) = tokenizer(".")["input_ids"]
    network.generation_config.eos_token_id = [tokenizer.eos_token_id, full_stop]
    return network


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mamba2"])
@pytest.mark.parametrize("end_of_text", [True, False])
def test_the_loss_at_the_start_is_the_marginal_loss_of_the_table(
    kind: str, end_of_text: bool, home: Home, tmp_path: Path
) -> None:
    network = network_of(kind)
    base = tiny.TransformersModel("base", network, tiny.shared_tokenizer())
    models = [base, tiny.model("llama", "one", 1), tiny.model("llama", "two", 2)]
    corpus = open_corpus(home.corpus)
    score(Ensemble(models), corpus, tmp_path, features=["hidden"], end_of_text=end_of_text)
    table = load_table(tmp_path)
    data = lessons(tmp_path, table, max_length=2048, held_out=0.0)
    hidden = table.feature("hidden")
    raw = build("mlp", hidden.shape[1], 2, width=8, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(raw[-1].weight, generator=torch.Generator().manual_seed(2))
    tensors = {name: tensor.detach() for name, tensor in raw.state_dict().items()}
    mean, scale = standardisation(hidden)
    model = JointModel(
        network,
        Head(tensors, mean, scale),
        n_tokens=base.tokenizer.n_tokens,
        ends=sorted(base.tokenizer.end_ids),
        ends_count=end_of_text,
    ).eval()

    scores = router_scores(from_tensors(tensors), hidden)
    wanted = marginal_loss(scores, table.gold_logprobs, table.known)
    got = torch.full_like(wanted, math.nan)
    alone = torch.full_like(wanted, math.nan)
    for texts in (data.learnt[:7], data.learnt[7:]):
        rows = torch.cat([t.rows for t in sorted(texts, key=lambda text: len(text.tokens))])
        losses, logprobs = [], []
        for batch in batches(table, texts, 64):
            with torch.no_grad():
                of_base, of_head = model(
                    batch.input_ids, batch.attention_mask, batch.lines, batch.columns, batch.gold
                )
            losses.append(joint_loss(of_base, of_head, batch))
            logprobs.append(of_base)
        got[rows], alone[rows] = torch.cat(losses), torch.cat(logprobs)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, table.gold_logprobs[:, 0], atol=1e-5, rtol=1e-5)


def test_an_assistant_that_does_not_know_a_position_is_left_out_of_its_loss(home: Home) -> None:
    table = load_table(home.scores)
    known = table.known.clone()
    known[:, 1] = False
    (batch,) = batches(
        replace(table, known=known),
        lessons(home.scores, table, max_length=2048, held_out=0.0).learnt,
        10_000,
    )
    scores = torch.randn(len(batch.gold), 3, generator=torch.Generator().manual_seed(0))
    base = batch.logprobs[:, 0]
    got = joint_loss(base, scores, batch)
    two = scores[:, [0, 2]].log_softmax(-1)
    wanted = -(two + torch.stack([base, batch.logprobs[:, 2]], -1)).logsumexp(-1)
    torch.testing.assert_close(got, wanted)


def test_what_the_base_model_cannot_write_has_no_gradient_that_is_no_number() -> None:
    network = tiny.fresh_network(tiny.CONFIGS["llama"](), 0)
    model = JointModel(network, None, n_tokens=257, ends=[], ends_count=True)
    ids = torch.tensor([[1, 2, 3]])
    lines, columns = torch.zeros(2, dtype=torch.long), torch.tensor([1, 2])
    logprobs, _ = model(ids, torch.ones_like(ids), lines, columns, torch.tensor([4, 300]))
    assert logprobs[1] == -math.inf
    torch.stack([logprobs[0], torch.logaddexp(logprobs[1], torch.tensor(-1.0))]).sum().backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    assert grads and all(bool(grad.isfinite().all()) for grad in grads)


def test_texts_are_cut_behind_the_longest_length(home: Home) -> None:
    table = load_table(home.scores)
    whole = lessons(home.scores, table, max_length=2048, held_out=0.0).learnt
    cut = lessons(home.scores, table, max_length=20, held_out=0.0).learnt
    assert sum(len(text.rows) for text in whole) == len(table)
    assert max(len(text.tokens) for text in whole) > 20
    assert max(len(text.tokens) for text in cut) == 20
    by_example = {text.example: text for text in whole}
    for text in cut:
        n = len(text.rows)
        assert text.rows.equal(by_example[text.example].rows[:n])
        assert text.tokens.equal(by_example[text.example].tokens[: len(text.tokens)])
    with pytest.raises(TrainingError, match=r"within max_length \(3 tokens\)"):
        lessons(home.scores, table, max_length=3, held_out=0.0)


def test_no_text_is_both_learnt_and_held_out(home: Home) -> None:
    data = lessons(home.scores, load_table(home.scores), max_length=2048, held_out=0.25)
    learnt, held = ({text.example for text in part} for part in (data.learnt, data.held_out))
    assert len(held) == 5 and len(learnt) == 15 and not learnt & held


# What is trained


def gradients(model: JointModel, home: Home) -> set[str]:
    """The names of the weights that one step moves."""
    table = load_table(home.scores)
    data = lessons(home.scores, table, max_length=2048, held_out=0.0)
    for batch in batches(table, data.learnt, 10_000):
        logprobs, scores = model(
            batch.input_ids, batch.attention_mask, batch.lines, batch.columns, batch.gold
        )
        joint_loss(logprobs, scores, batch).mean().backward()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.any())
    }


@pytest.mark.parametrize("how", ["lora", "full"])
def test_gradients_reach_the_head_and_what_is_trained_of_the_base_model(
    how: str, home: Home
) -> None:
    network = tiny.fresh_network(tiny.CONFIGS["llama"](), 0)
    if how == "lora":
        add_lora(network, LoraSettings(4, 8, 0.0, "all-linear", 0))
    blank = build("linear", 32, 2, generator=torch.Generator().manual_seed(0))
    head = Head(fold(blank, torch.zeros(32), torch.ones(32)), torch.zeros(32), torch.ones(32))
    end = tiny.shared_tokenizer().eos_token_id
    model = JointModel(network, head, n_tokens=end + 1, ends=[end], ends_count=True)
    moved = gradients(model, home)
    assert {"head.network.0.weight", "head.network.0.bias"} <= moved
    of_base = {name for name in moved if name.startswith("base.")}
    names = {name for name, _ in model.named_parameters() if name.startswith("base.")}
    if how == "lora":
        # The second factor is zero at first, so that the first one has no gradient yet.
        assert of_base == {name for name in names if "lora_B" in name}
    else:
        assert of_base == names


def test_a_lora_adapter_leaves_the_weights_below_it_as_they_are(home: Home, tmp_path: Path) -> None:
    trained(home, tmp_path / "out")
    config = load_ensemble(tmp_path / "out")
    assert config.models["ann"].location == str((home.folder / "ann").resolve())
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name)
    assert "lm_head" not in " ".join(adapter)
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    # Equal bytes on every run and every machine: no order of a set, no folder.
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert settings["base_model_name_or_path"] is None


def test_assistants_are_never_loaded(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multicolm.backend import loading

    loaded: list[str] = []
    load = loading.load_model
    monkeypatch.setattr(
        loading, "load_model", lambda name, config: loaded.append(name) or load(name, config)
    )
    trained(home, tmp_path / "out")
    assert loaded == ["ann"]


def test_a_head_that_is_trained_already_is_the_one_to_begin_with(
    home: Home, tmp_path: Path
) -> None:
    table = load_table(home.scores)
    blank = build("linear", 32, 2)
    tensors = {name: tensor.detach() for name, tensor in blank.state_dict().items()}
    tensors["0.bias"] = torch.tensor([50.0, -50.0])  # the first assistant writes everything
    identities = dict(zip(table.models, table.identities, strict=True))
    policy = CoLlmPolicy(head=Weights(tensors), made_for=identities)
    report = report_of(trained(home, tmp_path / "out", policy=policy))
    data = lessons(home.scores, table, max_length=2048, held_out=0.25)
    rows = torch.cat([text.rows for text in data.held_out])
    wanted = -float(table.gold_logprobs[rows, 1].mean())
    assert report["nll_nats_before"] == pytest.approx(wanted, rel=1e-5)

    other = CoLlmPolicy(head=Weights(tensors), made_for={**identities, "bob": "weights:0"})
    with pytest.raises(CapabilityError, match="was made for ann"):
        trained(home, tmp_path / "other", policy=other)


def test_labels_from_rollouts_are_refused_unless_they_are_to_be_ignored(
    home: Home, tmp_path: Path
) -> None:
    scores = tmp_path / "scores"
    shutil.copytree(home.scores, scores)
    plain = load_table(scores)
    one = torch.zeros(1, dtype=torch.int32)
    quality = {name: torch.tensor([float(name == "cid")]) for name in NAMES}
    Rollouts(one, one.clone(), quality).write(TableFiles(scores, read_index(scores)))
    assert load_table(scores).judged.sum() == 1
    judged = replace(home, scores=scores)
    with pytest.raises(CapabilityError, match=r"roll-outs.*'ann' as it is.*ignore_rollouts=true"):
        trained(judged, tmp_path / "out")
    settings = JointSettings(ignore_rollouts=True)
    job = make_job(
        CoLlmPolicy(), settings, scores=scores, folder=tmp_path / "out", config=home.config,
        how="lora", options={}, license="", on_progress=lambda *_: None, save_every=5.0,
    )  # fmt: skip
    assert torch.equal(scores_in_memory(job.table()).writer_logprobs, plain.writer_logprobs)
    # The base model alone learns from the corpus in any case.
    make_job(
        SinglePolicy(), JointSettings(), scores=scores, folder=tmp_path / "out",
        config=home.config, how="lora", options={}, license="", on_progress=lambda *_: None,
        save_every=5.0,
    )  # fmt: skip


# What comes out


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("kind", ["co-llm", "single"])
def test_the_checkpoint_is_an_ensemble_whose_base_model_learned_what_the_report_says(
    how: str, kind: str, home: Home, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    checkpoint = trained(home, out, how, kind, options={"lr": 3e-3, "epochs": 4})
    report = report_of(checkpoint)
    assert report["base_nll_nats"] < report["base_nll_nats_before"] - 0.1
    if kind == "co-llm":
        assert report["nll_nats"] < report["nll_nats_before"] - 0.1
        assert report["nll_nats"] < report["base_nll_nats"]

    loaded = multicolm.load(load_ensemble(out))
    assert loaded.models == NAMES
    answer = loaded.generate("text 3 is", max_new_tokens=12)[0]
    assert 0 < len(answer.trace.tokens) <= 12
    assert isinstance(loaded.policy, CoLlmPolicy if kind == "co-llm" else SinglePolicy)

    # The saved weights, read by scoring, give the numbers that training reported.
    score(loaded, open_corpus(home.corpus), tmp_path / "again", features=["hidden"])
    table = load_table(tmp_path / "again")
    data = lessons(home.scores, load_table(home.scores), max_length=2048, held_out=0.25)
    part = table.rows(torch.cat([text.rows for text in data.held_out]))
    assert report["base_nll_nats"] == pytest.approx(
        -float(part.gold_logprobs[:, 0].mean()), rel=1e-4
    )
    if isinstance(loaded.policy, CoLlmPolicy):
        head = from_tensors(load_file(out / "head.safetensors"))
        scores = router_scores(head, part.feature("hidden"))
        nll = float(marginal_loss(scores, part.gold_logprobs, part.known).mean())
        assert report["nll_nats"] == pytest.approx(nll, rel=1e-4)


def test_a_routed_text_of_the_checkpoint_is_written_by_several_models(
    home: Home, tmp_path: Path
) -> None:
    trained(home, tmp_path / "out", "full")
    loaded = multicolm.load(load_ensemble(tmp_path / "out"))
    answers = loaded.generate([f"text {i} is" for i in range(6)], max_new_tokens=20)
    writers = {token.model for answer in answers for token in answer.trace.tokens}
    assert len(writers) > 1
    assert loaded.backends[0].identity != home_identity(home)


def home_identity(home: Home) -> str:
    return load_table(home.scores).identities[0]


def test_the_trained_base_model_has_an_identity_of_its_own_and_the_old_one_is_refused(
    home: Home, tmp_path: Path
) -> None:
    checkpoint = trained(home, tmp_path / "out")
    was = home_identity(home)
    made_for = checkpoint.policy.made_for
    assert made_for["ann"].startswith(f"{was}+adapter:")
    assert checkpoint.provenance["models"][0]["identity"] == made_for["ann"]
    assert checkpoint.provenance["train"]["base_model_was"] == was
    assert checkpoint.provenance["train"]["train_base"] == "lora"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained together (a LoRA adapter) on corpus.jsonl" in card and was in card
    with pytest.raises(CapabilityError, match="was made for ann"):
        multicolm.load(home.config).generate("a", checkpoint.policy)


def test_paths_are_as_the_user_wrote_them_and_work_from_the_new_folder(
    home: Home, tmp_path: Path
) -> None:
    trained(home, tmp_path / "deep" / "out")
    data = yaml.safe_load((tmp_path / "deep" / "out" / "ensemble.yaml").read_text())
    assert data["policy"] == "." and data["base_model"] == "ann"
    assert data["models"]["ann"]["adapter"] == "./adapter"
    assert data["models"]["bob"]["model"].startswith("../")
    assert data["models"]["cid"]["model"] == str((home.folder / "cid").resolve())
    config = load_ensemble(tmp_path / "deep" / "out")
    assert config.models["bob"].location == str((home.folder / "bob").resolve())


@pytest.mark.parametrize("how", ["lora", "full"])
def test_saved_in_another_folder_it_is_the_same_ensemble(
    how: str, home: Home, tmp_path: Path
) -> None:
    trained(home, tmp_path / "out", how)
    Checkpoint.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "far" / "away")
    there, here = (load_ensemble(tmp_path / place) for place in ("far/away", "out"))
    assert there.models["ann"].location != here.models["ann"].location or how == "lora"
    assert there.models["bob"].location == here.models["bob"].location
    prompts = [f"text {i} is" for i in range(4)]
    texts = [
        [[t.id for t in answer.trace] for answer in multicolm.load(config).generate(prompts)]
        for config in (there, here)
    ]
    assert texts[0] == texts[1]
    shutil.rmtree(tmp_path / "out")
    assert multicolm.load(load_ensemble(tmp_path / "far" / "away")).generate("text 1 is")
    card = (tmp_path / "far" / "away" / "README.md").read_text()
    assert "The folder is an ensemble" in card and "--policy" not in card


def test_a_checkpoint_that_is_finished_is_not_made_again(home: Home, tmp_path: Path) -> None:
    trained(home, tmp_path / "out")
    before = contents(tmp_path / "out")
    steps: list[str] = []
    again = trained(home, tmp_path / "out", on_progress=lambda d, t, label: steps.append(label))
    assert not steps and contents(tmp_path / "out") == before
    assert again.policy.head["0.weight"].shape == (2, 32)
    with pytest.raises(ArtefactError, match="holds another checkpoint"):
        trained(home, tmp_path / "out", options={"seed": 1})


def test_nothing_of_the_training_itself_is_left(home: Home, tmp_path: Path) -> None:
    trained(home, tmp_path / "out", "full")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names - {".lock"} == {
        "README.md", "base", "config.json", "ensemble.yaml", "head.safetensors", "policy.yaml",
        "provenance.json",
    }  # fmt: skip


# Stopping and going on


class Stop(BaseException):
    """As if the process were killed."""


@pytest.mark.parametrize(("how", "stop_at"), [("lora", 1), ("lora", 4), ("full", 2), ("full", 5)])
def test_a_training_that_was_stopped_ends_with_the_same_bytes(
    how: str, stop_at: int, home: Home, tmp_path: Path
) -> None:
    options = {"epochs": 3, **({"lora_dropout": 0.2} if how == "lora" else {})}
    trained(home, tmp_path / "whole", how, options=options)

    def stopping(done: float, total: float, label: str) -> None:
        if label.startswith("epoch ") and done > stop_at:
            raise Stop

    with pytest.raises(Stop):
        trained(home, tmp_path / "out", how, options=options, on_progress=stopping, save_every=0.0)
    assert not (tmp_path / "out" / "policy.yaml").exists()
    torch.manual_seed(stop_at)  # another process has drawn other numbers before
    seen: list[float] = []

    def seeing(done: float, total: float, label: str) -> None:
        if label.startswith("epoch "):
            seen.append(done)

    trained(home, tmp_path / "out", how, options=options, on_progress=seeing)
    assert seen[0] == stop_at + 1  # what was done before is not done again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_equal_seeds_give_equal_bytes_and_others_do_not(home: Home, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        trained(home, tmp_path / name, options={"seed": seed})
    weights = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("one", "two", "three")
    ]
    assert weights[0] == weights[1] != weights[2]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_size_of_a_pass_does_not_matter(home: Home, tmp_path: Path) -> None:
    reports = [
        report_of(trained(home, tmp_path / str(budget), "full", options={"batch_tokens": budget}))
        for budget in (40, 4096)
    ]
    assert reports[0]["nll_nats"] == pytest.approx(reports[1]["nll_nats"], abs=1e-4)


def test_gradient_checkpointing_gives_the_same_weights(home: Home, tmp_path: Path) -> None:
    for name, on in (("off", False), ("on", True)):
        trained(home, tmp_path / name, "full", options={"gradient_checkpointing": on})
    one, other = (load_file(tmp_path / n / "base" / "model.safetensors") for n in ("off", "on"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-6, rtol=1e-4)


def test_bfloat16_trains_and_keeps_weights_in_the_type_of_the_ensemble(
    home: Home, tmp_path: Path
) -> None:
    checkpoint = trained(home, tmp_path / "out", "full", options={"mixed_precision": "bf16"})
    report = report_of(checkpoint)
    assert report["nll_nats"] < report["nll_nats_before"]
    weights = load_file(tmp_path / "out" / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("how", ["lora", "full"])
def test_a_model_in_half_precision_stays_one_and_learns(
    how: str, home: Home, tmp_path: Path
) -> None:
    ensemble = tmp_path / "ensemble.yaml"
    models = {name: {"model": str(home.folder / name)} for name in NAMES}
    models["ann"]["dtype"] = "bfloat16"
    ensemble.write_text(yaml.safe_dump({"base_model": "ann", "models": models}))
    scores = tmp_path / "scores"
    config = load_ensemble(ensemble)
    score(multicolm.load(config), open_corpus(home.corpus), scores, features=["hidden"])
    checkpoint = trained(Home(tmp_path, ensemble, home.corpus, scores), tmp_path / "out", how)
    report = report_of(checkpoint)
    assert report["base_nll_nats"] < report["base_nll_nats_before"]
    loaded = multicolm.load(load_ensemble(tmp_path / "out"))
    assert loaded.backends[0].precision == "bfloat16"
    if how == "full":
        weights = load_file(tmp_path / "out" / "base" / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    score(loaded, open_corpus(home.corpus), tmp_path / "again", features=["hidden"])
    data = lessons(scores, load_table(scores), max_length=2048, held_out=0.25)
    part = load_table(tmp_path / "again").rows(torch.cat([text.rows for text in data.held_out]))
    alone = -float(part.gold_logprobs[:, 0].mean())
    assert report["base_nll_nats"] == pytest.approx(alone, rel=1e-2)


def test_a_model_with_settings_that_transformers_does_not_save_is_saved(
    home: Home, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(home.folder / "ann", folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": False, "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    ensemble = tmp_path / "ensemble.yaml"
    ensemble.write_text(
        yaml.safe_dump({"base_model": "ann", "models": {"ann": {"model": "./model"}}})
    )
    moved = Home(tmp_path, ensemble, home.corpus, home.scores)
    trained(moved, tmp_path / "out", "full", "single")
    assert multicolm.load(load_ensemble(tmp_path / "out")).generate("a", max_new_tokens=2)


def test_a_full_disk_costs_no_more_than_the_same_command(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(home, tmp_path / "whole", "full")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(TrainingError, match=r"No space left on device\. Nothing is lost"):
            trained(home, tmp_path / "out", "full")
    steps: list[str] = []
    trained(home, tmp_path / "out", "full", on_progress=lambda d, t, label: steps.append(label))
    assert not any(label.startswith("epoch ") for label in steps)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_patience_stops_and_the_best_epoch_is_kept(home: Home, tmp_path: Path) -> None:
    options = {"epochs": 12, "lr": 0.03, "head_lr": 0.3, "patience": 1}
    report = report_of(trained(home, tmp_path / "out", "full", options=options))
    held_out = [epoch["held_out"]["joint"] for epoch in report["history"]]
    assert len(held_out) < 12
    assert report["epochs"] == held_out.index(min(held_out)) + 1
    best = report["history"][report["epochs"] - 1]["held_out"]
    assert report["epochs"] < len(held_out)
    assert report["nll_nats"] == pytest.approx(best["joint"], rel=1e-6)
    assert report["base_nll_nats"] == pytest.approx(best["base"], rel=1e-6)


def test_learning_rates_rise_and_fall_in_a_line() -> None:
    schedule = Schedule(1.0, 1.0, 1, 1, 1, 0.2, 0.0, 1.0, 0, 0, 0.0)
    got = [schedule.factor(step, 10) for step in range(10)]
    assert got == [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert Schedule(1.0, 1.0, 1, 1, 1, 0.0, 0.0, 1.0, 0, 0, 0.0).factor(0, 4) == 1.0


# The command line, and several processes


def test_the_command_trains_the_base_model_and_the_result_generates(
    home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pairs = [f"--option={name}={value}" for name, value in FAST.items()]
    command = ["train", str(home.ensemble), str(home.scores), "--policy", "co-llm", *pairs]
    assert main([*command, "--train-base", "lora", "--out", str(out)]) == 0
    printed = capfd.readouterr().out
    assert "an ensemble" in printed and "base nll nats before" in printed
    assert main(["generate", str(out), "text 3 is", "--max-new-tokens", "5"]) == 0
    assert capfd.readouterr().out.strip()


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(home, tmp_path / "one", "full")
    pairs = [f"--option={name}={value}" for name, value in FAST.items()]
    command = ["train", str(home.ensemble), str(home.scores), "--policy", "co-llm", *pairs]
    command += ["--train-base", "full", "--out", str(tmp_path / "two")]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    done, second = forked.job(2, command, Path.cwd())
    assert (done.returncode, second.returncode) == (0, 0), done.stderr + second.stderr
    assert "an ensemble: multicolm generate" in done.stdout and not second.stdout
    assert read_provenance(tmp_path / "two")["train"]["processes"] == 2
    one, two = (load_file(tmp_path / n / "base" / "model.safetensors") for n in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=2e-4, rtol=1e-3)


# What is refused


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"policy": "entropy"}, CapabilityError, "allowed are co-llm, and single"),
        (
            {"policy": {"kind": "single", "params": {"model": "bob"}}},
            CapabilityError,
            "has model 'bob' write",
        ),
        ({"options": {"lora_rnak": 3}}, ConfigError, "Did you mean 'lora_rank'"),
        ({"options": {"lr": 0}}, ConfigError, "lr: must be more than 0"),
        ({"options": {"lora_targets": ["nope"]}}, ConfigError, "are called down_proj, gate_proj"),
        ({"how": "full", "options": {"lr": 1e9, "clip": 1e9}}, TrainingError, "training diverges"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(
    changes: dict[str, Any],
    error: type[MulticolmError],
    words: str,
    home: Home,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=words):
        trained(home, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "policy.yaml").exists()


def test_a_missing_library_is_named_with_the_command_that_installs_it(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'multicolm\[peft\]'"):
        trained(home, tmp_path / "out")


def test_a_base_model_with_an_adapter_is_refused(home: Home, tmp_path: Path) -> None:
    trained(home, tmp_path / "out")
    with pytest.raises(CapabilityError, match="has an adapter already"):
        train_joint(
            resolve_policy("single"), home.scores, tmp_path / "more",
            config=load_ensemble(tmp_path / "out"), how="lora",
        )  # fmt: skip


def test_scores_of_another_base_model_are_refused(home: Home, tmp_path: Path) -> None:
    other = tmp_path / "ensemble.yaml"
    models = {
        "ann": {"model": str(home.folder / "bob")},
        "bob": {"model": str(home.folder / "ann")},
    }
    other.write_text(yaml.safe_dump({"base_model": "ann", "models": models}))
    with pytest.raises(ArtefactError, match="scores of another model 'ann'"):
        train_joint(
            resolve_policy("single"), home.scores, tmp_path / "out",
            config=load_ensemble(other), how="full",
        )  # fmt: skip


def test_scores_without_hidden_states_are_refused_with_the_option_that_keeps_them(
    home: Home, tmp_path: Path
) -> None:
    score(multicolm.load(home.config), open_corpus(home.corpus), tmp_path / "scores")
    bare = replace(home, scores=tmp_path / "scores")
    with pytest.raises(ArtefactError, match="--hidden"):
        trained(bare, tmp_path / "out")
    assert report_of(trained(bare, tmp_path / "single", policy="single"))["positions"] > 0


def test_a_folder_of_the_users_is_not_written_over(home: Home, tmp_path: Path) -> None:
    (tmp_path / "out" / "base").mkdir(parents=True)
    (tmp_path / "out" / "base" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtefactError, match="holds another base"):
        trained(home, tmp_path / "out", "full")
    assert (tmp_path / "out" / "base" / "thesis.txt").read_text() == "years of work"


def test_every_setting_is_documented() -> None:
    for name in JointSettings.model_fields:
        assert f"{name}:" in (JointSettings.__doc__ or ""), name

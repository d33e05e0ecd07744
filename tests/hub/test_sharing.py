"""Routers, ensembles and score tables go to a Hub on loopback and back, and stay what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_results import fake_comparison, fake_traces
from hub_server import Hub, running_hub
from score_worlds import contents, records, tables, write

import multicolm
from multicolm import catalog
from multicolm.artefacts import Weights
from multicolm.cli import main
from multicolm.config import load_ensemble
from multicolm.errors import ArtefactError, ConfigError, HubError, InputError, MulticolmError
from multicolm.evaluation.report import write_report
from multicolm.files import leads_out, links_out
from multicolm.hub.kinds import kind_of, pull, push
from multicolm.hub.saved import SharedEnsemble, SharedScores
from multicolm.policy.co_llm import CoLlmPolicy
from multicolm.policy.resolve import resolve_policy
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import load_table
from multicolm.training.checkpoint import Checkpoint

TABLE = """
tokens: [a, b, c, "<end>"]
ends: ["<end>"]
table: {"": {a: 0.5, b: 0.25, c: 0.25}, a: {b: 0.5, "<end>": 0.5}}
"""
PROMPT = "What is Dulerex made from?"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The only Hub that there is."""
    from huggingface_hub import constants

    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield running
    assert running.unknown == []


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub's address where nobody listens."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def router() -> Checkpoint:
    g = torch.Generator().manual_seed(0)
    head = Weights({"0.weight": torch.randn(2, 96, generator=g), "0.bias": torch.zeros(2)})
    provenance = {"models": [], "license": "mit", "train": {"report": {"loss_nats": 0.25}}}
    return Checkpoint(CoLlmPolicy(head=head), provenance, "A router.")


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A score table of two shards."""
    corpus = open_corpus(write(tmp_path / "texts.jsonl", records(12)))
    score(tables("p", "q"), corpus, tmp_path / "scores", shard_positions=20)
    return tmp_path / "scores"


def table_ensemble(folder: Path, **model: Any) -> Path:
    """An ensemble of two exact tables in a folder of their own."""
    folder.mkdir(parents=True)
    (folder / "p.yaml").write_text(TABLE)
    (folder / "q.yaml").write_text(TABLE.replace("a: 0.5, b: 0.25", "a: 0.25, b: 0.5"))
    models = {name: {"backend": "table", "model": f"{name}.yaml", **model} for name in ("p", "q")}
    data = {"base_model": "p", "models": models, "policy": "average"}
    (folder / "ensemble.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return folder


def pulled(folder: Path) -> dict[str, bytes]:
    """The files, without the notes of the Hub's library."""
    return {name: data for name, data in contents(folder).items() if not name.startswith(".cache")}


# --- there and back ------------------------------------------------------------------------------


def test_an_ensemble_writes_the_same_after_a_round_trip(hub: Hub, tmp_path: Path) -> None:
    done = push("tiny", "org/tiny")
    assert (done.kind, done.place) == ("ensemble", f"{hub.url}/org/tiny")
    assert hub.private == {"models/org/tiny": True}
    assert hub.tokens <= {None, "Bearer hf_secret"} and "Bearer hf_secret" in hub.tokens
    assert pull("org/tiny", tmp_path / "got").kind == "ensemble"
    assert pulled(tmp_path / "got") == hub.files["models/org/tiny"]
    mine = multicolm.load("tiny").generate([PROMPT], max_new_tokens=12)
    theirs = SharedEnsemble.from_pretrained("org/tiny").load()
    assert theirs.generate([PROMPT], max_new_tokens=12)[0].text == mine[0].text
    assert theirs.config is not None
    sent, kept = theirs.config.model_dump(), load_ensemble("tiny").model_dump()
    heads = [Weights(config["policy"]["params"].pop("head")) for config in (sent, kept)]
    assert sent == kept
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[1].content)


def test_a_shared_ensemble_may_name_a_policy_that_ships_with_multicolm(tmp_path: Path) -> None:
    data = yaml.safe_load(catalog.read("ensembles", "tiny"))
    assert data["policy"] == "tiny/co-llm"
    (tmp_path / "ensemble.yaml").write_text(yaml.safe_dump(data))
    shared = SharedEnsemble.from_pretrained(tmp_path)
    assert shared.config.policy == load_ensemble("tiny").policy


def test_a_router_is_the_same_after_a_round_trip(hub: Hub, tmp_path: Path) -> None:
    router().save_pretrained(tmp_path / "router")
    assert push(tmp_path / "router", "org/router", private=False).kind == "router"
    assert hub.private == {"models/org/router": False}
    assert hub.files["models/org/router"] == contents(tmp_path / "router")
    assert pull("org/router", tmp_path / "got").kind == "router"
    assert pulled(tmp_path / "got") == contents(tmp_path / "router")
    found = Checkpoint.from_pretrained("org/router").policy
    assert isinstance(found, CoLlmPolicy) and found.head is not None
    assert torch.equal(found.head["0.weight"], router().policy.head["0.weight"])  # type: ignore


def test_a_score_table_is_the_same_after_a_round_trip(
    hub: Hub, scores: Path, tmp_path: Path
) -> None:
    assert push(scores, "org/scores", license="cc0-1.0").kind == "score table"
    assert set(hub.files) == {"datasets/org/scores"}
    assert pull("org/scores", tmp_path / "got").kind == "score table"
    assert pulled(tmp_path / "got") == contents(scores)
    mine, theirs = load_table(scores), SharedScores.from_pretrained("org/scores").table()
    assert torch.equal(mine.gold_logprobs, theirs.gold_logprobs)
    assert theirs.digest == mine.digest


def test_only_files_of_known_kinds_travel(hub: Hub, scores: Path, tmp_path: Path) -> None:
    (scores / "notes.py").write_text("print('hello')")
    (scores / "secret.json").write_text("{}")
    push(scores, "org/scores")
    sent = set(hub.files["datasets/org/scores"])
    assert not sent & {"notes.py", "secret.json"}
    hub.files["datasets/org/scores"]["evil.py"] = b"raise SystemExit"
    hub.files["datasets/org/scores"]["text/evil.bin"] = b"\x80\x04."
    pull("org/scores", tmp_path / "got")
    assert set(pulled(tmp_path / "got")) == sent


def test_a_pull_that_was_stopped_goes_on(hub: Hub, tmp_path: Path) -> None:
    push("tiny", "org/tiny")
    pull("org/tiny", tmp_path / "got")
    (tmp_path / "got/ensemble.yaml").unlink()
    pull("org/tiny", tmp_path / "got")
    assert pulled(tmp_path / "got") == hub.files["models/org/tiny"]


def test_a_folder_is_not_taken_for_a_repository_that_cannot_be_seen(
    hub: Hub, tmp_path: Path
) -> None:
    push("tiny", "org/tiny")
    pull("org/tiny", tmp_path / "got")
    files = hub.files.pop("models/org/tiny")
    with pytest.raises(HubError, match="no repository org/tiny"):
        pull("org/tiny", tmp_path / "got")
    hub.files["models/org/tiny"] = files
    assert pull("org/tiny", tmp_path / "got").kind == "ensemble"


def test_two_repositories_are_not_pulled_into_one_folder(
    hub: Hub, scores: Path, tmp_path: Path
) -> None:
    push("tiny", "org/tiny")
    push(scores, "org/scores")
    with pytest.raises(HubError):
        pull("org/misspelt", tmp_path / "got")  # which leaves nothing in the way
    assert pull("org/scores", tmp_path / "got").kind == "score table"
    before = contents(tmp_path / "got")
    with pytest.raises(InputError, match="is not from org/tiny"):
        pull("org/tiny", tmp_path / "got")
    assert contents(tmp_path / "got") == before


# --- an ensemble's folder ------------------------------------------------------------------------


def test_saving_what_was_saved_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = table_ensemble(tmp_path / "home", cost=2.5)
    router().save_pretrained(folder / "router")
    file = folder / "ensemble.yaml"
    text = file.read_text().replace("policy: average", "policy: ./router")
    file.write_text(text + "generation: {max_new_tokens: 7, threads: 1}\nbridge: shared\n")
    for source, target in (("home", "a"), ("a", "b")):
        SharedEnsemble(tmp_path / source).save_pretrained(tmp_path / target)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) == {
        *("README.md", "ensemble.yaml", "models/p/p.yaml", "models/q/q.yaml"),
        *(f"policy/{name}" for name in contents(folder / "router")),
    }
    config = load_ensemble(tmp_path / "a")
    assert config.generation.max_new_tokens == 7 and config.bridge == "shared"
    assert config.generation.threads is None, "how many threads is a matter of the machine"
    assert config.models["p"].cost == 2.5
    assert config.policy.kind == "co-llm"
    assert (
        contents(tmp_path / "a/policy")["provenance.json"]
        == (folder / "router/provenance.json").read_bytes()
    )


def test_templates_go_along_and_devices_do_not(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "chat.jinja").write_text("{{ messages[0]['content'] }}!")
    models = {
        "one": {"model": "tiny-facts", "chat_template": "chat.jinja", "device": "cpu"},
        "two": {"model": "tiny-math", "dtype": "float32"},
    }
    data = {"base_model": "one", "models": models}
    (home / "ensemble.yaml").write_text(yaml.safe_dump(data))
    SharedEnsemble(home / "ensemble.yaml").save_pretrained(tmp_path / "saved")
    saved = yaml.safe_load((tmp_path / "saved/ensemble.yaml").read_text())
    assert saved["models"] == {
        "one": {"model": "tiny-facts", "chat_template": "./templates/one.jinja"},
        "two": {"model": "tiny-math", "dtype": "float32"},
    }
    template = load_ensemble(tmp_path / "saved").models["one"].chat_template_text
    assert template == "{{ messages[0]['content'] }}!"


def test_models_elsewhere_on_the_disk_go_along_only_if_asked_for(tmp_path: Path) -> None:
    facts = Path(multicolm.__file__).parents[1] / "registry/tiny/facts"
    home = tmp_path / "home"
    home.mkdir()
    data = {"base_model": "facts", "models": {"facts": {"model": str(facts), "dtype": "float32"}}}
    (home / "ensemble.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(
        ConfigError, match=r"model 'facts' lies in .*tiny/facts, on this machine only"
    ):
        SharedEnsemble(home).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/ensemble.yaml").exists()
    SharedEnsemble(home, with_models=True).save_pretrained(tmp_path / "saved")
    assert "in this repository" in (tmp_path / "saved/README.md").read_text()
    [mine] = SharedEnsemble(home).load().generate([PROMPT], max_new_tokens=8)
    [theirs] = multicolm.load(tmp_path / "saved").generate([PROMPT], max_new_tokens=8)
    assert theirs.text == mine.text
    SharedEnsemble(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "saved")


@pytest.mark.parametrize(
    ("setting", "more"),
    [
        ("trust_remote_code", {"trust_remote_code": True}),
        ("allow_pickled_weights", {"allow_pickled_weights": True}),
        ("engine_options", {"backend": "vllm-engine", "engine_options": {"worker_cls": "x.Y"}}),
    ],
)
def test_an_ensemble_that_would_run_code_of_others_is_not_shared(
    setting: str, more: dict[str, Any], hub: Hub, tmp_path: Path
) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    data = {"base_model": "p", "models": {"p": {"model": "tiny-facts", **more}}}
    (folder / "ensemble.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=rf"models\.p\.{setting}: a shared ensemble"):
        push(folder, "org/evil")
    assert hub.files == {}
    hub.files["models/org/evil"] = contents(folder)
    with pytest.raises(ConfigError, match=rf"{setting}: .*kept as ensemble\.yaml\.refused\."):
        pull("org/evil", tmp_path / "got")
    assert not (tmp_path / "got/ensemble.yaml").exists()
    with pytest.raises(ConfigError, match=setting):
        SharedEnsemble.from_pretrained("org/evil")


# --- cards ---------------------------------------------------------------------------------------


def test_the_card_of_an_ensemble_holds_yaml_figures_and_how_to_load_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import ModelCard

    # Its own tests draw the figure.
    monkeypatch.setattr("multicolm.evaluation.report.pareto", lambda *_: b"")

    write_report(fake_comparison(), fake_traces(), tmp_path / "results")
    shared = SharedEnsemble("tiny", results=tmp_path / "results", license="apache-2.0")
    shared.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved/README.md").read_text()
    assert (tmp_path / "saved/ensemble.yaml").read_text() in text
    assert "| generalist | tiny-generalist | Apache-2.0 |" in text
    assert "multicolm pull ORGANISATION/NAME ./FOLDER" in text
    assert "## Figures" in text and "**80.0**" in text
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.library_name == "multicolm"
    with pytest.raises(ArtefactError, match="holds no comparison whose table a card could show"):
        SharedEnsemble("tiny", results=tmp_path).save_pretrained(tmp_path / "other")


def test_the_card_of_a_score_table_says_what_the_models_gave(scores: Path) -> None:
    text = SharedScores(scores, license="cc0-1.0").card()
    table = load_table(scores)
    for k, name in enumerate(("p", "q")):
        nats = -float(table.gold_logprobs[:, k].double().mean())
        right = float(table.correct[:, k].double().mean())
        assert f"| {name} | table:{k} | {nats:.4f} | {100 * right:.1f} % | 0 | - |" in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc0-1.0" and "score-table" in front["tags"]
    assert '| `source` | "texts.jsonl" |' in text, "a path of this machine is nobody's business"


# --- damage and refusals -------------------------------------------------------------------------


def test_a_damaged_or_unfinished_score_table_is_not_shared(
    hub: Hub, scores: Path, tmp_path: Path
) -> None:
    push(scores, "org/scores")
    hub.files["datasets/org/scores"]["p/00000.safetensors"] += b"x"
    with pytest.raises(ArtefactError, match=r"p/00000\.safetensors is missing or has changed"):
        pull("org/scores", tmp_path / "got")
    index = json.loads((scores / "index.json").read_text())
    (scores / "index.json").write_text(json.dumps({**index, "files": {}}))
    with pytest.raises(ArtefactError, match="is not finished: repeat the same `multicolm score`"):
        push(scores, "org/scores")


def test_a_score_table_cannot_name_files_outside_of_it(scores: Path) -> None:
    index = json.loads((scores / "index.json").read_text())
    index["models"][1]["name"] = "../../elsewhere"
    (scores / "index.json").write_text(json.dumps(index))
    with pytest.raises(ArtefactError, match=r"a model cannot be called '\.\./\.\./elsewhere'"):
        SharedScores(scores)


def test_a_trained_ensemble_goes_with_its_base_model_and_with_no_other(
    hub: Hub, tmp_path: Path
) -> None:
    registry = Path(multicolm.__file__).parents[1] / "registry/tiny"
    folder = tmp_path / "trained"
    router().save_pretrained(folder)
    shutil.copytree(registry / "facts", folder / "base")
    models = {"facts": {"model": "./base"}, "math": {"model": str(registry / "math")}}
    models["generalist"] = {"model": "tiny-generalist"}
    data = {"base_model": "facts", "models": models, "policy": "."}
    (folder / "ensemble.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(
        ConfigError, match=r"model 'math' lies in .*tiny/math, on this machine only"
    ):
        push(folder, "org/trained")
    models["math"] = {"model": "tiny-math"}
    (folder / "ensemble.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    assert push(folder, "org/trained").kind == "router"
    pull("org/trained", tmp_path / "got")
    [mine] = multicolm.load(folder).generate([PROMPT], "single", max_new_tokens=8)
    [theirs] = multicolm.load(tmp_path / "got").generate([PROMPT], "single", max_new_tokens=8)
    assert theirs.text == mine.text


def test_what_is_no_artefact_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="holds nothing that multicolm shares"):
        push(tmp_path, "org/nothing")
    hub.files["models/org/other"] = {"README.md": b"# hello"}
    with pytest.raises(ArtefactError, match="holds nothing that multicolm shares"):
        pull("org/other", tmp_path / "got")


def test_options_of_an_ensemble_are_refused_for_others(scores: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a score table; models and results go along with an"):
        push(scores, "org/scores", with_models=True)
    router().save_pretrained(tmp_path / "router")
    with pytest.raises(InputError, match="is a router, whose licence `multicolm train` writes"):
        push(tmp_path / "router", "org/router", license="mit")


def test_a_folder_with_other_files_is_not_pulled_into(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="is not from org/tiny; name another folder"):
        pull("org/tiny", tmp_path)
    with pytest.raises(InputError, match="is a file; name a folder"):
        pull("org/tiny", tmp_path / "mine.txt")


@pytest.mark.usefixtures("nobody")
def test_without_a_network_there_is_one_sentence(tmp_path: Path) -> None:
    unreachable = r"the Hub cannot be reached for org/x \(.*refused.*\); nothing was changed\."
    for attempt in (
        lambda: pull("org/x", tmp_path / "got"),
        lambda: push("tiny", "org/x"),
        lambda: Checkpoint.from_pretrained("org/x"),
        lambda: router().push_to_hub("org/x"),
        lambda: SharedEnsemble.from_pretrained("org/x"),
        lambda: SharedScores.from_pretrained("org/x"),
    ):
        with pytest.raises(HubError, match=unreachable) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_in_offline_mode_the_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"org/x \(offline mode is on: HF_HUB_OFFLINE is set\)"):
        pull("org/x", tmp_path / "got")


def test_what_the_hub_refuses_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="the Hub has no repository org/none that you may see"):
        pull("org/none", tmp_path / "got")
    push("tiny", "org/tiny")
    with pytest.raises(HubError, match="org/tiny has no such revision"):
        pull("org/tiny", tmp_path / "got", revision="nope")
    with pytest.raises(HubError, match="'a/b/c' is no name of a repository on the Hub"):
        pull("a/b/c", tmp_path / "got")
    hub.read_only = True
    with pytest.raises(HubError, match="the Hub does not let you do this with org/tiny; log in"):
        push("tiny", "org/tiny")


# --- the command line ----------------------------------------------------------------------------


def test_the_commands_say_what_was_done(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "tiny", "org/tiny", "--public", "--message", "Here it is"]) == 0
    assert capfd.readouterr().out == f"tiny: an ensemble, now at {hub.url}/org/tiny\n"
    assert hub.private == {"models/org/tiny": False} and hub.messages == ["Here it is"]
    assert main(["pull", "org/tiny", str(tmp_path / "got"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {
        "kind": "ensemble",
        "folder": str(tmp_path / "got"),
    }
    assert main(["generate", str(tmp_path / "got"), PROMPT, "--max-new-tokens", "4"]) == 0
    capfd.readouterr()
    assert main(["pull", "org/none", str(tmp_path / "none")]) == 1
    assert capfd.readouterr().err.startswith("Error: the Hub has no repository org/none")


def served(folder: Path, **settings: Any) -> Path:
    """An ensemble with a model in a server."""
    folder.mkdir()
    far = {"backend": "vllm", "url": "http://far.example/v1", "model": "tiny-facts", **settings}
    data = {"base_model": "near", "models": {"near": {"model": "tiny-generalist"}, "far": far}}
    (folder / "ensemble.yaml").write_text(yaml.safe_dump(data))
    return folder


def test_who_pulls_is_told_to_which_servers_prompts_would_go(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    push(served(tmp_path / "home"), "org/served")
    card = hub.files["models/org/served"]["README.md"].decode()
    assert "in a server at http://far.example/v1" in card
    assert main(["pull", "org/served", str(tmp_path / "got")]) == 0
    warning = "Warning: model 'far' runs in a server at http://far.example/v1: what you ask goes"
    assert warning in capfd.readouterr().err


def test_keys_of_servers_are_nobodys_business(hub: Hub, tmp_path: Path) -> None:
    folder = served(tmp_path / "home", api_key_env="HOME")
    with pytest.raises(ConfigError, match=r"models\.far\.api_key_env: a shared ensemble"):
        push(folder, "org/served")
    hub.files["models/org/served"] = contents(folder)
    with pytest.raises(ConfigError, match=r"api_key_env: .*kept as ensemble\.yaml\.refused\."):
        pull("org/served", tmp_path / "got")


def test_what_is_pulled_is_recognised_by_its_files(scores: Path, tmp_path: Path) -> None:
    assert kind_of(scores) == "score table"
    router().save_pretrained(tmp_path / "router")
    assert kind_of(tmp_path / "router") == "router"
    assert kind_of(table_ensemble(tmp_path / "home")) == "ensemble"


# --- nothing reaches outside ---------------------------------------------------------------------


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """Files beside the shared folders, which are nobody's business."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "secret.jinja").write_text("{{ messages[0]['content'] }} s3cret")
    router().save_pretrained(folder / "router")
    table_ensemble(folder / "models")
    return folder


def shared_ensemble(folder: Path, **model: Any) -> Path:
    """An ensemble's folder with something in its first model's settings."""
    folder.mkdir()
    data = {"base_model": "p", "models": {"p": {"model": "tiny-facts", **model}}}
    (folder / "ensemble.yaml").write_text(yaml.safe_dump(data))
    return folder


OUTSIDE: list[dict[str, Any]] = [
    {"chat_template": "../private/secret.jinja"},
    {"chat_template": "PRIVATE/secret.jinja"},
    {"chat_template": "./link.jinja"},
    {"backend": "table", "model": "../private/models/p.yaml"},
    {"backend": "table", "model": "PRIVATE/models/p.yaml"},
]


@pytest.mark.parametrize("settings", OUTSIDE, ids=lambda each: "-".join(each.values())[:40])
def test_an_ensemble_that_names_files_outside_its_folder_is_neither_taken_nor_given(
    settings: dict[str, Any], hub: Hub, private: Path, tmp_path: Path
) -> None:
    given = {k: v.replace("PRIVATE", str(private)) for k, v in settings.items()}
    folder = shared_ensemble(tmp_path / "evil", **given)
    if "link" in str(settings):
        (folder / "link.jinja").symlink_to("../private/secret.jinja")
    with pytest.raises(ConfigError, match=r"leads? out of|does not lie in|on this machine only"):
        push(folder, "org/evil")
    assert hub.files == {}
    with pytest.raises(ConfigError, match=r"leads? out of|does not lie in"):
        SharedEnsemble.from_pretrained(folder)
    if "link" not in str(settings):  # the Hub has no links
        hub.files["models/org/evil"] = contents(folder)
        with pytest.raises(ConfigError, match=r"kept as ensemble\.yaml\.refused\."):
            pull("org/evil", tmp_path / "got")
        assert not (tmp_path / "got" / "ensemble.yaml").exists()


@pytest.mark.parametrize("head", ["../private/router/head.safetensors", "ABSOLUTE", "link"])
def test_a_policy_that_names_files_outside_its_folder_is_neither_taken_nor_given(
    head: str, hub: Hub, private: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "evil"
    router().save_pretrained(folder)
    theirs = private / "router" / "head.safetensors"
    (folder / "head.safetensors").unlink()
    if head == "link":
        (folder / "head.safetensors").symlink_to(theirs)
    else:
        file = folder / "policy.yaml"
        named = str(theirs) if head == "ABSOLUTE" else head
        file.write_text(file.read_text().replace("head: head.safetensors", f"head: {named}"))
    for take in (
        lambda: push(folder, "org/evil"),
        lambda: Checkpoint.from_pretrained(folder),
        lambda: resolve_policy(folder),
    ):
        with pytest.raises(MulticolmError, match="leads out of"):
            take()
    assert hub.files == {}
    if head != "link":
        hub.files["models/org/evil"] = contents(folder)
        with pytest.raises(ConfigError, match="leads out of"):
            pull("org/evil", tmp_path / "got")


def test_what_an_ensemble_names_elsewhere_goes_along_if_asked_for(
    private: Path, tmp_path: Path
) -> None:
    folder = shared_ensemble(tmp_path / "mine", chat_template="../private/secret.jinja")
    SharedEnsemble(folder, with_models=True).save_pretrained(tmp_path / "saved")
    assert "s3cret" in (tmp_path / "saved" / "templates" / "p.jinja").read_text()


def test_a_score_table_with_a_link_out_of_it_is_not_shared(scores: Path, tmp_path: Path) -> None:
    [file, *_] = sorted((scores / "text").iterdir())
    moved = tmp_path / "elsewhere.safetensors"
    file.rename(moved)
    file.symlink_to(moved)
    with pytest.raises(ArtefactError, match="is a link that leads out of"):
        SharedScores(scores).check()


def test_files_of_the_hubs_cache_are_links_that_count_as_inside(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--x" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "b1").write_text("x")
    (tmp_path / "other").write_text("y")
    (snapshot / "a.txt").symlink_to("../../blobs/b1")
    (snapshot / "evil.txt").symlink_to("../../../other")
    assert list(links_out(snapshot)) == [snapshot / "evil.txt"]
    assert leads_out(snapshot / ".." / ".." / ".." / "other", snapshot)
    assert not leads_out(snapshot / "a.txt", snapshot)
    assert not leads_out(snapshot / "policy" / ".." / "a.txt", snapshot / "policy")

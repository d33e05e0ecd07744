"""Policies of one's own in checkpoints: usable everywhere, and run only if the user named them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from learning_worlds import world, write_table
from serving_worlds import ask, running
from tables import random_table

import multicolm
from multicolm import Ensemble, SelectPolicy, Views
from multicolm.calibration.tune import tune
from multicolm.cli.show import command as show
from multicolm.config import policy_code
from multicolm.errors import CapabilityError, ConfigError, UnknownNameError
from multicolm.evaluation.answering import named_policy
from multicolm.evaluation.compare import compare
from multicolm.evaluation.task import completion_task
from multicolm.hub.kinds import _check_declared
from multicolm.policy.resolve import resolve_policy
from multicolm.training.checkpoint import Checkpoint
from multicolm.training.train import train

DUO = Ensemble([random_table("base", 0), random_table("left", 1)])

SOURCE = """
from __future__ import annotations
import pathlib
import torch
import multicolm
from pydantic.dataclasses import dataclass

pathlib.Path(__file__).with_name("ran").touch()

@multicolm.register_policy("own-gap")
class Gap(multicolm.SelectPolicy):
    gap: float = 2.0
    base_signals = frozenset({"top1"})
    assistant_signals = frozenset({"top1"})
    tunable = {"gap": (0.1, 0.5, 0.9)}

    def select(self, views):
        return (views.base.top1_probs < self.gap).long()

    def fit(self, table):
        return Gap(gap=float(table.top1_logprobs[:, 0].exp().median()))

@dataclass(frozen=True)
class Mixed(multicolm.MixPolicy):
    base_weight: float = 0.5
    base_signals = frozenset({"logprobs"})
    assistant_signals = frozenset({"logprobs"})

    def mix(self, views):
        both = self.base_weight * views.base.probs + (1 - self.base_weight) * views[1].probs
        return both.log()

class Verified(multicolm.VerifyPolicy):
    base_signals = frozenset({"logprobs"})
    assistant_signals = frozenset({"logprobs"})

    def target_probs(self, views):
        return views.drawn_probs(1)

class Longest(multicolm.SegmentPolicy):
    assistant_signals = frozenset({"text", "token_logprobs"})

    def rate(self, segments):
        return segments.n_tokens.sum(-1).double()
"""

KINDS = {"Gap": {"gap": 0.45}, "Mixed": {"base_weight": 0.25}, "Verified": {}, "Longest": {}}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(SOURCE)
    return tmp_path / "own.py"


@pytest.fixture(autouse=True)
def nobody_has_named_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.setattr(policy_code, "_named", set())
    yield
    later()


def later() -> None:
    """As in another process: no module is loaded, and no class registered."""
    policy_code._named.clear()
    for name in list(policy_code._files):
        del policy_code._files[name]
        sys.modules.pop(name, None)
    multicolm.plugins.policies._classes.pop("own-gap", None)


def elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As on another machine, where the user has named nothing yet."""
    later()
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    (folder / "ran").unlink(missing_ok=True)


def text(policy: Any, **settings: Any) -> str:
    [answer] = DUO.generate(["ab"], policy, max_new_tokens=9, seed=0, temperature=0.7, **settings)
    return answer.text


def saved(own: Path, name: str = "Gap") -> Path:
    """A checkpoint of a class of that file."""
    policy = resolve_policy(f"{own}:{name}", KINDS[name])
    Checkpoint(policy).save_pretrained(own.parent / "ck" / name)
    return own.parent / "ck" / name


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_of_any_kind_writes_as_the_policy_that_it_keeps(own: Path, name: str) -> None:
    wanted = text(f"{own}:{name}", params=KINDS[name])
    folder = saved(own, name)
    own.unlink()
    later()
    assert text(folder) == wanted
    again = Checkpoint.from_pretrained(folder)
    assert again.policy.as_config() == resolve_policy(folder).as_config()
    again.bound_to(folder).save_pretrained(folder.parent / "copy")
    assert text(folder.parent / "copy") == wanted
    assert yaml.safe_load((folder / "policy.yaml").read_text())["kind"] == f"own.py:{name}"


def test_it_works_in_an_ensemble_file(own: Path) -> None:
    folder = saved(own)
    later()
    file = folder.parent / "ensemble.yaml"
    models = "base_model: a\nmodels: {a: {backend: table, model: ./a.yaml}}\n"
    (folder.parent / "a.yaml").write_text("tokens: [a]\ntable: {'': {a: 1.0}}\n")
    for policy in ("./Gap", "{kind: ./Gap/own.py:Gap, params: {gap: 0.45}}"):
        file.write_text(f"{models}policy: {policy}\n")
        assert multicolm.load(file).policy == resolve_policy(folder)


@pytest.mark.parametrize("name", KINDS)
def test_a_server_writes_with_a_checkpoint_of_any_kind(own: Path, name: str) -> None:
    folder = saved(own, name)
    own.unlink()
    later()
    with running(Ensemble(DUO.backends, policy=folder)) as server:
        sent = {"model": "tiny", "prompt": "ab", "max_tokens": 9, "temperature": 0}
        [choice] = ask(server, "/v1/completions", sent).json["choices"]
    [answer] = DUO.generate(["ab"], folder, max_new_tokens=9)
    assert choice["text"] == answer.text


def test_what_was_trained_can_be_trained_again_and_only_what_learns_is(own: Path) -> None:
    scores = write_table(own.parent / "scores", [world(2, 40)])
    first, second = own.parent / "ck" / "gap", own.parent / "ck" / "again"
    made = train(resolve_policy(f"{own}:Gap"), scores, first).policy
    own.unlink()
    later()
    found = resolve_policy(first)
    assert found.as_config() == made.as_config()
    assert made.as_config()["params"] != {"gap": 2.0}
    again = train(found, scores, second)
    later()
    assert resolve_policy(second).as_config() == again.policy.as_config() == made.as_config()
    assert text(second) == text(first)
    for name in ("Mixed", "Longest"):
        own.write_text(SOURCE)
        with pytest.raises(CapabilityError, match=r"nothing to learn: it has no method `fit"):
            train(resolve_policy(saved(own, name)), scores, own.parent / "none")


def test_what_was_tuned_can_be_compared_and_tuned_again(own: Path) -> None:
    data = own.parent / "data.jsonl"
    records = [{"prompt": p, "completion": "b"} for p in ("a", "ab")]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = completion_task(str(data), "dev")
    first, second = own.parent / "ck" / "gap", own.parent / "ck" / "again"
    tune(DUO, named_policy(f"{own}:Gap"), [task], first, max_new_tokens=3)
    later()
    found = compare(
        DUO, [first], task, out=own.parent / "out", split="dev", max_new_tokens=3, traces=1
    )
    assert str(first) in [row.name for row in found.rows]
    later()
    tune(DUO, named_policy(first), [task], second, max_new_tokens=3)
    assert resolve_policy(second).as_config() == resolve_policy(first).as_config()


def test_code_that_the_user_never_named_is_not_run(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(own)
    elsewhere(monkeypatch, folder)
    said = (
        f"{folder}/own.py is code that comes with this policy and was not run here before. Read "
        f"it; `multicolm show {folder} --trust` then allows it, and so does naming it yourself "
        f"({folder}/own.py:Gap)."
    )
    for use in (text, resolve_policy, Checkpoint.from_pretrained, multicolm.config.load_policy):
        with pytest.raises(ConfigError) as caught:
            use(folder, *((Path.cwd(),) if use is multicolm.config.load_policy else ()))
        assert said in str(caught.value)
    [warning] = _check_declared(folder, "router")  # after a pull from the Hub
    assert warning.startswith(f"it comes with its own code, {folder}/own.py, which is not run")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("how", ["name", "show", "environment"])
def test_the_user_can_allow_it(own: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(own)
    elsewhere(monkeypatch, folder)
    if how == "name":
        resolve_policy(f"{folder}/own.py:Gap")
    elif how == "show":
        done = CliRunner().invoke(show, [str(folder), "--trust"])
        assert "may be run here from now on" in done.output
    else:
        digest = yaml.safe_load((folder / "policy.yaml").read_text())["code"]
        monkeypatch.setenv("MULTICOLM_TRUST_CODE", f"{'0' * 64},{digest}")
    later()
    assert resolve_policy(folder).as_config() == {"kind": "own-gap", "params": {"gap": 0.45}}


def test_code_that_has_changed_is_refused(own: Path) -> None:
    folder = saved(own)
    (folder / "own.py").write_text(SOURCE + "# changed\n")
    resolve_policy(f"{folder}/own.py:Gap")  # the user has named it, and it is another one
    with pytest.raises(ConfigError, match="has changed since this checkpoint was made"):
        resolve_policy(folder)


def test_a_compiled_file_beside_the_code_is_not_run(own: Path) -> None:
    import py_compile

    folder = saved(own)
    kept = (folder / "own.py").read_bytes()
    (folder / "own.py").write_text("raise SystemExit")
    py_compile.compile(str(folder / "own.py"), invalidation_mode=py_compile.PycInvalidationMode(3))
    (folder / "own.py").write_bytes(kept)
    later()
    assert resolve_policy(folder).name == "own-gap"


def test_an_error_in_the_file_names_its_line(tmp_path: Path) -> None:
    for source, said in (("x = 1\ny = z\n", "line 2: NameError"), ("x = (\n", "line 1: SyntaxE")):
        (tmp_path / "bad.py").write_text(source)
        with pytest.raises(ConfigError) as caught:
            resolve_policy(f"{tmp_path}/bad.py:Gap")
        assert str(caught.value).startswith(f"{tmp_path}/bad.py, {said}")


def test_without_code_of_its_own_there_is_nothing_to_trust(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("kind: confidence\n")
    done = CliRunner().invoke(show, [str(tmp_path), "--trust"])
    assert isinstance(done.exception, CapabilityError)
    assert "names no Python code; leave out --trust" in str(done.exception)


class OfAModule(SelectPolicy):
    """Registered nowhere, and of no file that was named."""

    base_signals = frozenset({"top1"})

    def select(self, views: Views) -> torch.Tensor:
        return torch.zeros(views.n_positions, dtype=torch.long)


def test_a_class_of_an_imported_module_is_known_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checkpoint(OfAModule()).save_pretrained(tmp_path)
    assert isinstance(resolve_policy(tmp_path), OfAModule)
    monkeypatch.delitem(sys.modules, __name__)
    with pytest.raises(ConfigError, match=r"which is not imported; import it before"):
        resolve_policy(tmp_path)
    with pytest.raises(UnknownNameError):
        resolve_policy({"kind": f"{__name__}:OfAModule"})

"""Trains a policy on a score table and writes a checkpoint."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import multicolm
from multicolm.artefacts import Artefact
from multicolm.errors import ArtefactError, CapabilityError, ConfigError
from multicolm.files import locked
from multicolm.learning.training import Training
from multicolm.policy.base import Policy
from multicolm.scoring.store import load_prompt_digests, load_table, read_index
from multicolm.training.checkpoint import Checkpoint, read_provenance

__all__ = ["check_identities", "report_lines", "train"]

Progress = Callable[[float, float, str], None]


def train(
    policy: Policy,
    scores: str | Path,
    out: str | Path,
    *,
    models: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    license: str = "",
    on_progress: Progress = lambda done, total, label: None,
    save_every: float = 5.0,
) -> Checkpoint:
    """Train a policy on a score table; no model is loaded.

    A training that was stopped goes on where it was when called again with the same arguments, and
    ends with the same bytes. One that is finished is not done again.

    Args:
        policy: of a kind that has a method ``fit(table)``, with the params it begins with. If
            ``fit`` has a parameter ``training`` too, it is given a
            :class:`multicolm.learning.training.Training`.
        scores: folder that ``multicolm score`` wrote.
        out: folder of the checkpoint.
        models: name -> identity of the ensemble's models in their order, the base model first; all
            models of the table if not given.
        options: of the training; which there are is the policy's business.
        license: of the checkpoint, an SPDX name, for its card.
        on_progress: told how much is done, of how much, and what is being done.
        save_every: seconds between two states that a stopped training can go on from.

    Raises:
        ArtefactError: if the table is damaged or of other models, or ``out`` holds another
            checkpoint.
        CapabilityError: if the policy has nothing to learn.
        ConfigError: if an option is unknown or out of range.
        TrainingError: if there is nothing to learn from, or training diverges.
    """
    fit = getattr(policy, "fit", None)
    if fit is None:
        raise CapabilityError(
            f"policy '{policy.name}' has nothing to learn: it has no method `fit(table)`. Its "
            "params can be found with `multicolm tune`."
        )
    folder = Path(out)
    index = read_index(scores)
    if models is not None:
        check_identities(models, {m.name: m.identity for m in index.models}, str(scores))
    names = list(models) if models is not None else [m.name for m in index.models]
    key = _key(policy, index.files, names, options or {})
    with locked(folder):
        finished = _finished(folder, key)
        if finished is not None:
            shutil.rmtree(folder / ".training", ignore_errors=True)
            return finished
        table = load_table(scores, names)
        # A folder for each key, so that no training goes on from the state of another.
        training = Training(options or {}, folder / ".training" / key, on_progress, save_every)
        wants_training = "training" in inspect.signature(fit).parameters
        if options and not wants_training:
            raise ConfigError(
                f"policy '{policy.name}' takes no training options: its `fit` has no parameter "
                f"`training`; got {', '.join(options)}."
            )
        fitted = cast("Policy", fit(table, training) if wants_training else fit(table))
        provenance = {
            "multicolm": multicolm.__version__,
            "models": [
                {"name": name, "identity": identity}
                for name, identity in zip(table.models, table.identities, strict=True)
            ],
            "license": license,
            "train": {
                "key": key,
                "source": index.source,
                "digest": index.digest,
                "examples": index.n_examples,
                "tokens": index.n_positions,
                "options": dict(options or {}),
                "report": training.report,
                "prompts": load_prompt_digests(scores),
            },
        }
        checkpoint = Checkpoint(fitted, provenance, _summary(fitted, index.source))
        checkpoint.save_pretrained(folder)
        shutil.rmtree(folder / ".training", ignore_errors=True)
        return checkpoint.bound_to(folder)


def check_identities(ensemble: Mapping[str, str], scored: Mapping[str, str], origin: str) -> None:
    """Refuse scores of other models than the ensemble's.

    Raises:
        ArtefactError: naming the model, and what it is on both sides.
    """
    for name, identity in ensemble.items():
        if name in scored and not _same(identity, scored[name]):
            raise ArtefactError(
                f"{origin} holds scores of another model '{name}' ({scored[name]}) than the "
                f"ensemble's ({identity}); score the corpus with this ensemble."
            )


def _same(one: str, other: str) -> bool:
    """Whether two identities may be of one model; an unknown one may be any."""
    if not one or not other or one == other:
        return True
    # Without the network nobody knows the commit of a branch.
    (model, _, adapter), (other_model, _, other_adapter) = (i.partition("+") for i in (one, other))
    repository, _, commit = model.partition("@")
    other_repository, _, other_commit = other_model.partition("@")
    both_pinned = len(commit) == len(other_commit) == 40
    equal = (repository, adapter) == (other_repository, other_adapter)
    return one.startswith("hub:") and equal and not both_pinned


def _key(
    policy: Policy, files: Mapping[str, str], names: Sequence[str], options: Mapping[str, Any]
) -> str:
    """What a training is: policy, data and options."""
    config = policy.as_config()
    params = {k: v for k, v in config["params"].items() if not isinstance(v, Artefact)}
    facts = [config["kind"], params, dict(files), list(names), dict(options)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _finished(folder: Path, key: str) -> Checkpoint | None:
    """The checkpoint that is there already, if this training made it.

    Raises:
        ArtefactError: if another one did.
    """
    if not (folder / "policy.yaml").is_file():
        return None
    provenance = read_provenance(folder)
    if provenance.get("train", {}).get("key") == key:
        return Checkpoint.from_pretrained(folder)
    raise ArtefactError(
        f"{folder} holds another checkpoint (of other data, params or options); choose another "
        "folder, or delete this one."
    )


def _summary(policy: Policy, source: str) -> str:
    return f"A {policy.name} policy, trained on {Path(source).name}."


def report_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a training reports, as pairs to print; numbers in nats per token and parts of 1."""
    shown = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            parts = [f"{k} {_number(v)}" for k, v in value.items()]
            shown.append((name.replace("_", " "), ", ".join(parts)))
        elif isinstance(value, int | float | str):
            shown.append((name.replace("_", " "), _number(value)))
    return shown


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

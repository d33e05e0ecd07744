"""Trains a policy on a score table and writes a checkpoint."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from multicolm.errors import CapabilityError, ConfigError
from multicolm.files import locked
from multicolm.learning.training import Training
from multicolm.policy.base import Policy
from multicolm.scoring.store import StoredTable, load_table, n_rollouts, read_index
from multicolm.training.checkpoint import Checkpoint, finished_checkpoint
from multicolm.training.provenance import check_identities, training_key, training_provenance

__all__ = ["train"]

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
            :class:`multicolm.learning.training.Training`. If its class says ``streams = True``,
            the table is a :class:`multicolm.scoring.store.StoredTable`, which is read block by
            block, so that memory does not grow with it.
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
    if fit is None and hasattr(policy, "fit_answers"):
        raise CapabilityError(
            f"policy '{policy.name}' learns from judged answers and not from scores; give --task "
            "in the place of the score table."
        )
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
    key = training_key(policy, index.files, names, options or {})
    with locked(folder):
        finished = finished_checkpoint(folder, key)
        if finished is not None:
            shutil.rmtree(folder / ".training", ignore_errors=True)
            return finished
        # Policies that read block by block get a table on disk; the others all of it in memory.
        streams = getattr(policy, "streams", False)
        table = StoredTable(scores, names) if streams else load_table(scores, names)
        # A folder for each key, so that no training goes on from the state of another.
        training = Training(options or {}, folder / ".training" / key, on_progress, save_every)
        wants_training = "training" in inspect.signature(fit).parameters
        if options and not wants_training:
            raise ConfigError(
                f"policy '{policy.name}' takes no training options: its `fit` has no parameter "
                f"`training`; got {', '.join(options)}."
            )
        fitted = cast("Policy", fit(table, training) if wants_training else fit(table))
        if labelled := n_rollouts(scores):
            training.report["positions_judged_by_rollouts"] = labelled
        provenance = training_provenance(
            scores,
            dict(zip(table.models, table.identities, strict=True)),
            license,
            key=key,
            options=dict(options or {}),
            report=training.report,
        )
        checkpoint = Checkpoint(fitted, provenance, _summary(fitted, index.source))
        checkpoint.save_pretrained(folder)
        shutil.rmtree(folder / ".training", ignore_errors=True)
        return checkpoint.bound_to(folder)


def _summary(policy: Policy, source: str) -> str:
    return f"A {policy.name} policy, trained on {Path(source).name}."

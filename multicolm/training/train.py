"""Trains a policy on a score table and writes a checkpoint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from multicolm.errors import CapabilityError, ConfigError
from multicolm.learning.training import Training
from multicolm.policy.base import Policy
from multicolm.score_table import ScoreTable
from multicolm.scoring.store import StoredTable, load_table, n_rollouts, read_index
from multicolm.training.checkpoint import Checkpoint, made_once, unfinished
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

    A stopped training resumes when called again with the same arguments, and ends with the same
    bytes. One that is finished is not done again.

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
        on_progress: called with how much is done, of how much, and what is being done.
        save_every: seconds between two states that a stopped training can resume from.

    Raises:
        ArtefactError: if the table is damaged or of other models, or ``out`` holds another
            checkpoint.
        CapabilityError: if the policy has nothing to learn.
        ConfigError: if an option is unknown or out of range.
        TrainingError: if there is nothing to learn from, or training diverges.
    """
    fit = _fit_of(policy)
    folder = Path(out)
    index = read_index(scores)
    if models is not None:
        check_identities(models, {m.name: m.identity for m in index.models}, str(scores))
    names = list(models) if models is not None else [m.name for m in index.models]
    key = training_key(policy, index.files, names, options or {})

    def make() -> Checkpoint:
        # Policies that read block by block get a table on disk; the others all of it in memory.
        streams = getattr(policy, "streams", False)
        table = StoredTable(scores, names) if streams else load_table(scores, names)
        # A folder for each key, so that no training resumes from the state of another.
        training = Training(options or {}, unfinished(folder) / key, on_progress, save_every)
        fitted = _fitted(policy, fit, table, training)
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
        return Checkpoint(fitted, provenance, _summary(fitted, index.source))

    return made_once(folder, key, make)


def _fit_of(policy: Policy) -> Callable[..., Any]:
    """The method that learns from a score table.

    Raises:
        CapabilityError: if the policy has none.
    """
    fit: Callable[..., Any] | None = getattr(policy, "fit", None)
    if fit is not None:
        return fit
    if hasattr(policy, "fit_answers"):
        raise CapabilityError(
            f"policy '{policy.name}' learns from judged answers and not from scores; give --task "
            "in the place of the score table."
        )
    raise CapabilityError(
        f"policy '{policy.name}' has nothing to learn: it has no method `fit(table)`. Its "
        "params can be found with `multicolm tune`."
    )


def _fitted(
    policy: Policy, fit: Callable[..., Any], table: ScoreTable | StoredTable, training: Training
) -> Policy:
    """What a policy learns; ``fit`` is given the training if it has a parameter for it.

    Raises:
        ConfigError: if there are options, and no parameter for them.
    """
    if "training" in inspect.signature(fit).parameters:
        return cast("Policy", fit(table, training))
    if training.options:
        raise ConfigError(
            f"policy '{policy.name}' takes no training options: its `fit` has no parameter "
            f"`training`; got {', '.join(training.options)}."
        )
    return cast("Policy", fit(table))


def _summary(policy: Policy, source: str) -> str:
    return f"A {policy.name} policy, trained on {Path(source).name}."

"""What a checkpoint was made from: written down, read again, and held against an ensemble."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multicolm.artefacts import Artefact
from multicolm.errors import ArtefactError
from multicolm.files import read_json
from multicolm.policy.base import Policy
from multicolm.scoring.store import load_prompt_digests, read_index
from multicolm.version import __version__

__all__ = ["check_identities", "read_provenance", "training_key", "training_provenance"]


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """What ``provenance.json`` of a checkpoint says; nothing if there is none.

    Its parts: ``models`` (name and identity, the base model first); ``train`` and ``tune``, each
    with ``digest`` and ``prompts`` (:func:`multicolm.types.prompt_digest`) of the data that were
    seen, the options, and a ``report`` of what was measured.

    Raises:
        ArtefactError: if it is damaged.
    """
    path = Path(folder) / "provenance.json"
    if not path.is_file():
        return {}
    data = read_json(path)
    if not isinstance(data, dict):
        raise ArtefactError(f"{path} is damaged (no mapping).")
    return data


def training_provenance(
    scores: str | Path, models: Mapping[str, str], license: str, **facts: Any
) -> dict[str, Any]:
    """What is written of a training.

    Args:
        scores: folder of the score table that was learned from.
        models: name -> identity of the models that the checkpoint is for, the base model first.
        license: of the checkpoint.
        facts: more of the training: ``key``, ``options``, ``report`` and the like.
    """
    index = read_index(scores)
    return {
        "multicolm": __version__,
        "models": [{"name": name, "identity": identity} for name, identity in models.items()],
        "license": license,
        "train": {
            "source": index.source,
            "digest": index.digest,
            "examples": index.n_examples,
            "tokens": index.n_positions,
            **facts,
            "prompts": load_prompt_digests(scores),
        },
    }


def training_key(
    policy: Policy, files: Mapping[str, str], models: Sequence[str], options: Mapping[str, Any]
) -> str:
    """What a training is: equal for an equal policy, equal scores and equal options.

    Args:
        policy: to begin with; what it has learned before does not count.
        files: of the score table, with their digests.
        models: names of those whose scores are used, the base model first.
        options: of the training.
    """
    config = policy.as_config()
    params = {k: v for k, v in config["params"].items() if not isinstance(v, Artefact)}
    facts = [config["kind"], params, dict(files), list(models), dict(options)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def check_identities(ensemble: Mapping[str, str], scored: Mapping[str, str], origin: str) -> None:
    """Refuse scores of other models than the ensemble's.

    Args:
        ensemble: name -> identity.
        scored: name -> identity, of the models of the scores.
        origin: of the scores, for the message.

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

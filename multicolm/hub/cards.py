"""The cards of ensembles and score tables: what they are, the figures, and how to load them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from multicolm import catalog
from multicolm.config import EnsembleConfig, ModelConfig, load_model_file
from multicolm.errors import ArtefactError
from multicolm.evaluation.results import read_comparison
from multicolm.evaluation.table import as_markdown
from multicolm.records import text_lines
from multicolm.scoring.store import Index

__all__ = ["ensemble_card", "scores_card"]

_TAGS = ["multicolm", "token-level-routing"]


def ensemble_card(config: EnsembleConfig, text: str, results: Path | None, license: str) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        config: of the ensemble.
        text: of ``ensemble.yaml``.
        results: folder of a comparison whose table is shown, if any.
        license: of the file and the policy; empty if that is not stated.

    Raises:
        ArtefactError: if the folder holds no comparison.
    """
    facts = [(name, *_facts(config, name)) for name in config.names]
    front: dict[str, Any] = {
        "library_name": "multicolm",
        "tags": [*_TAGS, "ensemble"],
        "license": license or "unknown",
    }
    hub = [
        config.models[name].location for name in config.names if not _is_here(config.models[name])
    ]
    if hub:
        front["base_model"] = hub
    parts = [
        _front(front),
        "# An ensemble for multicolm\n",
        f"{config.summary}\n" if config.summary else "",
        "Several language models write one text together, token by token.\n",
        "```console\n$ multicolm pull ORGANISATION/NAME ./FOLDER\n"
        '$ multicolm generate ./FOLDER "PROMPT" --trace\n```\n',
        "```python\nfrom multicolm.hub.saved import SharedEnsemble\n\n"
        'ensemble = SharedEnsemble.from_pretrained("ORGANISATION/NAME").load()\n```\n',
        "## ensemble.yaml\n",
        f"```yaml\n{text}```\n",
        "## Models\n",
        _table(["", "model", "licence"], facts),
        "The first is the base model.\n",
        _figures(results),
        f"## Licence\n\nOf this ensemble's file and policy: {license or 'not stated'}. The models "
        "have their own.\n",
    ]
    return "\n".join(part for part in parts if part)


def _is_here(model: ModelConfig) -> bool:
    return model.resolved.is_local or model.backend != "transformers"


def _facts(config: EnsembleConfig, name: str) -> tuple[str, str]:
    """What a model is, and its licence where that is known."""
    model = config.models[name]
    if model.url is not None:
        return f"{model.model}, in a server at {model.url}", "its own"
    if model.model in catalog.names("models"):
        return model.model, load_model_file(model.model).licence
    if model.resolved.is_local:
        return "in this repository", "see its files"
    revision = model.resolved_revision
    return f"{model.location}{f' at {revision}' if revision else ', not pinned'}", "its own"


def _figures(results: Path | None) -> str:
    """The table of a comparison, its headings below one of their own."""
    if results is None:
        return ""
    try:
        text = as_markdown(read_comparison(results))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{results} holds no comparison whose table a card could show ({error}); make one with "
            "`multicolm compare ... --out FOLDER`."
        ) from error
    lines = [f"##{line}" if line.startswith("#") else line for line in text_lines(text)]
    return "\n".join(["## Figures", "", *lines, ""])


def scores_card(index: Index, figures: Mapping[str, tuple[float, float]], license: str) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        index: of the score table.
        figures: per model nats per token, and the part of the tokens that are its likeliest ones.
        license: of the texts and scores; empty if that is not stated.
    """
    rows = []
    for model in index.models:
        nats, right = figures[model.name]
        rows.append(
            (
                model.name,
                model.identity or "unknown",
                f"{nats:.4f}",
                f"{100 * right:.1f} %",
                str(model.n_unknown),
                ", ".join(model.features) or "-",
            )
        )
    heads = ["model", "what it is", "nats per token", "likeliest", "unknown", "kept besides"]
    about = {
        "source": Path(index.source).name if Path(index.source).is_absolute() else index.source,
        "digest": index.digest,
        "examples": index.n_examples,
        "tokens of completions": index.n_positions,
        "end of text counted": index.end_of_text,
        "shards": len(index.shards),
        "multicolm": index.multicolm,
    }
    parts = [
        _front({"tags": [*_TAGS, "score-table"], "license": license or "unknown"}),
        "# A score table of multicolm\n",
        "What several language models gave to every token of a corpus: all that a frozen ensemble "
        "has to be asked for to train and calibrate a policy. The texts themselves are in it, as "
        "tokens.\n",
        "```console\n$ multicolm pull ORGANISATION/NAME ./scores\n"
        "$ multicolm train ENSEMBLE ./scores --policy co-llm --out ./router\n```\n",
        "```python\nfrom multicolm.hub.saved import SharedScores\n\n"
        'table = SharedScores.from_pretrained("ORGANISATION/NAME").table()\n```\n',
        "## What the models gave\n",
        _table(heads, rows),
        "The first is the base model, whose tokens are scored.\n",
        "## What was scored\n",
        _table(["", ""], [(f"`{key}`", json.dumps(value)) for key, value in about.items()]),
        f"## Licence\n\nOf texts and scores: {license or 'not stated'}.\n",
    ]
    return "\n".join(parts)


def _front(data: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(data), sort_keys=False)}---\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *[[_cell(cell) for cell in row] for row in rows]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

"""Write docs/reference/files.md and json.md from the classes themselves.

    python tools/reference.py            writes both
    python tools/reference.py --check    says whether they are what it would write

A test runs the check, so the pages cannot say what the code does not do.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from multicolm.config import (
    EnsembleConfig,
    GenerationConfig,
    ModelConfig,
    PolicyConfig,
    PolicyFile,
)
from multicolm.config.model import _OF_ALL, _SETTINGS, ModelFile
from multicolm.evaluation.metrics import ContainsMetric, ExactMatchMetric, NumericMetric
from multicolm.evaluation.results import (
    Comparison,
    ModelUse,
    RowResult,
    ShownToken,
    TracedAnswer,
)
from multicolm.evaluation.task import DataConfig, MetricConfig, TaskConfig
from multicolm.types import Alternative, Answer, Trace, TracedToken, Usage

PAGES = Path(__file__).parents[1] / "docs/reference"

FILES = """# YAML files

Every key that multicolm reads. An unknown key is an error that names the nearest known one;
`multicolm validate FILE` checks a file without loading a model. Relative paths start from the
folder of the file. This page is written by `python tools/reference.py`, from the classes.
"""

JSON = """# JSON outputs

Numbers that JSON cannot hold (NaN, infinities) are `null`. Log-probabilities are in nats,
durations in seconds. This page is written by `python tools/reference.py`, from the classes.
"""


# Classes that have a table of their own on the page.
_PARTS = {
    ModelConfig: "[model](#a-model-of-models)",
    GenerationConfig: "[settings](#generation)",
    PolicyConfig: "[policy](#policy)",
    DataConfig: "[split](#a-split-of-data)",
    MetricConfig: "[metric](#metric)",
    Usage: "[usage](#a-model-of-usage)",
    Trace: "list of [tokens](#a-token-of-trace)",
    Alternative: "[alternatives](#one-of-alternatives)",
    RowResult: "[rows](#a-row-of-rows)",
    ModelUse: "[uses](#a-model-of-uses)",
    ShownToken: "[tokens](#a-token)",
}


def main() -> int:
    """Write the pages, or compare them."""
    pages = {"files.md": _files(), "json.md": _json()}
    if "--check" in sys.argv:
        return int(any((PAGES / name).read_text("utf-8") != text for name, text in pages.items()))
    for name, text in pages.items():
        (PAGES / name).write_text(text, "utf-8")
    return 0


def _files() -> str:
    return "\n".join(
        [
            FILES,
            "## Ensemble files\n",
            "Read wherever ENSEMBLE is asked for: a file, a folder with an `ensemble.yaml`, or a",
            "name in `registry/ensembles/`.\n",
            _table(EnsembleConfig),
            "### A model of `models`\n",
            "A key that does not belong to the model's backend is refused.\n",
            _table(ModelConfig, _backends()),
            "### `generation`\n",
            "Also keyword arguments of `generate` and `stream`, and options of the command line.\n",
            _table(GenerationConfig),
            "### `policy`\n",
            "A name (`multicolm ls policies`), a policy file, a folder with a `policy.yaml`, or\n"
            "these keys:\n",
            _table(PolicyConfig),
            "## Policy files\n",
            "Presets in `policies/`, and the `policy.yaml` of a checkpoint.\n",
            _table(PolicyFile),
            "## Task files\n",
            "See [how to write a task](../how-to/own-task.md).\n",
            _table(TaskConfig),
            "### A split of `data`\n",
            "Or just the source: `test: questions.jsonl`.\n",
            _table(DataConfig),
            "### `metric`\n",
            _table(MetricConfig),
            *_metrics(),
            "## Model files\n",
            "`registry/models/*.yaml`: what is known of a model anywhere, pinned and sourced.\n",
            _table(ModelFile),
        ]
    )


def _metrics() -> Iterator[str]:
    kinds = {
        "exact-match": ExactMatchMetric,
        "contains": ContainsMetric,
        "numeric": NumericMetric,
    }
    for name, cls in kinds.items():
        yield f"#### `{name}`\n"
        yield _first_line(cls) + "\n"
        yield _table(cls)


def _json() -> str:
    return "\n".join(
        [
            JSON,
            "## `generate --json`, `chat --json`\n",
            "One object per line, one line per prompt: `Answer.as_json()`.\n",
            _table(Answer, defaults=False),
            "### A token of `trace`\n",
            _table(TracedToken, defaults=False),
            "### One of `alternatives`\n",
            _table(Alternative, defaults=False),
            "### A model of `usage`\n",
            _table(Usage, defaults=False),
            "## `results.json` of `compare`\n",
            "`compare --json` prints it; `multicolm.evaluation.results.read_comparison(folder)`\n"
            "reads it.\n",
            _table(Comparison, defaults=False),
            "### A row of `rows`\n",
            _table(RowResult, defaults=False),
            "### A model of `uses`\n",
            _table(ModelUse, defaults=False),
            "## Lines of `traces.jsonl`\n",
            "`read_traces(folder)` of the same module reads them.\n",
            _table(TracedAnswer, defaults=False),
            "### A token\n",
            _table(ShownToken, defaults=False),
        ]
    )


def _backends() -> dict[str, str]:
    """Per key of a model, the backends that take it."""
    return {
        key: "all"
        if key in _OF_ALL
        else ", ".join(f"`{name}`" for name, keys in _SETTINGS.items() if key in keys)
        for key in ModelConfig.model_fields
    }


def _table(cls: type, extra: dict[str, str] | None = None, *, defaults: bool = True) -> str:
    head = ["key", "type", *(["default"] if defaults else []), "meaning"]
    if extra is not None:
        head.insert(3, "backends")
    rows = []
    described = _described(cls)
    for name, kind, default in _fields(cls):
        row = [f"`{name}`", _shown(kind), *([default] if defaults else []), described[name]]
        if extra is not None:
            row.insert(3, extra[name])
        rows.append(row)
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in r) + " |" for r in lines)
        + "\n"
    )


def _fields(cls: type) -> Iterator[tuple[str, Any, str]]:
    if issubclass(cls, BaseModel):
        for name, field in cls.model_fields.items():
            yield name, field.annotation, _default(field.default, field.default_factory)
        return
    hints = get_type_hints(cls)
    for each in dataclasses.fields(cls):  # type: ignore[arg-type]
        yield each.name, hints[each.name], _default(each.default, each.default_factory)


def _default(value: Any, factory: Any) -> str:
    if callable(factory):
        value = factory()
    if value is PydanticUndefined or value is dataclasses.MISSING:
        return "required"
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    if value in ("", (), {}, None):
        return ""
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{key}: {part}' for key, part in value.items())}}}`"
    return f"`{value}`"


def _shown(kind: Any) -> str:
    """A type in the words of YAML and JSON."""
    plain = {
        str: "text", int: "whole number", float: "number", bool: "`true` or `false`",
        type(None): "", Any: "any", object: "any",
    }  # fmt: skip
    if kind in plain:
        return plain[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _shown(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(_shown, inner))))
    if origin in (tuple, list) or (origin is not None and "Sequence" in str(origin)):
        return f"list of {_shown(inner[0])}"
    if (origin is not None and "apping" in str(origin)) or origin is dict:
        value = _shown(inner[1])
        return "mapping" if value == "any" else f"mapping to {value}"
    return _PARTS.get(kind, "any")


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")


def _described(cls: type) -> dict[str, str]:
    """What the docstring says of each field."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE)
    plain = {name: _plain(" ".join(text.split())) for name, text in found}
    return plain


def _plain(text: str) -> str:
    """Sphinx roles are for the source: ``:class:`x.Y` `` is shown as `` `Y` ``."""
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    return text.replace("``", "`")


if __name__ == "__main__":
    sys.exit(main())

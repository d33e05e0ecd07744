"""The rows of a comparison in the order of reading, and as a Markdown table.

The table is what one pastes into a README or a paper's repository; the numbers of the page are
worded by the same functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from multicolm.evaluation.results import Comparison, RowResult

__all__ = [
    "as_markdown",
    "best",
    "facts",
    "headline",
    "in_order",
    "markup",
    "p_value",
    "percent",
    "plain",
    "points",
    "slices",
    "solo_speeds",
    "visible",
]

# Controls, zero-width and direction marks, and halves of surrogate pairs.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
_MARKUP = re.compile(r"[\\`*_\[\]<>|~#$]")


def visible(text: str) -> str:
    r"""Text in which control characters and direction marks are seen instead of obeyed.

    >>> visible("a\x1b[2J\u202eb")
    'a\\x1b[2J\\u202eb'
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def plain(value: Any) -> Any:
    """The same value as JSON has it everywhere: tuples as lists, infinities and no-numbers as text.

    >>> plain({"threshold": float("inf"), "ids": (1, 2)})
    {'threshold': 'inf', 'ids': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def in_order(rows: Sequence[RowResult]) -> list[RowResult]:
    """Models, then every policy followed by what belongs to it, then the oracle.

    Within these the given order is kept, and no row is lost.
    """
    heads = [row for row in rows if row.kind in ("model", "policy")]
    names = {row.name for row in heads}
    own = [row for row in rows if row.kind in ("random", "sweep")]
    ordered = []
    for head in sorted(heads, key=lambda row: row.kind != "model"):
        ordered += [head, *(row for row in own if row.of == head.name)]
    ordered += [row for row in own if row.of not in names]
    return ordered + [row for row in rows if row.kind == "oracle"]


def slices(row: RowResult) -> list[float]:
    """Who wrote the row's tokens: the share of every model, then that of all together, 0 to 1."""
    mixed = row.n_mixed / row.n_tokens if row.n_tokens else 0.0
    return [*(use.share for use in row.uses), mixed]


def best(rows: Sequence[RowResult]) -> dict[str, set[str]]:
    """Names of the rows that are the best of a column; ties are all best.

    The oracle is nobody's rival. Speed and cost are compared among rows of several models only:
    the smallest model alone would always win them.
    """
    real = [row for row in rows if row.kind != "oracle"]
    joint = [row for row in real if row.kind != "model"]

    def names(among: Sequence[RowResult], value: Callable[[RowResult], float]) -> set[str]:
        top = max(map(value, among), default=0.0)
        return {row.name for row in among if value(row) == top}

    gaining = [row for row in real if row.gain is not None]
    return {
        "quality": names(real, lambda row: row.quality),
        "gain": names(gaining, lambda row: row.gain or 0.0),
        "speed": names(joint, lambda row: row.tokens_per_second),
        "cost": names(joint, lambda row: -row.cost),
    }


def percent(value: float) -> str:
    """A share or a quality in percent, with one digit.

    >>> percent(0.7419)
    '74.2'
    """
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference in percentage points, with its sign.

    >>> points(-0.0831) == "\N{MINUS SIGN}8.3", points(0.0)
    (True, '+0.0')
    """
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def p_value(value: float | None) -> str:
    """A p-value as papers print it.

    >>> p_value(0.0004), p_value(0.0213), p_value(None)
    ('p < 0.001', 'p = 0.021', '')
    """
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def headline(comparison: Comparison) -> str:
    """The finding in one or two sentences, with what weakens it.

    Among several policies the highest is named as such: it was picked on these very questions.
    Empty if there is no policy or no model alone to compare.
    """
    policies = [row for row in comparison.rows if row.kind == "policy"]
    models = [row for row in comparison.rows if row.kind == "model"]
    if not policies or not models:
        return ""
    top = max(policies, key=lambda row: row.quality)
    alone = max(models, key=lambda row: row.quality)
    which = f"Highest of {len(policies)} policies" if len(policies) > 1 else "The policy"
    text = (
        f"{which}: {top.name} with {percent(top.quality)} % {comparison.metric}, "
        f"against {percent(alone.quality)} % of the best model alone, {alone.name}"
    )
    if top.gain is None or top.gain_low is None or top.gain_high is None:
        return text + "."
    span = f"95 % interval {points(top.gain_low)} to {points(top.gain_high)}"
    text += f" ({points(top.gain)} points, {span})."
    if top.gain_low <= 0 <= top.gain_high:
        text += " That difference may be chance."
    if alone.cost > 0:
        text += f" A token costs {top.cost / alone.cost:.2f} times as much."
    return text


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """How it was measured: pairs of a name and a value, in the order of reading."""
    models = [
        f"{name} ({identity}; cost {cost:g})" if identity else f"{name} (cost {cost:g})"
        for name, identity, cost in zip(
            comparison.models, comparison.identities, comparison.costs, strict=True
        )
    ]
    numbers = sorted({row.n_questions for row in comparison.rows})
    return [
        ("Ensemble", comparison.ensemble),
        ("Models", ", ".join(models)),
        ("Task", f"{comparison.task}, split {comparison.split}, data {comparison.digest}"),
        ("Metric", comparison.metric),
        ("Questions", " or ".join(map(str, numbers)) or "0"),
        ("Seed", str(comparison.seed)),
        ("Settings", ", ".join(f"{k} = {v}" for k, v in comparison.settings.items())),
        ("Versions", ", ".join(f"{k} {v}" for k, v in comparison.versions.items())),
        ("Machine", comparison.machine),
    ]


def solo_speeds(comparison: Comparison) -> list[tuple[str, float, float]]:
    """Per model that ran alone: its name, tokens per second, and seconds per forward pass."""
    solos = []
    for row in comparison.rows:
        if row.kind == "model":
            forwards = sum(use.forwards for use in row.uses)
            seconds = sum(use.seconds for use in row.uses)
            each = seconds / forwards if forwards else 0.0
            solos.append((row.name, row.tokens_per_second, each))
    return solos


def as_markdown(comparison: Comparison) -> str:
    """The whole table with how it was measured, as Markdown that ends with a newline."""
    models = " / ".join(map(markup, comparison.models))
    mixes = any(row.n_mixed for row in comparison.rows)
    heads = [
        "",
        f"{markup(comparison.metric)}, % (95 %)",
        "gain over the best model, points (95 %)",
        "p",
        f"written by {models}{' / together' * mixes}, %",
        "tokens/s",
        "cost per token",
        f"forwards of {models}",
        *[f"HTTP calls per token (of {models})"] * comparison.has_calls,
    ]
    winners = best(comparison.rows)
    lines = [
        f"# {markup(comparison.ensemble)} on {markup(comparison.task)}",
        markup(headline(comparison)),
        "\n".join(
            [
                _line(heads),
                _line(["---", *["--:"] * (len(heads) - 1)]),
                *(
                    _line(_cells(row, winners, mixes) + _calls(row) * comparison.has_calls)
                    for row in in_order(comparison.rows)
                ),
            ]
        ),
        "Bold: the best of its column, without the oracle; speed and cost among rows of several "
        f"models. A forward pass{' or an HTTP call' * comparison.has_calls} counts once however "
        "many texts it served.",
        *_notes(comparison),
        "\n".join(["## How it was measured", "", *_bullets(facts(comparison))]),
        *_speeds(comparison),
        *_warnings(comparison),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def markup(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _MARKUP.sub(lambda match: "\\" + match[0], visible(text.replace("\n", " ")))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: RowResult, winners: dict[str, set[str]], mixes: bool) -> list[str]:
    def bold(column: str, text: str) -> str:
        return f"**{text}**" if row.name in winners[column] else text

    quality = bold("quality", percent(row.quality))
    name = ("↳ " if row.kind in ("random", "sweep") else "") + markup(row.name)
    cells = [name, f"{quality} ({percent(row.low)} to {percent(row.high)})"]
    if row.gain is None:
        cells += ["", ""]
    else:
        span = ""
        if row.gain_low is not None and row.gain_high is not None:
            span = f" ({points(row.gain_low)} to {points(row.gain_high)})"
        cells += [bold("gain", points(row.gain)) + span, p_value(row.p_value).removeprefix("p = ")]
        cells[-1] = cells[-1].removeprefix("p ")
    if not row.uses:
        return [*cells, "", "", "", ""]
    shares = slices(row) if mixes else slices(row)[:-1]
    return [
        *cells,
        " / ".join(map(percent, shares)),
        bold("speed", f"{row.tokens_per_second:.1f}"),
        bold("cost", f"{row.cost:.2f}"),
        " / ".join(f"{use.forwards:,}" for use in row.uses),
    ]


def _calls(row: RowResult) -> list[str]:
    """A cell: HTTP calls per written token, of all models and of each."""
    if row.calls_per_token is None:
        return [""]
    each = [f"{(use.calls or 0) / row.n_tokens:.2f}" for use in row.uses]
    return [f"{row.calls_per_token:.2f} ({' / '.join(each)})"]


def _bullets(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [f"- {markup(name)}: {markup(value)}" for name, value in pairs if value]


def _notes(comparison: Comparison) -> list[str]:
    notes = [(row.name, row.note) for row in noted(comparison)]
    return ["\n".join(_bullets(notes))] if notes else []


def noted(comparison: Comparison) -> list[RowResult]:
    """The rows whose notes are shown; those of lotteries and sweeps are in ``results.json``."""
    shown = ("model", "policy", "oracle")
    return [row for row in in_order(comparison.rows) if row.note and row.kind in shown]


def _speeds(comparison: Comparison) -> list[str]:
    solos = solo_speeds(comparison)
    if not solos:
        return []
    rows = [_line([markup(name), f"{tps:.1f}", f"{1000 * each:.2f}"]) for name, tps, each in solos]
    heads = ["model alone", "tokens/s", "milliseconds per forward"]
    table = "\n".join([_line(heads), _line(["---", "--:", "--:"]), *rows])
    return ["## Every model alone, in the same run", table]


def _warnings(comparison: Comparison) -> list[str]:
    if not comparison.warnings:
        return []
    return ["\n".join(["## Warnings", "", *(f"- {markup(text)}" for text in comparison.warnings)])]

"""The rows of a comparison in the order of reading, and as a Markdown table.

The table is what one pastes into a README or a paper's repository; the numbers of the page are
worded by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multicolm.evaluation.findings import alone_name, best_alone, findings
from multicolm.evaluation.results import Comparison, RowResult
from multicolm.evaluation.wording import markup, p_value, percent, points

__all__ = [
    "as_markdown",
    "best",
    "facts",
    "gain_over",
    "has_holm",
    "in_order",
    "noted",
    "slices",
    "solo_speeds",
]


def in_order(rows: Sequence[RowResult]) -> list[RowResult]:
    """Models, then every policy followed by what belongs to it, then the oracles.

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

    Rivals are models alone and policies as they were given: no oracle, no random baseline, and no
    other threshold, which would be picked on these questions. Speed and cost are compared among
    policies only: the smallest model alone would always win them. Where all are equal nobody is
    best, and a gain has to show in the first decimal.
    """
    policies = [row for row in rows if row.kind == "policy"]
    rivals = [row for row in rows if row.kind == "model"] + policies

    def names(among: Sequence[RowResult], value: Callable[[RowResult], float]) -> set[str]:
        values = {value(row) for row in among}
        return {row.name for row in among if len(values) > 1 and value(row) == max(values)}

    def gain(row: RowResult) -> float:
        return row.gain or 0.0

    return {
        "quality": names(rivals, lambda row: row.quality),
        "gain": {row.name for row in rivals if gain(row) >= 0.0005} & names(rivals, gain),
        "speed": names(policies, lambda row: row.tokens_per_second),
        "cost": names(policies, lambda row: -row.cost),
    }


def gain_over(comparison: Comparison) -> str:
    """Heading of the gains: over which model alone."""
    alone = best_alone(comparison)
    return "gain" if alone is None else f"gain over {alone_name(alone)}"


def has_holm(comparison: Comparison) -> bool:
    """Whether p-values were corrected for several policies, so that there are two of each."""
    return sum(row.p_holm is not None for row in comparison.rows) > 1


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
        ("Intervals (95 %)", comparison.intervals),
        ("Seed", str(comparison.seed)),
        ("Settings", ", ".join(f"{k} = {v}" for k, v in comparison.settings.items())),
        ("Versions", ", ".join(f"{k} {v}" for k, v in comparison.versions.items())),
        ("Machine", comparison.machine),
        ("Speed", comparison.timing),
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
    mixes = _mixes(comparison)
    heads = [
        "",
        f"{markup(comparison.metric)}, % (95 %)",
        f"{markup(gain_over(comparison))}, points (95 %)",
        "p",
        *["p (Holm)"] * has_holm(comparison),
        f"written by {models}{' / together' * mixes}, %",
        "tokens/s",
        "cost per token",
        f"forwards of {models}",
        *[f"HTTP calls per token (of {models})"] * comparison.has_calls,
    ]
    winners = best(comparison.rows)
    lines = [
        f"# {markup(comparison.ensemble)} on {markup(comparison.task)}",
        *map(markup, findings(comparison)),
        "\n".join(
            [
                _line(heads),
                _line(["---", *["--:"] * (len(heads) - 1)]),
                *(
                    _line(_cells(row, comparison, winners) + _calls(row) * comparison.has_calls)
                    for row in in_order(comparison.rows)
                ),
            ]
        ),
        "Bold: the best of its column, among models alone and policies; speed and cost among "
        f"policies. A forward pass{' or an HTTP call' * comparison.has_calls} counts once however "
        "many texts it served.",
        *_notes(comparison),
        "\n".join(["## How it was measured", "", *_bullets(facts(comparison))]),
        *_speeds(comparison),
        *_warnings(comparison),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mixes(comparison: Comparison) -> bool:
    return any(row.n_mixed for row in comparison.rows)


def _cells(row: RowResult, comparison: Comparison, winners: dict[str, set[str]]) -> list[str]:
    def bold(column: str, text: str) -> str:
        return f"**{text}**" if row.name in winners[column] else text

    quality = bold("quality", percent(row.quality))
    name = ("↳ " if row.kind in ("random", "sweep") else "") + markup(row.name)
    cells = [name, f"{quality} ({percent(row.low)} to {percent(row.high)})"]
    gain = "" if row.gain is None else bold("gain", points(row.gain))
    if row.gain_low is not None and row.gain_high is not None:
        gain += f" ({points(row.gain_low)} to {points(row.gain_high)})"
    p_values = [row.p_value, *[row.p_holm] * has_holm(comparison)]
    cells += [gain, *(p_value(p).removeprefix("p = ").removeprefix("p ") for p in p_values)]
    if not row.uses:
        return [*cells, "", "", "", ""]
    shares = slices(row) if _mixes(comparison) else slices(row)[:-1]
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
    """The rows whose notes are shown; the others' are in ``results.json``."""
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

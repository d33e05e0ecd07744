"""A comparison as one HTML file that loads nothing and runs nothing but its own script.

What models wrote is never trusted. On the page it is escaped text, with control characters
made visible. For the script it is in blocks of JSON in which every ``<`` is escaped, so that no
text can end its block; the script puts it on the page as text nodes only. A Content-Security-Policy
allows the one style and the one script by their hashes, and no network at all.

Every answer's tokens are a block of their own, read when somebody looks at it: a page of thousands
of answers opens as fast as one of ten.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from multicolm.evaluation.findings import best_alone, findings, routing_verdict
from multicolm.evaluation.harness_results import HarnessResults, figure_text, leaders
from multicolm.evaluation.results import Comparison, RowResult, ShownToken, TracedAnswer
from multicolm.evaluation.table import (
    best,
    facts,
    gain_over,
    has_holm,
    in_order,
    noted,
    slices,
    solo_speeds,
)
from multicolm.evaluation.wording import p_value, percent, plain, points, visible
from multicolm.types import MIXTURE

__all__ = ["as_page"]

_N_COLOURS = 6
_N_UNDERLINES = 4


def as_page(
    comparison: Comparison,
    traces: Sequence[TracedAnswer],
    harness: HarnessResults | None = None,
) -> str:
    """The whole page; equal inputs give equal pages.

    Args:
        comparison: what the table says.
        traces: the answers to show token by token.
        harness: figures of the lm-evaluation-harness, for a section of their own.
    """
    css, js = _file("page.css"), _file("page.js")
    title = f"{comparison.ensemble} on {comparison.task}"
    return _filled(
        _file("page.html"),
        {
            "csp": _policy(css, js),
            "title": _text(title),
            "css": css,
            "findings": "".join(f"<p>{_text(text)}</p>" for text in findings(comparison)),
            "verdict": _text(routing_verdict(comparison)),
            "legend": _legend(comparison),
            "warnings": _warnings(comparison),
            "heads": _heads(comparison),
            "rows": "\n".join(_rows(comparison)),
            "notes": _notes(comparison),
            "harness": "" if harness is None else _harness(harness),
            "facts": "".join(
                f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>"
                for name, value in facts(comparison)
                if value
            ),
            "solo": _solo(comparison),
            "data": _data(comparison, traces),
            "js": js,
        },
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """A template with its ``{{names}}`` replaced, once: what is put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _policy(css: str, js: str) -> str:
    def allowed(text: str) -> str:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return (
        f"default-src 'none'; style-src {allowed(css)}; script-src {allowed(js)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _text(text: str) -> str:
    """Text that HTML shows as it is, also inside of an attribute."""
    return html.escape(visible(text))


def _writer_class(index: int | None) -> str:
    """Colour and underline of a writer; the base model has neither, ``None`` is all together."""
    if index is None:
        return "wx ux"
    if index == 0:
        return "w0"
    return f"w{(index - 1) % _N_COLOURS + 1} u{(index - 1) % _N_UNDERLINES + 1}"


def _legend(comparison: Comparison) -> str:
    items = []
    for i, (name, identity, cost) in enumerate(
        zip(comparison.models, comparison.identities, comparison.costs, strict=True)
    ):
        role = "base model" if i == 0 else "assistant"
        known = f'<span class="visually-hidden"> {_text(identity)},</span>' if identity else ""
        items.append(
            f'<li title="{_text(identity)}"><span class="swatch {_writer_class(i)}">{_text(name)}'
            f"</span> <small>{role},{known} cost {cost:g}</small></li>"
        )
    if any(row.n_mixed for row in comparison.rows):
        items.append(
            f'<li><span class="swatch {_writer_class(None)}">together</span> '
            "<small>several at once</small></li>"
        )
    return "".join(items)


def _warnings(comparison: Comparison) -> str:
    if not comparison.warnings:
        return ""
    items = "".join(f"<li>{_text(warning)}</li>" for warning in comparison.warnings)
    return (
        '<section class="warnings" role="note" aria-labelledby="warnings-title">'
        f'<h2 id="warnings-title">Before you trust a number</h2><ul>{items}</ul></section>'
    )


def _notes(comparison: Comparison) -> str:
    rows = noted(comparison)
    return "".join(
        f'<p class="note"><b>{_text(row.name)}</b>: {_text(row.note)}</p>' for row in rows
    )


def _heads(comparison: Comparison) -> str:
    names = [
        "row",
        f"{comparison.metric}, %",
        f"{gain_over(comparison)}, points",
        "written by",
        "tokens/s",
        "cost/token",
        "forwards",
        *["HTTP calls/token"] * comparison.has_calls,
    ]
    ticks = "".join(f"<span>{tick}</span>" for tick in (0, 50, 100))
    scale = f'<span class="scale" aria-hidden="true">{ticks}</span>'
    cells = (
        f'<th scope="col"><button type="button">{_text(name)}</button>{scale * (i == 1)}</th>'
        for i, name in enumerate(names)
    )
    return f"<tr>{''.join(cells)}</tr>"


def _rows(comparison: Comparison) -> list[str]:
    winners = best(comparison.rows)
    alone = best_alone(comparison)
    places = {row.name: i for i, row in enumerate(comparison.rows)}
    return [
        f'<tr class="{row.kind}" data-row="{places[row.name]}">'
        f"{_name_cell(row)}{''.join(_cells(row, comparison, winners, alone))}</tr>"
        for row in in_order(comparison.rows)
    ]


def _name_cell(row: RowResult) -> str:
    is_said = row.kind != "model" or row.name.endswith(" alone")
    kind = "" if is_said else ' <span class="kind">alone</span>'
    name = _text(row.name)
    # Long names break where their parts do, and not within a word.
    broken = re.sub("([-/_])", r"\1<wbr>", name)
    return f'<th scope="row" data-value="{name}" title="{name}">{broken}{kind}</th>'


def _cells(
    row: RowResult,
    comparison: Comparison,
    winners: Mapping[str, set[str]],
    alone: RowResult | None,
) -> list[str]:
    def number(column: str, value: float, text: str, below: str = "") -> str:
        top = ' class="best"' if row.name in winners.get(column, ()) else ""
        sub = f'<span class="sub">{below}</span>' if below else ""
        return f'<td data-value="{value!r}"><span{top}>{text}</span>{sub}</td>'

    interval = f"{percent(row.low)} to {percent(row.high)}"
    bar = _interval(row, alone)
    cells = [number("quality", row.quality, percent(row.quality), f"{bar}{interval}")]
    if row.gain is None:
        cells.append("<td></td>")
    else:
        span = [] if row.gain_low is None or row.gain_high is None else [_span(row)]
        p_values = [p_value(row.p_value)]
        if row.p_holm is not None and has_holm(comparison):
            p_values.append(f"Holm {p_value(row.p_holm)}")
        below = ", ".join([*span, *map(_text, filter(None, p_values))])
        cells.append(number("gain", row.gain, points(row.gain), below))
    if not row.uses:
        return [*cells, *["<td></td>"] * (4 + comparison.has_calls)]
    return [
        *cells,
        _shares(row, comparison),
        number("speed", row.tokens_per_second, f"{row.tokens_per_second:.1f}"),
        number("cost", row.cost, f"{row.cost:.2f}"),
        _forwards(row),
        *[_calls(row)] * comparison.has_calls,
    ]


def _span(row: RowResult) -> str:
    assert row.gain_low is not None and row.gain_high is not None
    return f"{points(row.gain_low)} to {points(row.gain_high)}"


def _interval(row: RowResult, alone: RowResult | None) -> str:
    """A quality with its interval as a small bar from 0 to 100 %, on the axis of the heading."""
    width = 112
    mark = 0.0 if alone is None else width * alone.quality
    line = f'<rect class="mark" x="{mark - 0.5:.1f}" width="1" height="10"/>' if alone else ""
    left, long = width * row.low, max(1.0, width * (row.high - row.low))
    return (
        f'<svg class="interval" width="{width}" height="10" aria-hidden="true">'
        f'<rect class="rail" y="3" width="{width}" height="4" rx="2"/>'
        f'<rect class="span" x="{left:.1f}" y="3" width="{long:.1f}" height="4" rx="2"/>{line}'
        f'<circle class="mean" cx="{width * row.quality:.1f}" cy="5" r="3"/></svg>'
    )


def _shares(row: RowResult, comparison: Comparison) -> str:
    """Who wrote the tokens: a bar, and the numbers below it."""
    names = [*comparison.models, "together"]
    writers: list[int | None] = [*range(len(comparison.models)), None]
    parts, said, left = [], [], 0.0
    for share, name, writer in zip(slices(row), names, writers, strict=True):
        colour = _writer_class(writer).split()[0]
        if share > 0:
            parts.append(
                f'<rect class="bar {colour}" x="{120 * left:.1f}" '
                f'width="{max(0.5, 120 * share - 1):.1f}" height="9" rx="1.5"/>'
            )
            said.append(
                f'<span class="swatch {colour}" title="{_text(name)}">{percent(share)}</span>'
            )
        left += share
    label = ", ".join(
        f"{_text(name)} {percent(share)} %"
        for name, share in zip(names, slices(row), strict=True)
        if share > 0
    )
    return (
        f'<td data-value="{row.assistant_share!r}">'
        f'<svg class="shares" width="120" height="9" role="img" aria-label="{label}">'
        f'{"".join(parts)}</svg><span class="sub" aria-hidden="true">{" · ".join(said)}</span></td>'
    )


def _forwards(row: RowResult) -> str:
    total = sum(use.forwards for use in row.uses)
    each = _each(row, [f"{use.forwards:,}" for use in row.uses])
    return f'<td data-value="{total}">{total:,}<span class="sub">{each}</span></td>'


def _calls(row: RowResult) -> str:
    """HTTP calls per written token, of all models and of each."""
    total = row.calls_per_token
    if total is None:
        return "<td></td>"
    each = _each(row, [f"{(use.calls or 0) / row.n_tokens:.2f}" for use in row.uses])
    return f'<td data-value="{total!r}">{total:.2f}<span class="sub">{each}</span></td>'


def _each(row: RowResult, texts: Sequence[str]) -> str:
    """A number of each model, in its colour."""
    return " · ".join(
        f'<span class="swatch {_writer_class(i).split()[0]}" title="{_text(use.model)}">'
        f"{text}</span>"
        for i, (use, text) in enumerate(zip(row.uses, texts, strict=True))
    )


def _solo(comparison: Comparison) -> str:
    rows = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{speed:.1f}</td><td>{1000 * each:.2f}</td></tr>'
        for name, speed, each in solo_speeds(comparison)
    )
    if not rows:
        return ""
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("model", "tokens/s", "ms per forward")
    )
    return (
        "<h3>Every model alone, in the same run</h3>"
        f'<table class="small"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    )


def _harness(results: HarnessResults) -> str:
    """Figures of the lm-evaluation-harness, one line each."""
    rows = []
    for column in results.columns():
        best = leaders(column)
        for figure in column:
            texts = (figure.label, figure.row, figure.likelihood, str(figure.n_questions or ""))
            cells = "".join(f"<td>{_text(text)}</td>" for text in texts)
            top = ' class="best"' if figure in best else ""
            rows.append(
                f'<tr><th scope="row">{_text(figure.task)}</th>{cells}'
                f"<td><span{top}>{_text(figure_text(figure))}</span></td></tr>"
            )
    names = ("task", "metric", "row", "likelihood", "questions", "figure")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    facts_ = "".join(
        f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in results.facts() if value
    )
    notes = "".join(f'<p class="note">{_text(warning)}</p>' for warning in results.warnings)
    return (
        '<section aria-labelledby="harness-title" id="harness">'
        '<h2 id="harness-title" tabindex="-1">Tasks of the lm-evaluation-harness</h2>'
        '<p class="hint">Marked figures are the best of their task and metric. '
        f"{_text(results.on_errors)}</p>"
        '<div class="scroll" role="region" aria-labelledby="harness-title" tabindex="0">'
        f'<table class="small"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f'</table></div>{notes}<dl class="facts">{facts_}</dl></section>'
    )


def _data(comparison: Comparison, traces: Sequence[TracedAnswer]) -> str:
    """The blocks of JSON: one for the page, and one per answer for its tokens."""
    questions: dict[tuple[str, str, str], int] = {}
    for answer in traces:
        questions.setdefault((answer.question, answer.prompt, answer.gold), len(questions))
    places = {row.name: i for i, row in enumerate(comparison.rows)}
    shared = {
        "metric": comparison.metric,
        "models": comparison.models,
        "writers": [_writer_class(i) for i in range(len(comparison.models))],
        "mixture": _writer_class(None),
        "rows": [_row_data(row) for row in comparison.rows],
        "questions": list(questions),
        "answers": [
            [
                places[answer.row],
                questions[answer.question, answer.prompt, answer.gold],
                answer.quality,
                answer.finish_reason,
                answer.text,
                len(answer.tokens),
            ]
            for answer in traces
        ],
    }
    blocks = [_block("data", plain(shared))]
    for i, answer in enumerate(traces):
        tokens = [_token(token, comparison.models) for token in answer.tokens]
        blocks.append(_block(f"answer-{i}", tokens))
    return "\n".join(blocks)


def _block(name: str, value: Any) -> str:
    # The tree builder ends a script at "</script" and changes its mind at "<!--": no "<", neither.
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _row_data(row: RowResult) -> dict[str, Any]:
    return {
        "name": row.name,
        "kind": row.kind,
        "of": row.of,
        "quality": row.quality,
        "low": row.low,
        "high": row.high,
        "cost": row.cost,
        "speed": row.tokens_per_second,
        "gain": row.gain,
        "shares": slices(row),
        "point": dict(row.point),
    }


def _token(token: ShownToken, models: Sequence[str]) -> list[Any]:
    """One token, compactly: text, writer, logprob, score, per model what it thought, policy.

    The writer is an index into the models, or -1 for all of them together.
    """
    writer = -1 if token.model == MIXTURE else models.index(token.model)
    views = [token.models.get(name) for name in models]
    looks = [
        None
        if view is None
        else [
            _short(view.get("logprob")),
            [[text, _short(chance)] for text, chance in view.get("top", ())],
        ]
        for view in views
    ]
    chances = [_short(token.policy.get(name)) for name in models]
    return [
        token.text,
        writer,
        _short(token.logprob),
        _short(token.score),
        looks if any(look is not None for look in looks) else [],
        chances if token.policy else [],
    ]


def _short(value: float | None) -> float | str | None:
    """A number for the page: five digits are more than anybody reads, and JSON has no infinity."""
    if value is None or math.isfinite(value):
        return None if value is None else float(f"{value:.5g}")
    return str(value)

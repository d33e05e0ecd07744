"""``multicolm validate``."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import click

from multicolm.cli.options import (
    as_json,
    examples,
    json_option,
)

if TYPE_CHECKING:
    from multicolm.config.validation import Report

__all__ = ["command"]


@click.command(
    epilog=examples(
        "validate duo.yaml",
        "validate tiny-mixed --load",
    )
)
@click.argument("sources", metavar="FILE_OR_NAME...", nargs=-1, required=True)
@click.option("--load", "loads", is_flag=True, help="Load the models of an ensemble too.")
@json_option
@click.pass_context
def command(ctx: click.Context, sources: tuple[str, ...], loads: bool, as_json_: bool) -> None:
    """Check ensembles, policies and tasks without loading a model.

    What was checked is printed. Nothing is fetched, so models of the Hub are not looked up. With
    --load an ensemble is loaded: what each model is and what its server can do is printed, how each
    two of them hand over to each other, and where tokenizers with the same vocabulary split text
    differently.
    """
    reports = [_checked(source) for source in sources]
    for report in reports if loads else ():
        if report.kind == "ensemble" and not report.errors:
            _load(report)
    for report in reports:
        if as_json_:
            click.echo(as_json(report.as_json()))
            continue
        click.echo(f"{report.source}: {'not ok' if report.errors else 'ok'}")
        for sign, lines in (
            ("checked", report.checked),
            ("warning", report.warnings),
            ("error", report.errors),
        ):
            for line in lines:
                click.echo(f"  {sign}  {line}")
    if any(report.errors for report in reports):
        ctx.exit(2)


def _checked(source: str) -> Report:
    """What is known of a source without loading anything."""
    from multicolm.config import Report, validate
    from multicolm.config.validation import is_task
    from multicolm.errors import MulticolmError

    if not is_task(source):
        return validate(source)
    from multicolm.evaluation.task import load_task

    report = Report(source, "task")
    try:
        task = load_task(source)
        splits = ", ".join(task.config.data)
        report.checked.append(f"task {task.name}: fields, metric {task.config.metric.kind}")
        report.checked.append(f"data: {splits}; not read")
    except MulticolmError as error:
        report.errors.extend(str(error).split("\n"))
    return report


def _load(report: Report) -> None:
    """Add what is known of an ensemble once it is loaded."""
    import multicolm
    from multicolm.backend.described import described
    from multicolm.errors import MulticolmError, MulticolmWarning
    from multicolm.tokenizer.agreement import differences

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MulticolmWarning)
            ensemble = multicolm.load(report.source)
    except MulticolmError as error:
        report.errors.extend(str(error).split("\n"))
        return
    said = (w.message for w in caught if issubclass(w.category, MulticolmWarning))
    report.warnings.extend(map(str, said))
    report.checked.append(f"loaded {len(ensemble.models)} models")
    report.checked.extend(
        f"model {m.name}: {line}"
        for m in ensemble.backends
        for line in (*described(m), *m.abilities)
    )
    report.warnings.extend(f"model {m.name}: {w}" for m in ensemble.backends for w in m.warnings)
    tokenizers = {model.name: model.tokenizer for model in ensemble.backends}
    for pair in ensemble.bridges:
        report.checked.append(f"bridge {pair}")
        if pair.bridge == "shared":
            found = differences(tokenizers[pair.one], tokenizers[pair.other])
            report.warnings.extend(f"{pair.one} - {pair.other}: '{pair.one}' {f}" for f in found)

"""What several verbs have in common: their options, and how an ensemble is loaded."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.shell_completion import CompletionItem

from multicolm.errors import ConfigError
from multicolm.numbers import check_number, check_whole

if TYPE_CHECKING:
    from multicolm.config import EnsembleConfig
    from multicolm.ensemble import Ensemble
    from multicolm.policy.base import Policy

__all__ = [
    "SEED",
    "DryRun",
    "Real",
    "Whole",
    "as_json",
    "completes",
    "dry_run_option",
    "ensemble_argument",
    "examples",
    "json_option",
    "load",
    "loading",
    "parameters",
    "policy_options",
    "quiet_transfers",
    "telling",
    "writing_options",
]

F = TypeVar("F", bound=Callable[..., Any])


class Whole(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A whole number that is refused as an option, before anything is read or loaded.

    Args:
        least: the smallest that is allowed.
        below: the smallest that is too large.
    """

    name = "integer"

    def __init__(self, least: int, below: int | None = None) -> None:
        self._least = least
        self._below = below

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """See :class:`click.ParamType`.

        Raises:
            InputError: if it is out of range.
        """
        number = click.INT.convert(value, param, ctx)
        return check_whole(param.name, number, least=self._least, below=self._below)


class Real(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A finite number, checked as :class:`Whole` is; ranges as of :func:`check_number`."""

    name = "float"

    def __init__(self, **limits: float) -> None:
        self._limits = limits

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """See :class:`click.ParamType`.

        Raises:
            InputError: if it is out of range.
        """
        number = click.FLOAT.convert(value, param, ctx)
        return check_number(param.name, number, **self._limits)


SEED = Whole(-(2**63), 2**63)
"""Of everything random, the statistics included."""


def examples(*commands: str, more: str = "") -> str:
    """The end of a verb's help.

    Args:
        commands: what one may type after ``multicolm``.
        more: paragraphs that follow.
    """
    lines = "".join(f"\n  multicolm {command}" for command in commands)
    return f"\b\nExamples:{lines}" + (more and f"\n\n{more}")


def completes(*kinds: str) -> Callable[..., list[CompletionItem]]:
    """Completes names of the catalogue, the last one of several with commas; else files.

    Args:
        kinds: of :data:`multicolm.catalog.Kind`.
    """

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from multicolm import catalog

        before, comma, begun = incomplete.rpartition(",")
        known = (name for kind in kinds for name in catalog.names(cast("catalog.Kind", kind)))
        found = [before + comma + name for name in known if name.startswith(begun)]
        return [CompletionItem(x) for x in found] or [CompletionItem(incomplete, type="file")]

    return complete


dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what it will take, and exit; nothing is written."
)


class DryRun(Exception):
    """What --dry-run was to find out is found out."""


def telling(dry_run: bool, out: Path) -> Callable[[object], None] | None:
    """What is done with an estimate: it is said, and with --dry-run nothing else is done.

    Args:
        dry_run: whether that was asked for.
        out: the folder of results; what is begun there needs no estimate any more.
    """

    def tell(estimate: object) -> None:
        from multicolm.cli.progress import say

        say(f"Ahead: {estimate}")
        if dry_run:
            raise DryRun

    begun = out.is_dir() and any(out.iterdir())
    return None if begun and not dry_run else tell


ensemble_argument = click.argument("ensemble", shell_complete=completes("ensembles"))

json_option = click.option("--json", "as_json_", is_flag=True, help="Print JSON instead of text.")


def parameters(pairs: tuple[str, ...], option: str = "--set") -> dict[str, Any]:
    """``("alpha=0.4",)`` as ``{"alpha": 0.4}``; values are read as in YAML.

    Args:
        pairs: as they were given.
        option: by which, for messages.

    Raises:
        ConfigError: if a pair has no ``=``, or its value is not readable.
    """
    from multicolm.config.document import Document

    read: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"{option} {pair}: write it as name=value, such as alpha=0.4.")
        try:
            read[name] = Document.parse(f"value: {value}", "").data["value"]
        except ConfigError as error:
            raise ConfigError(f"{option} {pair}: the value cannot be read as YAML.") from error
    return read


def policy_options(function: F) -> F:
    """``--policy`` and ``--set``."""
    for option in (
        click.option(
            "--set",
            "pairs",
            metavar="NAME=VALUE",
            multiple=True,
            help="A param of the policy, such as alpha=0.4. Repeatable.",
        ),
        click.option(
            "--policy",
            metavar="POLICY",
            shell_complete=completes("policies", "trained"),
            help="A name (see `multicolm ls policies`), a YAML file, a folder with a policy.yaml, "
            "or file.py:Class. [default: the ensemble's]",
        ),
    ):
        function = option(function)
    return function


def writing_options(function: F) -> F:
    """The settings of one call, as ``settings``; what is not given is the ensemble's."""
    options: list[tuple[str, dict[str, Any]]] = [
        ("--max-new-tokens", {"type": Whole(1), "help": "Maximum number of new tokens."}),
        ("--temperature", {"type": Real(least=0), "help": "Sampling temperature; 0 is greedy."}),
        ("--top-k", {"type": Whole(1), "help": "Sample from the K most likely tokens."}),
        (
            "--top-p",
            {
                "type": Real(above=0, most=1),
                "help": "Nucleus (top-p) cutoff.",
            },
        ),
        ("--seed", {"type": SEED, "help": "Random seed."}),
        (
            "--stop",
            {
                "multiple": True,
                "help": "Stop sequence; special tokens by name. Repeatable.",
            },
        ),
        (
            "--schedule",
            {
                "type": click.Choice(["stepwise", "block"]),
                "help": "Ask the policy token by token, or about blocks of drafted tokens.",
            },
        ),
        (
            "--block-size",
            {"type": Whole(1), "help": "Tokens that the base model drafts per block."},
        ),
        ("--threads", {"type": Whole(1, 1025), "help": "torch threads."}),
    ]
    names = [name.removeprefix("--").replace("-", "_") for name, _ in options]

    @functools.wraps(function)
    def gathered(**given: Any) -> Any:
        settings = {name: given.pop(name) for name in names}
        settings["stop"] = settings["stop"] or None
        return function(settings=settings, **given)

    decorated: Any = gathered
    for name, arguments in reversed(options):
        decorated = click.option(name, **arguments)(decorated)
    result: F = decorated
    return result


def load(source: str, policy: str | None, pairs: tuple[str, ...]) -> tuple[Ensemble, Policy]:
    """:func:`multicolm.load`, saying so on a terminal while it lasts; and the policy to use.

    Args:
        source: as for :func:`multicolm.load`.
        policy: of ``--policy``; the ensemble's own if not given.
        pairs: of ``--set``.

    Raises:
        MulticolmError: see :func:`multicolm.load` and :func:`parameters`.
    """
    import multicolm
    from multicolm.cli.processes import on_own_device
    from multicolm.cli.progress import working
    from multicolm.config import load_ensemble
    from multicolm.policy.resolve import resolve_policy
    from multicolm.views import ModelNames

    # First, so that a slip of the pen costs no import of torch and no loading of weights.
    config = on_own_device(load_ensemble(source))
    chosen = resolve_policy(policy or config.policy, parameters(pairs))
    chosen.needs(ModelNames(config.names))
    if any(model.backend == "transformers" for model in config.models.values()):
        from transformers.utils import logging

        # One bar per model, each drawn over the other, tells nobody anything.
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with working(loading(config)):
        return multicolm.load(config), chosen


def loading(config: EnsembleConfig) -> str:
    """What is said while an ensemble is loaded."""
    n_models = len(config.models)
    return f"loading {n_models} models" if n_models > 1 else f"loading {config.base_model}"


def quiet_transfers() -> None:
    """The bars of the Hub's library belong on a terminal, and in no log."""
    if not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


def as_json(value: Mapping[str, Any] | list[Any]) -> str:
    """One line of JSON; characters beyond ASCII stay as they are where stdout can show them."""
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    return json.dumps(value, ensure_ascii=encoding != "utf8", allow_nan=False)

"""The laws of the decode loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multicolm.ensemble import Ensemble
from multicolm.policy.base import Policy
from multicolm.testing.laws import LawBroken
from multicolm.types import Prompt

__all__ = ["check_removable", "check_routing"]


def check_routing(
    ensemble: Ensemble,
    prompts: Sequence[Prompt],
    policy: Policy | str | None = None,
    *,
    max_new_tokens: int = 24,
    temperatures: Sequence[float] = (0.0, 0.9),
    seed: int = 0,
) -> None:
    """How models are run changes nothing in the text.

    Laws: ``block`` equals ``stepwise`` for every block size; a batch equals its prompts one by one;
    equal seeds give equal texts; streamed pieces join to the text; a text does not depend on when
    it came, nor on who else came or left.

    Args:
        ensemble: the models.
        prompts: what to ask.
        policy: who writes; the ensemble's own if not given.
        max_new_tokens: length of the texts, in tokens.
        temperatures: greedy (0) and sampling.
        seed: of the draws.

    Raises:
        LawBroken: naming the law.
    """

    def write(some: Sequence[Prompt], **settings: Any) -> list[list[tuple[int, str]]]:
        settings = {"schedule": "stepwise", "max_new_tokens": max_new_tokens, **settings}
        return _write(ensemble, some, policy, seed, settings)

    for temperature in temperatures:
        plain = write(prompts, temperature=temperature)
        ways = {
            "equal seeds give equal texts": [write(prompts, temperature=temperature)],
            "a batch equals its prompts one by one": [
                [write([prompt], temperature=temperature)[0] for prompt in prompts]
            ],
            "rows that wait for a free slot are written as if alone": [
                write(prompts, temperature=temperature, batch_size=2)
            ],
            "a text does not depend on when it came nor on who left": [
                _come_and_go(ensemble, prompts, policy, seed, temperature, max_new_tokens)
            ],
            "block equals stepwise": [
                write(prompts, temperature=temperature, schedule="block", block_size=size)
                for size in (1, 2, 3, 8)
            ],
        }
        for law, others in ways.items():
            for other in others:
                _compare(law, plain, other, f"temperature {temperature}")


def _write(
    ensemble: Ensemble,
    prompts: Sequence[Prompt],
    policy: Policy | str | None,
    seed: int,
    settings: Any,
) -> list[list[tuple[int, str]]]:
    stream = ensemble.stream(prompts, policy, seed=seed, **settings)
    shown = [""] * len(prompts)
    for piece in stream:
        shown[piece.row] += piece.text
    for text, answer in zip(shown, stream.answers, strict=True):
        if text != answer.text:
            raise LawBroken("streamed pieces join to the text", f"{text!r} and {answer.text!r}.")
    return [[(token.id, token.model) for token in answer.trace] for answer in stream.answers]


def _come_and_go(
    ensemble: Ensemble,
    prompts: Sequence[Prompt],
    policy: Policy | str | None,
    seed: int,
    temperature: float,
    max_new_tokens: int,
) -> list[list[tuple[int, str]]]:
    """Texts that come one by one, each with another one beside it that leaves before its end."""
    live = ensemble.live(policy, n_slots=3)
    wanted = ensemble.generation.updated(
        {"temperature": temperature, "max_new_tokens": max_new_tokens}
    )
    rows = [live.row(prompt, number, wanted, seed) for number, prompt in enumerate(prompts)]
    for row in rows:
        beside = live.row(row.prompt, len(rows), wanted, seed + 1)
        live.add(row)
        live.add(beside)
        for _ in range(2):
            live.step()
        live.cancel(beside)
    while live.busy:
        live.step()
    return [[(token.id, token.model) for token in live.answer(row).trace] for row in rows]


def _compare(
    law: str,
    plain: Sequence[list[tuple[int, str]]],
    other: Sequence[list[tuple[int, str]]],
    at: str,
) -> None:
    for number, (one, two) in enumerate(zip(plain, other, strict=True)):
        if one != two:
            raise LawBroken(law, f"{at}, prompt {number + 1}: {one} became {two}.")


def check_removable(
    ensemble: Ensemble,
    prompts: Sequence[Prompt],
    model: str,
    policy: Policy | str | None = None,
    *,
    max_new_tokens: int = 24,
    seed: int = 0,
) -> None:
    """A model that is never chosen can be removed unnoticed.

    Args:
        ensemble: the models.
        prompts: what to ask.
        model: name of an assistant that writes nothing in answer to these prompts.
        policy: who writes; the ensemble's own if not given. Its roles and weights must go by name.
        max_new_tokens: length of the texts, in tokens.
        seed: of the draws.

    Raises:
        LawBroken: if the model did write, or the text changed without it.
    """
    chosen = ensemble.resolve(policy)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    with_it = ensemble.generate(prompts, chosen, **settings)
    if any(answer.trace.share(model) > 0 for answer in with_it):
        raise LawBroken("a model that is never chosen can be removed", f"'{model}' did write.")
    smaller = Ensemble([m for m in ensemble.backends if m.name != model])
    without = smaller.generate(prompts, chosen, **settings)
    for a, b in zip(with_it, without, strict=True):
        if [(t.id, t.model) for t in a.trace] != [(t.id, t.model) for t in b.trace]:
            raise LawBroken(
                "a model that is never chosen can be removed unnoticed",
                f"{a.text!r} became {b.text!r}.",
            )

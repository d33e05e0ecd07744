"""What a loaded model is, in sentences for users."""

from __future__ import annotations

from multicolm.backend.base import Model

__all__ = ["described"]


def described(model: Model) -> list[str]:
    """What a model is, what chats become, and which settings of its author are not used.

    Args:
        model: that is loaded.
    """
    facts = [model.architecture] if model.architecture else []
    if model.n_parameters:
        facts.append(f"{_amount(model.n_parameters)} parameters")
    facts.append(model.precision)
    if model.n_bytes:
        facts.append(f"{_amount(model.n_bytes)}B of weights")
    facts.append(f"{model.tokenizer.n_tokens:,} tokens")
    if model.context_length is not None:
        facts.append(f"context {model.context_length:,}")
    lines = [", ".join(facts), _ends(model)]
    if model.sampling_defaults:
        asked = ", ".join(f"{name} {value}" for name, value in model.sampling_defaults.items())
        lines.append(
            f"its author's generation settings ({asked}) are not used; `generation:` of the "
            "ensemble file says how texts are written"
        )
    return lines


def _ends(model: Model) -> str:
    tokenizer = model.tokenizer
    names = [tokenizer.piece(i) or str(i) for i in sorted(tokenizer.end_ids)]
    ends = f"ends a text with {' or '.join(names)}" if names else "never ends a text by itself"
    chats = "a chat template" if tokenizer.chat_template else "no chat template: chats are `plain`"
    return f"{ends}; {chats}"


def _amount(number: int) -> str:
    """A number with three digits that count, and a space before its unit."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} "

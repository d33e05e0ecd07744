"""What ensembles write with experts in engines is what they write with all models here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multicolm import Ensemble

__all__ = ["POLICIES", "QUESTIONS", "check_drawn_texts", "check_greedy_texts"]

QUESTIONS = [
    "Question: What does Dulerex treat?\nResponse:",
    "Question: Which illness does Loxid help with?\nResponse:",
    "Question: What is 3 ^ 2 + 4?\nResponse:",
    "Question: What is Dulerex made from?\nResponse:",
]
POLICIES: dict[str, Any] = {
    "co-llm": None,  # which is trained first
    "cosd-rule": "cosd-rule",
    "average": "average",
    "nudging": {"kind": "nudging", "params": {"threshold": 0.6, "nudger": "facts"}},
    "max-confidence": "max-confidence",
    "bild": {"kind": "bild", "params": {"rollback": 1.0}},
}


def check_greedy_texts(
    together: Ensemble, at_home: Ensemble, policy: str, co_llm: Path, schedule: Any
) -> None:
    """Equal texts by equal writers; prints how many requests they took."""
    chosen = POLICIES[policy] or str(co_llm)
    settings: dict[str, Any] = {"max_new_tokens": 48, "temperature": 0.0, "schedule": schedule}
    got = together.generate(QUESTIONS, chosen, **settings)
    want = at_home.generate(QUESTIONS, chosen, **settings)
    assert [answer.text for answer in got] == [answer.text for answer in want]
    assert [[t.model for t in a.trace] for a in got] == [[t.model for t in a.trace] for a in want]
    n_tokens = sum(len(answer.trace) for answer in got)
    calls = {name: usage.calls for name, usage in got.usage.items() if usage.calls}
    assert 0 < sum(calls.values()) <= 2 * n_tokens
    print(f"{policy}, {schedule}: {n_tokens} tokens, {sum(calls.values())} calls: {calls}")


def check_drawn_texts(together: Ensemble, at_home: Ensemble) -> None:
    """Equal texts by equal draws."""
    settings: dict[str, Any] = {"temperature": 0.9, "seed": 7, "max_new_tokens": 24}
    got = together.generate(QUESTIONS, "cosd-rule", **settings)
    want = at_home.generate(QUESTIONS, "cosd-rule", **settings)
    assert [answer.text for answer in got] == [answer.text for answer in want]

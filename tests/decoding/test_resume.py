"""A text that goes on behind tokens that stand already is the text that they begin."""

from __future__ import annotations

from typing import Any

import pytest
from live_worlds import MIXED_PROMPTS, PROMPTS, SETTINGS, mixed, tables

from multicolm import Ensemble
from multicolm.decoding.row import Row

POLICIES: list[Any] = [
    "single",
    "max-confidence",
    {"kind": "random", "params": {}},
    {"kind": "cosd-rule", "params": {"alpha": 0.6}},
]


def resumed(ensemble: Ensemble, policy: Any, prompt: str, before: Any, settings: Any) -> Row:
    live = ensemble.live(policy, n_slots=2)
    row = live.row(prompt, 0, ensemble.generation.updated(settings), 5)
    live.resume(row, before)
    if row.finish_reason is None:
        live.add(row)
        while live.busy:
            live.step()
    return row


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("world", [tables, mixed])
def test_a_text_resumed_behind_its_own_beginning_goes_on_as_it_did(world, policy, settings) -> None:
    ensemble = world()
    prompts = PROMPTS if world is tables else MIXED_PROMPTS
    # Also where the writer was drawn: chance depends on seed, prompt and place alone.
    for prompt in prompts[:3]:
        [whole] = ensemble.generate([prompt], policy, seed=5, **settings)
        tokens = [(token.id, ensemble.models.index(token.model)) for token in whole.trace]
        for n in range(len(tokens) + 1):
            row = resumed(ensemble, policy, prompt, tokens[:n], settings)
            assert [(new.token, new.writer) for new in row.written] == tokens
            assert row.text.text == whole.text and row.finish_reason == whole.finish_reason


def test_tokens_that_end_a_text_leave_nothing_to_be_written() -> None:
    ensemble = tables()
    end = min(ensemble.vocabulary.end_ids(0))
    row = resumed(ensemble, "single", "a", [(0, 0), (end, 0), (1, 0)], {"max_new_tokens": 9})
    assert row.finish_reason == "eos" and [new.token for new in row.written] == [0, end]
    row = resumed(ensemble, "single", "a", [(0, 0), (1, 1), (2, 1)], {"max_new_tokens": 2})
    assert row.finish_reason == "length" and len(row.written) == 2

"""One policy while a text thinks, another one while it answers."""

from __future__ import annotations

from typing import Any

import pytest
from thinkers import SETTINGS, thinker

from multicolm import Ensemble
from multicolm.errors import ConfigError
from multicolm.plugins import policies
from multicolm.testing import check_policy

BIG: Any = {"kind": "single", "params": {"model": "big"}}


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    """A small and a large model, of which the small one is surer of its answers."""
    unsure = {"2": {".": 0.6, "<end>": 0.4}}
    return Ensemble([thinker("small"), thinker("big", **unsure)])


def writers(ensemble: Ensemble, prompt: str = "Q", **params: Any) -> list[tuple[str, str]]:
    policy = {"kind": "phases", "params": params}
    [answer] = ensemble.generate([prompt], policy, **SETTINGS)
    return [(token.text, token.model) for token in answer.trace]


def test_it_keeps_the_laws() -> None:
    kind = policies.get("phases")
    check_policy(kind())
    check_policy(kind(think={"kind": "confidence", "params": {"threshold": 0.7}}, answer="random"))


@pytest.mark.parametrize("prompt", ["Q", "Q<think>"])
def test_thoughts_are_written_by_one_policy_and_answers_by_another(
    ensemble: Ensemble, prompt: str
) -> None:
    wrote = writers(ensemble, prompt, think=BIG, answer="max-confidence")
    end = [text for text, _ in wrote].index("</think>")
    assert {model for _, model in wrote[: end + 1]} == {"big"}
    assert wrote[-3:] == [("2", "small"), (".", "small"), ("<end>", "small")]
    turned = writers(ensemble, prompt, think="single", answer=BIG)
    assert [model for _, model in turned] == ["small"] * (end + 1) + ["big"] * 4


def test_the_policy_of_the_other_phase_runs_no_model(ensemble: Ensemble) -> None:
    policy = {"kind": "phases", "params": {"think": "single", "answer": BIG}}
    [answer] = ensemble.generate(["Q"], policy, **SETTINGS)
    # Six tokens of thoughts by the small one, with its prompt; the large one reads them once.
    assert answer.usage["small"].forwards == 6 and answer.usage["big"].forwards == 4


def test_the_text_is_the_same_in_every_batch_and_schedule(ensemble: Ensemble) -> None:
    policy = {"kind": "phases", "params": {"think": "confidence", "answer": "cosd-rule"}}
    prompts = ["Q", "Q<think>ab", "Qabcd</think>", "Q"]
    settings = {**SETTINGS, "temperature": 1.0, "seed": 3}
    texts = [
        [a.text for a in ensemble.generate(prompts, policy, **settings, **how)]
        for how in ({}, {"batch_size": 1}, {"schedule": "block"}, {"schedule": "stepwise"})
    ]
    assert texts[0] == texts[1] == texts[2] == texts[3]


def test_without_a_marker_texts_only_answer(ensemble: Ensemble) -> None:
    policy = {"kind": "phases", "params": {"think": BIG, "answer": "single"}}
    [answer] = ensemble.generate(["Q"], policy, max_new_tokens=20)
    assert {token.model for token in answer.trace} == {"small"}


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({"think": "average"}, "policy 'average' mixes, verifies or writes segments; within"),
        ({"answer": "r-stitch"}, "policy 'r-stitch' remembers something of a text; within"),
        ({"answer": "nudging"}, "policy 'nudging' remembers something of a text; within"),
        ({"think": "hm"}, "unknown policy 'hm'"),
        ({"think": {"kind": "single", "params": {"modle": 1}}}, "unknown key 'modle'"),
    ],
)
def test_a_policy_that_needs_more_than_its_place_is_refused(params: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=r"phases: (think|answer)") as caught:
        Ensemble([thinker("a")]).generate(["Q"], {"kind": "phases", "params": params})
    assert why in str(caught.value)

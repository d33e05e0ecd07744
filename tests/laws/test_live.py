"""Texts that come and go change nothing in each other, whatever the policy and the tokenizers."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import live_worlds
import pytest
import torch
from byte_worlds import Written, adapter
from live_worlds import LONG_PROMPTS, MIXED_PROMPTS, PROMPTS, SETTINGS, shown
from tables import READY

import multicolm
from multicolm import Answer, Ensemble
from multicolm.config import GenerationConfig
from multicolm.decoding.draft import Positions
from multicolm.decoding.live import Live
from multicolm.decoding.row import Row
from multicolm.decoding.sampling import Noise, Sampling
from multicolm.decoding.text import TextStream
from multicolm.types import TracedToken


@pytest.fixture(scope="module")
def tables() -> Ensemble:
    return live_worlds.tables()


@pytest.fixture(scope="module")
def mixed() -> Ensemble:
    return live_worlds.mixed()


@pytest.fixture(scope="module")
def cached() -> Ensemble:
    return live_worlds.cached()


class Crowd:
    """Texts that come at random rounds and leave at random rounds."""

    def __init__(self, live: Live, prompts: list[str], seed: int) -> None:
        self.chance = random.Random(seed)
        self.live = live
        self.rows: dict[int, Row] = {}
        self.asked: dict[int, tuple[str, dict[str, Any]]] = {}
        self.done: dict[int, Answer] = {}
        self.text: dict[int, str] = {}
        for number in range(3 * len(prompts)):
            prompt, settings = self.chance.choice(prompts), self.chance.choice(SETTINGS)
            self.asked[number] = (prompt, settings)
            wanted = GenerationConfig().updated(settings)
            self.rows[number] = live.row(prompt, number, wanted, seed=number)

    def run(self) -> list[int]:
        """Let all come and some go; returns those that left."""
        coming, left = list(self.rows), []
        while coming or self.live.busy:
            for _ in range(self.chance.choice([0, 0, 1, 3])):
                if coming:
                    self.live.add(self.rows[coming.pop(0)])
            for piece in self.live.step():
                self.text[piece.row] = self.text.get(piece.row, "") + piece.text
            for row in self.live.finished():
                self.done[row.number] = self.live.answer(row)
            under_way = [n for n in self.rows if n not in self.done and n not in (*coming, *left)]
            if under_way and self.chance.random() < 0.3:
                left.append(self.chance.choice(under_way))
                self.live.cancel(self.rows[left[-1]])
        return left


def check(ensemble: Ensemble, policy: Any, prompts: list[str], seed: int, n_slots: int = 3) -> None:
    live = ensemble.live(policy, n_slots=n_slots)
    crowd = Crowd(live, prompts, seed)
    left = crowd.run()
    assert left, "somebody has to leave"
    assert {*left, *crowd.done} == set(crowd.rows)
    assert not {*left} & set(crowd.done)
    for number, answer in crowd.done.items():
        prompt, settings = crowd.asked[number]
        [alone] = ensemble.generate([prompt], policy, seed=number, **settings)
        assert shown(answer) == shown(alone), (prompt, settings)
        assert crowd.text.get(number, "") == answer.text
    assert live.loop._slots.free == list(range(n_slots))
    assert live.loop._active == [] and not getattr(live.loop, "_drafted", [])


@pytest.mark.parametrize("kind", READY)
@pytest.mark.parametrize("schedule", ["stepwise", "block"])
def test_a_text_does_not_depend_on_who_comes_and_goes(
    tables: Ensemble, kind: str, schedule: Any
) -> None:
    ensemble = Ensemble(
        tables.backends, generation=GenerationConfig(schedule=schedule, block_size=4)
    )
    check(ensemble, kind, PROMPTS, seed=READY.index(kind))


@pytest.mark.parametrize(
    "kind", ["confidence", "cosd-rule", "cool-fusion", "max-confidence", "nudging", "unite"]
)
def test_nor_where_vocabularies_differ(mixed: Ensemble, kind: str) -> None:
    check(mixed, kind, MIXED_PROMPTS, seed=1)


@pytest.mark.parametrize("kind", ["confidence", "cosd-rule", "speculative", "average"])
def test_nor_where_models_have_caches(cached: Ensemble, kind: str) -> None:
    check(cached, kind, LONG_PROMPTS[:5], seed=2)


def test_texts_with_other_settings_share_forward_passes(tables: Ensemble) -> None:
    live = tables.live("average", n_slots=8)
    for number, settings in enumerate(SETTINGS):
        wanted = GenerationConfig().updated({**settings, "max_new_tokens": 1})
        live.add(live.row("a", number, wanted, seed=0))
    live.step()
    assert len(live.finished()) == len(SETTINGS)
    assert [usage.forwards for usage in live.usage.values()] == [1, 1, 1]


@pytest.mark.parametrize("schedule", ["stepwise", "block"])
def test_a_cancelled_text_gives_its_place_to_the_next_at_once(
    tables: Ensemble, schedule: Any
) -> None:
    generation = GenerationConfig(schedule=schedule)
    live = Ensemble(tables.backends, generation=generation).live("confidence", n_slots=1)
    wanted = GenerationConfig(max_new_tokens=40)
    first, second, third = (live.row("a", n, wanted, seed=0) for n in range(3))
    for row in (first, second, third):
        live.add(row)
    live.step()
    assert (first.slot, second.slot) == (0, -1)
    live.cancel(second)  # which waits
    live.cancel(first)  # which is being written
    live.step()
    assert third.slot == 0
    while live.busy:
        live.step()
    assert [row.number for row in live.finished()] == [2]
    live.cancel(third)  # which is done: nothing happens
    assert (
        live.answer(third).text == tables.generate(["a"], "confidence", max_new_tokens=40)[0].text
    )


@pytest.mark.parametrize("policy", ["confidence", "cosd-rule"])
def test_a_text_that_is_cancelled_in_any_round_leaves_no_draft_to_the_next_in_its_place(
    tables: Ensemble, policy: str
) -> None:
    generation = GenerationConfig(schedule="block", block_size=4)
    ensemble = Ensemble(tables.backends, generation=generation)
    wanted = GenerationConfig(schedule="block", block_size=4, max_new_tokens=24)
    alone = ensemble.generate(["b c", "d e"], policy, max_new_tokens=24)
    for n_rounds in range(1, 20):
        live = ensemble.live(policy, n_slots=2)
        vars(live.loop)["_enough"] = 1.0  # a draft that has ended waits for all others
        first, beside, after = (
            live.row(p, n, wanted, seed=n) for n, p in enumerate(("a", "b c", "d e"))
        )
        for row in (first, beside, after):
            live.add(row)
        for _ in range(n_rounds):
            live.step()
        live.cancel(first)
        kept = list(first.written)
        while live.busy:
            live.step()
        assert first.written == kept, f"written on in after it was cancelled in round {n_rounds}"
        for row, want in zip((beside, after), alone, strict=True):
            assert live.answer(row).text == want.text, n_rounds


def test_a_round_without_texts_does_nothing(tables: Ensemble) -> None:
    live = tables.live("confidence", n_slots=2)
    assert live.step() == [] and not live.busy
    assert all(usage.forwards == 0 for usage in live.usage.values())


@pytest.mark.parametrize(
    "policy", ["confidence", "cosd-rule", "cool-fusion", "byte-mixture", "chared"]
)
def test_its_caches_are_free_as_soon_as_nobody_holds_it(mixed: Ensemble, policy: str) -> None:
    gc.collect()
    gc.disable()
    try:
        live = mixed.live(policy)
        live.add(live.row("a", 0, GenerationConfig(max_new_tokens=3), seed=0))
        while live.busy:
            live.step()
        held = [weakref.ref(reader) for reader in live.loop.readers.opened.values()]
        assert held and all(ref() is not None for ref in held)
        del live
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()


def test_nor_do_keys_and_values_wait_for_the_garbage_collector(cached: Ensemble) -> None:
    gc.collect()
    gc.disable()
    try:
        live = cached.live("confidence")
        prompt = LONG_PROMPTS[0]
        live.add(live.row(prompt, 0, GenerationConfig(max_new_tokens=3), seed=0))
        while live.busy:
            live.step()
        held = [
            weakref.ref(layer.keys)
            for reader in live.loop.readers.opened.values()
            for layer in reader._session.inner._cache.layers
        ]
        assert held and all(ref() is not None for ref in held)
        del live
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()


def test_only_those_texts_report_a_seed_that_were_drawn_at_random(tables: Ensemble) -> None:
    live = tables.live("single", n_slots=2)
    rows = [
        live.row("a", number, GenerationConfig(temperature=temperature, max_new_tokens=3), seed=7)
        for number, temperature in enumerate((0.0, 1.0))
    ]
    for row in rows:
        live.add(row)
    while live.busy:
        live.step()
    assert [live.answer(row).seed for row in rows] == [None, 7]


@pytest.mark.parametrize("policy", ["byte-mixture", "chared", "max-confidence"])
def test_what_was_said_of_a_growing_text_is_never_taken_back(policy: str) -> None:
    ensemble = multicolm.load("tiny-mixed")
    live = ensemble.live(policy, n_slots=1)
    wanted = GenerationConfig(max_new_tokens=24)
    row = live.row("What is Dulerex made from?", 0, wanted, seed=0)
    live.add(row)
    said: list[TracedToken] = []
    counts = []
    while live.busy:
        live.step()
        said += live.tokens(row, len(said))
        counts.append(len(said))
    assert tuple(said) == live.answer(row).trace.tokens
    assert len(set(counts)) > 5  # it was said bit by bit


@pytest.mark.parametrize(
    ("policy", "tokenizer", "says"),
    [
        ("byte-mixture", "gpt2", "model 'other' cannot write the 1 bytes of this text"),
        ("chared", "llama2", "model 'other' puts all of its probability on special tokens"),
    ],
)
def test_a_text_that_one_model_cannot_follow_fails_alone(
    policy: str, tokenizer: str, says: str
) -> None:
    own = adapter(tokenizer)
    [a], [b], bad = map(own.encode_continuation, "ab!")
    [end] = own.end_ids
    unknown = 0

    def base(ids: tuple[int, ...]) -> dict[int, float]:
        return {a: 1.0} if ids.count(a) < 4 else {end: 1.0}

    def other(ids: tuple[int, ...]) -> dict[int, float]:
        if bad[0] not in ids:
            return base(ids)
        # What "a" is impossible for, and a special token that is no text and ends none.
        return {b: 1.0} if policy == "byte-mixture" else {unknown: 1.0}

    models = [Written(own, probs, n_prompt=0) for probs in (base, other)]
    models[0].name, models[1].name = "base", "other"
    live = Ensemble(models).live(policy, n_slots=3)
    wanted = GenerationConfig(max_new_tokens=12)
    rows = [live.row(text, i, wanted, seed=0) for i, text in enumerate(["a", "!", "b"])]
    for row in rows:
        live.add(row)
    failed = []
    while live.busy:
        live._runner.run([live.loop.step()])  # as the server does; step() raises what failed
        failed += live.failed()
    assert [row for row, _ in failed] == [rows[1]]
    assert says in str(failed[0][1])
    assert [set(live.answer(rows[i]).text) for i in (0, 2)] == [{"a"}, {"a"}]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_every_position_is_drawn_as_its_own_row_wants(order: list[int]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 9)
    samplings = [Sampling(), Sampling(1.0), Sampling(0.5, 2), Sampling(2.0, None, 0.7)]
    rows = [Row(i, "", [[1]], 10 + i, 0, 5, TextStream(), 1, samplings[i]) for i in range(4)]
    alone = [Positions([row], [3], Noise()) for row in rows]
    together = Positions([rows[i] for i in order], [3] * 4, Noise())
    lines = logits[order]
    tokens = torch.cat([alone[i].draw(logits[i : i + 1]) for i in order])
    assert torch.equal(together.draw(lines), tokens)
    probs = torch.cat([samplings[i].probs(logits[i : i + 1]) for i in order])
    assert torch.allclose(together.probs(lines), probs)
    jittered = torch.cat([alone[i].jittered(logits[i : i + 1], "residual") for i in order])
    assert torch.equal(together.jittered(lines, "residual"), jittered)
    assert torch.equal(jittered[order.index(0)], logits[0])

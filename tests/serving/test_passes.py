"""Policies over the same models run them together, and each writes what it writes alone."""

from __future__ import annotations

import gc
import math
import random
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import pytest
import torch
from expert_worlds import experts
from live_worlds import (
    LONG_PROMPTS,
    MIXED_PROMPTS,
    PROMPTS,
    SETTINGS,
    cached,
    mixed,
    shown,
    tables,
)

from multicolm import Answer, Ensemble, SelectPolicy, Views
from multicolm.backend.base import ModelOutput, Session
from multicolm.backend.passes import Passes, TokenQuery
from multicolm.backend.table import TableModel
from multicolm.config import GenerationConfig
from multicolm.decoding.live import Live
from multicolm.decoding.row import Row
from multicolm.decoding.runner import Runner


class OncePerText(SelectPolicy):
    """The base model's hidden state of the prompt names the model that writes the text."""

    name = "once-per-text"

    def prompt_states(self, models: Any) -> Any:
        return {0: frozenset({"last", "mean"})}

    def initial_state(self, views: Views) -> torch.Tensor:
        sure = views.prompt_hidden("base", "mean").sum(-1) + views.prompt_hidden().sum(-1) > 0
        return sure.long()[:, None]

    def select(self, views: Views) -> torch.Tensor:
        return views.state[:, 0]


class ByState(SelectPolicy):
    """Decides on the base model's last hidden state."""

    name = "by-state"
    base_signals: ClassVar[Any] = {"hidden"}
    assistant_signals: ClassVar[Any] = {"top1"}

    def select(self, views: Views) -> torch.Tensor:
        return (views.base.hidden.sum(-1) > 0).long()


TOP_1 = {"kind": "btm", "params": {"top_k": 1}}


def together(runner: Runner, lives: Sequence[Live]) -> None:
    runner.run([live.loop.step() for live in lives if live.busy])


@pytest.mark.parametrize(
    ("world", "prompts", "policies"),
    [
        (tables, PROMPTS, ["confidence", "average", "cosd-rule", "speculative", "single"]),
        (tables, PROMPTS, ["max-confidence", "nudging", "bild", "proxy-tuning", "random"]),
        (tables, PROMPTS, ["cool-fusion", "contrastive", "unite", "confidence", "mod"]),
        (tables, PROMPTS, ["btm", TOP_1, "spec-fuse", "confidence"]),
        (mixed, MIXED_PROMPTS, ["btm", TOP_1, "spec-fuse", "confidence"]),
        (mixed, MIXED_PROMPTS, ["confidence", "cosd-rule", "cool-fusion", "nudging"]),
        (mixed, MIXED_PROMPTS, ["byte-mixture", "chared", "unite", "max-confidence"]),
        (cached, LONG_PROMPTS[:5], ["confidence", "average", "speculative", ByState()]),
        (cached, LONG_PROMPTS[:5], ["btm", TOP_1, OncePerText(), "confidence"]),
        (experts, LONG_PROMPTS[:4], ["confidence", "average", "speculative", ByState(), "btm"]),
    ],
    ids=[
        "drafted",
        "lazy",
        "words",
        "text",
        "text-mixed",
        "mixed",
        "bytes",
        "cached",
        "text-cached",
        "experts",
    ],
)
@pytest.mark.parametrize("schedule", ["stepwise", "block"])
def test_other_texts_pauses_and_prompts_in_parts_change_nothing(
    world: Any, prompts: list[str], policies: list[Any], schedule: Any
) -> None:
    models = world().backends
    ensemble = Ensemble(models, generation=GenerationConfig(schedule=schedule, block_size=4))
    runner = Runner(ensemble.backends, 4, prompt_tokens=2)
    lives = [ensemble.live(policy, runner=runner) for policy in policies]
    chance, pausing = random.Random(len(prompts)), random.Random(1)
    coming: list[tuple[int, Row]] = []
    asked = []
    for number in range(4 * len(prompts)):
        k, prompt, settings = number % len(lives), chance.choice(prompts), chance.choice(SETTINGS)
        asked.append((policies[k], prompt, settings))
        wanted = GenerationConfig().updated(settings)
        coming.append((k, lives[k].row(prompt, number, wanted, seed=number)))
    under_way: list[tuple[int, Row]] = []
    done: dict[int, Answer] = {}
    n_left = 0
    while coming or any(live.busy for live in lives):
        for _ in range(chance.choice([0, 0, 1, 3])):
            if coming:
                k, row = coming.pop(0)
                lives[k].add(row)
                under_way.append((k, row))
        for _, row in under_way:
            row.is_paused = pausing.random() < 0.1
        together(runner, lives)
        for live in lives:
            done |= {row.number: live.answer(row) for row in live.finished()}
        under_way = [(k, row) for k, row in under_way if row.number not in done]
        if under_way and chance.random() < 0.15:
            k, row = under_way.pop(chance.randrange(len(under_way)))
            lives[k].cancel(row)
            n_left += 1
    assert n_left and len(done) + n_left == len(asked)
    for number, answer in done.items():
        policy, prompt, settings = asked[number]
        [alone] = ensemble.generate([prompt], policy, seed=number, **settings)
        assert shown(answer) == shown(alone), (policy, prompt, settings)
    assert runner.slots.free == list(range(4))


class Counted(Session):
    """How often it is fed, and how many rows at a time; it breaks when `broken` is set."""

    def __init__(self, inner: Session, name: str, fed: list[tuple[str, int]]) -> None:
        self._inner, self._name, self._fed = inner, name, fed
        self.broken = False

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]
        return self._inner.lengths

    def feed(self, rows: Any, tokens: Any, n_last: Any, *, hidden: bool = False) -> ModelOutput:
        if self.broken:
            raise RuntimeError("out of memory")
        assert list(rows) == sorted(set(rows))
        self._fed.append((self._name, len(rows)))
        return self._inner.feed(rows, tokens, n_last, hidden=hidden)

    def truncate(self, row: int, length: int) -> None:
        self._inner.truncate(row, length)


class Counting:
    """Two models that never end a text, and an account of their passes."""

    def __init__(self) -> None:
        self.fed: list[tuple[str, int]] = []
        self.sessions: list[Counted] = []
        counting = self

        class Model(TableModel):
            def open(self, n_rows: int) -> Session:
                session = Counted(super().open(n_rows), self.name, counting.fed)
                counting.sessions.append(session)
                return session

        even = {"": dict.fromkeys(("a", "b", "c"), 1 / 3)}
        self.ensemble = Ensemble(
            [Model(name, ("a", "b", "c", "."), even, ends=["."]) for name in ("base", "other")],
            generation=GenerationConfig(schedule="stepwise"),
        )
        self.runner = Runner(self.ensemble.backends, 6)

    def lives(self, policies: Sequence[str], n_tokens: int = 5) -> list[Live]:
        lives = [self.ensemble.live(policy, runner=self.runner) for policy in policies]
        wanted = GenerationConfig(max_new_tokens=n_tokens)
        for number, live in enumerate(lives):
            for row in range(2):
                live.add(live.row("a", 2 * number + row, wanted, seed=0))
        return lives


def test_a_model_is_run_once_for_all_policies_that_want_it() -> None:
    world = Counting()
    lives = world.lives(["average", "max-confidence", "cosd-rule"])
    while any(live.busy for live in lives):
        together(world.runner, lives)
    # Five tokens in six texts: five passes of each model, over all of them.
    assert Counter(world.fed) == {("base", 6): 5, ("other", 6): 5}
    assert len(world.sessions) == 2


@pytest.mark.parametrize("policy", ["average", "max-confidence"])
def test_a_text_grows_while_the_long_prompt_of_another_is_read_in_parts(policy: str) -> None:
    world = Counting()
    runner = Runner(world.ensemble.backends, 2, prompt_tokens=5)
    live = world.ensemble.live(policy, runner=runner)
    wanted = GenerationConfig(max_new_tokens=9)
    short, long = live.row("a", 0, wanted, seed=0), live.row("a" * 24, 1, wanted, seed=0)
    live.add(short)
    runner.run([live.loop.step()])
    live.add(long)
    while not long.written:
        before = len(short.written)
        runner.run([live.loop.step()])
        assert len(short.written) == before + 1
    assert len(short.written) == 5  # the prompt was read in four parts, and the last four tokens
    assert all(used.tokens_read in (0, 24) for used in long.usage)


def test_passes_are_counted_once_for_all_and_once_for_each_text() -> None:
    world = Counting()
    lives = world.lives(["average", "max-confidence"])
    while any(live.busy for live in lives):
        together(world.runner, lives)
    for name in world.ensemble.models:
        total = sum((live.usage[name] for live in lives[1:]), lives[0].usage[name])
        assert total.forwards == len([fed for fed in world.fed if fed[0] == name]) == 5
        assert total.seconds > 0
    answers = [live.answer(row) for live in lives for row in live.finished()]
    assert len(answers) == 4
    for answer in answers:
        assert [used.forwards for used in answer.usage.values()] == [5, 5]
        assert sum(used.tokens_read for used in answer.usage.values()) == 10


def test_a_model_that_breaks_costs_those_who_wanted_it_and_is_opened_anew() -> None:
    world = Counting()
    failed: list[str] = []

    def round_(name: str, live: Live) -> Passes[None]:
        try:
            yield from live.loop.step()
        except RuntimeError as error:
            failed.append(f"{name}: {error}")

    names = ["average", "max-confidence", "single"]
    lives = world.lives(names)  # the last one never runs the other model
    world.runner.run([round_(*each) for each in zip(names, lives, strict=True)])
    assert failed == [] and len(world.sessions) == 2
    world.sessions[1].broken = True
    world.runner.run([round_(*each) for each in zip(names, lives, strict=True)])
    assert failed == ["average: out of memory", "max-confidence: out of memory"]
    again = world.ensemble.live("average", runner=world.runner)
    again.add(again.row("a", 9, GenerationConfig(max_new_tokens=3), seed=0))
    while again.busy:
        world.runner.run([again.loop.step(), lives[2].loop.step()])
    assert len(again.finished()) == 1 and len(world.sessions) == 3


def test_a_model_that_breaks_under_one_policy_is_opened_anew() -> None:
    world = Counting()
    [live] = world.lives(["average"])
    world.runner.run([live.loop.step()])
    world.sessions[1].broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        world.runner.run([live.loop.step()])
    [again] = world.lives(["average"])
    while again.busy:
        world.runner.run([again.loop.step()])
    assert len(again.finished()) == 2 and len(world.sessions) == 3


@pytest.mark.parametrize("policies", [["average"], ["average", "max-confidence"]])
def test_what_a_broken_model_held_is_free_at_once(policies: list[str]) -> None:
    world = Counting()
    lives = world.lives(policies)
    failed: list[Exception] = []

    def round_(live: Live) -> Passes[None]:
        try:
            yield from live.loop.step()
        except RuntimeError as error:
            failed.append(error)

    world.runner.run([round_(live) for live in lives])
    world.sessions[1].broken = True
    held = [weakref.ref(world.sessions[1]), *(weakref.ref(live.loop) for live in lives)]
    gc.disable()
    try:
        world.runner.run([round_(live) for live in lives])
        assert len(failed) == len(policies)
        for several in (failed, lives, world.sessions):
            several.clear()
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()


class Breaking:
    """Models fail now and then, once in the middle of a pass."""

    def __init__(self, models: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.chance = random.Random(5)
        self.n_failed = 0
        for model in models:
            monkeypatch.setattr(model, "open", partial(self._opened, model.open))

    def _opened(self, open_: Any, n_rows: int) -> Any:
        session = open_(n_rows)
        if n_rows != 4:  # of a policy that has its own, or of the text alone
            return session
        whole = session.feed

        def feed(rows: Any, tokens: Any, n_last: Any, *, hidden: bool = False) -> ModelOutput:
            if self.chance.random() < 0.03:
                # A part has been read, and something else is in the cache.
                wrong = [[token + 1 if token else 0 for token in line] for line in tokens]
                whole(rows, wrong, n_last, hidden=hidden)
                self.n_failed += 1
                raise RuntimeError("out of memory")
            output: ModelOutput = whole(rows, tokens, n_last, hidden=hidden)
            return output

        session.feed = feed
        return session


@pytest.mark.parametrize(
    ("world", "prompts"),
    [(tables, PROMPTS), (mixed, MIXED_PROMPTS), (cached, LONG_PROMPTS[:5])],
    ids=["tables", "mixed", "cached"],
)
def test_texts_that_a_broken_model_was_not_writing_are_what_they_are_without_it(
    world: Any, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = Ensemble(world().backends, generation=GenerationConfig(schedule="stepwise"))
    breaking = Breaking(ensemble.backends, monkeypatch)
    runner = Runner(ensemble.backends, 4)
    policies = ["confidence", "cool-fusion", "max-confidence", "single", "nudging"]
    lives = {policy: ensemble.live(policy, runner=runner) for policy in policies}
    rows: dict[str, list[Row]] = {policy: [] for policy in policies}
    lost = done = 0

    def round_(policy: str) -> Passes[None]:
        nonlocal lost
        try:
            yield from lives[policy].loop.step()
        except RuntimeError:
            for row in rows[policy]:
                lives[policy].cancel(row)
            lost += len(rows[policy])
            rows[policy].clear()
            lives[policy] = ensemble.live(policy, runner=runner)

    for number in range(60):
        policy = policies[number % len(policies)]
        settings = {"max_new_tokens": 12, "temperature": float(number % 2)}
        wanted = GenerationConfig().updated(settings)
        row = lives[policy].row(prompts[number % len(prompts)], number, wanted, seed=number)
        lives[policy].add(row)
        rows[policy].append(row)
        for _ in range(4):
            runner.run([round_(each) for each in policies if lives[each].busy])
            for each in policies:
                for row in lives[each].finished():
                    rows[each].remove(row)
                    answer = lives[each].answer(row)
                    [alone] = ensemble.generate(
                        [answer.prompt],
                        each,
                        seed=row.number,
                        max_new_tokens=12,
                        temperature=float(row.number % 2),
                    )
                    assert shown(answer) == shown(alone), each
                    done += 1
    assert breaking.n_failed > 5 and lost > 5 and done > 10, (breaking.n_failed, lost, done)
    for each in policies:
        for row in rows[each]:
            lives[each].cancel(row)
    assert runner.slots.free == list(range(4))


def test_a_model_that_is_shared_is_asked_about_named_tokens_too() -> None:
    class Telling(Counted):
        def logprobs_of(self, rows: Any, lengths: Any, ids: Any, behind: Any = None) -> ModelOutput:
            assert (rows, lengths, behind) == ([1], [0], [[0]])
            return ModelOutput(torch.tensor([[float(i) for i in ids]]))

    class Model(TableModel):
        def open(self, n_rows: int) -> Session:
            return Telling(super().open(n_rows), self.name, [])

    model = Model("base", ("a", "."), {"": {"a": 1.0}}, ends=["."])
    query = TokenQuery(Runner([model], 2).open(0), [1], [0], [0, 1], [[0]])

    def ask() -> Passes[list[list[float]]]:
        [result] = yield [query]
        return result.output.logits.tolist()

    assert Runner([model], 2).run([ask()]) == [[[0.0, 1.0]]]


class NotANumber(Session):
    """Predicts no numbers in the second of two texts, after its first few tokens."""

    def __init__(self, inner: Session, rows: Sequence[int]) -> None:
        self._inner, self._rows = inner, rows

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]
        return self._inner.lengths

    def feed(self, rows: Any, tokens: Any, n_last: Any, *, hidden: bool = False) -> ModelOutput:
        output = self._inner.feed(rows, tokens, n_last, hidden=hidden)
        ends = list(accumulate(n_last))
        broken = [row in self._rows and self.lengths[row] > 4 for row in rows]
        logits = output.logits.clone()
        for end, n, wrong in zip(ends, n_last, broken, strict=True):
            logits[end - n : end] += math.nan if wrong else 0.0
        return replace(output, logits=logits)

    def truncate(self, row: int, length: int) -> None:
        self._inner.truncate(row, length)


@pytest.mark.parametrize("schedule", ["stepwise", "block"])
@pytest.mark.parametrize(
    "policy", ["single", "average", "cosd-rule", "speculative", "cool-fusion", "byte-mixture"]
)
def test_a_prediction_that_is_no_number_costs_its_text_alone(
    policy: str, schedule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = (mixed() if policy == "byte-mixture" else tables()).backends
    ensemble = Ensemble(models, generation=GenerationConfig(schedule=schedule, block_size=4))
    [alone] = ensemble.generate(["ab"], policy, seed=3, max_new_tokens=12)
    model = ensemble.backends[0]
    whole = model.open

    def open_(n_rows: int) -> Session:
        lanes = n_rows // 2
        return NotANumber(whole(n_rows), range(lanes, 2 * lanes))

    monkeypatch.setattr(model, "open", open_)
    runner = Runner(ensemble.backends, 2)
    live = ensemble.live(policy, runner=runner)
    wanted = GenerationConfig(max_new_tokens=12)
    for number, prompt in enumerate(["ab", "a" * 4]):
        live.add(live.row(prompt, number, wanted, seed=3))
    while live.busy:
        runner.run([live.loop.step()])
    [(row, error)] = live.failed()
    assert row.number == 1 and "predicts logits that are no numbers" in str(error)
    [finished] = live.finished()
    assert shown(live.answer(finished)) == shown(alone)
    assert runner.slots.free == [0, 1]

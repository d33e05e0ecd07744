"""An honest account: what each model was made to read and write."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import PROMPTS, byte_level, model, network

from multicolm import Ensemble
from multicolm.backend.base import Model, ModelOutput, Session
from multicolm.backend.table import TableModel
from multicolm.backend.transformers import TransformersModel
from multicolm.ensemble import Answers

TOKENS = ["a", "b", "c", "d", "."]
# Sure after a, c and d, unsure after b.
BASE = {
    "": {"a": 1.0},
    "a": {"b": 0.9, "c": 0.1},
    "b": {"c": 0.4, "d": 0.3, "a": 0.3},
    "c": {"d": 1.0},
    "d": {"a": 1.0},
}
LEFT = {**BASE, "b": {"d": 0.9, "a": 0.1}}


class Counting:
    """What one model was fed, call by call."""

    def __init__(self, model: Any, clock: Clock | None = None) -> None:
        self.calls: list[list[int]] = []
        self.n_passes = 0
        self._open, self._clock = model.open, clock
        model.open = self.open

    def open(self, n_rows: int) -> Session:
        session = self._open(n_rows)
        plain = session.feed

        def feed(rows: Any, tokens: Any, n_last: Any, **kwargs: Any) -> ModelOutput:
            if self._clock is not None:
                self._clock.now += 1.0
            self.calls.append([len(new) for new in tokens])
            output = plain(rows, tokens, n_last, **kwargs)
            self.n_passes += output.n_passes
            return output

        session.feed = feed
        return session

    @property
    def n_read(self) -> int:
        return sum(map(sum, self.calls))


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pair() -> tuple[Ensemble, Counting, Counting]:
    models = [
        TableModel(name, TOKENS, rows, ends=["."])
        for name, rows in (("base", BASE), ("left", LEFT))
    ]
    base, left = (Counting(model) for model in models)
    return Ensemble(models), base, left


CONFIDENCE = {"kind": "confidence", "params": {"threshold": 0.5}}


def test_a_lazily_caught_up_assistant_reads_every_token_once_and_only_where_it_is_asked() -> None:
    ensemble, base, left = pair()
    answer = ensemble.generate("ca", CONFIDENCE, schedule="stepwise", max_new_tokens=12)[0]
    assert answer.text == "bdabdabdabda"
    writers = [token.model for token in answer.trace]
    assert writers == ["base", "left", "base"] * 4
    # The base model draws at every place, and reads all but the last token.
    assert (answer.usage["base"].forwards, answer.usage["base"].tokens_read) == (12, 2 + 11)
    # The assistant is asked at places 1, 4, 7, 10, and reads up to there: the prompt and 1, then 3.
    assert left.calls == [[3], [3], [3], [3]]
    assert (answer.usage["left"].forwards, answer.usage["left"].tokens_read) == (4, 2 + 10)
    assert answer.usage["base"].tokens_written == 8 and answer.usage["left"].tokens_written == 4
    assert base.n_read == 13


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_a_certain_policy_in_blocks_asks_the_assistant_as_often_and_as_little(
    block_size: int,
) -> None:
    ensemble, base, left = pair()
    answer = ensemble.generate(
        "ca", CONFIDENCE, schedule="block", block_size=block_size, max_new_tokens=12
    )[0]
    assert answer.text == "bdabdabdabda"
    assert left.calls == [[3], [3], [3], [3]]
    assert base.n_read == answer.usage["base"].tokens_read == 13
    assert answer.usage["base"].forwards == 12


@pytest.mark.parametrize("settings", [{"schedule": "stepwise"}, {"schedule": "block"}, {}])
def test_nobody_but_the_single_model_is_run(settings: dict[str, Any]) -> None:
    ensemble, base, left = pair()
    answers = ensemble.generate(["a", "b", "cd"], max_new_tokens=5, **settings)
    assert left.calls == []
    assert answers.usage["left"] == type(answers.usage["left"])()
    assert base.n_read == answers.usage["base"].tokens_read == (1 + 1 + 2) + 3 * 4
    assert base.n_passes == answers.usage["base"].forwards == 5
    left_alone = ensemble.generate("a", {"kind": "single", "params": {"model": "left"}})
    assert left_alone.usage["base"].forwards == 0 == left_alone.usage["base"].tokens_written


def test_models_that_are_always_asked_read_everything_once_stepwise() -> None:
    ensemble, base, left = pair()
    answer = ensemble.generate("ca", "average", schedule="stepwise", max_new_tokens=7)[0]
    for counting, usage in ((base, answer.usage["base"]), (left, answer.usage["left"])):
        assert counting.calls == [[2], *[[1]] * 6]
        assert (usage.forwards, usage.tokens_read, usage.tokens_written) == (7, 8, 0)


def test_a_lottery_runs_only_the_model_that_it_drew() -> None:
    ensemble, base, left = pair()
    answer = ensemble.generate("ca", "random", schedule="stepwise", seed=3, max_new_tokens=20)[0]
    writers = [token.model for token in answer.trace]
    for counting, name in ((base, "base"), (left, "left")):
        places = [place for place, writer in enumerate(writers) if writer == name]
        assert answer.usage[name].forwards == len(places) == answer.usage[name].tokens_written
        assert answer.usage[name].tokens_read == 2 + places[-1] == counting.n_read


SETTINGS: Sequence[dict[str, Any]] = (
    {"schedule": "stepwise"},
    {"schedule": "block", "block_size": 3},
    {"schedule": "block", "block_size": 8, "temperature": 0.8},
    {"batch_size": 2, "temperature": 0.8},
)


def totals(answers: Answers, name: str) -> tuple[int, int, int, float]:
    usages = [answer.usage[name] for answer in answers]
    return (
        max(usage.forwards for usage in usages),
        sum(usage.tokens_read for usage in usages),
        sum(usage.tokens_written for usage in usages),
        sum(usage.seconds for usage in usages),
    )


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "policy", ["single", "confidence", "cosd-rule", "random", "max-confidence", "speculative"]
)
def test_every_written_token_has_one_writer_and_batch_totals_are_those_of_the_answers(
    policy: str, settings: dict[str, Any]
) -> None:
    ensemble, base, left = pair()
    answers = ensemble.generate(
        ["a", "b", "cd", "ab", "ba"], policy, seed=2, max_new_tokens=9, **settings
    )
    for answer in answers:
        written = {name: answer.usage[name].tokens_written for name in ("base", "left")}
        assert sum(written.values()) == len(answer.trace)
        for name, count in written.items():
            assert count == sum(token.model == name for token in answer.trace)
            assert answer.trace.share(name) == pytest.approx(count / len(answer.trace))
    for name, counting in (("base", base), ("left", left)):
        usage = answers.usage[name]
        most, n_read, n_written, seconds = totals(answers, name)
        assert usage.tokens_read == n_read == counting.n_read
        assert usage.forwards == counting.n_passes >= most
        assert usage.tokens_written == n_written
        assert usage.seconds == pytest.approx(seconds)


def test_seconds_are_those_of_the_clock() -> None:
    clock = Clock()
    models: list[Model] = [
        TableModel(name, TOKENS, rows, ends=["."])
        for name, rows in (("base", BASE), ("left", LEFT))
    ]
    countings = [Counting(model, clock) for model in models]
    stream = Ensemble(models).stream(
        ["ca", "abc"], "average", schedule="stepwise", max_new_tokens=4, clock=clock
    )
    for _ in stream:
        pass
    assert len(countings[0].calls) == 4
    assert stream.answers.usage["base"].seconds == pytest.approx(4)
    assert stream.answers.seconds == pytest.approx(8)
    # A pass is shared by the tokens that were read: 2 and 3 of the prompts, then 1 and 1.
    first, second = stream.answers
    assert first.usage["base"].seconds == pytest.approx(2 / 5 + 3 / 2)
    assert second.usage["base"].seconds == pytest.approx(3 / 5 + 3 / 2)


@pytest.mark.parametrize("policy", ["cosd-rule", "speculative", "max-confidence", "average"])
def test_the_account_of_real_models_is_what_their_sessions_were_fed(policy: str) -> None:
    members = [model("llama", "base"), model("gpt2", "left", 1)]
    countings = [Counting(member) for member in members]
    answers = Ensemble(members).generate(
        PROMPTS[:5], policy, temperature=0.8, seed=1, max_new_tokens=10, batch_size=3
    )
    for member, counting in zip(members, countings, strict=True):
        usage = answers.usage[member.name]
        assert usage.tokens_read == counting.n_read == totals(answers, member.name)[1]
        assert usage.forwards == counting.n_passes
    written = sum(answers.usage[member.name].tokens_written for member in members)
    assert written == (0 if policy == "average" else sum(len(a.trace) for a in answers))


def test_a_model_with_nothing_new_to_read_reads_its_last_token_once_more() -> None:
    wider = byte_level(specials=["<mark>"])
    grown = copy.deepcopy(network("llama"))
    grown.resize_token_embeddings(len(wider), mean_resizing=False)
    with torch.no_grad():  # nothing but the mark is ever likely
        grown.get_output_embeddings().weight.zero_()
        grown.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(len(wider)))
        grown.get_output_embeddings().bias[-1] = 50.0
    for kind in ("gpt2", "lfm2"):
        left = model(kind, "left")
        counting = Counting(left)
        ensemble = Ensemble([TransformersModel("base", grown, wider), left])
        answer = ensemble.generate("abc", "max-confidence", schedule="stepwise", max_new_tokens=4)[
            0
        ]
        assert [token.text for token in answer.trace] == ["<mark>"] * 4 and answer.text == ""
        assert counting.calls == [[3], [1], [1], [1]]
        assert answer.usage["left"].tokens_read == 6


def test_logprobs_in_a_trace_are_those_of_the_writer_before_temperature() -> None:
    ensemble, _, _ = pair()
    answer = ensemble.generate("ca", CONFIDENCE, max_new_tokens=3, temperature=0.0)[0]
    want = torch.tensor([0.9, 0.9, 1.0]).log()
    got = torch.tensor([token.logprob for token in answer.trace])
    assert torch.allclose(got, want, atol=1e-6)
    scores = [token.score for token in answer.trace]
    assert scores == pytest.approx([0.9, 0.4, 1.0])
    hot = ensemble.generate("ca", "single", max_new_tokens=6, temperature=3.0, seed=4)[0]
    for before, token in zip("a" + hot.text, hot.trace, strict=False):
        assert token.logprob == pytest.approx(torch.tensor(BASE[before][token.text]).log().item())

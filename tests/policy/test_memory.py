"""What a policy remembers of each text, and what it knows of a prompt before the first token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from score_worlds import HiddenTable
from tables import random_table

import multicolm
from multicolm import Ensemble, MixPolicy, NewTokens, SegmentPolicy, Segments, SelectPolicy, Views
from multicolm.backend.table import TableModel
from multicolm.decoding.draft import Positions
from multicolm.decoding.row import Row
from multicolm.decoding.sampling import Noise, Sampling
from multicolm.decoding.text import TextStream
from multicolm.errors import CapabilityError, PolicyError, UnknownNameError
from multicolm.scoring.likelihood import LikelihoodReader
from multicolm.testing import LawBroken, check_policy, check_routing
from multicolm.views import prompt_hidden_key

PROMPTS = ["a", "ab", " ed", " cfa", "dd", "abba"]
PLAIN = [random_table(name, seed) for seed, name in enumerate(["base", "left", "right"])]
TABLES = [HiddenTable(model) for model in PLAIN]
TRIO = Ensemble(TABLES)


class ChoosesOnce(SelectPolicy):
    """The model that the base model's hidden state of the prompt names writes the whole text."""

    pooling: Any = "last"

    def prompt_states(self, models: Any) -> Any:
        return {0: frozenset({self.pooling})}

    def initial_state(self, views: Views) -> torch.Tensor:
        states = views.prompt_hidden("base", self.pooling)
        weights = torch.arange(1.0, states.shape[1] + 1)
        # A jump in the middle of nowhere, so that rounding decides nothing.
        return ((states @ weights * 0.73).floor().long() % len(views.models))[:, None]

    def text_uses(self, views: Views) -> torch.Tensor:
        return torch.nn.functional.one_hot(views.state[:, 0], len(views.models)).bool()

    def select(self, views: Views) -> torch.Tensor:
        return views.state[:, 0]


class Tallies(MixPolicy):
    """Weights are how often each model's likeliest token was written so far, plus one."""

    base_signals: ClassVar[Any] = {"logprobs"}
    assistant_signals: ClassVar[Any] = {"logprobs"}
    schedule: ClassVar[Any] = "block"

    def initial_state(self, views: Views) -> torch.Tensor:
        return torch.ones(views.n_positions, len(views.models))

    def update(self, views: Views, written: NewTokens) -> torch.Tensor:
        hits = views.stack(lambda view: view.top1_ids) == written.ids
        return views.state + hits.T

    def mix(self, views: Views) -> torch.Tensor:
        weights = views.state / views.state.sum(-1, keepdim=True)
        return (views.stack(lambda view: view.probs) * weights.T[:, :, None]).sum(0).log()


class TakesTurns(SelectPolicy):
    """Assistants three tokens, the base model three, unless it is unsure: deferral by phase."""

    base_signals: ClassVar[Any] = {"top1"}
    assistant_signals: ClassVar[Any] = {"top1"}
    assistants: ClassVar[Any] = "deferred"

    def initial_state(self, views: Views) -> torch.Tensor:
        return torch.zeros(views.n_positions, 2, dtype=torch.long)

    def update(self, views: Views, written: NewTokens) -> torch.Tensor:
        seen = torch.full((views.n_positions,), len(list(views)))
        return torch.stack([views.state[:, 0] + 1, seen], dim=1)

    def defers(self, views: Views) -> torch.Tensor:
        unsure = (views.state[:, 0] // 3 % 2 == 1) | (views.base.top1_probs < 0.3)
        return unsure & (len(views.models) > 1)

    def select(self, views: Views) -> torch.Tensor:
        return 1 + (views.state.sum(-1) % (len(views.models) - 1))


class Learns(SegmentPolicy):
    """Whoever wins is trusted more."""

    longest: int = 3
    assistant_signals: ClassVar[Any] = {"text", "token_logprobs"}

    def initial_state(self, views: Views) -> torch.Tensor:
        return torch.ones(views.n_positions, 3)

    def rate(self, segments: Segments) -> torch.Tensor:
        assert segments.state is not None
        weights = segments.state[:, : segments.nats.shape[1]]
        return weights - segments.nats.nanmean(-1)

    def feedback(self, segments: Segments, chosen: torch.Tensor) -> torch.Tensor:
        assert segments.state is not None
        return segments.state + torch.nn.functional.one_hot(chosen, 3)


@pytest.mark.parametrize("kind", [ChoosesOnce, Tallies, TakesTurns, Learns])
def test_a_policy_with_memory_keeps_the_laws_of_the_loop(kind: Any) -> None:
    check_routing(TRIO, PROMPTS[:3], kind(), max_new_tokens=6)


@pytest.mark.parametrize("kind", [Tallies, TakesTurns])
def test_a_policy_with_memory_keeps_the_laws_of_policies(kind: Any) -> None:
    check_policy(kind())


def test_only_the_model_that_was_chosen_for_a_text_is_run() -> None:
    answers = TRIO.generate(PROMPTS, ChoosesOnce(), max_new_tokens=8)
    chosen = set()
    for answer in answers:
        [writer] = {token.model for token in answer.trace}
        chosen.add(writer)
        alone = TRIO.generate(
            [answer.prompt], {"kind": "single", "params": {"model": writer}}, max_new_tokens=8
        )[0]
        assert answer.text == alone.text
        for name in TRIO.models:
            n_alone = alone.usage[name].forwards
            if name == "base":
                # It reads the prompt for the choice, and where it is chosen that is its first pass.
                assert answer.usage[name].forwards == max(n_alone, 1)
            else:
                assert answer.usage[name].forwards == n_alone
            assert (n_alone > 0) == (name == writer)
    assert chosen == set(TRIO.models)


@pytest.mark.parametrize("bridge", ["boundary", "auto"])
def test_a_model_of_another_vocabulary_that_is_chosen_once_writes_as_if_alone(bridge: Any) -> None:
    base = HiddenTable(random_table("base", 1, ("a", "b", "c", " ", "d", " d", "e", ".")))
    left = random_table("left", 2, ("a", "b", "c", " ", "d", "e", "ab", "bc", "<stop>"))
    pair = Ensemble([base, left], bridge=bridge)
    prompts = ["a", "ab", "cab", "ad", "ce"]
    writers = set()
    for answer in pair.generate(prompts, ChoosesOnce(), max_new_tokens=8):
        [writer] = {token.model for token in answer.trace}
        writers.add(writer)
        single = {"kind": "single", "params": {"model": writer}}
        [alone] = pair.generate([answer.prompt], single, max_new_tokens=8)
        assert answer.text == alone.text
        assert (answer.usage["left"].forwards > 0) == (writer == "left")
    assert writers == {"base", "left"}
    check_routing(pair, prompts[:3], ChoosesOnce(), max_new_tokens=6)


def test_prompt_states_are_known_under_the_exact_bridge() -> None:
    """A model that is followed by bytes otherwise is followed by tokens, as for hidden states."""
    ensemble = multicolm.load("tiny-mixed-exact")
    [answer] = ensemble.generate(["What does Zosos treat?"], ChoosesOnce(), max_new_tokens=3)
    [writer] = {token.model for token in answer.trace}
    ran = {name for name, usage in answer.usage.items() if usage.forwards}
    assert ran == {writer, "generalist"}


def test_a_choice_without_the_base_model_never_runs_it() -> None:
    class Draws(SelectPolicy):
        def uses(self, models: Any) -> frozenset[int]:
            return frozenset(range(1, len(models)))

        def initial_state(self, views: Views) -> torch.Tensor:
            return 1 + (views.uniform[:, None] * (len(views.models) - 1)).long()

        def select(self, views: Views) -> torch.Tensor:
            return views.state[:, 0]

    check_policy(Draws())
    check_routing(TRIO, PROMPTS[:3], Draws(), max_new_tokens=6)
    answers = TRIO.generate(PROMPTS, Draws(), seed=4, max_new_tokens=6)
    assert {token.model for answer in answers for token in answer.trace} == {"left", "right"}
    for answer in answers:
        ran = [name for name, usage in answer.usage.items() if usage.forwards]
        assert ran == [answer.trace.tokens[0].model]
        assert answer.seed == 4  # something random had a part in it, though decoding is greedy


def test_the_context_of_a_model_that_is_not_chosen_does_not_end_a_text() -> None:
    small = TableModel("base", ["a", "b"], {"": {"a": 1.0}}, context_length=4)
    large = TableModel("large", ["a", "b"], {"": {"b": 1.0}})

    class Large(SelectPolicy):
        def text_uses(self, views: Views) -> torch.Tensor:
            return torch.tensor([[False, True]]).expand(views.n_positions, -1)

        def select(self, views: Views) -> torch.Tensor:
            return torch.ones(views.n_positions, dtype=torch.long)

    [answer] = Ensemble([small, large]).generate(["aa"], Large(), max_new_tokens=9)
    assert (answer.text, answer.finish_reason) == ("b" * 9, "length")
    assert answer.usage["base"].forwards == 0


@pytest.mark.parametrize("at_once", [1, 2, 1 << 20])
def test_the_hidden_state_of_a_prompt_is_that_of_its_last_token_or_the_mean(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("multicolm.decoding.own_tokens._MAX_LOGITS", at_once * 7)
    seen: dict[str, torch.Tensor] = {}

    class Watches(SelectPolicy):
        def prompt_states(self, models: Any) -> Any:
            return {2: frozenset({"last", "mean"})}

        def initial_state(self, views: Views) -> torch.Tensor:
            seen.update({how: views.prompt_hidden("right", how) for how in ("last", "mean")})
            return torch.zeros(views.n_positions, 1)

        def select(self, views: Views) -> torch.Tensor:
            return torch.full((views.n_positions,), 2)

    answers = TRIO.generate(PROMPTS, Watches(), max_new_tokens=5, batch_size=8)
    alone = TRIO.generate(
        PROMPTS, {"kind": "single", "params": {"model": "right"}}, max_new_tokens=5
    )
    assert [a.text for a in answers] == [a.text for a in alone]
    for line, prompt in enumerate(PROMPTS):
        ids = TABLES[2].tokenizer.encode(prompt)
        states = torch.stack([TABLES[2].hidden_after(ids[: n + 1]) for n in range(len(ids))])
        assert torch.equal(seen["last"][line], states[-1])
        assert torch.allclose(seen["mean"][line], states.mean(0))


def test_what_was_read_of_the_prompt_is_read_once() -> None:
    answers = TRIO.generate(PROMPTS, ChoosesOnce(), max_new_tokens=1)
    for answer in answers:
        n_prompt = len(TABLES[0].tokenizer.encode(answer.prompt))
        assert answer.usage["base"].tokens_read == n_prompt


class Undeclared(SelectPolicy):
    def select(self, views: Views) -> torch.Tensor:
        return views.state[:, 0]


class Unread(SelectPolicy):
    def initial_state(self, views: Views) -> torch.Tensor:
        return views.prompt_hidden("left")

    def select(self, views: Views) -> torch.Tensor:
        return views.state[:, 0].long()


class Strays(ChoosesOnce):
    def select(self, views: Views) -> torch.Tensor:
        return (views.state[:, 0] + 1) % len(views.models)


class Flat(Undeclared):
    def initial_state(self, views: Views) -> torch.Tensor:
        return torch.zeros(views.n_positions)


class Widens(Undeclared):
    def initial_state(self, views: Views) -> torch.Tensor:
        return torch.zeros(views.n_positions, 1, dtype=torch.long)

    def update(self, views: Views, written: NewTokens) -> torch.Tensor:
        return torch.cat([views.state, views.state], dim=1)


class Retypes(Widens):
    """A batch would turn the whole numbers of other texts into these."""

    def update(self, views: Views, written: NewTokens) -> torch.Tensor:
        return views.state + 0.5


class NobodyWrites(Undeclared):
    def text_uses(self, views: Views) -> torch.Tensor:
        return torch.zeros(views.n_positions, len(views.models), dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Undeclared, "has to define `initial_state`"),
        (Unread, "declare it in `prompt_states`"),
        (Strays, "chose model"),
        (Flat, "initial_state() must return a tensor of shape [1, width]"),
        (Widens, "update() must return a tensor of shape [1, 1]"),
        (Retypes, "must return a tensor of shape [1, 1] and torch.int64, a row per position, and"),
        (NobodyWrites, "text_uses() gave a text the models []"),
    ],
)
def test_a_policy_that_breaks_the_contract_of_memory_is_stopped(kind: Any, said: str) -> None:
    with pytest.raises(PolicyError) as caught:
        TRIO.generate(["ab"], kind(), max_new_tokens=4)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [None, {7: {"last"}}, {"base": {"last"}}, {0: "last"}, {0: ["last"]}, {0: {"max"}}]
)
def test_prompt_states_are_of_models_by_index_and_of_known_pooling(wrong: Any) -> None:
    class Wants(Undeclared):
        def prompt_states(self, models: Any) -> Any:
            return wrong

    with pytest.raises(
        PolicyError, match=r"prompt_states\(\) must return a mapping from a model's"
    ):
        TRIO.generate(["ab"], Wants(), max_new_tokens=1)


def test_what_is_kept_of_a_text_is_shown_on_the_device_of_the_views() -> None:
    row = Row(
        number=0,
        prompt="a",
        prompt_ids=[[0]],
        key=0,
        seed=None,
        max_new_tokens=1,
        text=TextStream(()),
        draft_length=1,
        sampling=Sampling(),
        slot=0,
        models=(0,),
        state=torch.zeros(2),
    )
    row.prompt_hidden[0, "last"] = torch.zeros(3)
    context = Positions([row], [0], Noise()).text_context(torch.device("meta"))
    assert context["state"]().is_meta and context[prompt_hidden_key(0, "last")]().is_meta


class Counts(SelectPolicy):
    """Hides what it remembers in itself, or lets texts share it."""

    def initial_state(self, views: Views) -> torch.Tensor:
        return torch.arange(views.n_positions)[:, None]

    def select(self, views: Views) -> torch.Tensor:
        return views.state[:, 0] % len(views.models)


class Mingles(Counts):
    def initial_state(self, views: Views) -> torch.Tensor:
        return torch.zeros(views.n_positions, 1, dtype=torch.long)

    def update(self, views: Views, written: NewTokens) -> torch.Tensor:
        return views.state + written.ids.sum()


class Leaks(Counts):
    """Uses a model that it said it would not."""

    def initial_state(self, views: Views) -> torch.Tensor:
        return (views.uniform[:, None] * len(views.models)).long()

    def text_uses(self, views: Views) -> torch.Tensor:
        other = (views.state[:, 0] + 1) % len(views.models)
        return torch.nn.functional.one_hot(other, len(views.models)).bool()


@pytest.mark.parametrize(
    ("kind", "law"),
    [
        (Counts, "that position alone"),
        (Mingles, "that position alone"),
        (Widens, "keeps its width"),
        (NobodyWrites, "a text has a model"),
        (Leaks, "said to be used for it"),
    ],
)
def test_a_memory_that_breaks_a_law_is_caught(kind: Any, law: str) -> None:
    with pytest.raises(LawBroken, match=law):
        check_policy(kind())


def test_segments_are_proposed_by_all_models_or_refused() -> None:
    class Some(Learns):
        def text_uses(self, views: Views) -> torch.Tensor:
            return torch.ones(views.n_positions, len(views.models), dtype=torch.bool)

    with pytest.raises(CapabilityError, match="rates what all models that it uses propose"):
        TRIO.generate(["a"], Some(), max_new_tokens=2)


def test_prompt_states_are_refused_where_a_model_shows_none_or_is_not_used() -> None:
    with pytest.raises(CapabilityError, match="needs hidden of model 'base'"):
        Ensemble(PLAIN).generate(["a"], ChoosesOnce(), max_new_tokens=2)

    class Bytes(Tallies):
        support: ClassVar[Any] = "bytes"

        def prompt_states(self, models: Any) -> Any:
            return {0: frozenset({"last"})}

    with pytest.raises(CapabilityError, match="writes in bytes"):
        TRIO.generate(["a"], Bytes(), max_new_tokens=2)

    class Elsewhere(ChoosesOnce):
        def uses(self, models: Any) -> frozenset[int]:
            return frozenset({1})

    with pytest.raises(PolicyError, match="which uses\\(\\) leaves out"):
        TRIO.generate(["a"], Elsewhere(), max_new_tokens=2)


@pytest.mark.parametrize("kind", [ChoosesOnce, Tallies, TakesTurns])
def test_texts_are_as_likely_under_a_policy_with_memory_as_they_were_when_written(
    kind: Any,
) -> None:
    answers = TRIO.generate(PROMPTS, kind(), max_new_tokens=8)
    whole = [a for a in answers if a.text and a.finish_reason == "length"]
    assert whole
    reader = LikelihoodReader(TRIO, kind())
    passages = [reader.passage(a.prompt, a.text) for a in whole]
    found = reader.likelihoods(passages)
    for answer, likelihood in zip(whole, found, strict=True):
        written = sum(token.logprob for token in answer.trace)
        assert likelihood.logprob == pytest.approx(written, abs=1e-4)
        assert likelihood.is_greedy


SOURCE = """
import torch
from multicolm import SegmentPolicy

class Longest(SegmentPolicy):
    longest: int = 2
    assistant_signals = frozenset({"text", "token_logprobs"})

    def rate(self, segments):
        return segments.n_tokens.sum(-1).double()
"""


def test_a_policy_of_any_kind_works_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SOURCE)
    [answer] = TRIO.generate(["ab"], f"{tmp_path}/own.py:Longest", max_new_tokens=6)
    assert answer.text and answer.policy.endswith("own.py:Longest")
    with pytest.raises(UnknownNameError, match="Longst"):
        TRIO.generate(["ab"], f"{tmp_path}/own.py:Longst")


def test_a_policy_that_uses_no_model_of_an_ensemble_is_refused() -> None:
    class Assistants(SelectPolicy):
        def uses(self, models: Any) -> frozenset[int]:
            return frozenset(range(1, len(models)))

        def select(self, views: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(CapabilityError, match="uses none of the models"):
        Ensemble([PLAIN[0]]).generate(["ab"], Assistants())

"""How unlikely each model finds the text so far, and models that are run where they are named."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from score_worlds import HiddenTable
from tables import random_table

from multicolm import Ensemble, MixPolicy, Needs, SelectPolicy, Views
from multicolm.backend.table import TableModel
from multicolm.errors import CapabilityError, PolicyError
from multicolm.scoring.likelihood import LikelihoodReader
from multicolm.testing import LawBroken, check_policy, check_routing

PROMPTS = ["a", "ab", " ed", " cfa", "dd", "abba"]
TABLES = [HiddenTable(random_table(name, s)) for s, name in enumerate(["base", "left", "right"])]
TRIO = Ensemble(TABLES)
LEFT = ("a", "b", "c", " ", "d", "e", "ab", "bc", "<stop>")
BASE = ("a", "b", "c", " ", "d", " d", "e", ".")
MIXED = Ensemble([random_table("base", 1, BASE), random_table("left", 2, LEFT)])


class Posterior(MixPolicy):
    """Models weighed by how likely they find the text so far: Bayes' rule."""

    base_signals: ClassVar[Any] = {"logprobs"}
    assistant_signals: ClassVar[Any] = {"logprobs"}
    likelihoods: ClassVar[bool] = True
    schedule: ClassVar[Any] = "block"

    def mix(self, views: Views) -> torch.Tensor:
        weights = (-views.text_nll).log_softmax(-1)
        return (views.stack(lambda view: view.logprobs) + weights.T[:, :, None]).logsumexp(0)


class SurestSoFar(SelectPolicy):
    """Whoever finds the text so far most likely writes on, where the base model is unsure."""

    base_signals: ClassVar[Any] = {"top1"}
    assistant_signals: ClassVar[Any] = {"top1", "token_logprobs"}
    assistants: ClassVar[Any] = "deferred"
    likelihoods: ClassVar[bool] = True

    def defers(self, views: Views) -> torch.Tensor:
        return views.base.top1_probs < 0.6

    def select(self, views: Views) -> torch.Tensor:
        return (-views.text_nll).nan_to_num(nan=-math.inf).argmax(-1)


class OneExpert(MixPolicy):
    """The base model's state names one assistant per position, whose log-probabilities add up."""

    base_signals: ClassVar[Any] = {"logprobs", "hidden"}
    assistant_signals: ClassVar[Any] = {"logprobs"}
    schedule: ClassVar[Any] = "block"

    def models_at(self, views: Views) -> torch.Tensor:
        n_assistants = len(views.models) - 1
        named = 1 + views.base.hidden.argmax(-1) % max(n_assistants, 1)
        return torch.nn.functional.one_hot(named, len(views.models) + 1)[:, :-1].bool()

    def mix(self, views: Views) -> torch.Tensor:
        return views.stack(lambda view: view.logprobs).sum(0)


class Duel(SelectPolicy):
    """Two models of three, by chance, and the surer of them; the base model is one like others."""

    assistant_signals: ClassVar[Any] = {"top1"}

    def needs(self, models: Any) -> Needs:
        return Needs({}, {k: frozenset({"top1"}) for k in range(len(models))})

    def models_at(self, views: Views) -> torch.Tensor:
        out = (views.uniform * len(views.models)).long()
        flags = torch.nn.functional.one_hot(out, len(views.models)) == 0
        return flags | (len(views.models) == 1)

    def select(self, views: Views) -> torch.Tensor:
        best = views.stack(lambda view: view.top1_probs).argmax(0)
        return torch.tensor(list(views))[best]


def nll_of(model: TableModel, prompt: str, text: list[int]) -> float:
    ids = model.tokenizer.encode(prompt)
    total = 0.0
    for token in text:
        total -= float(model.logits_after(ids).log_softmax(-1)[token])
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("kind", [Posterior, SurestSoFar, OneExpert, Duel])
def test_the_laws_of_policies_hold(kind: Any) -> None:
    check_policy(kind())


@pytest.mark.parametrize("kind", [Posterior, SurestSoFar, OneExpert, Duel])
def test_the_laws_of_the_loop_hold(kind: Any) -> None:
    check_routing(TRIO, PROMPTS[:3], kind(), max_new_tokens=6)


@pytest.mark.parametrize("at_once", [1, 1 << 20])
@pytest.mark.parametrize("schedule", ["stepwise", "block"])
def test_the_text_is_as_unlikely_as_the_product_over_its_tokens(
    schedule: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multicolm.decoding.own_tokens._MAX_LOGITS", at_once * 7)
    [answer] = TRIO.generate(["ab"], Posterior(), schedule=schedule, max_new_tokens=9, block_size=4)
    text: list[int] = []
    for token in answer.trace:
        ids = TABLES[0].tokenizer.encode("ab") + text
        weights = torch.tensor([-nll_of(model, "ab", text) for model in TABLES]).softmax(0)
        each = torch.stack([model.logits_after(ids).softmax(-1) for model in TABLES])
        mixed = (each * weights[:, None]).sum(0)
        assert token.id == int(mixed.argmax())
        assert token.logprob == pytest.approx(float(mixed.max().log()), abs=1e-5)
        text.append(token.id)


@pytest.mark.parametrize("at_once", [1, 2, 1 << 20])
def test_a_model_that_was_not_asked_for_long_scores_what_it_missed(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multicolm.decoding.own_tokens._MAX_LOGITS", at_once * 7)
    seen: list[tuple[int, list[float]]] = []

    class Seldom(SurestSoFar):
        def defers(self, views: Views) -> torch.Tensor:
            return views.place % 5 == 4

        def select(self, views: Views) -> torch.Tensor:
            seen.append((int(views.place[0]), views.text_nll[0].tolist()))
            return torch.zeros(views.n_positions, dtype=torch.long)

    for prompt in PROMPTS:
        seen.clear()
        [answer] = TRIO.generate([prompt], Seldom(), max_new_tokens=11)
        ids = [token.id for token in answer.trace]
        for place, nats in seen:
            wanted = [nll_of(model, prompt, ids[:place]) for model in TABLES]
            assert nats == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_across_vocabularies_each_model_scores_its_own_tokens() -> None:
    """A token that one model has and the other spells in two is one factor or two."""
    seen: list[list[float]] = []

    class Watches(SurestSoFar):
        def defers(self, views: Views) -> torch.Tensor:
            return views.place >= 0

        def select(self, views: Views) -> torch.Tensor:
            seen.append(views.text_nll[0].tolist())
            return torch.zeros(views.n_positions, dtype=torch.long)

    base, left = (model for model in MIXED.backends if isinstance(model, TableModel))
    [answer] = MIXED.generate(["ab"], Watches(), max_new_tokens=8, schedule="stepwise")
    written = "".join(token.text for token in answer.trace)
    for place, (of_base, of_left) in enumerate(seen):
        text = "".join(token.text for token in answer.trace.tokens[:place])
        ids = [token.id for token in answer.trace.tokens[:place]]
        assert of_base == pytest.approx(nll_of(base, "ab", ids), abs=1e-4)
        if math.isfinite(of_left):
            own = left.tokenizer.encode_continuation(text) if text else []
            assert of_left == pytest.approx(nll_of(left, "ab", own), abs=1e-4)
    assert any(math.isfinite(nats) for _, nats in seen[1:]), written
    check_routing(MIXED, ["ab", "c"], SurestSoFar(), max_new_tokens=6)


def test_only_the_models_that_are_named_are_run() -> None:
    for schedule in ("stepwise", "block"):
        answers = TRIO.generate(PROMPTS, OneExpert(), max_new_tokens=8, schedule=schedule)
        for answer in answers:
            ids = TABLES[0].tokenizer.encode(answer.prompt) + [t.id for t in answer.trace]
            n_prompt = len(ids) - len(answer.trace)
            before = ids[n_prompt - 1 : -1]
            named = [TRIO.models[1 + token % 2] for token in before]
            for name in ("left", "right"):
                last = max((i for i, who in enumerate(named) if who == name), default=-1)
                usage = answer.usage[name]
                assert usage.forwards > 0 or name not in named
                # In blocks, a model may be named at what was drafted beyond the text, too.
                if schedule == "stepwise":
                    assert usage.forwards == named.count(name)
                    assert usage.tokens_read == (n_prompt + last if last >= 0 else 0)
    assert len({answer.usage["left"].forwards for answer in answers}) > 1


class NamesTooFew(OneExpert):
    def models_at(self, views: Views) -> torch.Tensor:
        return torch.zeros(views.n_positions, 1, dtype=torch.bool)


class LooksElsewhere(OneExpert):
    def mix(self, views: Views) -> torch.Tensor:
        last = len(views.models) - 1
        return views[last].logprobs + views[max(last - 1, min(last, 1))].logprobs


class Undeclared(Posterior):
    likelihoods: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (NamesTooFew, "models_at() must return a torch.bool tensor with 4 rows of 3"),
        (LooksElsewhere, "which was not run here"),
        (Undeclared, "`likelihoods = True`"),
    ],
)
def test_what_was_not_declared_or_named_cannot_be_read(kind: Any, said: str) -> None:
    with pytest.raises(PolicyError) as caught:
        TRIO.generate(["ab"], kind(), max_new_tokens=4)
    assert said in str(caught.value)
    with pytest.raises((PolicyError, LawBroken)):
        check_policy(kind())


def test_a_base_model_that_drafts_cannot_be_left_out_of_a_text() -> None:
    class WithoutBase(Posterior):
        def text_uses(self, views: Views) -> torch.Tensor:
            flags = torch.ones(views.n_positions, len(views.models), dtype=torch.bool)
            flags[:, 0] = False
            return flags

    with pytest.raises(PolicyError, match="name it under `deferred`"):
        TRIO.generate(["ab"], WithoutBase(), max_new_tokens=2)

    class Deferred(WithoutBase):
        def needs(self, models: Any) -> Needs:
            return Needs({}, {k: frozenset({"logprobs"}) for k in range(len(models))})

        def mix(self, views: Views) -> torch.Tensor:
            weights = (-views.text_nll[:, list(views)]).log_softmax(-1)
            return (views.stack(lambda view: view.logprobs) + weights.T[:, :, None]).logsumexp(0)

    answers = TRIO.generate(PROMPTS, Deferred(), max_new_tokens=6)
    others = Ensemble(TABLES[1:]).generate(PROMPTS, Posterior(), max_new_tokens=6)
    assert [a.text for a in answers] == [a.text for a in others]
    assert all(a.usage["base"].forwards == 0 for a in answers)


def test_texts_written_in_bytes_have_no_running_likelihood() -> None:
    class Bytes(Posterior):
        support: ClassVar[Any] = "bytes"

    with pytest.raises(CapabilityError, match="writes in bytes"):
        TRIO.generate(["ab"], Bytes(), max_new_tokens=2)


@pytest.mark.parametrize("kind", [Posterior, SurestSoFar, OneExpert, Duel])
def test_a_given_text_is_as_likely_as_it_was_when_it_was_written(kind: Any) -> None:
    answers = TRIO.generate(PROMPTS, kind(), max_new_tokens=8, seed=0)
    whole = [a for a in answers if a.text and a.finish_reason == "length"]
    assert whole
    reader = LikelihoodReader(TRIO, kind())
    found = reader.likelihoods([reader.passage(a.prompt, a.text) for a in whole])
    for answer, likelihood in zip(whole, found, strict=True):
        written = sum(token.logprob for token in answer.trace)
        assert likelihood.logprob == pytest.approx(written, abs=1e-4)

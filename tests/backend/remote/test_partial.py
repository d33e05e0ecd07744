"""Servers that return their likeliest tokens only: the rest is unknown, and nobody makes it up."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from fake_vllm import TEXT_ONLY, FakeVllm, Manners
from remote_worlds import PROMPTS, ensemble, local, remote

from multicolm import Ensemble, SelectPolicy, VerifyPolicy
from multicolm.decoding.sampling import Sampling
from multicolm.errors import CapabilityError, MulticolmWarning, PolicyError
from multicolm.exact.byte_session import ByteSession
from multicolm.views import View, Views

Serve = Callable[..., FakeVllm]
INF = float("inf")
# The five likeliest tokens have 0.9 together.
KNOWN = torch.tensor([[0.4, 0.2, 0.1, 0.1, 0.1]]).log()
ROW = torch.nn.functional.pad(KNOWN, (0, 3), value=-INF)


# What a view of a partial row says


def test_what_is_known_is_taken_as_it_is_and_not_normalised() -> None:
    view = View(ROW, max_top_logprobs=5)
    assert torch.equal(view.logprobs, ROW)
    assert view.top1_probs.item() == pytest.approx(0.4)
    assert view.margins.item() == pytest.approx(0.2)
    assert View(ROW).top1_probs.item() == pytest.approx(0.4 / 0.9)
    assert torch.equal(view.topk_logprobs(5), KNOWN)


def test_more_likely_tokens_than_are_known_are_refused() -> None:
    with pytest.raises(CapabilityError, match=r"6 likeliest .* 'facts', whose server returns 5;"):
        View(ROW, name="facts", max_top_logprobs=5).topk_logprobs(6)
    with pytest.raises(CapabilityError, match=r"2 likeliest tokens .* returns 1; set `logprobs:`"):
        _ = View(ROW, max_top_logprobs=1).margins


# What a server with 20 log-probabilities shows


def test_a_partial_row_holds_true_log_probabilities_and_leaves_the_rest_unknown(
    serve: Serve,
) -> None:
    model = remote(serve("facts", Manners(max_logprobs=20)))
    ids = model.tokenizer.encode(PROMPTS[0])
    got = model.open(1).feed([0], [ids], [1]).logits[0]
    want = local("facts").open(1).feed([0], [ids], [1]).logits[0].log_softmax(-1)
    known = got > -INF
    assert model.max_top_logprobs == 20 == int(known.sum())
    assert torch.allclose(got[known], want[known], atol=1e-5)
    assert float(want[~known].max()) <= float(want[known].min())
    assert model.shows == {"text", "top1", "topk", "token_logprobs"}
    silent = remote(serve("facts", Manners(max_logprobs=20, returns_named=False)))
    assert silent.shows == {"text", "top1", "topk"}


@pytest.mark.parametrize(("schedule", "temperature"), [("stepwise", 0.9), ("block", 0.0)])
@pytest.mark.parametrize(
    "policy",
    [
        "cosd-rule",
        "max-confidence",
        {"kind": "nudging", "params": {"threshold": 0.7, "nudger": "facts"}},
        {"kind": "margin", "params": {"threshold": 0.9}},
    ],
    ids=["cosd-rule", "max-confidence", "nudging", "margin"],
)
def test_policies_that_look_at_the_likeliest_tokens_write_the_same(
    serve: Serve, policy: Any, schedule: Any, temperature: float
) -> None:
    partial = ensemble(remote(serve("facts", Manners(max_logprobs=10))))
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_k": 10,
        "schedule": schedule,
        "max_new_tokens": 10,
        "seed": 2,
    }
    got = partial.generate(PROMPTS[:2], policy, **settings)
    want = ensemble(local("facts")).generate(PROMPTS[:2], policy, **settings)
    for one, other in zip(got, want, strict=True):
        assert one.text == other.text
        for mine, theirs in zip(one.trace, other.trace, strict=True):
            assert (mine.id, mine.model) == (theirs.id, theirs.model)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_a_policy_that_needs_every_probability_is_refused_by_name_signal_and_server(
    serve: Serve,
) -> None:
    fake = serve("facts", Manners(max_logprobs=5))
    partial = ensemble(remote(fake))
    for policy in (
        "entropy",
        "pack-llm",
        "speculative",
        {"kind": "average", "params": {"mean": "geometric"}},
    ):
        name = policy if isinstance(policy, str) else "average"
        with pytest.raises(
            CapabilityError,
            match=f"policy '{name}' needs logprobs of model 'facts' \\(server {fake.url}\\), which "
            "shows only text, token_logprobs, top1, topk; choose another policy",
        ):
            partial.generate(PROMPTS[0], policy)


def test_average_says_how_it_treats_what_is_unknown_and_does_so(serve: Serve) -> None:
    fake = serve("facts", Manners(max_logprobs=5))
    partial = ensemble(remote(fake))
    sentence = (
        f"policy 'average' knows only the 5 likeliest tokens of model 'facts' \\({fake.url}\\): "
        "tokens outside a server's top k count with probability 0."
    )
    with pytest.warns(MulticolmWarning, match=sentence):
        [answer] = partial.generate(PROMPTS[0], "average", max_new_tokens=8)
    ids = local("facts").tokenizer.encode(PROMPTS[0])
    for token in answer.trace:
        rows = [
            local(name).open(1).feed([0], [ids], [1]).logits[0].softmax(-1)
            for name in ("generalist", "facts")
        ]
        rows[1][rows[1].argsort()[:-5]] = 0
        mixed = sum(rows) / 2
        assert token.id == int(mixed.argmax())
        assert token.logprob == pytest.approx(math.log(mixed.max() / mixed.sum()), abs=1e-4)
        ids = [*ids, token.id]


class Scores(SelectPolicy):
    """Notes how unlikely the models find the text; the base model writes."""

    base_signals: ClassVar[Any] = {"top1"}
    assistant_signals: ClassVar[Any] = {"top1"}
    likelihoods: ClassVar[bool] = True
    seen: ClassVar[list[list[float]]] = []

    def select(self, views: Views) -> torch.Tensor:
        self.seen.extend(views.text_nll.tolist())
        return torch.zeros(views.n_positions, dtype=torch.long)


def test_a_server_is_asked_by_name_for_tokens_of_the_text_that_it_did_not_return(
    serve: Serve,
) -> None:
    found = []
    for facts in (remote(serve("facts", Manners(max_logprobs=2))), local("facts")):
        Scores.seen.clear()
        ensemble(facts).generate(PROMPTS[0], Scores(), max_new_tokens=8, schedule="stepwise")
        found.append(torch.tensor(Scores.seen))
    assert found[0].shape == (8, 2) and bool((found[1][1:] > 0).all())
    assert torch.allclose(found[0], found[1], atol=1e-3)
    silent = remote(serve("facts", Manners(max_logprobs=20, returns_named=False)))
    with pytest.raises(CapabilityError, match="needs token_logprobs of model 'facts'"):
        ensemble(silent).generate(PROMPTS[0], Scores())


class Greedy(VerifyPolicy):
    """The text is what the assistant finds likeliest."""

    name = "greedy"
    base_signals: ClassVar[Any] = {"logprobs"}
    assistant_signals: ClassVar[Any] = {"top1"}

    def target_probs(self, views: Views) -> torch.Tensor:
        best = views[1].top1_ids
        vocab = views.drawn_probs(0).shape[-1]
        return torch.nn.functional.one_hot(best, vocab).float()


def test_tokens_that_are_put_in_the_place_of_a_draft_have_the_probability_that_a_server_tells(
    serve: Serve,
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 8, "top_logprobs": 2}
    got = ensemble(remote(serve("facts", Manners(max_logprobs=5)))).generate(
        PROMPTS, Greedy(), **settings
    )
    want = ensemble(local("facts")).generate(PROMPTS, Greedy(), **settings)
    assert any(token.model == "facts" for answer in got for token in answer.trace)
    for one, other in zip(got, want, strict=True):
        for mine, theirs in zip(one.trace, other.trace, strict=True):
            assert (mine.id, mine.model) == (theirs.id, theirs.model)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            for known, true in zip(mine.alternatives, theirs.alternatives, strict=True):
                assert known.logprob == pytest.approx(true.logprob, abs=1e-4)


def test_drawing_is_refused_where_a_token_that_is_not_known_could_come(serve: Serve) -> None:
    fake = serve("facts", Manners(max_logprobs=5))
    partial = ensemble(remote(fake))
    for settings in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 6}):
        with pytest.raises(
            CapabilityError,
            match=f"'cosd-rule' lets model 'facts' draw tokens, and its server {fake.url} "
            "returns the probability of 5 of them: set `top_k` to 5 or less",
        ):
            partial.generate(PROMPTS[0], "cosd-rule", **settings)
    assert partial.generate(PROMPTS[0], "cosd-rule", temperature=1.0, top_k=5, max_new_tokens=2)
    # The base model alone may draw as it likes.
    assert partial.generate(PROMPTS[0], "single", temperature=1.0, max_new_tokens=2)


def test_drawing_from_five_known_tokens_is_drawing_from_all_cut_to_five() -> None:
    whole = torch.tensor([[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.03, 0.02]]).log()
    sampling = Sampling(0.7, top_k=5, top_p=0.9)
    assert torch.allclose(sampling.probs(ROW), sampling.probs(whole))


def test_bytes_are_refused(serve: Serve) -> None:
    model = remote(serve("facts", Manners(max_logprobs=5)))
    with pytest.raises(CapabilityError, match="bytes need every probability of model 'facts'"):
        ByteSession(model, 1)
    with pytest.raises(CapabilityError, match="the exact bridge needs every probability of model"):
        ensemble(model, bridge="exact")


@pytest.mark.parametrize("k", [5, 20])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_such_a_server_proposes_words_and_judges_those_of_others(
    serve: Serve, k: int, batch_size: int
) -> None:
    fake = serve("facts", Manners(max_logprobs=k))
    settings: dict[str, Any] = {"max_new_tokens": 16, "batch_size": batch_size}
    got = ensemble(remote(fake)).generate(PROMPTS, "cool-fusion", **settings)
    want = ensemble(local("facts")).generate(PROMPTS, "cool-fusion", **settings)
    for one, other in zip(got, want, strict=True):
        assert one.text == other.text
        for mine, theirs in zip(one.trace, other.trace, strict=True):
            assert (mine.id, mine.model) == (theirs.id, theirs.model)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert (mine.score is None) == (theirs.score is None)
            assert (mine.score or 0.0) == pytest.approx(theirs.score or 0.0, rel=1e-3)
    assert any(token.model == "facts" for answer in got for token in answer.trace)
    assert any(token.score is not None for answer in got for token in answer.trace)


# Servers of text


def test_a_server_of_text_says_so_and_shows_what_comes_next(serve: Serve) -> None:
    model = remote(serve("facts", TEXT_ONLY))
    assert model.shows == {"text"}
    assert "text only, no log-probabilities by token id" in model.abilities
    ids = model.tokenizer.encode(PROMPTS[0])
    row = model.open(1).feed([0], [ids], [1]).logits[0]
    want = local("facts").open(1).feed([0], [ids], [1]).logits[0]
    assert [int(row.argmax()), float(row.max())] == [int(want.argmax()), INF]
    assert int((row > -INF).sum()) == 1


def test_a_server_of_text_can_be_the_nudger_and_its_probabilities_are_unknown(
    serve: Serve,
) -> None:
    fake = serve("facts", TEXT_ONLY)
    nudging = {"kind": "nudging", "params": {"threshold": 0.9, "nudger": "facts"}}
    got = ensemble(remote(fake)).generate(PROMPTS, nudging, max_new_tokens=24)
    want = ensemble(local("facts")).generate(PROMPTS, nudging, max_new_tokens=24)
    assert [answer.text for answer in got] == [answer.text for answer in want]
    theirs = [token for answer in got for token in answer.trace if token.model == "facts"]
    assert theirs
    assert all(math.isnan(token.logprob) for token in theirs)
    numbers = [t["logprob"] for a in got for t in a.as_json()["trace"] if t["model"] == "facts"]
    assert set(numbers) == {None}
    assert all(isinstance(body["prompt"], str | list) for body in fake.requests)


def test_a_server_of_text_is_refused_by_policies_that_need_numbers(serve: Serve) -> None:
    fake = serve("facts", TEXT_ONLY)
    text_only = ensemble(remote(fake))
    with pytest.raises(
        CapabilityError,
        match=f"policy 'cosd-rule' needs top1 of model 'facts' \\(server {fake.url}\\), which "
        "shows only text; choose",
    ):
        text_only.generate(PROMPTS[0], "cosd-rule")
    with pytest.raises(
        CapabilityError, match="returns the probability of none of them: set `temper"
    ):
        text_only.generate(PROMPTS[0], "nudging", temperature=1.0)


def test_a_server_of_text_proposes_words_that_others_judge(serve: Serve) -> None:
    fake = serve("facts", TEXT_ONLY)
    sentence = (
        f"policy 'cool-fusion' lets model 'facts' \\(server {fake.url}\\) propose and not judge: "
        "it does not return the log-probabilities of given text."
    )
    with pytest.warns(MulticolmWarning, match=sentence):
        got = ensemble(remote(fake)).generate(PROMPTS, "cool-fusion", max_new_tokens=16)
    quiet = copy.copy(local("facts"))
    vars(quiet)["signals"] = frozenset({"text"})
    with pytest.warns(MulticolmWarning, match="'facts' propose and not judge"):
        want = ensemble(quiet).generate(PROMPTS, "cool-fusion", max_new_tokens=16)
    assert [answer.text for answer in got] == [answer.text for answer in want]
    assert any(answer.usage["facts"].calls for answer in got)
    scores = [token.score for answer in got for token in answer.trace if token.score is not None]
    assert scores and all(math.isfinite(score) for score in scores)


def test_models_that_all_propose_and_never_judge_are_refused(serve: Serve) -> None:
    fake = serve("facts", TEXT_ONLY)
    alone = Ensemble([remote(fake)])
    with pytest.raises(
        CapabilityError,
        match=rf"'cool-fusion' needs a model that returns .* \(signal token_logprobs\), and "
        rf"'facts' \(server {fake.url}\) do not; add a local model",
    ):
        alone.generate(PROMPTS[0], "cool-fusion")


def test_a_server_of_text_cannot_go_on_within_a_character(serve: Serve) -> None:
    model = remote(serve("facts", TEXT_ONLY))
    ids = model.tokenizer.encode_bytes("é".encode()[:1])
    with pytest.raises(
        CapabilityError, match="takes no token ids, and the text ends within a char"
    ):
        model.open(1).feed([0], [ids], [1])


def test_a_policy_may_not_read_a_probability_that_it_did_not_ask_for() -> None:
    with pytest.raises(PolicyError, match="declared only \\['text'\\]"):
        _ = View(ROW, signals=frozenset({"text"}), max_top_logprobs=0).top1_logprobs


def test_no_warning_is_given_where_everything_is_known(serve: Serve) -> None:
    whole = ensemble(remote(serve()))
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        [answer] = whole.generate(PROMPTS[0], "average", max_new_tokens=2)
    assert len(answer.trace) == 2 and not given


# What a server is asked about besides


@pytest.mark.parametrize("schedule", ["stepwise", "block"])
@pytest.mark.parametrize("kind", ["unite", "bild"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_policy_that_names_tokens_writes_the_same_with_a_server_that_tells_of_them(
    serve: Serve, kind: str, schedule: Any, temperature: float
) -> None:
    policy = {"kind": kind, "params": {"rollback": 1.0} if kind == "bild" else {"top_k": 6}}
    fake = serve("facts", Manners(max_logprobs=6))
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_k": 6,
        "schedule": schedule,
        "max_new_tokens": 10,
        "seed": 2,
    }
    got = ensemble(remote(fake, logprobs=6)).generate(PROMPTS, policy, **settings)
    want = ensemble(local("facts")).generate(PROMPTS, policy, **settings)
    for one, other in zip(got, want, strict=True):
        assert [(t.id, t.model) for t in one.trace] == [(t.id, t.model) for t in other.trace]
        for mine, theirs in zip(one.trace, other.trace, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    named = [body for body in fake.requests if "logprob_token_ids" in body]
    assert len(named) > 1, "the probe's, and those of the texts"
    assert got.usage["facts"].calls > 0


def test_a_server_that_tells_of_no_named_tokens_is_refused_by_policies_that_name_some(
    serve: Serve,
) -> None:
    fake = serve("facts", Manners(max_logprobs=6, returns_named=False))
    with pytest.raises(
        CapabilityError, match="policy 'unite' needs token_logprobs of model 'facts'"
    ):
        ensemble(remote(fake)).generate(PROMPTS[0], "unite")


def test_a_token_that_no_server_was_asked_about_is_not_taken_for_impossible() -> None:
    signals = frozenset({"topk", "token_logprobs"})
    named = torch.tensor([[6]])
    view = View(ROW, signals=signals, name="facts", max_top_logprobs=5, candidates=named)
    assert view.logprobs_of(torch.tensor([[0, 6]])).tolist()[0][1] == -INF
    with pytest.raises(PolicyError, match="server of model 'facts' was not asked about"):
        view.logprob_of(torch.tensor([7]))

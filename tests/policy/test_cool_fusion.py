"""Cool-Fusion: proposals that end where words do, judged by every model in its own tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tables import random_table

import multicolm
from multicolm import Ensemble, SegmentPolicy, Segments
from multicolm.backend.table import TableModel
from multicolm.decoding.row import Row
from multicolm.decoding.segments import SegmentWriter
from multicolm.errors import PolicyError
from multicolm.testing import LawBroken, check_policy, check_routing

BASE = ("a", "b", "c", " ", "d", " d", "e", ".")
LEFT = ("a", "b", "c", " ", "d", "e", " ab", "bc", "<stop>")
RIGHT = ("a", "b", "c", " ", "d", "e", " c", "ea", "<stop>")
PROMPTS = ["a", "bc", "a d", "cab"]


def same_vocabulary(seed: int = 0) -> list[TableModel]:
    return [random_table(name, seed + i, BASE) for i, name in enumerate(("base", "left", "right"))]


def mixed(seed: int = 0) -> list[TableModel]:
    tables = (("base", 1, BASE), ("left", 2, LEFT), ("right", 3, RIGHT))
    return [random_table(name, seed + i, tokens) for name, i, tokens in tables]


def text_of(tokens: Sequence[int]) -> list[str]:
    return [BASE[token] for token in tokens]


def proposed(model: TableModel, own: list[int], n_left: int) -> tuple[list[int], float]:
    """What a model writes greedily up to the end of a word, and what that costs in nats."""
    tokens: list[int] = []
    nats = 0.0
    while len(tokens) < n_left:
        logprobs = model.logits_after(own + tokens).log_softmax(-1)
        token = int(logprobs.argmax())
        if tokens and (token == len(BASE) - 1 or BASE[token].startswith(" ")):
            break
        tokens.append(token)
        nats -= float(logprobs[token])
        if token == len(BASE) - 1 or len(tokens) == 16:
            break
    return tokens, nats


def judged(model: TableModel, own: list[int], tokens: list[int]) -> float:
    nats = 0.0
    for i, token in enumerate(tokens):
        nats -= float(model.logits_after(own + tokens[:i]).log_softmax(-1)[token])
    return math.exp(nats / len(tokens))


@pytest.mark.filterwarnings("ignore:policy 'cool-fusion' lets model 'left' propose and not judge")
@pytest.mark.parametrize("silent", [None, 1])
@pytest.mark.parametrize("seed", range(5))
def test_the_proposal_of_the_lowest_average_perplexity_of_those_who_judge_is_written(
    seed: int, silent: int | None
) -> None:
    own = same_vocabulary(10 * seed)
    judges = [model for k, model in enumerate(own) if k != silent]
    if silent is not None:
        vars(own[silent])["signals"] = frozenset({"text"})
    [answer] = Ensemble(own).generate(["a"], "cool-fusion", max_new_tokens=16)
    written = own[0].tokenizer.encode("a")
    n_prompt = len(written)
    writers: list[str] = []
    while len(written) - n_prompt < 16 and (not writers or written[-1] != len(BASE) - 1):
        each = [proposed(m, written, 16 - len(written) + n_prompt)[0] for m in own]
        best = min(range(3), key=lambda k: sum(judged(model, written, each[k]) for model in judges))
        if all(tokens == each[0] for tokens in each):
            best = 0
        written += each[best]
        writers += [own[best].name] * len(each[best])
    assert [token.id for token in answer.trace] == written[n_prompt:]
    assert [token.model for token in answer.trace] == writers


def test_proposals_end_where_a_word_does_and_a_token_of_every_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = mixed()
    n_inner, propose = 0, SegmentWriter._propose

    def watch(writer: SegmentWriter, k: int, rows: Sequence[Row]) -> Any:
        nonlocal n_inner
        proposals = yield from propose(writer, k, rows)
        for row, proposal in zip(rows, proposals, strict=True):
            content = [writer._vocabulary.token_bytes(token) for token in proposal.tokens]
            if not all(content) or row.n_tokens + len(content) >= row.max_new_tokens:
                continue  # the end of a text, or of what may be written
            inner = b"".join(content)[1:]
            # Between words of a proposal some model has a token that lies across.
            crossing = [c for c in (" ab", " c", " d") if c.encode() in inner]
            assert b" " not in inner or crossing
            n_inner += b" " not in inner
        return proposals

    monkeypatch.setattr(SegmentWriter, "_propose", watch)
    Ensemble(own).generate(PROMPTS, "cool-fusion", max_new_tokens=12)
    assert n_inner > 10


def test_models_that_are_one_write_the_text_of_one_and_judge_nothing() -> None:
    twins = [random_table(name, 4, BASE) for name in ("one", "two")]
    alone = Ensemble(twins[:1]).generate(PROMPTS, "single", max_new_tokens=20)
    both = Ensemble(twins).generate(PROMPTS, "cool-fusion", max_new_tokens=20)
    assert [a.text for a in both] == [a.text for a in alone]
    assert {t.model for a in both for t in a.trace} == {"one"}
    assert all(t.score is None for a in both for t in a.trace)


@pytest.mark.parametrize("own", [same_vocabulary(), mixed()], ids=["one vocabulary", "three"])
def test_it_keeps_the_laws(own: list[TableModel]) -> None:
    policy = Ensemble(own).resolve("cool-fusion")
    check_policy(policy)
    check_routing(Ensemble(own), PROMPTS, policy)


def test_the_embedded_models_write_together_whatever_their_tokens() -> None:
    for name in ("tiny", "tiny-mixed"):
        ensemble = multicolm.load(name)
        [answer] = ensemble.generate(["What does Zosos treat?"], "cool-fusion", max_new_tokens=24)
        assert len({token.model for token in answer.trace}) > 1
        assert all(token.score is None or token.score <= -1 for token in answer.trace)
        shown = "".join(t.text for t in answer.trace if not t.text.startswith("<|"))
        assert shown == answer.text


def test_nats_of_a_draft_are_those_of_the_models_own_tokens() -> None:
    own = mixed()
    seen: list[Segments] = []

    class Watching(SegmentPolicy):
        base_signals = frozenset({"logprobs"})
        assistant_signals = frozenset({"logprobs"})

        def rate(self, segments: Segments) -> torch.Tensor:
            seen.append(segments)
            return -segments.nats.sum(-1)

    answers = Ensemble(own).generate(["a"], Watching(), max_new_tokens=1)
    assert len(answers[0].trace) == 1 and len(seen) == 1
    prompts = [model.tokenizer.encode("a") for model in own]
    for a, writer in enumerate(own):
        token = int(writer.logits_after(prompts[a]).argmax())
        content = writer.tokenizer.token_bytes(token).decode()
        for b, judge in enumerate(own):
            nats, ids = 0.0, judge.tokenizer.encode(content) if content else []
            if not content:
                ids = [min(judge.tokenizer.end_ids)]
            for i, own_token in enumerate(ids):
                logprobs = judge.logits_after(prompts[b] + ids[:i]).log_softmax(-1)
                nats -= float(logprobs[own_token])
            assert float(seen[0].nats[0, a, b]) == pytest.approx(nats, abs=1e-5)
            assert int(seen[0].n_tokens[0, a, b]) == len(ids)


def test_of_proposals_that_others_find_incredible_the_least_incredible_wins() -> None:
    def sure(name: str, token: str, others: float) -> TableModel:
        rest = {t: others for t in "abc" if t != token}
        return TableModel(name, ["a", "b", "c", "."], {"": {token: 1.0, **rest}}, ends=["."])

    own = [sure("one", "a", 1e-150), sure("two", "b", 1e-100), sure("three", "c", 1e-160)]
    [answer] = Ensemble(own).generate(["a"], "cool-fusion", max_new_tokens=1)
    # a: 1e100 and 1e160; b: 1e150 and 1e160; c: 1e150 and 1e100.
    assert answer.text == "c"
    [token] = answer.trace
    assert token.score == pytest.approx(-(1e150 + 1e100 + 1) / 3, rel=1e-3)


def test_ratings_of_another_shape_are_refused_by_name() -> None:
    class Wrong(SegmentPolicy):
        base_signals = frozenset({"logprobs"})
        assistant_signals = frozenset({"logprobs"})

        def rate(self, segments: Segments) -> torch.Tensor:
            return torch.zeros(1)

    with pytest.raises(PolicyError, match=r"policy 'Wrong': rate\(\) must return 1 rows of 3"):
        Ensemble(mixed()).generate(["a"], Wrong(), max_new_tokens=3)
    with pytest.raises(LawBroken, match="one number per proposal"):
        check_policy(Wrong())


def options(**params: Any) -> dict[str, Any]:
    return {"kind": "cool-fusion", "params": params}


def test_a_proposal_that_finds_no_end_of_a_word_ends_at_its_greatest_length() -> None:
    letters = ("a", "b", "c", ".")
    own = [random_table(name, i, letters) for i, name in enumerate(("one", "two"))]
    settings: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "seed": 2}
    answers = Ensemble(own).generate(["a", "b", "c"] * 4, options(longest=3), **settings)
    lengths = []
    for answer in answers:
        runs = itertools.groupby(answer.trace, key=lambda token: token.score)
        lengths += [len(list(run)) for score, run in runs if score is not None]
    assert len(lengths) > 10 and max(lengths) == 3

"""Scores across vocabularies: merged spans, and what every model gave to each."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learning_worlds import world
from tables import random_table

import multicolm
from multicolm import Ensemble, catalog
from multicolm.backend.table import TableModel
from multicolm.errors import CapabilityError
from multicolm.exact.byte_session import ByteSession
from multicolm.learning.losses import marginal_loss
from multicolm.scoring.corpus import open_corpus
from multicolm.scoring.score import score
from multicolm.scoring.store import TableFiles, load_table, read_index

BASE = ("a", "b", "c", " ", "d", " d", "e", ".")
LEFT = ("a", "b", "c", " ", "d", "e", "ab", "bc", "<stop>")
RIGHT = ("a", "b", "c", " ", "d", "e", "cab", "ea", "<stop>")
RECORDS = [
    {"prompt": "a", "completion": "abc d"},
    {"prompt": "cab", "completion": "e"},
    {"prompt": "e d", "completion": "cabcab dea"},
    {"prompt": "bc", "completion": "bcbcab"},
]


def models() -> list[TableModel]:
    tables = (("base", 1, BASE), ("left", 2, LEFT), ("right", 3, RIGHT))
    return [random_table(*table) for table in tables]


def scored(folder: Path, members: list[TableModel], **settings: Any) -> Any:
    data = folder / "d.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    score(Ensemble(members), open_corpus(data), folder / "scores", **settings)
    return load_table(folder / "scores")


def by_hand(model: TableModel, prompt: str, text: str) -> list[tuple[str, float]]:
    """The model's own tokens of a text and its end, each with its log-probability."""
    read = model.tokenizer.encode(prompt)
    ids = [*model.tokenizer.encode_continuation(text), *model.tokenizer.end_ids]
    found = []
    for token in ids:
        session = model.open(1)
        logprobs = session.feed([0], [read], [1]).logits[0].log_softmax(-1)
        found.append((model.tokenizer.piece(token), float(logprobs[token])))
        read = [*read, token]
    return found


def spans_by_hand(text: str, members: list[TableModel]) -> list[tuple[int, int]]:
    """Stretches between offsets at which every model has a token's end, the text's end last."""
    common: set[int] | None = None
    for model in members:
        at, ends = 0, {0}
        for token in model.tokenizer.encode_continuation(text):
            at += len(model.tokenizer.token_bytes(token))
            ends.add(at)
        common = ends if common is None else common & ends
    assert common is not None
    cuts = sorted(common)
    return [*itertools.pairwise(cuts), (len(text), len(text))]


def test_a_span_has_the_product_of_the_models_own_tokens_in_it(tmp_path: Path) -> None:
    members = models()
    table = scored(tmp_path, members)
    row = n_merged = 0
    for number, record in enumerate(RECORDS):
        text = record["completion"]
        spans = spans_by_hand(text, members)
        n_merged += sum(stop - start > 2 for start, stop in spans)
        for start, stop in spans:
            assert int(table.example[row]) == number
            for k, model in enumerate(members):
                at, wanted = 0, 0.0
                *own, end = by_hand(model, record["prompt"], text)
                for piece, logprob in own:
                    wanted += logprob if start <= at < stop else 0.0
                    at += len(piece)
                wanted = end[1] if start == stop else wanted
                assert float(table.gold_logprobs[row, k]) == pytest.approx(wanted, abs=1e-5)
            row += 1
    assert row == len(table) and n_merged >= 2 and bool(table.known.all())


def test_the_spans_of_a_text_have_the_probability_of_the_text(tmp_path: Path) -> None:
    members = models()
    table = scored(tmp_path, members)
    for k, model in enumerate(members):
        total = sum(p for r in RECORDS for _, p in by_hand(model, r["prompt"], r["completion"]))
        assert float(table.gold_logprobs[:, k].double().sum()) == pytest.approx(total, abs=1e-4)


def test_a_table_of_models_with_one_vocabulary_is_not_merged(tmp_path: Path) -> None:
    twin = random_table("twin", 7, BASE)
    table = scored(tmp_path, [models()[0], twin])
    n_tokens = sum(len(twin.tokenizer.encode_continuation(r["completion"])) + 1 for r in RECORDS)
    assert len(table) == n_tokens


def test_the_index_says_which_bridge_made_the_scores(tmp_path: Path) -> None:
    scored(tmp_path, [*models()[:2], random_table("twin", 7, BASE)])
    bridges = {model.name: model.bridge for model in read_index(tmp_path / "scores").models}
    assert bridges == {"base": "shared", "left": "boundary", "twin": "shared"}


def test_a_model_that_is_added_later_changes_no_score_of_the_others(tmp_path: Path) -> None:
    base, left, right = models()
    first = scored(tmp_path, [base, left])
    before = {
        name: (tmp_path / "scores" / name / "00000.safetensors").read_bytes()
        for name in ("base", "left")
    }
    both = scored(tmp_path, [base, left, right])
    for name, content in before.items():
        assert (tmp_path / "scores" / name / "00000.safetensors").read_bytes() == content
    assert len(both) < len(first)  # merged further
    again = load_table(tmp_path / "scores", ["base", "left"])
    assert torch.equal(again.gold_logprobs, first.gold_logprobs)


def test_the_right_token_of_ones_own_counts_as_right(tmp_path: Path) -> None:
    choices = {"": {"<stop>": 1.0}, "q": {"ab": 0.9, "a": 0.1}, "ab": {"c": 1.0}}
    base = TableModel("base", ["q", "a", "b", "c", "."], {"": {"b": 1.0}}, ["."])
    other = TableModel("other", ["q", "ab", "a", "b", "c", "<stop>"], choices, ["<stop>"])
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"prompt": "q", "completion": "abc"}))
    score(Ensemble([base, other]), open_corpus(data), tmp_path / "scores")
    table = load_table(tmp_path / "scores")
    assert table.correct[:, 1].tolist() == [True, True, True]  # ab, c, the end
    assert table.correct[:, 0].tolist() == [False, False, False]
    assert float(table.gold_logprobs[0, 1]) == pytest.approx(math.log(0.9))


def test_what_lies_beyond_a_context_is_unknown_as_a_whole_span(tmp_path: Path) -> None:
    base, left, _ = models()
    short = random_table("left", 2, LEFT)
    short.context_length = 4
    table = scored(tmp_path, [base, short])
    (tmp_path / "whole").mkdir()
    whole = scored(tmp_path / "whole", [base, left])
    assert len(table) == len(whole) and not bool(table.known.all())
    known = table.known[:, 1]
    assert torch.equal(table.gold_logprobs[known], whole.gold_logprobs[known])
    files = TableFiles(tmp_path / "scores", read_index(tmp_path / "scores"))
    assert "open" in files.read("left", 0)


def test_training_the_base_model_across_vocabularies_is_refused_by_name(tmp_path: Path) -> None:
    from multicolm.config import load_ensemble
    from multicolm.policy.co_llm import CoLlmPolicy
    from multicolm.training.joint.train import train_joint

    config = load_ensemble("tiny-mixed")
    questions = catalog.registry() / "tiny" / "questions" / "train.jsonl"
    lines = questions.read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    score(
        multicolm.load("tiny-mixed"),
        open_corpus(tmp_path / "d.jsonl"),
        tmp_path / "scores",
        features=["hidden"],
    )
    with pytest.raises(CapabilityError, match="'facts' has another vocabulary than the base"):
        train_joint(CoLlmPolicy(), tmp_path / "scores", tmp_path / "out", config=config, how="lora")


# ---- the exact bridge


def next_bytes(model: TableModel, prompt: str, text: bytes) -> list[torch.Tensor]:
    """Log-probabilities of the 257 outcomes before every byte of a text, and behind it."""
    session = ByteSession(model, 1, prune=0.0)
    session.begin(0, model.tokenizer.encode(prompt))
    found = [session.next_byte_logprobs([0])[0]]
    for i in range(len(text)):
        session.feed([0], [text[i : i + 1]])
        found.append(session.next_byte_logprobs([0])[0])
    return found


def exactly_scored(folder: Path, members: list[TableModel]) -> Any:
    data = folder / "d.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    score(Ensemble(members, bridge="exact"), open_corpus(data), folder / "scores")
    return load_table(folder / "scores")


def test_by_the_exact_bridge_every_base_token_has_its_exact_probability(tmp_path: Path) -> None:
    members = models()
    table = exactly_scored(tmp_path, members)
    row = n_closed = 0
    for record in RECORDS:
        text = record["completion"].encode()
        shown = [next_bytes(model, record["prompt"], text) for model in members]
        at = 0
        for token in members[0].tokenizer.encode_continuation(record["completion"]):
            content = members[0].tokenizer.token_bytes(token)
            for k in (1, 2):
                wanted = sum(float(shown[k][at + i][byte]) for i, byte in enumerate(content))
                assert float(table.gold_logprobs[row, k]) == pytest.approx(wanted, abs=1e-4)
                n_closed += int(table.top1_ids[row, k]) == -1
            at += len(content)
            row += 1
        for k in (1, 2):
            assert float(table.gold_logprobs[row, k]) == pytest.approx(
                float(shown[k][at][256]), abs=1e-4
            )
        row += 1
    # Nothing is merged, and some base tokens begin within a token of an assistant.
    assert row == len(table) and n_closed > 0 and bool(table.known.all())
    assert {m.name: m.bridge for m in read_index(tmp_path / "scores").models} == {
        "base": "shared",
        "left": "exact",
        "right": "exact",
    }


def test_the_marginal_likelihood_by_spans_is_that_byte_by_byte(tmp_path: Path) -> None:
    """P(span) = sum_k pi_k prod_bytes P_k(byte | bytes before), whatever wrote the bytes before."""
    members = models()
    table = exactly_scored(tmp_path, members)
    scores = torch.randn(len(table), 3, generator=torch.Generator().manual_seed(0))
    by_spans = -marginal_loss(scores, table.gold_logprobs, table.known)
    pi = scores.softmax(-1).double()
    row = 0
    for record in RECORDS:
        text = record["completion"].encode()
        shown = [next_bytes(model, record["prompt"], text) for model in members]
        own = members[0].tokenizer.encode_continuation(record["completion"])
        contents = [members[0].tokenizer.token_bytes(token) for token in own]
        base = [p for _, p in by_hand(members[0], record["prompt"], record["completion"])]
        at = 0
        for content, base_logprob in zip([*contents, b""], base, strict=True):
            outcomes = [*content] if content else [256]
            each = [math.exp(base_logprob)] + [
                math.exp(sum(float(shown[k][at + i][o]) for i, o in enumerate(outcomes)))
                for k in (1, 2)
            ]
            wanted = math.log(sum(float(p) * q for p, q in zip(pi[row], each, strict=True)))
            assert float(by_spans[row]) == pytest.approx(wanted, abs=1e-4)
            at += len(content)
            row += 1


def test_a_first_choice_is_right_if_all_of_the_models_own_tokens_of_the_span_are(
    tmp_path: Path,
) -> None:
    """Every word of the assistant's begins with the same token, which alone says nothing."""

    def sure(tokens: Sequence[str], token: str) -> dict[str, float]:
        return {other: float(other == token) for other in tokens}

    whole, parts = ("a", " b", " c", "."), ("a", " ", "b", "c", ".")
    base = TableModel("base", whole, {"": sure(whole, " c")}, ends=["."])

    def assistant(name: str, word: str) -> TableModel:
        rows = {"": sure(parts, " "), " ": sure(parts, word), "b": sure(parts, ".")}
        return TableModel(name, parts, rows, ends=["."])

    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": " b"}\n')
    models = [base, assistant("right", "b"), assistant("wrong", "c")]
    score(Ensemble(models), open_corpus(data), tmp_path / "out")
    table = load_table(tmp_path / "out")
    assert table.correct.tolist() == [[False, True, False], [False, True, True]]
    assert table.gold_logprobs[0, 1] == 0 and table.gold_logprobs[0, 2] == -math.inf


def test_a_merged_span_is_right_where_a_model_is_at_all_of_its_own_tokens() -> None:
    table = replace(
        world(2, 4), gold_ids=torch.tensor([5, 5, 5, 5]),
        top1_ids=torch.tensor([[5, 5], [6, 9], [5, 6], [5, 5]]),
    )  # fmt: skip
    opens = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    merged = table.merged(opens)
    assert merged.correct.tolist() == [[False, True], [True, False], [True, True]]
    assert merged.top1_ids[0, 0] not in (5, 6) and merged.top1_ids[1, 1] == 6

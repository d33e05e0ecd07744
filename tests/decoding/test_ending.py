"""Why a text ends, what is shown of it meanwhile, and what it was seeded with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from duo_world import duo_ensemble
from tiny_models import byte_level, fresh_network, model

from multicolm import Answer, Ensemble, SelectPolicy, Views
from multicolm.backend.base import ModelOutput, Session
from multicolm.backend.table import TableModel
from multicolm.errors import ModelError
from multicolm.tokenizer.literal import LiteralTokenizer
from multicolm.types import MIXTURE, Piece

TOKENS = ["a", "b", "c", "<x>", "."]
CYCLE = {"": {"a": 1.0}, "a": {"b": 1.0}, "b": {"c": 1.0}, "c": {"a": 1.0}}
POLICIES = ("single", "random", "average", "speculative", "cosd-rule", "confidence")


def table(name: str, rows: Any = None, context_length: int | None = None) -> TableModel:
    return TableModel(name, TOKENS, rows or CYCLE, ends=["."], context_length=context_length)


class Turns(SelectPolicy):
    """The models write in turn."""

    history = True

    def select(self, views: Views) -> torch.Tensor:
        return (views.previous + 1) % len(views.models)


def schedules() -> list[dict[str, Any]]:
    return [{"schedule": "stepwise"}, {"schedule": "block", "block_size": 3}, {"block_size": 8}]


# --- finish reasons ------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", schedules())
@pytest.mark.parametrize("policy", POLICIES)
def test_a_text_ends_at_its_writers_end(policy: str, settings: dict[str, Any]) -> None:
    ending = {**CYCLE, "c": {".": 1.0}}
    ensemble = Ensemble([table("base", ending), table("left", ending)])
    answer = ensemble.generate("c", policy, seed=0, max_new_tokens=1, **settings)[0]
    assert (answer.finish_reason, answer.text, len(answer.trace)) == ("eos", "", 1)
    answer = ensemble.generate("a", policy, seed=0, max_new_tokens=9, **settings)[0]
    assert (answer.finish_reason, answer.text) == ("eos", "bc")
    assert [token.text for token in answer.trace] == ["b", "c", "."]


@pytest.mark.parametrize("settings", schedules())
@pytest.mark.parametrize("policy", POLICIES)
def test_a_text_ends_at_a_stop_string(policy: str, settings: dict[str, Any]) -> None:
    ensemble = Ensemble([table("base"), table("left")])
    for stop, text, n_tokens in (
        ("ca", "b", 3),
        (["cab", "ca"], "b", 3),
        (["zz", "bc"], "", 2),
        ("abcabc", "bc", 8),
    ):
        answer = ensemble.generate("a", policy, seed=0, max_new_tokens=9, stop=stop, **settings)[0]
        assert (answer.finish_reason, answer.text) == ("stop", text)
        assert len(answer.trace) == n_tokens  # the stop's tokens are in the trace


@pytest.mark.parametrize("settings", schedules())
@pytest.mark.parametrize("policy", POLICIES)
def test_a_text_ends_at_a_special_token_whose_name_is_a_stop_string(
    policy: str, settings: dict[str, Any]
) -> None:
    turning = {**CYCLE, "c": {"<x>": 1.0}, "<x>": {"a": 1.0}}
    models = [table("base", turning), table("left", turning)]
    for one in models:
        one.tokenizer = LiteralTokenizer(TOKENS, specials=["<x>"], ends=["."])
    for stop, reason, text in (
        ("<x>", "stop", "bc"),
        ("c<x>a", "stop", "b"),
        (["zz", "<x>ab"], "stop", "bc"),
        ([], "length", "bcabcab"),
        ("<", "length", "bcabcab"),  # a part of a name is not in the text
    ):
        ensemble = Ensemble(models)
        answer = ensemble.generate("a", policy, seed=0, max_new_tokens=9, stop=stop, **settings)[0]
        assert (answer.finish_reason, answer.text) == (reason, text)


@pytest.mark.parametrize("settings", schedules())
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_text_ends_at_its_length(policy: str, length: int, settings: dict[str, Any]) -> None:
    ensemble = Ensemble([table("base"), table("left")])
    answer = ensemble.generate("a", policy, seed=0, max_new_tokens=length, **settings)[0]
    assert (answer.finish_reason, len(answer.trace)) == ("length", length)
    assert answer.text == "bcabcab"[:length]


def test_what_may_have_been_a_stop_is_shown_when_the_text_ends_otherwise() -> None:
    ensemble = Ensemble([table("base")])
    answer = ensemble.generate("a", max_new_tokens=3, stop="abcd")[0]
    assert (answer.finish_reason, answer.text) == ("length", "bca")


class Strict(TableModel):
    """Breaks when it is fed more than its context holds, as learned positions do."""

    def open(self, n_rows: int) -> Session:
        session, limit = super().open(n_rows), self.context_length
        plain = session.feed

        def feed(rows: Any, tokens: Any, n_last: Any, **kwargs: Any) -> ModelOutput:
            output = plain(rows, tokens, n_last, **kwargs)
            assert limit is None or max(session.lengths) <= limit, "read past the context"
            return output

        session.feed = feed  # type: ignore[method-assign]
        return session


def strict(name: str, context_length: int | None, tokens: Sequence[str] = TOKENS) -> Strict:
    return Strict(name, tokens, CYCLE, ends=["."], context_length=context_length)


@pytest.mark.parametrize("settings", schedules())
def test_a_text_ends_where_the_context_of_a_model_in_use_is_full(settings: dict[str, Any]) -> None:
    ensemble = Ensemble([strict("base", 12), strict("left", 5), strict("right", 4)])
    for policy, n_tokens in (
        ("single", 11),
        ({"kind": "single", "params": {"model": "left"}}, 4),
        ({"kind": "speculative", "params": {"target": "left"}}, 4),
        ({"kind": "average", "params": {"weights": [1, 1, 0]}}, 4),
        ({"kind": "random", "params": {"weights": [1, 0, 1]}}, 3),
        ("confidence", 3),
        ("cosd-rule", 3),
        ("max-confidence", 3),
    ):
        answer = ensemble.generate("ab", policy, seed=0, max_new_tokens=30, **settings)[0]
        assert (answer.finish_reason, len(answer.trace)) == ("context", n_tokens), policy


@pytest.mark.parametrize("settings", schedules())
def test_a_token_that_a_model_reads_as_many_does_not_overfill_its_context(
    settings: dict[str, Any],
) -> None:
    chatty = {"": {"<think>": 1.0}}
    letters = ["a", "b", *"<think>"]
    base = Strict("base", [*letters, "<think>"], chatty)
    left = Strict("left", letters, {"": {"a": 0.5, "b": 0.5}}, context_length=20)
    ensemble = Ensemble([base, left])
    for policy in ("max-confidence", "speculative", "average"):
        answer = ensemble.generate("ab", policy, seed=0, max_new_tokens=9, **settings)[0]
        assert answer.finish_reason in ("context", "length")
    answer = ensemble.generate("ab", "max-confidence", max_new_tokens=9, **settings)[0]
    assert (answer.text, answer.finish_reason) == ("<think>" * 3, "context")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_full_context_of_a_real_model_ends_the_text(kind: str) -> None:
    base = model(kind)
    prompt = "ab " * 100
    n_prompt = len(base.tokenizer.encode(prompt))
    ensemble = Ensemble([base, model("bloom", "other")])
    for policy in ("single", "max-confidence"):
        answer = ensemble.generate(prompt, policy, max_new_tokens=400, schedule="block")[0]
        if answer.finish_reason == "context":
            assert len(answer.trace) == 256 - n_prompt + 1
        else:
            assert answer.finish_reason == "eos"


# --- streaming -----------------------------------------------------------------------------------


def joined(pieces: Sequence[Piece], row: int) -> str:
    return "".join(piece.text for piece in pieces if piece.row == row)


def spelled(answer: Answer, ensemble: Ensemble) -> list[tuple[str, str]]:
    """Every character of an answer with its writer, from the trace alone (one byte per token)."""
    characters: list[tuple[str, str]] = []
    left = b""
    for token in answer.trace:
        left += ensemble.vocabulary.token_bytes(token.id)
        try:
            characters += [(character, token.model) for character in left.decode()]
        except UnicodeDecodeError:
            continue
        left = b""
    return characters


@pytest.mark.parametrize("settings", schedules())
def test_pieces_join_to_the_text_with_the_writers_of_the_trace(settings: dict[str, Any]) -> None:
    ensemble = Ensemble([table("base"), table("left"), table("right")])
    stream = ensemble.stream(
        ["a", "b", "ab", "c"], Turns(), max_new_tokens=10, stop="cabcz", batch_size=3, **settings
    )
    pieces = list(stream)
    for row, answer in enumerate(stream.answers):
        assert joined(pieces, row) == answer.text and len(answer.text) == 10
        shown = [(c, piece.model) for piece in pieces if piece.row == row for c in piece.text]
        assert shown == spelled(answer, ensemble)
        assert [token.model for token in answer.trace][:3] == ["base", "left", "right"]
    assert all(piece.text for piece in pieces)


def test_characters_of_several_tokens_and_writers_are_shown_whole() -> None:
    emoji = byte_level(merges=False)
    ids = emoji("é😀")["input_ids"]
    pieces_of = [emoji.convert_ids_to_tokens(i) for i in ids]
    assert len(ids) == 6
    network = fresh_network(_chain_config(len(emoji)))
    base, left = (_chain(name, network, emoji, ids) for name in ("base", "left"))
    stream = Ensemble([base, left]).stream("x", Turns(), max_new_tokens=len(ids))
    pieces = list(stream)
    assert stream.answers[0].text == "é😀", pieces_of
    assert [(piece.text, piece.model) for piece in pieces] == [("é", "left"), ("😀", "left")]


def _chain_config(width: int) -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=width,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )


def _chain(name: str, network: Any, tokenizer: Any, ids: Sequence[int]) -> Any:
    """A model that always writes the same tokens, whatever its network says."""
    from multicolm.backend.transformers import TransformersModel

    class Chain(TransformersModel):
        def open(self, n_rows: int) -> Session:
            session = super().open(n_rows)
            plain = session.feed

            def feed(rows: Any, tokens: Any, n_last: Any, **kwargs: Any) -> ModelOutput:
                output = plain(rows, tokens, n_last, **kwargs)
                logits = torch.full_like(output.logits, -9.0)
                line = 0
                for row, count in zip(rows, n_last, strict=True):
                    for back in range(count - 1, -1, -1):
                        place = session.lengths[row] - 1 - back  # the prompt is one token
                        logits[line, ids[place % len(ids)]] = 9.0
                        line += 1
                return ModelOutput(logits)

            session.feed = feed  # type: ignore[method-assign]
            return session

    return Chain(name, network, tokenizer)


def test_a_mixture_is_named_as_such() -> None:
    ensemble = Ensemble([table("base"), table("left")])
    stream = ensemble.stream("a", "average", max_new_tokens=3)
    assert {piece.model for piece in stream} == {MIXTURE}
    assert {token.model for token in stream.answers[0].trace} == {MIXTURE}


def test_a_stream_that_is_broken_off_keeps_the_answers_that_were_finished() -> None:
    rows = {"": {"a": 1.0}, "a": {"a": 1.0}, "b": {"c": 1.0}, "c": {".": 1.0}}
    ensemble = Ensemble([table("base", rows), table("left", rows)])
    whole = ensemble.generate(["a", "b", "c"], max_new_tokens=30)
    stream = ensemble.stream(["a", "b", "c"], max_new_tokens=30)
    for n_before, _ in enumerate(stream):
        if n_before == 11:
            break
    finished = stream.answers
    assert [answer.text for answer in finished] == ["c", ""]
    assert [answer.trace for answer in finished] == [answer.trace for answer in whole[1:]]
    assert finished.usage["base"].forwards > 0


# --- seeds ---------------------------------------------------------------------------------------

COIN = {"": {"a": 0.4, "b": 0.3, "c": 0.25, ".": 0.05}}


def texts(answers: Sequence[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def test_each_prompt_may_have_its_own_seed() -> None:
    ensemble = Ensemble([table("base", COIN), table("left", COIN)])
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 20}
    together = ensemble.generate(["a", "a", "b", "a"], "random", seed=[1, 2, 1, 1], **settings)
    singly = [
        ensemble.generate([prompt], "random", seed=seed, **settings)[0]
        for prompt, seed in (("a", 1), ("a", 2), ("b", 1), ("a", 1))
    ]
    assert texts(together) == texts(singly)
    assert together[0].text == together[3].text != together[1].text
    assert [answer.seed for answer in together] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("policy", "temperature", "random"),
    [
        ("single", 0.0, False),
        ("confidence", 0.0, False),
        ("average", 0.0, False),
        ("single", 0.7, True),
        ("random", 0.0, True),
        ("average", 0.7, True),
    ],
)
def test_a_seed_is_reported_where_something_was_random(
    policy: str, temperature: float, random: bool
) -> None:
    ensemble = Ensemble([table("base", COIN), table("left", COIN)])
    answers = ensemble.generate(["a", "b"], policy, seed=5, temperature=temperature)
    assert [answer.seed for answer in answers] == ([5, 5] if random else [None, None])


def test_a_fresh_seed_is_reported_and_gives_the_same_text_again() -> None:
    ensemble = Ensemble([table("base", COIN), table("left", COIN)])
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 40}
    first = ensemble.generate("a", "random", **settings)[0]
    assert first.seed is not None
    assert ensemble.generate("a", "random", seed=first.seed, **settings)[0].trace == first.trace
    others = {ensemble.generate("a", "random", **settings)[0].text for _ in range(6)}
    assert len(others) > 1


def test_copies_of_a_prompt_without_a_seed_each_get_one_of_their_own() -> None:
    ensemble = Ensemble([table("base", COIN), table("left", COIN)])
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 40}
    copies = ensemble.generate(["a"] * 6, "random", **settings)
    assert len({answer.seed for answer in copies}) == len(set(texts(copies))) == 6
    again = ensemble.generate(["a"] * 6, "random", seed=[a.seed or 0 for a in copies], **settings)
    assert texts(again) == texts(copies)
    assert len(set(texts(ensemble.generate(["a"] * 6, "random", seed=1, **settings)))) == 1


def test_answers_that_are_finished_come_before_an_error() -> None:
    duo = duo_ensemble()
    n_passes, fail_at = 0, 0
    plain = duo.backends[0].open

    def open_(n_rows: int) -> Any:
        session = plain(n_rows)
        feed = session.feed

        def failing(*args: Any, **more: Any) -> Any:
            nonlocal n_passes
            n_passes += 1
            if n_passes > fail_at:
                raise ModelError("broken")
            return feed(*args, **more)

        session.feed = failing
        return session

    duo.backends[0].open = open_
    # Each text is a letter and the end, which lets nothing out: two passes.
    for n in range(8):
        n_passes, fail_at = 0, n
        stream, found = duo.stream(["1", "2", "3", "4"], "single", batch_size=1), []
        with pytest.raises(ModelError):
            for number, answer in stream.finished():
                found.append((number, answer.text))
        assert found == [(i, "x") for i in range(n // 2)]

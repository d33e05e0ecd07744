"""llama.cpp's own server, as far as its answers differ from vLLM's; the real one is in engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_models
import torch
from fake_llama import FakeLlama
from fake_vllm import Manners
from remote_worlds import local, remote

from multicolm.backend.base import Model
from multicolm.backend.remote.answers import Unreadable, top_rows
from multicolm.backend.remote.model import LlamaCppServerModel
from multicolm.backend.remote.probe import RequestedModel
from multicolm.backend.remote.transport import Server
from multicolm.errors import ServerError
from multicolm.testing import check_against, check_model


def behind(fake: FakeLlama, **wish: Any) -> LlamaCppServerModel:
    server = Server(fake.url, "m", sleep=lambda _: None)
    return LlamaCppServerModel("m", server, fake.model.tokenizer, RequestedModel(**wish))


@pytest.fixture
def fake() -> Iterator[FakeLlama]:
    with FakeLlama(local("facts")) as server:
        yield server


@pytest.fixture(scope="module")
def babbler() -> Model:
    """A random model, which writes parts of characters."""
    return tiny_models.model("llama")


def test_what_it_can_do_is_found_out(fake: FakeLlama) -> None:
    assert behind(fake).abilities[1:] == [
        "the server calls it 'facts'",
        "prompts are token ids, several at a time",
        "log-probabilities of the whole vocabulary (768 tokens)",
        "prompts are not scored by the server",
        "`max_tokens: 0` writes one token",
        "its context takes 511 tokens",
    ]


@pytest.mark.parametrize("logprobs", ["all", 20])
def test_it_shows_what_the_model_shows_in_process(fake: FakeLlama, logprobs: Any) -> None:
    seen = check_against(behind(fake, logprobs=logprobs), local("facts"), texts=["Question:"])
    assert (seen.n_unknown == 0) == (logprobs == "all")
    check_model(behind(fake, logprobs=logprobs))


def test_it_is_kept_from_writing_parts_of_characters_of_which_it_would_tell_nothing(
    babbler: Model,
) -> None:
    with FakeLlama(babbler, "babbler") as fake:
        model = behind(fake)
        check_against(model, babbler, texts=tiny_models.PROMPTS)
        n_before = len(fake.requests)
        model.open(1).feed([0], [[5, 6, 7]], [1])
        [body] = fake.requests[n_before:]
        kept = {babbler.tokenizer.token_bytes(int(i)) for i in body["logit_bias"]}
    assert b"\xc3" in kept and b"a" not in kept


def test_one_that_tells_of_every_token_is_kept_from_none(
    serve: Callable[..., Any], fake: FakeLlama
) -> None:
    assert remote(serve())._abilities.unreported == ()
    assert len(behind(fake)._abilities.unreported) == 128


def test_texts_that_share_its_room_go_in_as_many_requests_as_that_takes() -> None:
    with FakeLlama(local("facts"), "facts", Manners(max_model_len=96)) as fake:
        model = behind(fake)
        assert model.context_length == 95
        texts = [[5, 6, 7] * n for n in (4, 5, 31, 1)]
        output = model.open(4).feed(range(4), texts, [1] * 4)
        assert (output.n_calls, output.calls_of) == (3, (1, 1, 1, 1))
        assert [len(body["prompt"]) for body in fake.requests[-3:]] == [2, 93, 3]
        alone = torch.cat([local("facts").open(1).feed([0], [t], [1]).logits for t in texts])
        assert torch.allclose(output.logits, alone.log_softmax(-1), atol=1e-4)


ENTRY = {"id": 7, "bytes": [97], "top_logprobs": [{"id": 7, "bytes": [97], "logprob": -0.5}]}


def test_what_comes_behind_a_gap_is_not_read() -> None:
    behind_a_gap = {**ENTRY, "bytes": [195, 97]}
    tokens, rows = top_rows({"content": [ENTRY, behind_a_gap, ENTRY]})
    assert tokens == [7] and len(rows) == 1


@pytest.mark.parametrize("entry", [{"token": "a", "top_logprobs": []}, {"id": 7}, {"id": None}, 3])
def test_entries_without_ids_tell_nothing(entry: Any) -> None:
    assert top_rows({"content": [entry]}) == ([], [])


@pytest.mark.parametrize("top", [{"id": 7}, {"id": 7, "logprob": "a"}, {"id": 7, "logprob": None}])
def test_entries_without_numbers_are_an_error(top: Any) -> None:
    with pytest.raises(Unreadable, match=r"`top_logprobs` holds .*, which is no log-probability"):
        top_rows({"content": [{**ENTRY, "top_logprobs": [top]}]})


def test_one_that_stops_to_tell_is_an_error(fake: FakeLlama) -> None:
    session = behind(fake).open(1)
    fake.go_wrong("no logprobs")
    with pytest.raises(ServerError, match="it gave no log-probabilities by token id, other than"):
        session.feed([0], [[5, 6]], [1])

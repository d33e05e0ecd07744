"""A model in a server shows what it shows in this process, with fewer requests than passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_vllm import FakeVllm, Manners
from remote_worlds import PROMPTS, local, remote

from multicolm.errors import CapabilityError
from multicolm.testing import check_model

Serve = Callable[..., FakeVllm]
IDS = [40, 467, 79, 258, 72, 536, 221, 18]


def logprobs(model: object, ids: list[int], n_last: int) -> torch.Tensor:
    return model.open(1).feed([0], [ids], [n_last]).logits.log_softmax(-1)


@pytest.mark.parametrize(
    "manners",
    [Manners(), Manners(prompt_logprobs=False), Manners(prompt_logprobs=False, echo=False)],
    ids=["prompt_logprobs", "echo", "no scoring"],
)
def test_it_shows_what_the_model_shows_in_this_process(serve: Serve, manners: Manners) -> None:
    model = remote(serve("facts", manners))
    for n_last in (1, 2, len(IDS)):
        got, want = logprobs(model, IDS, n_last), logprobs(local("facts"), IDS, n_last)
        assert torch.allclose(got, want, atol=1e-5)


def test_it_keeps_the_laws_of_backends(serve: Serve) -> None:
    check_model(remote(serve()), tolerance=1e-5)
    check_model(remote(serve("facts", Manners(prompt_logprobs=False)), look_ahead=1), seed=1)


def write_greedily(model: object, ids: list[int], n_tokens: int) -> tuple[list[int], int]:
    """Token by token; the tokens, and how many requests they took."""
    session, new, written, n_calls = model.open(1), ids, [], 0
    for _ in range(n_tokens):
        output = session.feed([0], [new], [1])
        n_calls += output.n_calls
        new = [int(output.logits[0].argmax())]
        written += new
    return written, n_calls


def test_one_request_asks_for_twice_as_many_tokens_as_long_as_all_are_used(serve: Serve) -> None:
    fake = serve()
    ids = local("facts").tokenizer.encode(PROMPTS[0])
    plain, n_plain = write_greedily(remote(fake, look_ahead=1), ids, 24)
    ahead, n_ahead = write_greedily(remote(fake, look_ahead=8), ids, 24)
    assert ahead == plain == write_greedily(local("facts"), ids, 24)[0]
    assert (n_plain, n_ahead) == (24, 6)  # 1 + 2 + 4 + 8 + 8 + 8
    assert [body["max_tokens"] for body in fake.requests[-6:]] == [1, 2, 4, 8, 8, 8]


def test_what_is_foreseen_far_ahead_is_remembered_until_it_is_reached(serve: Serve) -> None:
    fake = serve("facts", Manners(max_logprobs=5))
    written, n_calls = write_greedily(remote(fake, look_ahead=128), IDS, 200)
    assert written == write_greedily(local("facts"), IDS, 200)[0]
    assert n_calls == 8  # 1 + 2 + 4 + ... + 64 + 128


def test_where_others_write_it_soon_asks_for_one_token_at_a_time(serve: Serve) -> None:
    fake = serve()
    session = remote(fake, look_ahead=8).open(1)
    session.feed([0], [IDS], [1])
    for token in [3, 5] * 5:  # that the model would not write
        assert session.feed([0], [[token]], [1]).n_calls == 1
    assert [body["max_tokens"] for body in fake.requests[-10:]] == [1] * 10


def test_cutting_a_text_and_reading_it_again_costs_nothing(serve: Serve) -> None:
    session = remote(serve()).open(1)
    first = session.feed([0], [IDS], [3])
    session.truncate(0, len(IDS) - 3)
    again = session.feed([0], [IDS[-3:]], [3])
    assert (first.n_calls, again.n_calls, again.n_passes, again.calls_of) == (1, 0, 0, (0,))
    assert torch.equal(first.logits, again.logits)


def test_what_was_foreseen_is_not_believed_on_another_way(serve: Serve) -> None:
    model = remote(serve(), look_ahead=8)
    session = model.open(1)
    first = session.feed([0], [IDS], [1])
    for token in (7, int(first.logits.argmax()), 7):
        session.truncate(0, len(IDS))
        got = session.feed([0], [[token]], [1]).logits.log_softmax(-1)
        assert torch.allclose(got, logprobs(local("facts"), [*IDS, token], 1), atol=1e-5)


def test_a_batch_is_one_request_and_counts_for_the_rows_that_needed_it(serve: Serve) -> None:
    session = remote(serve()).open(3)
    session.feed([0], [IDS], [1])
    output = session.feed([1, 2], [IDS[:3], IDS[:5]], [1, 1])
    assert (output.n_calls, output.calls_of) == (1, (1, 1))
    session.truncate(0, len(IDS) - 1)
    output = session.feed([0, 1], [IDS[-1:], [9]], [1, 1])
    assert (output.n_calls, output.calls_of) == (1, (0, 1))


def test_an_end_of_text_as_the_first_token_is_a_token_like_any_other(serve: Serve) -> None:
    generalist = local("generalist")
    end = next(iter(generalist.tokenizer.end_ids))
    said = " Well. Dulerex is prescribed for typhus. Answer: typhus."
    ids = generalist.tokenizer.encode(PROMPTS[0] + said)
    session = remote(serve("generalist"), look_ahead=4).open(1)
    output = session.feed([0], [ids], [1])
    assert int(output.logits.argmax()) == end
    assert torch.allclose(output.logits.log_softmax(-1), logprobs(generalist, ids, 1), atol=1e-5)
    # Behind an end of text another text begins.
    after = session.feed([0], [[end, *IDS]], [1]).logits.log_softmax(-1)
    assert torch.allclose(after, logprobs(generalist, [*ids, end, *IDS], 1), atol=1e-5)


def test_a_text_is_looked_at_up_to_the_end_of_the_servers_context(serve: Serve) -> None:
    fake = serve("facts", Manners(max_model_len=72))
    model = remote(fake, look_ahead=8)
    assert model.context_length == 71
    written, _ = write_greedily(model, IDS * 8, 8)  # 64 tokens, and 7 of these are read again
    assert written == write_greedily(local("facts"), IDS * 8, 8)[0]
    assert [body["max_tokens"] for body in fake.requests[-4:]] == [1, 2, 4, 1]


def test_of_few_places_each_is_a_text_of_its_own_and_all_at_once_are_scored(serve: Serve) -> None:
    fake = serve()
    model = remote(fake)
    n_before = len(fake.requests)
    model.open(1).feed([0], [[*IDS, *IDS]], [3])
    assert [len(prompt) for prompt in fake.requests[-1]["prompt"]] == [14, 15, 16]
    model.open(1).feed([0], [[*IDS, *IDS]], [16])
    assert fake.requests[-1]["prompt_logprobs"] == -1
    assert len(fake.requests) == n_before + 2


def test_a_server_that_takes_one_prompt_at_a_time_is_asked_one_by_one(serve: Serve) -> None:
    fake = serve("facts", Manners(takes_several=False))
    model = remote(fake)
    assert "prompts are token ids, one at a time" in model.abilities
    output = model.open(2).feed([0, 1], [IDS, IDS[:4]], [1, 2])
    assert output.n_calls == 3
    want = [logprobs(local("facts"), ids, n) for ids, n in ((IDS, 1), (IDS[:4], 2))]
    assert torch.allclose(output.logits.log_softmax(-1), torch.cat(want), atol=1e-5)


def test_hidden_states_are_refused_by_name(serve: Serve) -> None:
    fake = serve()
    with pytest.raises(CapabilityError, match=f"'facts' runs in server {fake.url}, which shows no"):
        remote(fake).open(1).feed([0], [IDS], [1], hidden=True)

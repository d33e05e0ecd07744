"""What goes wrong between here and a server, each with a real socket that misbehaves on purpose.

What may pass is asked again; what does not pass is one sentence that names the server, the request
and what was kept. No other model ever steps in.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fake_vllm import FakeVllm, Manners
from remote_worlds import PROMPTS, ensemble, impatient, local, remote

from multicolm import Ensemble
from multicolm.backend.remote import transport
from multicolm.backend.remote.transport import Server, _retry_after
from multicolm.errors import ServerError

Serve = Callable[..., FakeVllm]
IDS = [40, 467, 79, 258, 72, 536, 221, 18]
FACTS = {"kind": "single", "params": {"model": "facts"}}


def forward(model: Any) -> int:
    """What the model would write next."""
    return int(model.open(1).feed([0], [IDS], [1]).logits.argmax())


@pytest.mark.parametrize("fault", ["500", "503", "cut", "garbage", "hang up"])
def test_what_may_pass_is_asked_again_after_growing_pauses(serve: Serve, fault: Any) -> None:
    fake = serve()
    model = remote(fake)
    fake.go_wrong(fault, fault)
    shown = model.open(1).feed([0], [IDS], [1])
    assert int(shown.logits.argmax()) == forward(local("facts"))
    first, second = model.pauses
    assert 0.5 <= first <= 0.8
    assert 1.0 <= second <= 1.3
    # Two attempts failed, the third was answered, and it was seen that it is the same model.
    assert shown.n_calls == 5


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("429", "HTTP 429: Slow down. (it asks to wait 1 s)"),
        ("500", "HTTP 500: EngineCore encountered an issue."),
        ("cut", "the connection broke (peer closed connection without sending complete message"),
        ("garbage", "the answer is no JSON (<html>It works!</html>)"),
        ("hang up", "the connection broke (Server disconnected without sending a response.)"),
    ],
)
def test_what_does_not_pass_is_one_sentence(serve: Serve, fault: Any, reason: str) -> None:
    fake = serve()
    model = remote(fake, retries=1)
    fake.go_wrong(fault, fault)
    session = model.open(1)
    with pytest.raises(ServerError) as caught:
        session.feed([0], [IDS], [1])
    text = str(caught.value)
    assert text.startswith(
        f"server {fake.url} of model 'facts': POST /v1/completions (1 more tokens after 1 text of "
        f"up to 8 tokens): {reason}"
    )
    assert text.endswith("(tried 2 times). See that it runs, then call again.")
    assert caught.value.server == fake.url
    # The session is as before, so the same may be asked when the server is well again.
    assert session.lengths == [0]
    assert int(session.feed([0], [IDS], [1]).logits.argmax()) == forward(local("facts"))


def changed(answer: dict[str, Any], **choice: Any) -> dict[str, Any]:
    """An answer with something else in each of its choices."""
    for each in answer["choices"]:
        each |= choice
    return answer


def with_top(answer: dict[str, Any], tops: dict[str, Any]) -> dict[str, Any]:
    """An answer with these log-probabilities of each token."""
    for each in answer["choices"]:
        n = len(each["logprobs"]["tokens"])
        each["logprobs"]["top_logprobs"] = [tops] * n
    return answer


HUGE = int("9" * 400)
IMPOSSIBLE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "negative id": lambda a: with_top(a, {"token_id:-5": -0.1}),
    "id of 400 digits": lambda a: with_top(a, {f"token_id:{HUGE}": -0.1}),
    "id 2^63": lambda a: with_top(a, {f"token_id:{2**63}": -0.1}),
    "id that would fill the memory": lambda a: with_top(a, {"token_id:100000000": -0.1}),
    "id with an underscore": lambda a: with_top(a, {"token_id:1_0": -0.1}),
    "minus 400 digits, twice": lambda a: with_top(a, {"token_id:5": 1, "token_id:6": -HUGE}),
    "true": lambda a: with_top(a, {"token_id:5": True}),
    "+50": lambda a: with_top(a, {"token_id:5": 50.0}),
    "infinity": lambda a: with_top(a, {"token_id:5": float("inf")}),
    "400 digits": lambda a: with_top(a, {"token_id:5": HUGE}),
    "more than 1": lambda a: with_top(a, {f"token_id:{i}": -0.1 for i in range(4)}),
    "a text": lambda a: with_top(a, {"token_id:5": "-0.1"}),
    "a list for rows": lambda a: with_top(a, [1]),  # type: ignore[arg-type]
    "prompt_logprobs: 5": lambda a: changed(a, prompt_logprobs=5),
    "prompt_logprobs: [5]": lambda a: changed(a, prompt_logprobs=[5]),
    "prompt_logprobs of 1e999": lambda a: changed(
        a, prompt_logprobs=[{"1": {"logprob": float("inf")}}]
    ),
    "no text": lambda a: changed(a, text=[]),
    "logprobs: 3": lambda a: changed(a, logprobs=3),
    "choices: 3": lambda a: {**a, "choices": 3},
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_an_answer_that_no_model_can_give_is_an_error_that_names_the_server(
    serve: Serve, what: str
) -> None:
    fake = serve()
    session = remote(fake, logprobs=5).open(1)
    sound = fake.complete
    fake.complete = lambda body: IMPOSSIBLE[what](sound(body))  # type: ignore[method-assign]
    with pytest.raises(ServerError) as caught:
        session.feed([0], [IDS], [1])
    assert str(caught.value).startswith(f"server {fake.url} of model 'facts': POST /v1/completions")
    assert len(str(caught.value)) < 600


def test_choices_are_numbered_by_numbers(serve: Serve) -> None:
    fake = serve()
    session = remote(fake, logprobs=5).open(2)
    sound = fake.complete
    for index in ([0], "0", True, 1e999, HUGE, None):
        fake.complete = lambda body, index=index: changed(  # type: ignore[misc]
            sound(body), index=index
        )
        with pytest.raises(ServerError, match="the choices are not numbered from 0 to 1"):
            session.feed([0, 1], [IDS, IDS[:3]], [1, 1])


@pytest.mark.parametrize(
    "date",
    [
        "Fri, 31 Dec 9999 23:59:59 -2359",
        "Mon, 01 Jan 2024 00:00:00 +99999999999",
        "Mon, 01 Jan 0001 00:00:00 +2359",
        "٣",
        "",
    ],
)
def test_a_date_beyond_all_dates_is_no_time_to_wait(date: str) -> None:
    pause = _retry_after({"retry-after": date})
    assert pause is None or pause >= 0


def test_the_pause_is_the_one_that_the_server_asks_for(serve: Serve) -> None:
    fake = serve()
    model = remote(fake)
    fake.go_wrong("429", "429")
    assert forward(model) == forward(local("facts"))
    assert model.pauses == [1.0, 1.0]


@pytest.mark.parametrize("after", ["Wed, 01 Jan 2098 00:00:00 GMT", "86400"])
def test_nobody_waits_a_day_because_a_server_asks_for_it(after: str) -> None:
    answer = f"HTTP/1.1 429 No\r\nretry-after: {after}\r\ncontent-length: 0\r\n\r\n"
    reason = r"HTTP 429: an empty body \(it asks to wait [\d.e+]+ s\). See"
    with saying(answer) as url, pytest.raises(ServerError, match=reason):
        server(url).get("/v1/models", "which models it serves", most=4096)


@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_a_server_that_does_not_come_to_an_end_is_given_up_in_time(
    serve: Serve, fault: Any
) -> None:
    fake = serve()
    model = remote(fake, timeout=0.3, retries=1)
    fake.go_wrong(fault, fault)
    begin = time.monotonic()
    with pytest.raises(
        ServerError, match=r"no whole answer in time \(the limit is 0.3 s\) \(tried 2"
    ):
        forward(model)
    assert time.monotonic() - begin < 5


def test_a_server_that_refuses_connections_is_named(serve: Serve) -> None:
    fake = serve()
    model = remote(fake)
    fake.stop()
    with pytest.raises(
        ServerError,
        match=f"server {fake.url} of model 'facts': POST .* it cannot be reached .*3 times",
    ):
        forward(model)
    fake.restart()


def test_a_request_that_is_wrong_is_not_repeated(serve: Serve) -> None:
    fake = serve()
    model = remote(fake)
    n_before = len(fake.requests)
    with pytest.raises(ServerError, match="HTTP 400: Token id 99999 is out of vocabulary"):
        model.open(1).feed([0], [[99999]], [1])
    assert len(fake.requests) == n_before + 1
    assert model.pauses == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("no choices", "the answer holds no choices for 1 prompts"),
        ("no logprobs", "it gave no log-probabilities by token id"),
    ],
)
def test_an_answer_that_is_not_as_probed_says_so(serve: Serve, fault: Any, reason: str) -> None:
    fake = serve()
    model = remote(fake)
    fake.go_wrong(fault)
    with pytest.raises(ServerError, match=f"{reason}, other than when it was probed"):
        forward(model)


# A server that comes back


def test_a_server_that_comes_back_as_it_was_goes_on(serve: Serve) -> None:
    fake = serve()
    together = ensemble(remote(fake))
    want = ensemble(local("facts")).generate(PROMPTS[0], FACTS, max_new_tokens=8)[0].text
    stream = together.stream(PROMPTS[0], FACTS, max_new_tokens=8)
    text = next(stream).text
    fake.restart()
    assert text + "".join(piece.text for piece in stream) == want


@pytest.mark.parametrize("policy", [FACTS, "average"])
def test_a_server_that_comes_back_with_another_model_is_refused_in_mid_text(
    serve: Serve, policy: Any
) -> None:
    fake = serve()
    stream = ensemble(remote(fake)).stream(PROMPTS[0], policy, max_new_tokens=24)
    next(stream)
    fake.restart(model=local("math"))
    with pytest.raises(
        ServerError,
        match=f"server {fake.url} of model 'facts': check after a new connection: 'facts' is "
        "another model now than when the ensemble was loaded, and no text is written with two; "
        ".* Finished and kept: 0 of 1 answers; [0-9]+ tokens of others were written.",
    ):
        list(stream)


def test_the_same_name_and_place_do_not_make_it_the_same_model(serve: Serve) -> None:
    fake = serve()
    model = remote(fake)
    another = local("math")
    fake.restart()
    forward(model)
    plain, another.name = another.name, "facts"  # what /v1/models lists is as before
    try:
        fake.restart(model=another)
        with pytest.raises(ServerError, match="is another model now"):
            forward(model)
    finally:
        another.name = plain


@pytest.mark.parametrize("keeps_alive", [True, False])
def test_a_server_that_was_found_to_be_another_is_not_believed_when_asked_again(
    serve: Serve, keeps_alive: bool
) -> None:
    fake = serve("facts", Manners(keeps_alive=keeps_alive))
    model = remote(fake, retries=0)
    fake.go_wrong("500")
    with pytest.raises(ServerError, match="HTTP 500"):
        forward(model)
    fake.restart(model=local("math"))
    for _ in range(3):
        with pytest.raises(ServerError, match="is another model now"):
            forward(model)
    fake.restart(model=local("facts"))
    assert forward(model) == forward(local("facts"))


def test_a_doubt_of_one_thread_is_a_doubt_of_all(serve: Serve) -> None:
    fake = serve()
    model = remote(fake)
    forward(model)
    fake.restart(model=local("math"))
    complaints: list[ServerError] = []

    def ask() -> None:
        try:
            forward(model)
        except ServerError as error:
            complaints.append(error)

    for _ in range(2):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(20)
    assert len(complaints) == 2 and "another model now" in str(complaints[1])


def test_a_server_that_comes_back_with_fewer_abilities_is_refused(serve: Serve) -> None:
    fake = serve()
    model = remote(fake)
    fake.restart(manners=Manners(max_logprobs=5, clamps=True))
    with pytest.raises(ServerError, match="it returns 5 tokens instead of 768, other than when"):
        forward(model)
    fake.restart(manners=Manners(max_logprobs=5))
    with pytest.raises(ServerError, match="HTTP 400: Requested sample logprobs of -1"):
        forward(model)


def test_a_server_that_keeps_no_connections_is_not_suspected(serve: Serve) -> None:
    fake = serve("facts", Manners(keeps_alive=False))
    model = remote(fake, look_ahead=1)
    n_before = len(fake.requests)
    session = model.open(1)
    for token in IDS:
        session.feed([0], [[token]], [1])
    assert len(fake.requests) == n_before + len(IDS)


@pytest.mark.parametrize("keeps_alive", [True, False])
def test_a_server_that_was_not_asked_for_a_while_may_have_become_another_one(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, keeps_alive: bool
) -> None:
    fake = serve("facts", Manners(keeps_alive=keeps_alive))
    model = remote(fake)
    monkeypatch.setattr(transport, "KEPT", 0.0)
    fake.restart(model=local("math"))
    with pytest.raises(ServerError, match="is another model now"):
        forward(model)


def test_a_connection_that_is_closed_now_and_then_does_not_make_new_ones_harmless(
    serve: Serve,
) -> None:
    fake = serve()
    model = remote(fake)
    fake.restart(manners=Manners(keeps_alive=False))
    forward(model)
    fake.restart(model=local("math"))
    with pytest.raises(ServerError, match="is another model now"):
        forward(model)


# What is kept


def test_what_was_finished_is_kept_and_said(serve: Serve) -> None:
    fake = serve()
    model = remote(fake, retries=0)
    together = ensemble(model)
    done = local("facts").tokenizer.encode(PROMPTS[1])
    count = iter(range(1000))
    # The first prompt is finished before the second is begun.
    fake.before_answer = lambda: fake.go_wrong("500") if next(count) == 2 else None
    with pytest.raises(
        ServerError, match=r"Finished and kept: 1 of 2 answers; \d tokens of"
    ) as caught:
        together.generate([PROMPTS[0], PROMPTS[1]], FACTS, max_new_tokens=6, batch_size=1)
    [answer] = caught.value.answers
    want = ensemble(local("facts")).generate(PROMPTS[0], FACTS, max_new_tokens=6)
    assert answer.text == want[0].text
    assert done  # the second prompt is one that would have been written


def test_of_several_servers_the_one_that_failed_is_named(serve: Serve) -> None:
    facts, math = serve("facts"), serve("math")
    together = ensemble(remote(facts), remote(math, retries=0))
    math.go_wrong("500")
    with pytest.raises(ServerError, match=f"server {math.url} of model 'math'"):
        together.generate(PROMPTS[0], "max-confidence", max_new_tokens=4)
    # Nothing is left behind: the next call is answered.
    assert together.generate(PROMPTS[0], "max-confidence", max_new_tokens=4)


class saying:
    """A socket that says one thing to whoever connects, whatever is asked."""

    def __init__(self, text: str) -> None:
        self._text = text.encode()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(10)
        self._thread = threading.Thread(target=self._talk, daemon=True)

    def _talk(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(self._text)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._socket.close()


def server(url: str, retries: int = 2) -> Server:
    return Server(url, "facts", timeout=2.0, retries=retries, sleep=impatient().sleep)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", "the answer is no JSON object"),
        ("HTTP/1.1 404 No\r\ncontent-length: 4\r\n\r\nnope", "HTTP 404: nope"),
        (
            'HTTP/1.1 400 No\r\ncontent-length: 23\r\n\r\n{"detail":"not so long"}'[:-1],
            'HTTP 400: {"detail":"not so long"',
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n\r\nnope",
            "the answer is compressed wrongly",
        ),
        (
            f"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n{'[' * 100_000}",
            "the answer is no JSON ([[[",
        ),
        (
            f"HTTP/1.1 400 No\r\ncontent-length: 100000\r\n\r\n{'[' * 100_000}",
            "HTTP 400: [[[",
        ),
    ],
)
def test_answers_that_are_none_are_quoted(text: str, reason: str) -> None:
    with saying(text) as url, pytest.raises(ServerError) as caught:
        server(url, retries=0).get("/v1/models", "which models it serves", most=1 << 20)
    assert str(caught.value).startswith(
        f"server {url} of model 'facts': GET /v1/models (which models it serves): {reason}"
    )


def test_an_answer_over_another_ensemble_is_no_business_of_this_one(serve: Serve) -> None:
    fake = serve()
    one, other = remote(fake), remote(fake)
    assert isinstance(ensemble(one), Ensemble)
    n_before = one._server.n_calls
    forward(other)
    assert one._server.n_calls == n_before

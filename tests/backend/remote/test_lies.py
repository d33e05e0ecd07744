"""Answers that contradict themselves or what was asked, in each form in which servers answer.

Real answers of the fakes are changed, at one place or at random, and read again: what comes of it
is an error that names the server, or what a model can say. Nothing else, and no other exception.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from fake_llama import FakeLlama
from fake_vllm import FakeVllm, Manners, Refused
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_core import from_json
from remote_worlds import local, remote

from multicolm.backend.remote.model import LlamaCppServerModel, RemoteModel
from multicolm.backend.remote.probe import RequestedModel, find_served_model
from multicolm.backend.remote.service import Service
from multicolm.backend.remote.transport import Server
from multicolm.errors import ServerError, VocabularyError

IDS = [40, 467, 79, 258, 72, 536, 221, 18]
URL = "http://127.0.0.1:9"


class Played(Service):
    """Answers what it is given, as if a server had sent it."""

    def __init__(self, answer: Any) -> None:
        super().__init__(URL, "facts")
        self.answer = answer

    @property
    def n_calls(self) -> int:
        return 0

    def get(self, path: str, what: str, *, most: int) -> dict[str, Any]:
        return self.answer

    def post(self, path: str, body: Mapping[str, Any], what: str, **_: Any) -> dict[str, Any]:
        return self.answer


class Recorded:
    """What a fake answered to one request, and a model that has probed that fake.

    Args:
        model: that was probed.
        fake: whom it asks.
        rows: in how many texts the request asks.
        n_last: about how many places of each.
        named: tokens that it asks about by name instead.
    """

    def __init__(
        self,
        model: RemoteModel,
        fake: FakeVllm,
        rows: int = 1,
        n_last: int = 1,
        named: tuple[int, ...] = (),
    ) -> None:
        self.model, self.n_rows, self.n_last, self.named = model, rows, n_last, named
        answers: list[dict[str, Any]] = []
        sound = fake.complete
        fake.complete = lambda body: answers.append(sound(body)) or answers[-1]  # type: ignore
        try:
            self.want = self.ask(model._server)
        finally:
            fake.complete = sound  # type: ignore[method-assign]
        [self.answer] = answers

    def ask(self, server: Service) -> torch.Tensor:
        """What a session shows if this server answers its request."""
        session = self.model.open(self.n_rows)
        session._server = server
        texts = [IDS[: len(IDS) - n] for n in range(self.n_rows)]
        if self.named:
            for row, text in enumerate(texts):
                session._texts[row].extend(text)
            lengths = [len(text) for text in texts]
            return session.logprobs_of(list(range(self.n_rows)), lengths, self.named).logits
        try:
            return session.feed(list(range(self.n_rows)), texts, [self.n_last] * self.n_rows).logits
        except ServerError:
            assert session.lengths == [0] * self.n_rows  # what was not answered was not read
            raise

    def read(self, answer: Any) -> torch.Tensor:
        """What is shown if the answer is this one, in the form of JSON."""
        return self.ask(Played(from_json(json.dumps(answer).encode())))


@cache
def recorded() -> dict[str, Recorded]:
    """A real answer in each form."""
    found = {}
    with FakeVllm(local("facts"), "facts") as fake:
        some, everything = remote(fake, logprobs=5), remote(fake)
        found["vllm"] = Recorded(some, fake)
        found["vllm, two texts"] = Recorded(some, fake, rows=2)
        found["vllm, all"] = Recorded(everything, fake)
        found["vllm, named"] = Recorded(some, fake, named=(3, 700))
        found["vllm, prompt_logprobs"] = Recorded(some, fake, n_last=6)
    with FakeVllm(local("facts"), "facts", Manners(prompt_logprobs=False)) as fake:
        found["echo"] = Recorded(remote(fake, logprobs=5), fake, n_last=6)
    with FakeVllm(local("facts"), "facts", Manners(max_logprobs=0)) as fake:
        found["text"] = Recorded(remote(fake), fake)
    with FakeLlama(local("facts")) as fake:
        server = Server(fake.url, "facts", sleep=lambda _: None)
        model = LlamaCppServerModel(
            "facts", server, local("facts").tokenizer, RequestedModel(logprobs=5)
        )
        found["llama.cpp"] = Recorded(model, fake)
    assert found["echo"].answer["choices"][0]["logprobs"]["tokens"][0] == f"token_id:{IDS[0]}"
    assert found["vllm, prompt_logprobs"].answer["choices"][0]["prompt_logprobs"]
    return found


FORMS = [
    "vllm",
    "vllm, two texts",
    "vllm, all",
    "vllm, named",
    "vllm, prompt_logprobs",
    "echo",
    "text",
    "llama.cpp",
]


@pytest.mark.parametrize("form", FORMS)
def test_the_answers_that_are_changed_here_are_read_as_they_are(form: str) -> None:
    assert torch.equal(recorded()[form].read(recorded()[form].answer), recorded()[form].want)


# Changes at random

HUGE = 10**400
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 767, 768, 2**31, 2**63, -(2**63), HUGE, -HUGE, 1 << 22),
    *(0.0, -0.0, -0.1, 0.5, 50.0, -1e308, 1e308, math.inf, -math.inf, math.nan, -9999, 1e-320),
    *("", " ", "token_id:", "token_id:5", "token_id:05", "token_id:-1", f"token_id:{HUGE}", "5"),
    *("token_id:٣", "token_id:1_0", "\x00", "ü😀", "a" * 5000, "stop", "length", "facts", "math"),
    *([], [[]], [None], [0], {}, {"id": 5}, {"5": {"logprob": -0.1}}, {"token_id:5": -0.1}),
    {"tokens": ["token_id:5"], "top_logprobs": [{"token_id:5": -0.1}]},
    {"content": [{"id": 5, "logprob": -0.1, "top_logprobs": []}]},
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place within a value: what holds it, and under which name or number."""
    items: Any = ()
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    for key, inner in items:
        yield value, key
        yield from places(inner)


def change(answer: Any, where: int, how: str, odd: Any, other: int) -> None:
    """Change an answer at one place."""
    found = list(places(answer))
    holder, key = found[where % len(found)]
    if how == "replace":
        holder[key] = copy.deepcopy(odd)
    elif how == "remove":
        del holder[key]
    elif how == "swap":  # with what is elsewhere, of whatever type
        there, name = found[other % len(found)]
        holder[key], there[name] = copy.deepcopy(there[name]), copy.deepcopy(holder[key])
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:  # under another name
        holder[str(odd)[:20] if not isinstance(odd, str) else odd] = holder.pop(key)


CHANGES = st.tuples(
    st.integers(0, 1 << 20),
    st.sampled_from(["replace", "replace", "remove", "swap", "insert"]),
    st.sampled_from(ODD),
    st.integers(0, 1 << 20),
)


def check_shown(case: Recorded, shown: torch.Tensor) -> None:
    """What is shown is what a model can say."""
    assert shown.shape == case.want.shape
    assert not bool(shown.isnan().any())
    if case.model.max_top_logprobs == 0:
        assert bool((shown.isinf()).all())
    else:
        assert float(shown.max()) <= 0.05
        assert float(shown.double().exp().sum(-1).max()) <= 1.06


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30, deadline=None)
@given(changes=st.lists(CHANGES, min_size=1, max_size=2))
def test_a_changed_answer_is_an_error_that_names_the_server_or_what_a_model_can_say(
    form: str, changes: list[tuple[int, str, Any, int]]
) -> None:
    case = recorded()[form]
    answer = copy.deepcopy(case.answer)
    for each in changes:
        change(answer, *each)
    try:
        shown = case.read(answer)
    except ServerError as error:
        assert str(error).startswith(f"server {URL} of model 'facts': ")
        assert len(str(error)) < 800
    else:
        check_shown(case, shown)


class Lying(Service):
    """The fake vLLM without a socket, of which some answers are changed."""

    def __init__(self, lies: list[tuple[int, str, Any, int]], first: int) -> None:
        super().__init__(URL, "facts")
        self._lies, self._n, self._first = lies, 0, first

    @property
    def n_calls(self) -> int:
        return self._n

    def get(self, path: str, what: str, *, most: int) -> dict[str, Any]:
        return self._changed({"data": [{"id": "facts", "max_model_len": 512, "root": "/facts"}]})

    def post(self, path: str, body: Mapping[str, Any], what: str, **_: Any) -> dict[str, Any]:
        try:
            answer = json.loads(sound(json.dumps(body)))
        except Refused as refused:
            raise self.error(f"POST {path}", str(refused), refused.status) from refused
        return self._changed(answer)

    def _changed(self, answer: Any) -> Any:
        n = self._n - self._first
        self._n += 1
        if 0 <= n < len(self._lies):
            change(answer, *self._lies[n])
        return from_json(json.dumps(answer).encode())


@cache
def sound(body: str) -> str:
    with FakeVllm(local("facts"), "facts", Manners(max_logprobs=5, clamps=True)) as fake:
        return json.dumps(fake.complete(json.loads(body)))


@settings(max_examples=20, deadline=None)
@given(lies=st.lists(CHANGES, min_size=1, max_size=3), first=st.integers(0, 20))
def test_a_server_that_lies_while_it_is_probed_is_refused_by_name_or_used_for_what_it_showed(
    lies: list[tuple[int, str, Any, int]], first: int
) -> None:
    try:
        model = RemoteModel("facts", Lying(lies, first), local("facts").tokenizer)
        shown = model.open(1).feed([0], [IDS], [1]).logits
    except (ServerError, VocabularyError) as error:
        assert URL in str(error)
        assert len(str(error)) < 800
        return
    assert not bool(shown.isnan().any())
    assert all(len(sentence) < 5000 for sentence in model.abilities)


# Contradictions


def first(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["choices"][0]


def entry(answer: dict[str, Any]) -> dict[str, Any]:
    return first(answer)["logprobs"]["content"][0]


def put(holder: Any, key: Any, value: Any) -> None:
    holder[key] = value


LIES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a token that its row does not have": (
        "vllm",
        lambda a: put(first(a)["logprobs"]["tokens"], 0, "token_id:700"),
        "`tokens` holds token 700, which `top_logprobs` leaves out",
    ),
    "a token with two probabilities": (
        "vllm",
        lambda a: put(first(a)["logprobs"]["token_logprobs"], 0, -7.5),
        "has two log-probabilities, -7.5 and ",
    ),
    "a token with two probabilities, in the other form": (
        "llama.cpp",
        lambda a: put(entry(a), "logprob", -7.5),
        "has two log-probabilities, -7.5 and ",
    ),
    "a likely token that is not among the likeliest": (
        "llama.cpp",
        lambda a: entry(a).update(id=700, logprob=-0.01),
        "holds token 700, which `top_logprobs` leaves out",
    ),
    "an id in two forms": (
        "vllm",
        lambda a: first(a)["logprobs"]["top_logprobs"][0].update({"token_id:07": -9, "7": -9}),
        "an entry of `top_logprobs` names a token twice",
    ),
    "an id twice": (
        "llama.cpp",
        lambda a: entry(a)["top_logprobs"].append(entry(a)["top_logprobs"][0]),
        "an entry of `top_logprobs` names a token twice",
    ),
    "an id that is a fraction": (
        "llama.cpp",
        lambda a: put(entry(a), "id", 7.5),
        "`content` holds 7.5, which is no token id",
    ),
    "more tokens than were asked for": (
        "vllm",
        lambda a: [part.extend(part * 3) for part in first(a)["logprobs"].values()],
        "`tokens` holds 4 new ones, and 1 were asked for",
    ),
    "more text than tokens have": (
        "text",
        lambda a: put(first(a), "text", "a" * 4097),
        "`text` has 4097 characters for 4 tokens",
    ),
    "another prompt comes back": (
        "echo",
        lambda a: [part.insert(0, part[0]) for part in first(a)["logprobs"].values()],
        "`tokens` does not begin with the prompt",
    ),
    "a place within the prompt without a row": (
        "echo",
        lambda a: put(first(a)["logprobs"]["top_logprobs"], 3, None),
        "`top_logprobs` leaves out another token of a prompt than the first",
    ),
    "a scored place without a row": (
        "vllm, prompt_logprobs",
        lambda a: put(first(a)["prompt_logprobs"], 3, None),
        "`prompt_logprobs` leaves out another token of a prompt than the first",
    ),
    "a part of a prompt": (
        "vllm, prompt_logprobs",
        lambda a: first(a)["prompt_logprobs"].pop(),
        "`prompt_logprobs` has 7 entries for 8 tokens of a prompt",
    ),
    "a row that leaves out the prompt's own token": (
        "vllm, prompt_logprobs",
        lambda a: first(a)["prompt_logprobs"][3].pop(str(IDS[3])),
        f"`prompt_logprobs` leaves out token {IDS[3]}, which is the prompt's own",
    ),
    "probabilities that sum to more than 1": (
        "vllm, prompt_logprobs",
        lambda a: [known.update(logprob=-0.5) for known in first(a)["prompt_logprobs"][3].values()],
        "the probabilities of an entry of `prompt_logprobs` sum to ",
    ),
    "ids beyond the vocabulary": (
        "vllm, all",
        lambda a: first(a)["logprobs"]["top_logprobs"][0].update({"token_id:9000": -30.0}),
        "it names token 9000, and its vocabulary had 768",
    ),
    "a reason that is a number": (
        "vllm",
        lambda a: put(first(a), "finish_reason", 3),
        "`finish_reason` is 3, which is no text",
    ),
    "a model's name that is a list": (
        "vllm",
        lambda a: put(a, "model", ["facts"]),
        r"`model` is \['facts'\], which is no text",
    ),
}


@pytest.mark.parametrize("what", LIES)
def test_a_contradiction_is_an_error_that_names_server_and_field(what: str) -> None:
    form, lie, reason = LIES[what]
    answer = copy.deepcopy(recorded()[form].answer)
    lie(answer)
    with pytest.raises(ServerError, match=f"server {URL} of model 'facts': POST .*{reason}"):
        recorded()[form].read(answer)


def test_an_unlikely_token_may_come_where_the_likeliest_are_kept_away() -> None:
    """By a bias, which is no part of the probabilities that come back."""
    case = recorded()["llama.cpp"]
    answer = copy.deepcopy(case.answer)
    entry(answer).update(id=700, logprob=-25.0)
    assert torch.equal(case.read(answer), case.want)


LENGTHS = [True, 1, 0, -5, 1e999, 2.0, HUGE, "512", [512], {}]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("field", ["max_model_len", "meta"])
def test_a_context_has_a_length_that_a_context_can_have(field: str, length: Any) -> None:
    name = "n_ctx" if field == "meta" else field
    value = {"n_ctx": length} if field == "meta" else length
    with pytest.raises(
        ServerError, match=f"server {URL} of model 'facts': GET /v1/models: `{name}` is no number"
    ):
        find_served_model(Played({"data": [{"id": "facts", field: value}]}), None)


@pytest.mark.parametrize("data", [None, 5, True, "facts", {}, {"facts": 1}])
def test_what_is_listed_is_a_list(data: Any) -> None:
    with pytest.raises(ServerError, match="GET /v1/models: `data` is no list of models"):
        find_served_model(Played({"data": data}), "facts")


def test_a_list_of_many_models_is_named_in_part() -> None:
    models = [{"id": f"model-{i:04}"} for i in range(5000)]
    with pytest.raises(ServerError, match=r"model-0019 and 4980 more; say which") as caught:
        find_served_model(Played({"data": models}), None)
    assert len(str(caught.value)) < 1200
    with pytest.raises(ServerError) as caught:
        find_served_model(Played({"data": models}), "other")
    assert len(str(caught.value)) < 1200

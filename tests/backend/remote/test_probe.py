"""What a server can do is found out by asking, and whatever is missing is said in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fake_vllm import TEXT_ONLY, FakeVllm, Manners
from remote_worlds import config, local, remote

from multicolm.backend.remote.model import RemoteModel, VllmModel
from multicolm.backend.remote.transport import Server
from multicolm.errors import ConfigError, ServerError, VocabularyError
from multicolm.plugins import backends

Serve = Callable[..., FakeVllm]


@pytest.mark.parametrize(
    ("manners", "found"),
    [
        (Manners(), (True, None, "prompt_logprobs", "is refused")),
        (Manners(max_logprobs=20), (True, 20, "prompt_logprobs", "is refused")),
        (Manners(max_logprobs=7), (True, 5, "prompt_logprobs", "is refused")),
        (Manners(max_logprobs=7, clamps=True), (True, 7, "prompt_logprobs", "is refused")),
        (Manners(max_logprobs=1), (True, 1, "prompt_logprobs", "is refused")),
        (Manners(prompt_logprobs=False), (True, None, "echo", "is refused")),
        (Manners(prompt_logprobs=False, echo=False), (True, None, None, "is refused")),
        (Manners(max_tokens_0="nothing"), (True, None, "prompt_logprobs", "writes nothing")),
        (
            Manners(max_tokens_0="unlimited", takes_ids=False, refusal=500),
            (False, 0, None, "writes on without a limit"),
        ),
        (Manners(returns_ids=False), (True, 0, None, "is refused")),
        (Manners(max_logprobs=0), (True, 0, None, "is refused")),
        (Manners(takes_ids=False, refusal=422), (False, 0, None, "is refused")),
        (TEXT_ONLY, (False, 0, None, "is refused")),
    ],
)
def test_what_a_server_can_do_is_found_out(serve: Serve, manners: Manners, found: Any) -> None:
    fake = serve("facts", manners)
    can = remote(fake)._abilities
    assert (can.takes_ids, can.max_top_logprobs, can.scoring, can.max_tokens_0) == found
    # What was found stays: from now on nothing is asked that the server refused.
    assert can.context_length == 511


def test_what_was_found_is_said_in_sentences(serve: Serve) -> None:
    fake = serve("facts", Manners(max_logprobs=20))
    assert remote(fake).abilities == [
        f"server {fake.url}",
        "the server calls it 'facts'",
        "prompts are token ids, several at a time",
        "log-probabilities of the 20 likeliest tokens and of tokens that are named",
        "prompts are scored by `prompt_logprobs`",
        "`max_tokens: 0` is refused",
        "its context takes 511 tokens",
    ]


def test_the_first_request_may_take_longer_than_others(serve: Serve) -> None:
    fake = serve()
    slow = iter([0.4])
    fake.before_answer = lambda: fake.wait_until_end(next(slow, 0.0))
    assert remote(fake, timeout=0.3, retries=0).max_top_logprobs is None


def test_log_probabilities_can_be_limited(serve: Serve) -> None:
    assert remote(serve(), logprobs=7).max_top_logprobs == 7
    assert remote(serve(), logprobs="all").max_top_logprobs is None


@pytest.mark.parametrize("wanted", [30, "all"])
def test_more_log_probabilities_than_there_are_is_an_error(serve: Serve, wanted: Any) -> None:
    fake = serve("facts", Manners(max_logprobs=20))
    with pytest.raises(
        ServerError,
        match=f"server {fake.url} of model 'facts': probe: the ensemble file asks for `logprobs: "
        f"{wanted}`, and the server returns 20 tokens; start it with a higher limit",
    ):
        remote(fake, logprobs=wanted)


def test_another_tokenizer_than_the_servers_is_refused(serve: Serve) -> None:
    for manners in (Manners(), TEXT_ONLY):
        fake = serve("facts", manners)
        with pytest.raises(
            VocabularyError,
            match=f"model 'facts': server {fake.url} reads '.*' in other tokens than the "
            "tokenizer of `model:`; name the folder or Hub id of the model",
        ):
            remote(fake, model="tiny-facts-own")


def test_a_model_that_the_server_does_not_serve_is_an_error_with_the_nearest_name(
    serve: Serve,
) -> None:
    with pytest.raises(
        ServerError, match=r"unknown served model 'fact'. Did you mean 'facts'\? Known: facts."
    ):
        remote(serve(), served_model="fact")


def test_a_server_that_lists_no_models_is_believed_the_name_and_asked_for_it(
    serve: Serve,
) -> None:
    fake = serve("facts", Manners(lists=False))
    assert remote(fake, served_model="facts")._abilities.context_length is None
    assert remote(fake, served_model="facts").context_length == 512  # of its config.json
    with pytest.raises(ServerError, match=r"GET /v1/models .which models it serves.: HTTP 404"):
        remote(fake)
    with pytest.raises(ServerError, match="HTTP 404: The model `fact` does not exist"):
        remote(fake, served_model="fact")


def test_the_key_comes_from_the_environment(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = serve("facts", None, api_key="hush")
    settings = config(fake, api_key_env="SOME_KEY")
    with pytest.raises(ServerError, match="HTTP 401: Unauthorized"):
        remote(fake)
    with pytest.raises(
        ConfigError, match=r"models.facts.api_key_env: the environment variable SOME_KEY is not set"
    ):
        VllmModel.from_config("facts", settings)
    monkeypatch.setenv("SOME_KEY", "hush")
    assert VllmModel.from_config("facts", settings).max_top_logprobs is None


@pytest.mark.parametrize("key", ["hush\n", "hush\r", "hu sh", "h\xfcsh"])
def test_a_key_that_no_header_can_hold_is_not_shown_in_the_complaint(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ConfigError, match="the environment variable SOME_KEY holds") as caught:
        VllmModel.from_config("facts", config(serve(), api_key_env="SOME_KEY", retries=0))
    assert key.strip() not in str(caught.value)


def test_every_backend_of_servers_is_a_remote_model() -> None:
    for name in ("vllm", "sglang", "llama-cpp-server", "openai"):
        cls = backends.get(name)
        assert issubclass(cls, RemoteModel)
        assert cls.backend == name


def test_a_path_behind_the_host_and_a_v1_make_no_difference(serve: Serve) -> None:
    fake = serve()
    for url in (fake.url, f"{fake.url}/", f"{fake.url}/v1", f"{fake.url}/v1/"):
        assert Server(url, "facts").url == fake.url
    assert local("facts").server == ""

"""How a request for next tokens is put to a server: ``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from multicolm.backend.remote.answers import LONGEST_TOKEN, Completion, read_all
from multicolm.backend.remote.service import Service

__all__ = ["Scoring", "completions"]

Scoring = Literal["prompt_logprobs", "echo"]
"""The parameter by which a server returns the probabilities of a prompt's own tokens."""

# Bytes of an answer: of what every one has, of what comes with each text, of each token of a
# prompt that may come back, and of a log-probability with what names its token. Servers were seen
# to write 40 (vLLM) to 110 (llama.cpp) for the last.
_ANY = 1 << 20
_A_TEXT = 1 << 12
_A_PROMPT_TOKEN = 64
_A_NUMBER = 160


def completions(
    server: Service,
    served_model: str,
    prompts: Sequence[Sequence[int] | str],
    n_tokens: int,
    *,
    width: int,
    logprobs: int | None = None,
    scoring: Scoring | None = None,
    timeout: float | None = None,
    final_500: bool = False,
    **more: Any,
) -> tuple[list[Completion], dict[str, Any]]:
    """Ask how to continue some texts, in one request.

    Args:
        server: whom to ask.
        served_model: what it calls the model.
        prompts: texts, or token ids.
        n_tokens: maximum number of tokens to write.
        width: the number of ids in its vocabulary, as far as it is known.
        logprobs: of how many likeliest tokens to return the log-probability, -1 for all; not given,
            none is asked for.
        scoring: how to ask for the prompts' own tokens too, if they are wanted.
        timeout: seconds that it may take, if more than usual.
        final_500: whether HTTP status 500 counts as an answer; it is asked again otherwise.
        **more: further parameters.

    Returns:
        One completion per prompt, and the answer as it was.

    Raises:
        ServerError: if the server does not answer.
        Unreadable: if it answers something else.
    """
    body: dict[str, Any] = {
        "model": served_model,
        "prompt": [p if isinstance(p, str) else list(p) for p in prompts],
        "max_tokens": n_tokens,
        "temperature": 0,
        **more,
    }
    if len(prompts) == 1:
        body["prompt"] = body["prompt"][0]
    if logprobs is not None:
        body |= {"logprobs": logprobs, "return_tokens_as_token_ids": True}
    if scoring == "echo":
        body["echo"] = True
    elif scoring is not None:
        body["prompt_logprobs"] = logprobs
    n_texts = "1 text" if len(prompts) == 1 else f"{len(prompts)} texts"
    longest = max(map(len, prompts))
    unit = "characters" if isinstance(prompts[0], str) else "tokens"
    what = f"{n_tokens} more tokens after {n_texts} of up to {longest} {unit}"
    named = body.get("logprob_token_ids", ())
    n_numbers = len(named) + 1
    if logprobs is not None:
        n_numbers += min(logprobs, width) if logprobs >= 0 else width
    n_prompt = sum(map(len, prompts))
    n_rows = len(prompts) * max(1, n_tokens) + (n_prompt if scoring else 0)
    answer = server.post(
        "/v1/completions",
        body,
        what,
        most=_ANY
        + _A_TEXT * len(prompts)
        + _A_PROMPT_TOKEN * n_prompt
        + n_rows * (LONGEST_TOKEN + _A_NUMBER * n_numbers),
        timeout=timeout,
        final_500=final_500,
    )
    read = read_all(answer, prompts, n_tokens, echoed=scoring == "echo", named=named)
    return read, answer

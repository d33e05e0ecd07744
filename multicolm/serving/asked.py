"""What clients may ask for, and what of OpenAI's interface is not served and therefore refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from pydantic import Field

from multicolm.config import GenerationConfig
from multicolm.config.wording import Strict, check
from multicolm.errors import InputError
from multicolm.types import Message, Prompt

__all__ = [
    "MOST_ALTERNATIVES",
    "ChatAsked",
    "CompletionAsked",
    "Extension",
    "Refusal",
    "StreamOptions",
    "read",
    "schema_of",
]

_MOST_TEXTS = 128
MOST_ALTERNATIVES = 20  # to each token, as OpenAI and vLLM have it
_MOST_STOPS = 16  # each is looked for behind every token, in the thread that writes for all

_HARMLESS = frozenset(
    {
        *("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
        *("service_tier", "user"),
        *("cache_prompt", "request_id"),  # llama.cpp's and vLLM's
    }
)
"""Fields that are for the client's own books, or for a server's speed: they change no text."""

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_generation_prompt": ((True,), "a chat is answered, not gone on with"),
    "audio": ((), "this server writes text only"),
    "bad_words": (([],), "tokens cannot be ruled out"),
    "best_of": ((1,), "ask for n texts, and choose"),
    "continue_final_message": ((False,), "a chat is answered, not gone on with"),
    "dry_multiplier": ((0,), "only 0 is served"),
    "dynatemp_range": ((0,), "only 0 is served"),
    "echo": ((False,), "the prompt is not read back"),
    "frequency_penalty": ((0,), "only 0 is served"),
    "function_call": (("none",), "functions are not served"),
    "functions": (([],), "functions are not served"),
    "ignore_eos": ((False,), "a text ends where its writer ends it"),
    "include_stop_str_in_output": ((False,), "a stop is no part of the text"),
    "length_penalty": ((1,), "only 1 is served"),
    "logit_bias": (({},), "tokens cannot be biased"),
    "min_p": ((0,), "only 0 is served"),
    "min_tokens": ((0,), "a text ends where its writer ends it"),
    "mirostat": ((0,), "only 0 is served"),
    "modalities": ((["text"],), "this server writes text only"),
    "num_beams": ((1,), "texts are drawn, not searched for"),
    "parallel_tool_calls": ((True, False), "tools are not served"),
    "prediction": ((), "predicted outputs are not served"),
    "presence_penalty": ((0,), "only 0 is served"),
    "prompt_logprobs": ((), "the prompt is not read back"),
    "reasoning_effort": (("none",), "it has no meaning for these models"),
    "repeat_penalty": ((1,), "only 1 is served"),
    "repetition_penalty": ((1,), "only 1 is served"),
    "response_format": (({"type": "text"},), "only plain text is served"),
    "skip_special_tokens": ((True,), "special tokens are no text"),
    "stop_token_ids": (([],), "stop at texts instead"),
    "store": ((False,), "nothing is stored"),
    "suffix": (("",), "texts cannot be filled in"),
    "tool_choice": (("none",), "tools are not served"),
    "tools": (([],), "tools are not served"),
    "typical_p": ((1,), "only 1 is served"),
    "use_beam_search": ((False,), "texts are drawn, not searched for"),
    "web_search_options": ((), "there is no search"),
    "xtc_probability": ((0,), "only 0 is served"),
}
"""Fields of OpenAI's, vLLM's and llama.cpp's that are not served: the values with which they change
nothing, and why not others."""

_HARMLESS_IN_TURNS = frozenset({"annotations", "name"})
_NOTHING_IN_TURNS: dict[str, Any] = {"refusal": "", "tool_calls": []}
"""Fields of a message with what says nothing in them, as clients hand back earlier answers."""


_PROMPTS = (
    "'prompt' must be a text, a list of token ids, or a list of texts or of lists of token ids."
)


_CONTENT = (
    'must be text, or a list of parts {"type": "text", "text": ...}; images, audio and files are '
    "not served."
)


class Refusal(InputError):
    """A request that is refused, and the field that is to blame.

    Attributes:
        param: the field, such as ``messages.0.content``.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Extension(Strict):
    """What only multicolm understands.

    Attributes:
        policy: who decides who writes; the one that ``model`` names if not given.
        params: params that replace those of the policy.
    """

    policy: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)


class StreamOptions(Strict):
    """How a text is streamed.

    Attributes:
        include_usage: whether a last chunk, without choices, says what was used.
    """

    include_usage: bool = False


class _Asked(Strict):
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=_MOST_TEXTS)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)  # -1 and 0: all tokens
    max_tokens: int | None = None
    multicolm: Extension = Field(default_factory=Extension)

    def prompts(self) -> list[Prompt]:
        """What is to be answered, one by one."""
        raise NotImplementedError

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log-probabilities of the written tokens are wanted."""
        raise NotImplementedError

    @property
    def alternatives(self) -> tuple[str, int]:
        """The field that asks for the likeliest tokens with each written one, and how many."""
        raise NotImplementedError

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that limits the length of a text, and its value."""
        return "max_tokens", self.max_tokens

    def settings(self, own: GenerationConfig, most: int) -> GenerationConfig:
        """How the texts are written.

        Args:
            own: settings of the ensemble, for what is not asked.
            most: the most tokens that the operator allows.

        Raises:
            Refusal: if a setting is out of range.
        """
        field, wanted = self.limit
        if wanted is not None and not 1 <= wanted <= most:
            raise Refusal(
                f"{field} must be 1 to {most} on this server, got {wanted}; ask for less.", field
            )
        top_k = self.top_k
        if top_k in (-1, 0):
            own, top_k = own.model_copy(update={"top_k": None}), None
        for name in ("temperature", "top_p", "stop"):
            value = getattr(self, name)
            try:
                own.updated({name: value})
            except InputError as error:
                raise Refusal(str(error), name) from error
        return own.updated(
            {
                "max_new_tokens": min(own.max_new_tokens, most) if wanted is None else wanted,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": top_k,
                "stop": self.stop,
                "top_logprobs": self.alternatives[1],
            }
        )


class CompletionAsked(_Asked):
    """The body of ``POST /v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES)

    def prompts(self) -> list[Prompt]:
        """What is to be answered, one by one."""
        prompt = self.prompt
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return cast("list[Prompt]", [prompt] if one else prompt)

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log-probabilities of the written tokens are wanted."""
        return self.logprobs is not None

    @property
    def alternatives(self) -> tuple[str, int]:
        """The field that asks for the likeliest tokens with each written one, and how many."""
        return "logprobs", self.logprobs or 0


class _Part(Strict):
    type: Literal["text"]
    text: str


class _Turn(Strict):
    role: str = Field(min_length=1)
    content: str | list[_Part]

    @property
    def text(self) -> str:
        content = self.content
        return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatAsked(_Asked):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[_Turn] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MOST_ALTERNATIVES)

    def prompts(self) -> list[Prompt]:
        """The one chat."""
        return [[Message(role=turn.role, content=turn.text) for turn in self.messages]]

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log-probabilities of the written tokens are wanted."""
        return self.logprobs

    @property
    def alternatives(self) -> tuple[str, int]:
        """The field that asks for the likeliest tokens with each written one, and how many."""
        return "top_logprobs", self.top_logprobs

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that limits the length of a text, and its value."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


A = TypeVar("A", CompletionAsked, ChatAsked)


@dataclass(frozen=True)
class _Field:
    """A field that is there, and its value."""

    name: str
    value: Any

    @property
    def is_refused(self) -> bool:
        """Whether it asks for something that is not served."""
        if self.name not in _REFUSED:
            return False
        if self.name == "logit_bias" and isinstance(self.value, Mapping):
            return not all(_same(bias, 0) for bias in self.value.values())
        return not any(_same(self.value, neutral) for neutral in _REFUSED[self.name][0])


def _same(value: object, neutral: object) -> bool:
    # In Python True is 1 and 0 is False; in JSON they are not.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def schema_of(asked: type[CompletionAsked] | type[ChatAsked]) -> dict[str, Any]:
    """What a body may hold, as JSON Schema for an OpenAPI document; nothing refers elsewhere.

    Fields that change nothing are in it, those that are not served with the values that are taken.
    """
    schema = asked.model_json_schema(ref_template="{model}")
    parts = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return whole(parts[value["$ref"]])
            # A docstring here is for those who read the code.
            return {k: whole(v) for k, v in value.items() if k not in ("title", "description")}
        return [whole(part) for part in value] if isinstance(value, list) else value

    found: dict[str, Any] = whole(schema)
    fields: dict[str, Any] = found["properties"]
    fields |= {name: {} for name in sorted(_HARMLESS)}
    fields |= {name: {"enum": [*taken, None]} for name, (taken, _) in _REFUSED.items()}
    if "messages" in fields:
        turn = fields["messages"]["items"]["properties"]
        turn |= {name: {} for name in sorted(_HARMLESS_IN_TURNS)}
        turn |= {name: {"enum": [said, None]} for name, said in _NOTHING_IN_TURNS.items()}
    return found


def read(body: bytes, schema: type[A]) -> A:
    """A request's body, checked.

    Raises:
        Refusal: if it is no JSON, asks for what is not served, or has a field that is not known or
            of the wrong type; it names the field.
    """
    data = _parsed(body)
    if not isinstance(data, Mapping):
        raise Refusal("the body must be a JSON object with `model` and what it is to answer.")
    given = {
        name: value for name, value in data.items() if value is not None and name not in _HARMLESS
    }
    if _same(given.get("best_of"), given.get("n", 1)):
        given.pop("best_of", None)  # of as many texts as are wanted, all are the best
    for field in (_Field(name, value) for name, value in given.items()):
        if field.is_refused:
            why = _REFUSED[field.name][1]
            raise Refusal(f"'{field.name}' is not supported: {why}.", field.name)
        if field.name == "messages":
            given["messages"] = _without_nothing(field.value)
    given = {name: value for name, value in given.items() if name not in _REFUSED}
    asked, problems = check(schema, given)
    if asked is None:
        first = problems[0]
        if first.place[:1] == ("prompt",) and "prompt" in given:
            raise Refusal(_PROMPTS, "prompt")
        where = ".".join(map(str, first.place))
        if first.place[:1] == ("messages",) and first.place[2:3] == ("content",):
            if first.text.startswith("required"):
                raise Refusal(f"'{where}' is missing; say what was said.", where)
            raise Refusal(f"'{where}' {_CONTENT}", where)
        lead = f"'{where}': " if where and not first.at_key else ""
        raise Refusal(f"{lead}{first.text}".replace("unknown key", "unknown field"), where or None)
    _check_together(asked)
    return asked


def _parsed(body: bytes) -> Any:
    """What a body says, which can be said back to the client too.

    Raises:
        Refusal: if it is no JSON, or holds what a reply in JSON could not repeat.
    """
    try:
        data = json.loads(body)
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise Refusal(
            "the body holds text that is not valid Unicode: one half of a pair of surrogates; "
            "send whole characters."
        ) from error
    except RecursionError as error:
        raise Refusal("the body is not JSON that is served: it is nested too deep.") from error
    except ValueError as error:
        raise Refusal(
            "the body is not JSON, or has a number in it that is not finite; send an object in "
            "UTF-8."
        ) from error
    return data


def _without_nothing(messages: Any) -> Any:
    """Messages as clients hand them back, without what says nothing in them."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return messages
    return [
        {name: value for name, value in turn.items() if not _says_nothing(name, value)}
        if isinstance(turn, Mapping)
        else turn
        for turn in messages
    ]


def _says_nothing(name: str, value: Any) -> bool:
    if value is None or name in _HARMLESS_IN_TURNS:
        return True
    return name in _NOTHING_IN_TURNS and bool(value == _NOTHING_IN_TURNS[name])


def _check_together(asked: CompletionAsked | ChatAsked) -> None:
    """Refuse what is right field by field, and not together.

    Raises:
        Refusal: naming the field.
    """
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(
            "'stream_options' goes with \"stream\": true; leave it out.", "stream_options"
        )
    if isinstance(asked.stop, list) and len(asked.stop) > _MOST_STOPS:
        raise Refusal(
            f"'stop' must hold at most {_MOST_STOPS} texts on this server, got {len(asked.stop)}; "
            "send fewer.",
            "stop",
        )
    if isinstance(asked, CompletionAsked):
        if not asked.prompt:
            raise Refusal("'prompt' is empty; write at least a word.", "prompt")
        return
    if asked.top_logprobs and not asked.logprobs:
        raise Refusal(
            "'top_logprobs' goes with \"logprobs\": true; add it, or leave this out.",
            "top_logprobs",
        )
    both = (asked.max_tokens, asked.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise Refusal(
            "'max_tokens' and 'max_completion_tokens' say different things; give one of them.",
            "max_tokens",
        )

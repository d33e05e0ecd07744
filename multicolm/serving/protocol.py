"""What clients may ask for, and what of OpenAI's interface is not served and therefore refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast

from pydantic import Field, ValidationError, model_validator
from pydantic_core import from_json

from multicolm.config import GenerationConfig
from multicolm.config.chat_template import TemplateArgs
from multicolm.config.wording import Strict, problems_of
from multicolm.errors import InputError, shorten
from multicolm.types import Chat, Message, Prompt

__all__ = [
    "MOST_ALTERNATIVES",
    "ChatCompletionRequest",
    "CompletionRequest",
    "Extension",
    "Refusal",
    "StreamOptions",
    "read",
    "schema_of",
]

MOST_ALTERNATIVES = 20  # to each token, as OpenAI and vLLM have it
# What is read for one client is not done for others: so nothing in a body is longer than this.
_MOST_TEXTS = 128
_MOST_MESSAGES = 2048  # as OpenAI has it
_MOST_PARTS = 256  # of a message
_MOST_FIELDS = 128  # of one object
_MOST_VALUES = 20_000  # lists and objects in a body
_LONGEST_NAME = 256  # characters
_LONGEST_PARAMS = 16_384  # characters of JSON
_MOST_STOPS = 16  # each is searched for after every token, in the thread that writes for all
_LONGEST_STOP = 1024  # characters

T = TypeVar("T")
_List: TypeAlias = Annotated[list[T], Field(fail_fast=True)]
_Name: TypeAlias = Annotated[str, Field(max_length=_LONGEST_NAME)]

_HARMLESS = frozenset(
    {
        *("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
        *("service_tier", "user"),
        *("cache_prompt", "request_id"),  # llama.cpp's and vLLM's
    }
)
"""Fields that are for the client's own books, or for a server's speed: they change no text."""

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_generation_prompt": ((True,), "a chat is answered, not continued"),
    "audio": ((), "this server writes text only"),
    "bad_words": (([],), "tokens cannot be ruled out"),
    "best_of": ((1,), "ask for n texts, and choose"),
    "continue_final_message": ((False,), "a chat is answered, not continued"),
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

# How a model thought is not handed back to it: templates of thinking models leave it out, too.
_HARMLESS_IN_TURNS = frozenset({"annotations", "name", "reasoning", "reasoning_content"})
_NOTHING_IN_TURNS: dict[str, Any] = {"refusal": "", "tool_calls": []}
"""Fields of a message with what says nothing in them, as clients hand back earlier answers."""


_PROMPTS = (
    "'prompt' must be a text, a list of token ids, or a list of texts or of lists of token ids."
)


_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


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


class _Body(Strict):
    """An object in a body."""

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, data: Any) -> Any:
        # Pydantic complains of each one that is not known.
        if isinstance(data, Mapping) and len(data) > _MOST_FIELDS:
            raise ValueError(f"must have at most {_MOST_FIELDS} fields, got {len(data)}.")
        return data


class Extension(_Body):
    """What only multicolm understands.

    Attributes:
        policy: who decides who writes; the one that ``model`` names if not given.
        params: params that replace those of the policy.
    """

    policy: _Name | None = None
    params: dict[_Name, Any] = Field(default_factory=dict, max_length=_MOST_FIELDS)


class StreamOptions(_Body):
    """How a text is streamed.

    Attributes:
        include_usage: whether a last chunk, without choices, says what was used.
    """

    include_usage: bool = False


class _BaseRequest(_Body):
    model: _Name
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=_MOST_TEXTS)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | _List[str] | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)  # -1 and 0: all tokens
    max_tokens: int | None = None
    thinking_token_budget: int | None = Field(default=None, ge=0)
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
            most: maximum number of tokens that the operator allows.

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
        for name in ("temperature", "top_p", "stop", "thinking_token_budget"):
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
                "thinking_token_budget": self.thinking_token_budget,
                "top_logprobs": self.alternatives[1],
            }
        )


class CompletionRequest(_BaseRequest):
    """The body of ``POST /v1/completions``."""

    prompt: str | _List[int] | _List[str] | _List[_List[int]]
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


class _Part(_Body):
    type: Literal["text"]
    text: str


class _Turn(_Body):
    role: str = Field(min_length=1, max_length=_LONGEST_NAME)
    content: str | Annotated[_List[_Part], Field(max_length=_MOST_PARTS)]

    @property
    def text(self) -> str:
        content = self.content
        return content if isinstance(content, str) else "".join(part.text for part in content)


class ChatCompletionRequest(_BaseRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: _List[_Turn] = Field(min_length=1, max_length=_MOST_MESSAGES)
    include_reasoning: bool = True
    chat_template_kwargs: TemplateArgs = Field(default_factory=dict, max_length=_MOST_FIELDS)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MOST_ALTERNATIVES)

    def prompts(self) -> list[Prompt]:
        """The one chat."""
        turns = [Message(role=turn.role, content=turn.text) for turn in self.messages]
        return [Chat(turns, self.chat_template_kwargs) if self.chat_template_kwargs else turns]

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


R = TypeVar("R", bound=_BaseRequest)


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


def schema_of(asked: type[CompletionRequest] | type[ChatCompletionRequest]) -> dict[str, Any]:
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
    fields: dict[str, Any] = {
        name: field if name in found["required"] else {"anyOf": [field, {"type": "null"}]}
        for name, field in found["properties"].items()
    }
    found["properties"] = fields
    fields |= {name: {} for name in sorted(_HARMLESS)}
    fields |= {name: {"enum": [*taken, None]} for name, (taken, _) in _REFUSED.items()}
    if "messages" in fields:
        turn = fields["messages"]["items"]["properties"]
        turn |= {name: {} for name in sorted(_HARMLESS_IN_TURNS)}
        turn |= {name: {"enum": [said, None]} for name, said in _NOTHING_IN_TURNS.items()}
    return found


def read(content: bytes, schema: type[R]) -> R:
    """A request's body, checked.

    Raises:
        Refusal: if it is no JSON, asks for what is not served, or has a field that is not known or
            of the wrong type; it names the field.
    """
    data = _parsed(content)
    if not isinstance(data, Mapping):
        raise Refusal("the body must be a JSON object with `model` and what it is to answer.")
    if len(data) > _MOST_FIELDS:
        raise Refusal(f"the body must have at most {_MOST_FIELDS} fields, got {len(data)}.")
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
    try:
        body = schema.model_validate(given)
    except ValidationError as error:
        [first] = problems_of(error, schema, given, most=1)
        if first.place[:1] == ("prompt",) and "prompt" in given:
            raise Refusal(_PROMPTS, "prompt") from error
        where = shorten(".".join(map(str, first.place)))
        if first.place[:1] == ("messages",) and first.place[2:3] == ("content",):
            if first.text.startswith("required"):
                raise Refusal(f"'{where}' is missing; say what was said.", where) from error
            raise Refusal(f"'{where}' {_CONTENT}", where) from error
        lead = f"'{where}': " if where and not first.at_key else ""
        text = f"{lead}{first.text}".replace("unknown key", "unknown field")
        raise Refusal(text, where or None) from error
    _check_together(body)
    return body


def _parsed(body: bytes) -> Any:
    """What a body says, which can be said back to the client too.

    Raises:
        Refusal: if it is no JSON, or holds what a reply in JSON could not repeat.
    """
    _check_values(body)
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        why = str(error)
        if "hex escape" in why or "surrogate" in why:
            raise Refusal(
                "the body holds text that is not valid Unicode: one half of a pair of surrogates; "
                "send whole characters."
            ) from error
        raise Refusal(
            f"the body is not JSON that is served: {shorten(why)}; send an object in UTF-8."
        ) from error


def _check_values(body: bytes) -> None:
    """Refuse a body that holds so many lists and objects that parsing it would hold up the others.

    Raises:
        Refusal: if there are too many.
    """
    if body.count(b"[") + body.count(b"{") > _MOST_VALUES:
        body = _STRING.sub(b"", body)  # those in texts are text
        if body.count(b"[") + body.count(b"{") > _MOST_VALUES:
            raise Refusal(f"the body must hold at most {_MOST_VALUES} lists and objects.")


def _without_nothing(messages: Any) -> Any:
    """Messages as clients hand them back, without what says nothing in them."""
    if not isinstance(messages, list) or len(messages) > _MOST_MESSAGES:
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


def _check_together(body: _BaseRequest) -> None:
    """Refuse what is right field by field, and not together.

    Raises:
        Refusal: naming the field.
    """
    if body.stream_options is not None and not body.stream:
        raise Refusal(
            "'stream_options' goes with \"stream\": true; leave it out.", "stream_options"
        )
    if isinstance(body.stop, list) and len(body.stop) > _MOST_STOPS:
        raise Refusal(
            f"'stop' must hold at most {_MOST_STOPS} texts on this server, got {len(body.stop)}; "
            "send fewer.",
            "stop",
        )
    longest = max(
        map(len, [body.stop] if isinstance(body.stop, str) else body.stop or []), default=0
    )
    if longest > _LONGEST_STOP:
        raise Refusal(
            f"'stop' must have at most {_LONGEST_STOP} characters, got {longest}.", "stop"
        )
    _check_size("multicolm.params", body.multicolm.params)
    if isinstance(body, CompletionRequest) and not body.prompt:
        raise Refusal("'prompt' is empty; write at least a word.", "prompt")
    if not isinstance(body, ChatCompletionRequest):
        return
    _check_size("chat_template_kwargs", body.chat_template_kwargs)
    if body.top_logprobs and not body.logprobs:
        raise Refusal(
            "'top_logprobs' goes with \"logprobs\": true; add it, or leave this out.",
            "top_logprobs",
        )
    both = (body.max_tokens, body.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise Refusal(
            "'max_tokens' and 'max_completion_tokens' say different things; give one of them.",
            "max_tokens",
        )


def _check_size(field: str, values: Mapping[str, Any]) -> None:
    """Refuse values that are long, or could not be said back in JSON.

    Raises:
        Refusal: naming the field.
    """
    try:
        size = len(json.dumps(values, ensure_ascii=False, allow_nan=False))
    except ValueError as error:  # such as 1e999
        raise Refusal(f"'{field}' holds a number that is not finite.", field) from error
    if size > _LONGEST_PARAMS:
        raise Refusal(
            f"'{field}' must have at most {_LONGEST_PARAMS} characters, got {size}.", field
        )

"""Chats in a model's own template: what a template may do, and what a message may not.

A template writes special tokens by their names. The same names in a message, in whatever field of
it, are text: whoever writes a message cannot end a turn or begin another one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from multicolm import catalog
from multicolm.errors import InputError, MulticolmWarning
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.types import Chat, Message

__all__ = [
    "hidden_in",
    "no_template",
    "not_special_here",
    "plain_template",
    "rendered",
    "replaced",
    "strings_in",
    "strings_of",
    "unknown_args",
]

# How the special tokens that templates write are called; tags such as <tool_call> often are text.
_NAMES = re.compile(r"<\|[^|<>\s]+\|>|</?s>|<(?:bos|eos|unk|pad)>|<(?:start|end)_of_\w+>")


def strings_of(messages: Iterable[Any]) -> list[str]:
    """Every string in some messages, whatever field it is in and however deep."""
    found: list[str] = []
    for value in messages:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Mapping):
            found += strings_of([*value, *value.values()])
        elif isinstance(value, Sequence) and not isinstance(value, bytes):
            found += strings_of(value)
    return found


def strings_in(messages: Sequence[Message]) -> list[str]:
    """Every string that whoever writes a chat has written, what it asks of templates included."""
    return strings_of([*messages, messages.template_args if isinstance(messages, Chat) else {}])


def hidden_in(messages: Sequence[Message], names: Mapping[str, str]) -> Chat:
    """A chat with some names replaced in every string of every field.

    Args:
        messages: of a chat.
        names: what stands in the place of each name.
    """
    args = messages.template_args if isinstance(messages, Chat) else {}
    hidden = (cast("Message", _hidden(dict(message), names)) for message in messages)
    return Chat(hidden, _hidden(args, names))


def _hidden(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return replaced(value, names)
    if isinstance(value, Mapping):
        return {_hidden(key, names): _hidden(part, names) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_hidden(part, names) for part in value]
    return value


def replaced(text: str, names: Mapping[str, str]) -> str:
    """The text with every name replaced at once; of names that begin alike the longest."""
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(pattern, lambda found: names[found.group()], text) if names else text


def rendered(
    name: str,
    template: Callable[[list[dict[str, Any]], Mapping[str, Any]], Any],
    messages: Sequence[Message],
    hidden: Mapping[str, str] | None = None,
) -> str:
    """What a template makes of a chat.

    Args:
        name: the model's, for messages.
        template: takes the messages, and the variables that the chat sets. It may be of the
            model's author or of the user, and fail in any way that a program can.
        messages: of the chat.
        hidden: what stands in the messages in the place of names, for messages.

    Raises:
        InputError: if the template refuses the messages, or fails.
    """
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        args = messages.template_args if isinstance(messages, Chat) else {}
        return str(template([cast("dict[str, Any]", dict(turn)) for turn in messages], args))
    except Exception as error:
        names = {stand_in: hidden_name for hidden_name, stand_in in (hidden or {}).items()}
        reason = replaced(" ".join(str(error).split()), names).rstrip(".")
        if isinstance(error, TemplateSyntaxError):
            reason = f"is not right in line {error.lineno}: {reason}"
        elif isinstance(error, TemplateError):
            # Among them what a template says itself, by raise_exception.
            raise InputError(
                f"the chat template of model '{name}' refuses these messages: {reason}"
            ) from error
        else:
            reason = f"fails on these messages: {type(error).__name__}: {reason}"
        raise InputError(
            f"the chat template of model '{name}' {reason}. Mend it, or set another one with "
            "`chat_template:` in the ensemble file."
        ) from error


def not_special_here(tokenizer: TokenizerAdapter, template: str) -> list[str]:
    """Names in a template that look like special tokens, and are text for a tokenizer."""
    n_front = len(tokenizer.encode(""))
    names = dict.fromkeys(_NAMES.findall(template))
    return [name for name in names if len(tokenizer.encode_rendered(name)) - n_front > 1]


def unknown_args(template: str, args: Iterable[str]) -> list[str]:
    """Variables that a template does not use; none if that cannot be found out."""
    from jinja2 import Environment, TemplateError, meta

    environment = Environment(extensions=["jinja2.ext.do", "jinja2.ext.loopcontrols"])
    try:
        used = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:
        return []
    return [name for name in args if name not in used]


def plain_template(name: str) -> str:
    """What chats of a model without a template are written in, which is said once per model.

    Args:
        name: the model's, for the message.
    """
    warnings.warn(
        f"model '{name}' has no chat template, so its chats are written as `plain` (\"User: ...\", "
        '"Assistant:"); set `chat_template:` for it in the ensemble file if it knows another '
        'form, and `stop: ["\\n\\nUser:"]` if no other model ends the reply.',
        MulticolmWarning,
        stacklevel=2,
    )
    return catalog.read("chat_templates", "plain")


def no_template(name: str, others: Iterable[str]) -> InputError:
    """What to say where none of a model's templates is for every chat.

    Args:
        name: the model's.
        others: names of the templates that it has.
    """
    return InputError(
        f"model '{name}' has chat templates for {' and '.join(sorted(others))} only; give a plain "
        "text prompt, or set `chat_template:` for it in the ensemble file: `chatml` or `plain`, "
        "jinja text that uses `messages`, or a .jinja file."
    )

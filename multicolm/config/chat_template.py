"""Chat templates of ensemble files: found, and checked before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator

from multicolm import catalog
from multicolm.config.document import read_text
from multicolm.errors import ConfigError, UnknownNameError, unknown

__all__ = ["TemplateArgs", "chat_template_text"]

_FORMS = "allowed are {names}, a .jinja file, or jinja text that uses `messages`"


_OURS = frozenset(
    {
        *("messages", "conversation", "chat_template", "add_generation_prompt", "tokenize"),
        *("continue_final_message", "start_of_text", "bos_token", "eos_token", "special_tokens"),
        *("padding", "truncation", "max_length", "tools", "documents", "processor_kwargs"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    }
)
"""Arguments of transformers' ``apply_chat_template`` that are no variables of a template, and
variables that chats are written with anyway."""


def _allowed(args: dict[str, Any]) -> dict[str, Any]:
    for name in args:
        if name in _OURS:
            raise ValueError(f"'{name}' is set by multicolm itself; leave it out.")
        if not name.isidentifier():
            raise ValueError(f"'{name}' is no name of a variable in a template.")
    return args


TemplateArgs: TypeAlias = Annotated[dict[str, Any], AfterValidator(_allowed)]
"""Variables of chat templates by name."""


def chat_template_text(given: str, base_dir: Path) -> str:
    """The jinja text that ``chat_template`` stands for.

    Args:
        given: a name in ``registry/chat_templates/``, a ``.jinja`` file, or the text itself.
        base_dir: the folder that relative paths start from.

    Raises:
        UnknownNameError: if it is a word, and no name.
        ConfigError: if the file cannot be read, or the text is no template of chats.
    """
    known = catalog.names("chat_templates")
    if given in known:
        return catalog.read("chat_templates", given)
    forms = _FORMS.format(names=" and ".join(f"`{name}`" for name in known))
    if given.endswith(".jinja") and "{" not in given:
        path = base_dir / Path(given).expanduser()
        text = read_text(path, "a chat template")
        _check(text, f"{path}: ", forms)
        return text
    if "{" not in given:
        shown = given if len(given) <= 40 else f"{given[:37]}..."
        raise UnknownNameError(f"{unknown('chat template', shown, known)} A{forms[1:]}.")
    _check(given, "", forms)
    return given


def _check(text: str, where: str, forms: str) -> None:
    """Refuse what is no jinja, or writes the same whatever the messages are.

    Raises:
        ConfigError: beginning with ``where``.
    """
    from jinja2 import Environment, TemplateSyntaxError, meta

    environment = Environment(extensions=["jinja2.ext.do", "jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(text)
    except TemplateSyntaxError as error:
        # transformers knows tags that jinja does not, such as `generation`; it will look again.
        if "unknown tag" in str(error) and "messages" in text:
            return
        raise ConfigError(
            f"{where}is not jinja in line {error.lineno} of the template: {str(error).rstrip('.')}."
        ) from error
    if "messages" not in meta.find_undeclared_variables(parsed):
        raise ConfigError(
            f"{where}the template does not use `messages`, so what is asked would be lost; {forms}."
        )

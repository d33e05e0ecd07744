"""From what a user asks to what every model reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from multicolm.backend.base import Model
from multicolm.errors import InputError
from multicolm.exact.bounds import least_tokens
from multicolm.tokenizer.vocabulary import Vocabulary
from multicolm.types import Message, OwnTokens, Prompt

__all__ = ["check_prompt", "check_unicode", "encode_prompt", "prompt_ids"]


def prompt_ids(
    prompt: Prompt,
    number: int,
    models: Sequence[Model],
    vocabulary: Vocabulary,
    used: Collection[int],
) -> list[list[int]]:
    """What each model reads before the text, in its own tokens; nothing for models not in use.

    Args:
        prompt: text, a chat, token ids of the shared vocabulary, or every model's own. A chat goes
            through each model's own template.
        number: its place among the prompts, for messages.
        models: the ensemble's models.
        vocabulary: what they share.
        used: indices of the models in use.

    Raises:
        InputError: if the prompt is empty, of another type, no Unicode, longer than a model's
            context, or holds ids that are no tokens.
    """
    where = f"prompt {number + 1}"
    check_prompt(prompt, where)
    if isinstance(prompt, OwnTokens):
        _check_own(prompt, where, models)
    elif _is_ids(prompt):
        _check_ids(cast("Sequence[int]", prompt), where, vocabulary.size)
    ids: list[list[int]] = []
    for k, model in enumerate(models):
        if k in used:
            _check_bytes(prompt, where, model)
        own = encode_prompt(prompt, k, model, vocabulary) if k in used else []
        if k in used and not own:
            raise InputError(f"{where} is empty for model '{model.name}'; write at least a word.")
        limit = model.context_length
        if limit is not None and len(own) > limit:
            raise InputError(
                f"{where} has {len(own)} tokens, and the context of model '{model.name}' holds "
                f"{limit}; shorten it."
            )
        ids.append(own)
    return ids


def _check_bytes(prompt: Prompt, where: str, model: Model) -> None:
    """Refuse a text or chat that cannot fit, before it is made into tokens, which takes longer."""
    limit = model.context_length
    if limit is None or isinstance(prompt, OwnTokens) or _is_ids(prompt):
        return
    if isinstance(prompt, str):
        content = prompt.encode()
    elif sum(len(message["content"]) for message in cast("Sequence[Message]", prompt)) > limit:
        text = model.tokenizer.chat_text(cast("Sequence[Message]", prompt)) or ""
        # A special token may stand for the blanks beside it, too.
        content = "".join(text.split()).encode()
    else:
        return
    least = least_tokens(model.tokenizer, content)
    if least > limit:
        raise InputError(
            f"{where} has {len(content)} bytes, which are {least} tokens or more, and the context "
            f"of model '{model.name}' holds {limit}; shorten it."
        )


def _is_ids(prompt: Any) -> bool:
    return not isinstance(prompt, str) and all(
        isinstance(part, int) and not isinstance(part, bool) for part in prompt
    )


def _check_ids(ids: Sequence[int], where: str, size: int) -> None:
    for shared_id in ids:
        if not 0 <= shared_id < size:
            raise InputError(
                f"{where} holds token id {shared_id}; the vocabulary has 0 to {size - 1}."
            )


def _check_own(prompt: OwnTokens, where: str, models: Sequence[Model]) -> None:
    if len(prompt.ids) != len(models):
        raise InputError(
            f"{where} holds tokens for {len(prompt.ids)} models, and the ensemble has "
            f"{len(models)}; give a list for each, an empty one for models that are not in use."
        )
    for model, ids in zip(models, prompt.ids, strict=True):
        for token_id in ids:
            if not 0 <= token_id < model.tokenizer.n_tokens:
                raise InputError(
                    f"{where} holds token id {token_id} for model '{model.name}', whose tokens are "
                    f"0 to {model.tokenizer.n_tokens - 1}."
                )


def check_unicode(text: str, where: str) -> None:
    """Refuse what has no bytes.

    Raises:
        InputError: beginning with ``where``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} is not valid Unicode at character {error.start}; "
            "read it as UTF-8 before passing it on."
        ) from error


def check_prompt(prompt: Any, where: str) -> None:
    """Refuse what is no prompt.

    Raises:
        InputError: beginning with ``where``, if it is empty, of another type, or no Unicode.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise InputError(f"{where} is empty; write at least a word.")
        check_unicode(prompt, where)
        return
    if isinstance(prompt, OwnTokens):
        return
    if isinstance(prompt, Mapping | bytes | bytearray) or not isinstance(prompt, Sequence):
        raise InputError(
            f"{where} is a {type(prompt).__name__}; allowed are a text, a chat (a list of "
            "messages with role and content), or a list of token ids."
        )
    if not prompt:
        raise InputError(f"{where} is empty; write at least a word.")
    for message in prompt if not _is_ids(prompt) else ():
        if not (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise InputError(
                f'{where}: {message!r} is no message; one is {{"role": "user", "content": "..."}}.'
            )
        check_unicode(message["content"], where)


def encode_prompt(prompt: Prompt, k: int, model: Model, vocabulary: Vocabulary) -> list[int]:
    """What model ``k`` reads for a prompt, in its own tokens.

    Raises:
        InputError: if it is a chat and the model has no template, or the template refuses it.
    """
    if isinstance(prompt, OwnTokens):
        return list(prompt.ids[k])
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt)
    if _is_ids(prompt):
        return vocabulary.read(k, cast("Sequence[int]", prompt))
    return model.tokenizer.encode_chat(cast("Sequence[Message]", prompt))

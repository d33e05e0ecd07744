"""API keys, as they come from options and environment variables."""

from __future__ import annotations

import re

from multicolm.errors import ConfigError

__all__ = ["check_key"]

_KEY = re.compile(r"[!-~]+")


def check_key(key: str, where: str, instead: str) -> str:
    """A key that a header can carry. Messages never show it.

    Args:
        key: as it was given.
        where: what holds it, for messages.
        instead: what to do if no key is meant.

    Raises:
        ConfigError: if it is empty, or has a blank, a line break or a character that is not ASCII
            in it.
    """
    if not key.strip():
        raise ConfigError(f"{where} is empty; set it to the key, or {instead}.")
    if not _KEY.fullmatch(key):
        raise ConfigError(
            f"{where} holds what is no key: it has a blank, a line break or a character that is "
            "not ASCII in it; set it to the key alone."
        )
    return key

"""How the tokens of a text are put to a server, and those that it writes are read.

A server that takes token ids and returns them needs nothing of this. One of text does: specials are
written by their names, and what comes back is cut into tokens here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from multicolm.backend.remote.answers import Completion
from multicolm.errors import CapabilityError, ServerError
from multicolm.tokenizer.base import TokenizerAdapter

__all__ = ["PromptFormat"]

_A_FEW = 4  # tokens: the last one that a text shows may be cut short


class PromptFormat:
    """How one model's texts go to its server and come back.

    Args:
        tokenizer: of the model.
        takes_ids: whether prompts are token ids.
        returns_ids: whether what is written comes back as token ids.
        name: of the model, for messages.
        server: its address, for messages.
    """

    def __init__(
        self,
        tokenizer: TokenizerAdapter,
        *,
        takes_ids: bool,
        returns_ids: bool,
        name: str,
        server: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._takes_ids = takes_ids
        self._returns_ids = returns_ids
        self._name = name
        self._server = server
        self._start = tokenizer.encode("")

    def at_least(self, n_tokens: int) -> int:
        """How many tokens to ask for where so many are wanted."""
        return n_tokens if self._returns_ids else max(n_tokens, _A_FEW)

    def prompt(self, ids: Sequence[int]) -> Sequence[int] | str:
        """A text as the server takes it.

        What the tokenizer puts in front of every text is left to the server.

        Raises:
            CapabilityError: if it takes characters only, and the text ends within one, or holds
                the name of a special token, which the server would take for the token.
        """
        if self._takes_ids:
            return ids
        rest = ids[len(self._start) :] if list(ids[: len(self._start)]) == self._start else ids
        parts: list[str] = []
        for name, run in groupby(rest, self._tokenizer.special_name):
            tokens = list(run)
            parts.append(self._text(tokens) if name is None else name * len(tokens))
        return "".join(parts)

    def _text(self, ids: Sequence[int]) -> str:
        """Tokens of text as the server takes them."""
        way = f"model '{self._name}' cannot continue here: its server {self._server} takes no token"
        try:
            text = self._tokenizer.decode(ids).decode()
        except UnicodeDecodeError as error:
            raise CapabilityError(
                f"{way} ids, and the text ends within a character. Use a policy that hands over "
                "between words, or a server that takes token ids."
            ) from error
        if name := self._tokenizer.special_in(text):
            raise CapabilityError(
                f"{way} ids, and would read '{name}', which is text here, as that special token. "
                "Leave it out, or use a server that takes token ids."
            )
        return text

    def tokens(self, answer: Completion, n_asked: int) -> list[int]:
        """What the server wrote, as tokens; at least one.

        Raises:
            ServerError: if there is none in it.
        """
        ids = self._tokenizer.encode_continuation(answer.text) if answer.text else []
        if answer.ended and self._tokenizer.end_ids:
            return [*ids, min(self._tokenizer.end_ids)]
        # The text may be cut off within what would be one token.
        kept = ids[:-1] if len(ids) > 1 else ids
        if not kept or "\ufffd" in self._tokenizer.decode(kept[:1]).decode("utf-8", "replace"):
            raise ServerError(
                f"server {self._server} of model '{self._name}': asked for {n_asked} tokens, it "
                f"wrote {answer.text!r}, in which there is no whole character; use a server "
                "that returns token ids.",
                server=self._server,
            )
        return kept

"""Texts behind prompts, in the tokens of every model in use, and no longer than it can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from multicolm.decoding.prompts import encode_prompt
from multicolm.ensemble import Ensemble
from multicolm.errors import InputError
from multicolm.policy.base import Policy
from multicolm.scoring.spans import spans_of
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.types import Prompt

__all__ = ["Passage", "PassageReader"]


@dataclass(frozen=True, slots=True)
class Passage:
    """A text behind a prompt, in tokens.

    Attributes:
        prompt_ids: per model what it reads before, in its own tokens; nothing for models that are
            not in use.
        ids: the text, in the base model's tokens.
    """

    prompt_ids: tuple[tuple[int, ...], ...]
    ids: tuple[int, ...]


class PassageReader:
    """Turns texts into passages that the models of an ensemble can read.

    Args:
        ensemble: whose models read.
        policy: says which of them are in use.
    """

    def __init__(self, ensemble: Ensemble, policy: Policy) -> None:
        self._ensemble = ensemble
        self._models = ensemble.backends
        self._used = sorted(policy.uses(ensemble.models))

    def passage(self, prompt: Prompt, text: str, *, written: str = "") -> Passage:
        """A text as the models read it.

        Args:
            prompt: what stands before; a text that is empty if nothing does.
            text: whose likelihood is asked for, not empty.
            written: a part of the answer that stands between the two and is not asked for.

        Raises:
            InputError: if the text is empty, the base model has no tokens for it, a prompt cannot
                be read, or nothing can stand before the first token.
        """
        tokenizer = self._models[0].tokenizer
        prompts: list[tuple[int, ...]] = []
        for k, model in enumerate(self._models):
            own = model.tokenizer
            if k not in self._used:
                ids: list[int] = []
            elif not prompt:
                ids = own.start_ids + (own.encode_continuation(written) if written else [])
            else:
                ids = encode_prompt(prompt, k, model, self._ensemble.vocabulary)
                ids = ids + (own.encode_continuation(written) if written else [])
            if k in self._used and not ids:
                raise InputError(
                    f"nothing stands before the text for model '{model.name}', and its tokenizer "
                    "has no token for the beginning or the end of a text; give a prompt."
                )
            prompts.append(tuple(ids))
        at_start = not prompt and not written
        ids = _opening(tokenizer, text) if at_start else tokenizer.encode_continuation(text)
        if not ids:
            raise InputError("a text whose likelihood is asked for is empty.")
        return Passage(tuple(prompts), tuple(ids))

    def room(self, ids: Sequence[int]) -> dict[int, int]:
        """How many tokens of a prompt each model in use can read before a text.

        Models without a limit are missing.

        Raises:
            InputError: if the text alone is longer than a context.
        """
        room = {}
        for k in self._used:
            limit = self._models[k].context_length
            if limit is None:
                continue
            n_own = self._n_own(k, ids)
            # The last token is predicted and never read.
            if n_own > limit:
                raise InputError(
                    f"a text of {n_own} tokens whose likelihood is asked for is longer than the "
                    f"context of model '{self._models[k].name}', which holds {limit}; shorten it."
                )
            room[k] = limit - n_own + 1
        return room

    def fitted(self, passage: Passage) -> tuple[Passage, bool]:
        """The passage with prompts cut on the left so far that every model can read it.

        Returns:
            The passage, and whether anything was cut.

        Raises:
            InputError: if the text alone is longer than a context.
        """
        room = self.room(passage.ids)
        cut = tuple(
            ids[-room[k] :] if k in room else ids for k, ids in enumerate(passage.prompt_ids)
        )
        return Passage(cut, passage.ids), cut != passage.prompt_ids

    def windows(self, text: str) -> Iterator[Passage]:
        """A text from its beginning, in stretches that every model can read.

        The first stands behind whatever begins a text, each other one behind as much of the text
        before it as fits with as many tokens to predict as fit: one token, where there is more to
        come. Together they predict every token once.

        Raises:
            InputError: see :meth:`passage`.
        """
        whole = self.passage("", text)
        ids, done = whole.ids, 0
        limits = [m.context_length for k, m in enumerate(self._models) if k in self._used]
        longest = min((limit for limit in limits if limit is not None), default=len(ids))
        while done < len(ids):
            end = min(len(ids), done + longest)
            while not self._fits(ids[done:end]):
                end = done + (end - done + 1) // 2
            # As in other harnesses, so that equal texts get equal numbers: what is left of the
            # context is filled up with what stands before.
            before = ids[max(0, end - longest - 1) : done]
            prompts = tuple(
                prompt if not before or k not in self._used else tuple(self._read_as(k, before))
                for k, prompt in enumerate(whole.prompt_ids)
            )
            yield self.fitted(Passage(prompts, ids[done:end]))[0]
            done = end

    def _is_other(self, k: int) -> bool:
        """Whether a model has another vocabulary than the base model."""
        vocabulary = self._ensemble.vocabulary
        return isinstance(vocabulary, BridgedVocabulary) and vocabulary.groups[k] != 0

    def _n_own(self, k: int, ids: Sequence[int]) -> int:
        """How many tokens of its own a model reads for a text."""
        vocabulary = self._ensemble.vocabulary
        if not self._is_other(k) or not isinstance(vocabulary, BridgedVocabulary):
            return len(ids)
        return len(spans_of(vocabulary, k, ids, None).own)

    def _read_as(self, k: int, ids: Sequence[int]) -> list[int]:
        """A stretch within a text, in a model's own tokens."""
        vocabulary = self._ensemble.vocabulary
        if not self._is_other(k):
            return vocabulary.read(k, ids)
        content = b"".join(vocabulary.token_bytes(token) for token in ids)
        return self._models[k].tokenizer.encode_bytes(content)

    def _fits(self, ids: Sequence[int]) -> bool:
        limits = {k: self._models[k].context_length for k in self._used}
        return len(ids) == 1 or all(
            limit is None or self._n_own(k, ids) <= limit for k, limit in limits.items()
        )


def _opening(tokenizer: TokenizerAdapter, text: str) -> list[int]:
    """Tokens of a text that nothing stands before, without what the tokenizer puts in front."""
    front, ids = tokenizer.encode(""), tokenizer.encode(text)
    return ids[len(front) :] if ids[: len(front)] == front else ids

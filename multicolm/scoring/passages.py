"""Texts after prompts, in the tokens of every model in use, and no longer than it can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from multicolm.decoding.prompts import check_unicode, encode_prompt
from multicolm.ensemble import Ensemble
from multicolm.errors import InputError
from multicolm.policy.base import Policy
from multicolm.scoring.spans import Spans, Spelled, opening_of, spans_of, spelled
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.types import Prompt

__all__ = ["Passage", "PassageReader"]


@dataclass(frozen=True, slots=True)
class Passage:
    """A text after a prompt, in tokens.

    Attributes:
        prompt_ids: per model what it reads before, in its own tokens; nothing for models that are
            not in use.
        ids: the text, in the base model's tokens.
        contents: per token, what of the text it stands for; ``None`` where that is what it decodes
            to. Models of other vocabularies read this, for the base model's tokenizer may change
            a text: put characters together, replace them, or drop them.
        at_start: whether nothing comes before the text, so that every model begins it as it
            begins texts.
    """

    prompt_ids: tuple[tuple[int, ...], ...]
    ids: tuple[int, ...]
    contents: tuple[bytes, ...] | None = None
    at_start: bool = False

    def part(self, start: int, end: int, prompt_ids: tuple[tuple[int, ...], ...]) -> Passage:
        """Some of its tokens, after other prompts."""
        contents = None if self.contents is None else self.contents[start:end]
        return Passage(prompt_ids, self.ids[start:end], contents, self.at_start and start == 0)


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
        self._writes_together = policy.acts != "select"

    def passage(self, prompt: Prompt, text: str, *, written: str = "") -> Passage:
        """A text as the models read it.

        Args:
            prompt: what comes before; a text that is empty if nothing does.
            text: whose likelihood is asked for, not empty.
            written: a part of the answer that stands between the two and is not asked for.

        Raises:
            InputError: if the text is empty, no model in use has tokens for it, a prompt cannot be
                read, or nothing can come before the first token.
        """
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
                    f"there is nothing before the text for model '{model.name}', and its tokenizer "
                    "has no token for the beginning or the end of a text; give a prompt."
                )
            prompts.append(tuple(ids))
        if not text:
            raise InputError("a text whose likelihood is asked for is empty.")
        check_unicode(text, "a text whose likelihood is asked for")
        at_start = not prompt and not written
        whole = self._spelled(text.encode(), at_start)
        if not whole.ids:
            raise InputError(
                f"no model in use has tokens for {text[:40]!r}, whose likelihood is asked for; "
                "leave it out."
            )
        return Passage(tuple(prompts), tuple(whole.ids), tuple(whole.contents), at_start)

    def _spelled(self, content: bytes, at_start: bool) -> Spelled:
        """A text in the base model's tokens, with some of other models' where those are wanting.

        Models that write every token together can write what the base model's tokenizer changes in
        tokens of the others only; and so a text is spelled of which the base model has nothing.
        """
        whole = spelled(self._models[0].tokenizer, content, at_start=at_start)
        vocabulary = self._ensemble.vocabulary
        if not isinstance(vocabulary, BridgedVocabulary):
            return whole
        if not whole.ids:
            return self._spelled_by_another(content) or whole
        if not self._writes_together:
            return whole
        ids: list[int] = []
        contents: list[bytes] = []
        pairs = zip(whole.ids, whole.contents, strict=True)
        put_in = b" " if at_start else b""
        for is_own, run in groupby(
            pairs, lambda pair: vocabulary.token_bytes(pair[0]) in (pair[1], put_in + pair[1])
        ):
            tokens, parts = zip(*run, strict=True)
            others = None if is_own else self._spelled_by_another(b"".join(parts))
            ids += others.ids if others else tokens
            contents += others.contents if others else parts
        return Spelled(ids, contents)

    def _spelled_by_another(self, content: bytes) -> Spelled | None:
        """Bytes in the tokens of the first model in use that has them; ``None`` if none does."""
        vocabulary = self._ensemble.vocabulary
        assert isinstance(vocabulary, BridgedVocabulary)
        for k in self._used:
            tokenizer = self._models[k].tokenizer
            try:
                own = tokenizer.encode_bytes(content)
            except InputError:
                continue
            if tokenizer.decode(own) == content:
                parts = [tokenizer.token_bytes(token) for token in own]
                return Spelled(vocabulary.ids_of(k, own), parts)
        return None

    def room(self, passage: Passage) -> dict[int, int]:
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
            n_own = self._n_own(k, passage)
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
        room = self.room(passage)
        cut = tuple(
            ids[-room[k] :] if k in room else ids for k, ids in enumerate(passage.prompt_ids)
        )
        return replace(passage, prompt_ids=cut), cut != passage.prompt_ids

    def windows(self, text: str) -> Iterator[Passage]:
        """A text from its beginning, in stretches that every model can read.

        The first stands after whatever begins a text, each other one after as much of the text
        before it as fits with as many tokens to predict as fit: one token, where there is more to
        come. Together they predict every token once.

        Raises:
            InputError: see :meth:`passage`.
        """
        whole = self.passage("", text)
        n, done = len(whole.ids), 0
        limits = [m.context_length for k, m in enumerate(self._models) if k in self._used]
        longest = min((limit for limit in limits if limit is not None), default=n)
        while done < n:
            end = min(n, done + longest)
            while not self._fits(whole.part(done, end, whole.prompt_ids)):
                end = done + (end - done + 1) // 2
            # As in other harnesses, so that equal texts get equal numbers: what is left of the
            # context is filled up with what comes before.
            before = whole.part(max(0, end - longest - 1), done, whole.prompt_ids)
            prompts = tuple(
                prompt if not before.ids or k not in self._used else tuple(self._read_as(k, before))
                for k, prompt in enumerate(whole.prompt_ids)
            )
            yield self.fitted(whole.part(done, end, prompts))[0]
            done = end

    def _is_other(self, k: int) -> bool:
        """Whether a model has another vocabulary than the base model."""
        vocabulary = self._ensemble.vocabulary
        return isinstance(vocabulary, BridgedVocabulary) and vocabulary.groups[k] != 0

    def _contents(self, passage: Passage) -> Sequence[bytes]:
        """Per token of a text, what of the text it stands for."""
        vocabulary = self._ensemble.vocabulary
        if passage.contents is not None:
            return passage.contents
        return [vocabulary.token_bytes(token) for token in passage.ids]

    def _spans(self, k: int, passage: Passage) -> Spans:
        """A text in the tokens of a model of another vocabulary.

        Raises:
            InputError: if it has no token for anything in it.
        """
        vocabulary = self._ensemble.vocabulary
        assert isinstance(vocabulary, BridgedVocabulary)
        contents, at_start = passage.contents, passage.at_start
        spans = spans_of(vocabulary, k, passage.ids, None, contents, at_start=at_start)
        if not spans.own:
            shown = b"".join(self._contents(passage)).decode("utf-8", "replace")
            raise InputError(
                f"model '{self._models[k].name}' has no token for anything in {shown[:40]!r}, "
                "whose likelihood is asked for; choose another policy, or leave it out."
            )
        return spans

    def _n_own(self, k: int, passage: Passage) -> int:
        """How many tokens of its own a model reads for a text."""
        return len(self._spans(k, passage).own) if self._is_other(k) else len(passage.ids)

    def _read_as(self, k: int, stretch: Passage) -> list[int]:
        """A stretch within a text, in a model's own tokens."""
        if not self._is_other(k):
            return self._ensemble.vocabulary.read(k, stretch.ids)
        content = b"".join(self._contents(stretch))
        return self._models[k].tokenizer.encode_bytes(content)

    def _fits(self, passage: Passage) -> bool:
        limits = {k: self._models[k].context_length for k in self._used}
        return len(passage.ids) == 1 or all(
            limit is None or self._n_own(k, passage) <= limit for k, limit in limits.items()
        )


_opening = opening_of

"""Several vocabularies in one ensemble: the union of their tokens, and bytes between them.

Models are put into groups of one vocabulary each. The union holds the base model's tokens, then
those of the others that are new to it: tokens of text are known by their bytes, special ones by
their names. What another group wrote is read as bytes, encoded as they come
(:class:`multicolm.tokenizer.incremental.IncrementalEncoder`); what a model's own group wrote stays
the tokens that were written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multicolm.errors import VocabularyError
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.tokenizer.incremental import IncrementalEncoder
from multicolm.tokenizer.shared import SharedVocabulary
from multicolm.tokenizer.vocabulary import TokenAligner, Vocabulary
from multicolm.views import ModelNames

__all__ = ["BridgedVocabulary", "join"]


Covers: TypeAlias = Callable[[TokenizerAdapter], str | None]
"""Why the exact bridge does not cover a tokenizer; ``None`` if it does."""


def join(
    models: ModelNames, tokenizers: Sequence[TokenizerAdapter], covers: Covers | None = None
) -> Vocabulary:
    """One vocabulary for all models: theirs if they share one, else the union of several.

    Args:
        models: the names, the base model first.
        tokenizers: of each.
        covers: of the exact bridge, if assistants continue within their own tokens too, where it
            covers their tokenizers.
    """
    groups: list[list[int]] = []
    shared: list[SharedVocabulary] = []
    for k in range(len(models)):
        for g, members in enumerate(groups):
            together = [*members, k]
            names = ModelNames(models[i] for i in together)
            try:
                shared[g] = SharedVocabulary(names, [tokenizers[i] for i in together])
            except VocabularyError:
                continue
            groups[g] = together
            break
        else:
            groups.append([k])
            shared.append(SharedVocabulary(ModelNames([models[k]]), [tokenizers[k]]))
    if len(groups) == 1:
        return shared[0]
    return BridgedVocabulary(models, tokenizers, groups, shared, covers)


class BridgedVocabulary(Vocabulary):
    """The union of several vocabularies.

    Attributes:
        shared: per group, its own vocabulary.
        refusals: per model, why it does not continue within its own tokens, if asked to; empty
            otherwise.

    Args:
        models: the names, the base model first.
        tokenizers: of each.
        groups: per group, its models by ascending index; the base model's group first.
        shared: per group, its vocabulary.
        covers: see :func:`join`.
    """

    def __init__(
        self,
        models: ModelNames,
        tokenizers: Sequence[TokenizerAdapter],
        groups: Sequence[Sequence[int]],
        shared: Sequence[SharedVocabulary],
        covers: Covers | None = None,
    ) -> None:
        self.models = models
        self.shared = tuple(shared)
        self._tokenizers = tuple(tokenizers)
        of = {k: g for g, members in enumerate(groups) for k in members}
        self.groups = tuple(of[k] for k in range(len(models)))
        self._member = tuple(groups[of[k]].index(k) for k in range(len(models)))
        self._owners: list[tuple[int, int]] = []
        self._rests: list[bytes] = []  # ends of tokens that are no tokens
        self._ids: list[list[int]] = []  # per group, the union's id of each of its own
        known = _Known()
        for g in range(len(groups)):
            self._ids.append(self._add(g, known))
        self.refusals = tuple(
            (covers(tokenizer) or "") if covers and self.groups[k] else ""
            for k, tokenizer in enumerate(tokenizers)
        )
        self._exact = covers is not None
        for k in range(len(models)):
            if self.is_exact(k):
                self._add_ends_of_tokens(k, known)
        self._texts = known.texts
        self.size = len(self._owners)
        self._in_group = [self._reverse(ids) for ids in self._ids]
        self._own = [self._to_own(k) for k in range(len(models))]
        self._union = [self._to_union(k) for k in range(len(models))]
        self._first: dict[int, Tensor] = {}

    def _add(self, g: int, known: _Known) -> list[int]:
        """The union's ids of a group's tokens; those that are new are added."""
        vocabulary = self.shared[g]
        ends = vocabulary.end_ids(None)
        taken: set[int] = set()
        ids: list[int] = []
        for i in range(vocabulary.size):
            content = vocabulary.token_bytes(i)
            table: dict[Any, int] = known.texts if content else known.specials
            key = content or vocabulary.name(i)
            # Each model ends a text in its own way, and all of them mean the same.
            end = known.end if i == min(ends, default=-1) else None
            found = table.get(key) if end is None else end
            if found is None or found in taken:
                found = len(self._owners)
                self._owners.append((g, i))
                table.setdefault(key, found)
            if i == min(ends, default=-1) and known.end is None:
                known.end = found
            taken.add(found)
            ids.append(found)
        return ids

    def _add_ends_of_tokens(self, k: int, known: _Known) -> None:
        """What a model may write to continue within one of its tokens: every end of every one."""
        tokenizer = self._tokenizers[k]
        for token in range(tokenizer.n_tokens):
            content = tokenizer.token_bytes(token)
            for first in range(1, len(content)):
                rest = content[first:]
                if rest not in known.texts:
                    known.texts[rest] = len(self._owners)
                    self._owners.append((self.groups[k], -1 - len(self._rests)))
                    self._rests.append(rest)

    def is_exact(self, model: int) -> bool:
        """Whether a model continues anywhere, by the exact bridge."""
        return self._exact and self.groups[model] > 0 and not self.refusals[model]

    def first_tokens(self, model: int) -> Int[Tensor, "vocab"]:
        """Per id, that of the first token with which a model spells the same text itself."""
        if model not in self._first:
            first = torch.arange(self.size)
            for token in (self._own[model] < 0).nonzero()[:, 0].tolist():
                own = self._encoded(model, self.token_bytes(token))
                spelled = [i for i in own[:-1] if self._tokenizers[model].token_bytes(i) != b" "]
                if own:
                    first[token] = self._union[model][(spelled or own[-1:])[0]]
            self._first[model] = first
        return self._first[model]

    def ends_of_tokens(self, model: int) -> tuple[Int[Tensor, "own_vocab"], Int[Tensor, "ends"]]:
        """The ids of what is left of a model's tokens after their first bytes.

        Returns:
            Per own token, where its entries begin; and the entries: what is left after 0 bytes,
            after 1, and so on up to the last byte. Special tokens have none.
        """
        tokenizer = self._tokenizers[model]
        starts: list[int] = []
        ids: list[int] = []
        for token, whole in enumerate(self._union[model].tolist()):
            starts.append(len(ids))
            content = tokenizer.token_bytes(token)
            if content:
                ids += [whole, *(self._texts[content[i:]] for i in range(1, len(content)))]
        return torch.tensor(starts), torch.tensor(ids)

    def _reverse(self, ids: Sequence[int]) -> Int[Tensor, "vocab"]:
        """Per id of the union, the group's own; -1 for those that it does not have."""
        own = torch.full((self.size,), -1, dtype=torch.long)
        own[torch.tensor(ids)] = torch.arange(len(ids))
        return own

    def _to_own(self, k: int) -> Int[Tensor, "vocab"]:
        """Per id of the union, the model's own; -1 for those that it does not have."""
        in_group = self._in_group[self.groups[k]]
        own = self.shared[self.groups[k]].own_ids(self._member[k], in_group.clamp_min(0))
        return torch.where(in_group < 0, -1, own)

    def _to_union(self, k: int) -> Int[Tensor, "own_vocab"]:
        """Per own id of a model, the union's."""
        ids = torch.full((self._tokenizers[k].n_tokens,), -1, dtype=torch.long)
        known = self._own[k] >= 0
        ids[self._own[k][known]] = known.nonzero()[:, 0]
        return ids

    def follow(self, model: int, prompt: Sequence[int]) -> TokenAligner:
        """Begin to follow a text after a prompt, which is in the model's own tokens."""
        return _ByteAligner(self, model, prompt)

    def own_tokens(self, model: int, token: int) -> list[int]:
        """What a model reads for a token that its own group wrote."""
        g = self.groups[model]
        in_group = int(self._in_group[g][token])
        return self.shared[g].read(self._member[model], [in_group]) if in_group >= 0 else []

    def ids_of(self, model: int, own: Sequence[int]) -> list[int]:
        """The union's ids of a model's own tokens."""
        return self._union[model][torch.tensor(own, dtype=torch.long)].tolist()

    def tokenizer(self, model: int) -> TokenizerAdapter:
        """The adapter of a model's tokenizer."""
        return self._tokenizers[model]

    def encoder(self, model: int) -> IncrementalEncoder:
        """Turns bytes into a model's own tokens as they come."""
        return IncrementalEncoder(self._tokenizers[model])

    def is_own(self, model: int, token: int, writer: int) -> bool:
        """Whether a model reads a token as it was written: one of its group's, by its group.

        What was written together is the group's that has the token first. The end of a token,
        which a model may write by the exact bridge, is text that others may have begun.
        """
        mixed = writer == len(self.groups)
        g = self._owners[token][0] if mixed else self.groups[writer]
        return g == self.groups[model] and int(self._in_group[g][token]) >= 0

    def read(self, model: int, ids: Sequence[int]) -> list[int]:
        """The model's own tokens for ids that stand alone, as in a prompt of ids."""
        own: list[int] = []
        pending = b""
        for token in ids:
            known = int(self._in_group[self.groups[model]][token]) >= 0
            if self.groups[model] == 0 or (known and not self.token_bytes(token)):
                own += [*self._encoded(model, pending), *self.own_tokens(model, token)]
                pending = b""
            else:
                pending += self.token_bytes(token)
        return own + self._encoded(model, pending)

    def _encoded(self, model: int, content: bytes) -> list[int]:
        encoder = self.encoder(model)
        encoder.append(content)
        return list(encoder.ids)

    def n_read(self, model: int, token: int) -> int:
        """How many own tokens the model reads for a token of the text, at most."""
        own = int(self._own[model][token])
        return max(len(self.token_bytes(token)), own >= 0)

    def own_ids(self, model: int, ids: Int[Tensor, "positions"]) -> Int[Tensor, "positions"]:
        """A model's own ids; -1 for tokens that it does not have."""
        return self._own[model].to(ids.device)[ids]

    def logits(
        self, model: int, own: Float[Tensor, "positions own_vocab"]
    ) -> Float[Tensor, "positions vocab"]:
        """A model's logits over all ids; -inf for tokens that it does not have."""
        index = self._own[model].to(own.device)
        width = own.shape[-1]
        missing = (index < 0) | (index >= width)
        return own[:, index.clamp(0, width - 1)].masked_fill(missing, float("-inf"))

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text; empty for special tokens."""
        g, own = self._owners[token]
        return self._rests[-1 - own] if own < 0 else self.shared[g].token_bytes(own)

    def name(self, token: int) -> str:
        """How a trace shows a token: its text, or its special name."""
        g, own = self._owners[token]
        if own < 0:
            return self._rests[-1 - own].decode("utf-8", errors="backslashreplace")
        return self.shared[g].name(own)

    def end_ids(self, model: int | None) -> frozenset[int]:
        """Ids with which ``model`` ends a text; ``None``: with which any model does."""
        if model is None:
            return frozenset().union(*(self.end_ids(k) for k in range(len(self.models))))
        g = self.groups[model]
        ends = self.shared[g].end_ids(self._member[model])
        return frozenset(self._ids[g][i] for i in ends)


@dataclass
class _Known:
    """Ids of the union by what distinguishes one token from another.

    Attributes:
        texts: of tokens of text, by their bytes.
        specials: of the others, by name.
        end: of the end of a text.
    """

    texts: dict[bytes, int] = field(default_factory=dict)
    specials: dict[str, int] = field(default_factory=dict)
    end: int | None = None


class _Run:
    """Tokens of the text one after another that one's own group wrote, or that others did.

    Attributes:
        first: place of its first token in the text.
        start: how many own tokens come before it.
        encoder: of what others wrote; ``None`` for what the own group did.
        ends: per token of the text, where it ends, from the start of the run: in bytes for what
            others wrote, else in own tokens.
    """

    def __init__(self, first: int, start: int, encoder: IncrementalEncoder | None) -> None:
        self.first = first
        self.start = start
        self.encoder = encoder
        self.ends: list[int] = []

    def reach(self, place: int) -> int | None:
        """See :meth:`TokenAligner.reach`; the place lies in the run or at its end."""
        if place == self.first:
            return self.start
        end = self.ends[place - self.first - 1]
        if self.encoder is None or end == 0:
            return self.start + end
        i = bisect_left(self.encoder.ends, end)
        found = i < len(self.encoder.ends) and self.encoder.ends[i] == end
        return self.start + i + 1 if found else None


class _ByteAligner(TokenAligner):
    """Reads what its own group wrote token by token, and what others wrote as bytes."""

    def __init__(self, vocabulary: BridgedVocabulary, model: int, prompt: Sequence[int]) -> None:
        self._vocabulary = vocabulary
        self._model = model
        self.own = list(prompt)
        self._n_prompt = len(self.own)
        self._runs: list[_Run] = []
        self._kept = len(self.own)

    @property
    def n_tokens(self) -> int:
        """How many tokens of the text it has followed."""
        return self._runs[-1].first + len(self._runs[-1].ends) if self._runs else 0

    def extend(self, tokens: Sequence[int], writers: Sequence[int]) -> None:
        """Follow more tokens of the text."""
        waiting: tuple[_Run, int] | None = None  # what is to be encoded, once it is all there
        for token, writer in zip(tokens, writers, strict=True):
            is_own = self._vocabulary.is_own(self._model, token, writer)
            if not self._runs or (self._runs[-1].encoder is None) != is_own:
                self._renew(waiting)
                waiting = None
                encoder = None if is_own else self._vocabulary.encoder(self._model)
                self._runs.append(_Run(self.n_tokens, len(self.own), encoder))
            run = self._runs[-1]
            if run.encoder is None:
                self.own += self._vocabulary.own_tokens(self._model, token)
                run.ends.append(len(self.own) - run.start)
            else:
                waiting = waiting or (run, run.encoder.stable)
                run.encoder.append(self._vocabulary.token_bytes(token))
                run.ends.append(run.encoder.n_bytes)
        self._renew(waiting)

    def cut(self, n_tokens: int) -> None:
        """Go back to the first ``n_tokens`` tokens of the text."""
        if n_tokens >= self.n_tokens:
            return
        while self._runs and self._runs[-1].first >= n_tokens:
            self._keep(self._runs.pop().start)
        if not self._runs:
            return
        run = self._runs[-1]
        del run.ends[n_tokens - run.first :]
        if run.encoder is None:
            self._keep(run.start + run.ends[-1])
        elif run.encoder.n_bytes > run.ends[-1]:
            run.encoder.truncate(run.ends[-1])
            self._renew((run, run.encoder.stable))

    def _keep(self, n_own: int) -> None:
        del self.own[n_own:]
        self._kept = min(self._kept, len(self.own))

    def _renew(self, changed: tuple[_Run, int] | None) -> None:
        """Take over what an encoder has changed after its tokens that stay as they are."""
        if changed is None:
            return
        run, stable = changed
        assert run.encoder is not None
        at = run.start + stable
        new = run.encoder.ids[stable:]
        n_same = 0
        for old, now in zip(self.own[at:], new, strict=False):
            if old != now:
                break
            n_same += 1
        self._keep(at + n_same)
        self.own += new[n_same:]

    def reach(self, place: int) -> int | None:
        """How many own tokens come before a place of the text; ``None`` within one."""
        if place == 0:
            return self._n_prompt
        i = bisect_left(self._runs, place, key=lambda run: run.first + len(run.ends))
        return self._runs[i].reach(place)

    @property
    def is_settled(self) -> bool:
        """Whether its own tokens stay as they are, however the text continues."""
        encoder = self._runs[-1].encoder if self._runs else None
        return encoder is None or encoder.stable == len(encoder.ids)

    def pop_stable_prefix(self) -> int:
        """How many own tokens in front have not changed since the last call."""
        kept, self._kept = self._kept, len(self.own)
        return kept

"""What the best choice of writers could do: a search among the first choices of all models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from multicolm.backend.base import Model, Session
from multicolm.backend.checked import open_session
from multicolm.ensemble import Ensemble

__all__ = ["Riddle", "can_be_written"]

SPARE_FORWARDS = 600
"""Prefixes of one question's texts that are tried beyond one for each byte of a right one."""


@dataclass(frozen=True, slots=True)
class Riddle:
    """A question for the oracle.

    Attributes:
        prompt_ids: per model, what it reads before the text, in its own tokens.
        completions: texts that are right from the first token to the last; one or more.
    """

    prompt_ids: Sequence[Sequence[int]]
    completions: Sequence[str]


@dataclass(slots=True)
class _Node:
    """The beginning of a text.

    Attributes:
        ids: its tokens, in the ensemble's vocabulary.
        writers: of each.
        n_bytes: its length.
        fitting: right completions that begin like it.
    """

    ids: list[int]
    writers: list[int]
    n_bytes: int
    fitting: Sequence[bytes]


@dataclass(eq=False, slots=True)
class _Search:
    """A depth-first search for one right text."""

    riddle: Riddle
    stack: list[_Node] = field(default_factory=list)
    n_forwards: int = 0
    found: bool = False

    @property
    def is_open(self) -> bool:
        return not self.found and bool(self.stack) and self.n_forwards < self._limit

    @property
    def result(self) -> bool | None:
        """``None`` if the search was cut before it found anything."""
        return None if self.stack and not self.found else self.found

    @property
    def _limit(self) -> int:
        """One forward for each beginning of a right text, and some for other ways to cut it."""
        texts = self.riddle.completions
        return SPARE_FORWARDS + sum(len(text.encode()) + 1 for text in texts)


def can_be_written(
    ensemble: Ensemble, riddles: Sequence[Riddle], *, batch_size: int = 32
) -> list[bool | None]:
    """Per question, whether first choices alone can write a right completion.

    That is so if every token of some right completion, its end included, can be the most likely
    token of some model after the prompt and the tokens before it. No greedy policy that lets one
    model write each token can do better, as far as the right completions are all that there are.

    The search of a question tries as many prefixes as its right completions have bytes, and
    :data:`SPARE_FORWARDS` more. So a text that one model writes on its own is not too long for it;
    where models cut the same text into tokens in many ways, it may end without an answer.

    Args:
        ensemble: whose models choose.
        riddles: the questions.
        batch_size: how many are searched at a time.

    Returns:
        ``None`` where the search was cut.
    """
    searches = [_Search(riddle) for riddle in riddles]
    for search in searches:
        texts = [text.encode() for text in search.riddle.completions]
        search.stack.append(_Node([], [], 0, texts))
    for start in range(0, len(searches), batch_size):
        _Walk(ensemble, searches[start : start + batch_size]).run()
    return [search.result for search in searches]


class _Walk:
    """Some searches, one node of each at a time."""

    def __init__(self, ensemble: Ensemble, searches: Sequence[_Search]) -> None:
        self._searches = list(searches)
        self._vocabulary = ensemble.vocabulary
        self._readers = [
            _PrefixReader(model, k, ensemble, len(searches))
            for k, model in enumerate(ensemble.backends)
        ]
        self._ends = [ensemble.vocabulary.end_ids(k) for k in range(len(ensemble.backends))]
        self._any_ends = any(self._ends)

    def run(self) -> None:
        while rows := [row for row, search in enumerate(self._searches) if search.is_open]:
            nodes = {row: self._searches[row].stack.pop() for row in rows}
            for row in rows:
                self._searches[row].n_forwards += 1
            choices: dict[int, list[tuple[int, int]]] = {row: [] for row in rows}
            for k, reader in enumerate(self._readers):
                prompts = {row: self._searches[row].riddle.prompt_ids[k] for row in rows}
                for row, token in reader.first_choices(nodes, prompts):
                    choices[row].append((k, token))
            for row in rows:
                self._extend(self._searches[row], nodes[row], choices[row])

    def _extend(self, search: _Search, node: _Node, choices: Sequence[tuple[int, int]]) -> None:
        """Follow each choice that keeps the text right; the base model's first."""
        new: dict[int, _Node] = {}
        for k, token in choices:
            if token in self._ends[k]:
                search.found |= any(len(text) == node.n_bytes for text in node.fitting)
                continue
            content = self._vocabulary.token_bytes(token)
            fitting = [
                text for text in node.fitting if content and text.startswith(content, node.n_bytes)
            ]
            if fitting and token not in new:
                ids, writers = [*node.ids, token], [*node.writers, k]
                new[token] = _Node(ids, writers, node.n_bytes + len(content), fitting)
        if not self._any_ends:  # Nobody can end a text, so it is right once it is whole.
            search.found |= any(
                len(text) == child.n_bytes for child in new.values() for text in child.fitting
            )
        search.stack += reversed(new.values())


class _PrefixReader:
    """One model that is asked for its first choice after prefixes that come and go."""

    def __init__(self, model: Model, k: int, ensemble: Ensemble, n_rows: int) -> None:
        self._model = model
        self._k = k
        self._vocabulary = ensemble.vocabulary
        self._session: Session = open_session(model, n_rows)
        self._fed: list[list[int]] = [[] for _ in range(n_rows)]

    def first_choices(
        self, nodes: dict[int, _Node], prompts: dict[int, Sequence[int]]
    ) -> Iterator[tuple[int, int]]:
        """Row and most likely token; rows whose prefix is beyond the context have none."""
        rows, tokens = [], []
        for row, node in nodes.items():
            follower = self._vocabulary.follow(self._k, prompts[row])
            follower.extend(node.ids, node.writers)
            own = follower.own
            limit = self._model.context_length
            if limit is not None and len(own) > limit:
                continue
            fed = self._fed[row]
            # The last token is always fed, for a session looks after what it is fed.
            n_common = min(_n_common(fed, own), len(own) - 1)
            if n_common < len(fed):
                self._session.truncate(row, n_common)
            rows.append(row)
            tokens.append(own[n_common:])
            self._fed[row] = own
        if not rows:
            return
        look = self._session.feed(rows, tokens, [1] * len(rows))
        shared = self._vocabulary.logits(self._k, look.logits)
        yield from zip(rows, shared.argmax(-1).tolist(), strict=True)


def _n_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    for n, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return n
    return min(len(one), len(other))

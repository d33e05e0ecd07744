"""Texts that a model in a server follows.

Nothing is kept at the server: every request names the whole text so far, and the engine's prefix
cache makes that cheap. What the server said is remembered by its place in the text. So cutting a
text costs nothing, and where the text follows what the model foresaw, that answers later feeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from multicolm.backend.base import ModelOutput, PartialOutput, Session
from multicolm.backend.remote.answers import Completion, Likeliest, Unreadable
from multicolm.backend.remote.completions import completions
from multicolm.backend.remote.probe import Abilities
from multicolm.backend.remote.service import Service
from multicolm.backend.remote.written import PromptFormat
from multicolm.errors import CapabilityError, MulticolmError, ServerError

__all__ = ["RemoteSession"]

_MOST_NAMED = 128  # tokens that are asked about in one request
_MOST_REMEMBERED = 64  # places of one text; a row over a whole vocabulary may have megabytes
# What one more text costs a server, counted in numbers of its answer: with vLLM on a CPU a number
# took 8 microseconds and a text with a common beginning 1 millisecond.
_A_TEXT = 128
_MOST_PADDING = 1 << 12  # ids of a model beyond those of its tokenizer
_MOST_NUMBERS = 1 << 16  # of one text in one answer, so that guesses that fail stay cheap


@dataclass
class _Text:
    """One text, and what the server said about its places.

    Attributes:
        ids: the text.
        line: the text, or where it was cut back, what came then; and after it what was foreseen.
        known: per number of tokens in front, what may come next; right as long as these are the
            first of ``line``.
        n_ahead: how many tokens to ask for next time.
        asked_at: the length of the text when the server was last asked to continue it.
        n_foreseen: how many tokens it wrote then.
        n_right: how many of these the text has followed until it took another way; ``None`` while
            it has taken none.
    """

    ids: list[int] = field(default_factory=list)
    line: list[int] = field(default_factory=list)
    known: dict[int, Likeliest] = field(default_factory=dict)
    n_ahead: int = 1
    asked_at: int = 0
    n_foreseen: int = 0
    n_right: int | None = None

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""
        start = len(self.ids)
        self.ids.extend(tokens)
        same = self.line[start : start + len(tokens)]
        if list(tokens[: len(same)]) != same:
            first = next(i for i, (a, b) in enumerate(zip(tokens, same, strict=False)) if a != b)
            self._leave(start + first)
        if len(self.line) < len(self.ids):
            self.line = list(self.ids)

    def _leave(self, place: int) -> None:
        """The text takes another way than it did or was foreseen to."""
        del self.line[place:]
        self._keep(range(place + 1))
        if self.n_right is None and place < self.asked_at + self.n_foreseen:
            self.n_right = max(0, place - self.asked_at)

    def foresee(self, rows: Sequence[Likeliest], tokens: Sequence[int]) -> None:
        """Remember how the server would continue the text."""
        self.asked_at, self.n_foreseen, self.n_right = len(self.ids), len(tokens), None
        self.line = [*self.ids, *tokens]
        self._keep(range(len(self.ids)))
        self.known.update({len(self.ids) + i: row for i, row in enumerate(rows)})

    def forget(self) -> None:
        """Keep what may be asked again: the last places, and what was foreseen."""
        self._keep(range(len(self.ids) - _MOST_REMEMBERED + 1, len(self.line) + 1))

    def _keep(self, places: range) -> None:
        self.known = {n: row for n, row in self.known.items() if n in places}

    def plan(self, most: int) -> int:
        """How many tokens to ask for: twice as many as were foreseen rightly, if all were."""
        if self.n_foreseen:
            followed = min(len(self.ids) - self.asked_at, self.n_foreseen)
            right = max(0, followed) if self.n_right is None else self.n_right
            doubled = 2 * self.n_foreseen if right == self.n_foreseen else max(1, right)
            self.n_ahead = min(most, doubled)
        return self.n_ahead


class RemoteSession(Session):
    """Some texts that one model in a server follows.

    Args:
        server: the server.
        abilities: what it can do.
        prompt_format: how texts are put to it, and what it writes is read.
        name: of the model, for messages.
        width: number of columns of logits.
        n_rows: number of texts.
        look_ahead: maximum number of tokens to ask for at a time.
    """

    def __init__(
        self,
        server: Service,
        abilities: Abilities,
        prompt_format: PromptFormat,
        name: str,
        width: int,
        n_rows: int,
        look_ahead: int,
    ) -> None:
        self._server = server
        self._abilities = abilities
        self._prompt_format = prompt_format
        self._name = name
        self._width = width
        self._texts = [_Text() for _ in range(n_rows)]
        self._look_ahead = look_ahead
        self._n_passes = 0

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]  # derived, so it cannot go stale
        """Per row, how many tokens it holds."""
        return [len(text.ids) for text in self._texts]

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`multicolm.backend.base.Session.truncate`; costs nothing."""
        text = self._texts[row]
        if length == 0:
            self._texts[row] = _Text(n_ahead=text.n_ahead)
        else:
            del text.ids[length:]

    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.feed`.

        Rows are cut back to what they were if the server does not answer.

        Raises:
            CapabilityError: if hidden states are wanted.
            ServerError: if the server does not answer, or otherwise than when it was probed.
        """
        if hidden:
            raise CapabilityError(
                f"model '{self._name}' runs in server {self._server.url}, which shows no hidden "
                "states."
            )
        before = [len(self._texts[row].ids) for row in rows]
        for row, new in zip(rows, tokens, strict=True):
            self._texts[row].extend(new)
        n_calls = self._server.n_calls
        self._n_passes = 0
        try:
            calls = self._learn(rows, n_last)
        except MulticolmError:
            for row, length in zip(rows, before, strict=True):
                self.truncate(row, length)
            raise
        shown = []
        for row, count in zip(rows, n_last, strict=True):
            text = self._texts[row]
            for place in range(len(text.ids) - count + 1, len(text.ids) + 1):
                shown.append(text.known[place].spread(self._width))
            text.forget()
        kind = ModelOutput if self._abilities.max_top_logprobs is None else PartialOutput
        return kind(
            torch.stack(shown),
            n_passes=self._n_passes,
            n_calls=self._server.n_calls - n_calls,
            calls_of=tuple(calls),
        )

    def logprobs_of(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        ids: Sequence[int],
        after: Sequence[Sequence[int]] | None = None,
    ) -> ModelOutput:
        """See :meth:`multicolm.backend.base.Session.logprobs_of`.

        Raises:
            ServerError: if the server does not answer, or not about all of these tokens.
        """
        n_calls = self._server.n_calls
        self._n_passes = 0
        more = after or [()] * len(rows)
        texts = [
            [*self._texts[row].ids[:n], *new]
            for row, n, new in zip(rows, lengths, more, strict=True)
        ]
        found = []
        for first in range(0, len(ids), _MOST_NAMED):
            some = list(ids[first : first + _MOST_NAMED])
            lines = []
            for answer in self._ask(texts, 1, about=some):
                [row] = answer.rows or [Likeliest([], [])]
                known = dict(zip(row.ids, row.logprobs, strict=True))
                if not known.keys() >= set(some):
                    raise self._changed("it does not return the log-probabilities of named tokens")
                lines.append([known[token] for token in some])
            found.append(torch.tensor(lines))
        n_calls = self._server.n_calls - n_calls
        return ModelOutput(torch.cat(found, dim=-1), n_passes=self._n_passes, n_calls=n_calls)

    def _learn(self, rows: Sequence[int], n_last: Sequence[int]) -> list[int]:
        """Ask for what is not known; returns in how many requests each row had a part."""
        ended: list[_Text] = []
        scored: list[_Text] = []
        inner: list[tuple[_Text, int]] = []
        calls = []
        for row, count in zip(rows, n_last, strict=True):
            text = self._texts[row]
            end = len(text.ids)
            missing = [p for p in range(end - count + 1, end + 1) if p not in text.known]
            if len(missing) > 1 and self._is_cheaper_scored(end, len(missing)):
                scored.append(text)
            else:
                ended += [text] if end in missing else []
                inner += [(text, place) for place in missing if place < end]
            calls.append(1 if missing else 0)
        if scored:
            self._score(scored)
        if inner:
            self._fill([*inner, *((text, len(text.ids)) for text in ended)])
        elif ended:
            self._continue(ended)
        return calls

    def _is_cheaper_scored(self, n_tokens: int, n_missing: int) -> bool:
        """Whether to ask about every place of a text, or about some as texts of their own."""
        if self._abilities.scoring is None:
            return False
        n_returned = self._abilities.n_returned
        return n_tokens * n_returned <= n_missing * (n_returned + _A_TEXT)

    def _continue(self, texts: Sequence[_Text]) -> None:
        """Ask how to continue texts, as far as that is likely to be of use."""
        n_tokens = max(text.plan(self._most_ahead) for text in texts)
        n_tokens = min([n_tokens, *(self._room(text) for text in texts)])
        n_tokens = self._prompt_format.at_least(n_tokens)
        answers = self._ask([text.ids for text in texts], n_tokens)
        for text, answer in zip(texts, answers, strict=True):
            tokens, rows = self._read(answer, n_tokens)
            text.foresee(rows, tokens)

    def _fill(self, places: Sequence[tuple[_Text, int]]) -> None:
        """Ask what comes next at places within texts: each is the end of a text of its own."""
        n_tokens = self._prompt_format.at_least(1)
        answers = self._ask([text.ids[:place] for text, place in places], n_tokens)
        for (text, place), answer in zip(places, answers, strict=True):
            text.known[place] = self._read(answer, n_tokens)[1][0]

    def _score(self, texts: Sequence[_Text]) -> None:
        """Ask about every place of texts at once."""
        answers = self._ask([text.ids for text in texts], 1, scoring=True)
        for text, answer in zip(texts, answers, strict=True):
            if len(answer.prompt_rows) != len(text.ids):
                raise self._changed("it scored no more than a part of a prompt")
            text.known |= {n: self._whole(r) for n, r in enumerate(answer.prompt_rows) if r}
            text.known[len(text.ids)] = self._read(answer, 1)[1][0]

    def _ask(
        self,
        texts: Sequence[Sequence[int]],
        n_tokens: int,
        *,
        scoring: bool = False,
        about: Sequence[int] = (),
    ) -> list[Completion]:
        prompts = [self._prompt_format.prompt(ids) for ids in texts]
        answers = []
        for some in self._requests([len(ids) + n_tokens for ids in texts]):
            answers += self._send([prompts[i] for i in some], n_tokens, scoring, about)
        return answers

    def _requests(self, sizes: Sequence[int]) -> list[list[int]]:
        """Which texts go together in one request: as many as the server takes."""
        room = self._abilities.room if self._abilities.takes_several else 0
        requests: list[list[int]] = []
        used = 0
        for i, size in enumerate(sizes):
            used += size
            if not requests or (room is not None and used > room):
                requests.append([])
                used = size
            requests[-1].append(i)
        return requests

    def _send(
        self,
        prompts: Sequence[Sequence[int] | str],
        n_tokens: int,
        scoring: bool,
        about: Sequence[int],
    ) -> list[Completion]:
        abilities = self._abilities
        named: dict[str, Any] = {"logprob_token_ids": list(about)} if about else {}
        self._n_passes += n_tokens
        try:
            answers, whole = completions(
                self._server,
                abilities.served_model,
                prompts,
                n_tokens,
                width=self._width,
                logprobs=1 if about else abilities.how_many or None,
                scoring=abilities.scoring if scoring else None,
                **named,
                **abilities.request_parameters,
            )
        except Unreadable as error:
            raise self._changed(str(error)) from error
        if (model := whole.get("model") or "") != abilities.answers_as:
            raise self._changed(f"it answers as model '{model[:80]}'")
        return answers

    def _read(self, answer: Completion, n_asked: int) -> tuple[list[int], list[Likeliest]]:
        """The tokens of an answer, and a row for each.

        Raises:
            ServerError: if they are not as the server gave them when it was probed.
        """
        if self._abilities.max_top_logprobs == 0:
            tokens = self._prompt_format.tokens(answer, n_asked)
            return tokens, [Likeliest([token], [float("inf")]) for token in tokens]
        if not answer.rows or len(answer.rows) != len(answer.tokens):
            raise self._changed("it gave no log-probabilities by token id")
        return answer.tokens, [self._whole(row) for row in answer.rows]

    def _whole(self, row: Likeliest) -> Likeliest:
        n_returned = self._abilities.n_returned
        if (last := max(row.ids, default=0)) >= self._width + _MOST_PADDING:
            raise self._changed(f"it names token {last}, and its vocabulary had {self._width}")
        if len(row.ids) < n_returned:
            raise self._changed(f"it returns {len(row.ids)} tokens instead of {n_returned}")
        # A server returns a token that was given or written, too, were it not among the likeliest.
        return row if len(row.ids) == n_returned else row.first(n_returned)

    def _changed(self, what: str) -> ServerError:
        return self._server.error(
            "POST /v1/completions",
            f"{what}, other than when it was probed; was it started anew with other settings? "
            "Load the ensemble again.",
        )

    @property
    def _most_ahead(self) -> int:
        return min(self._look_ahead, max(1, _MOST_NUMBERS // max(1, self._abilities.n_returned)))

    def _room(self, text: _Text) -> int:
        limit = self._abilities.context_length
        # One token more than the context takes may be written after it.
        return self._look_ahead if limit is None else max(1, limit + 1 - len(text.ids))

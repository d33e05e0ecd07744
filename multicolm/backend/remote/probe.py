"""What a server can do, found out by asking it for it.

Servers accept parameters that they ignore, and ignore what others refuse. So each ability counts as
there once an answer has shown it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from multicolm.backend.remote.answers import Completion, Likeliest, Unreadable
from multicolm.backend.remote.completions import Scoring, completions
from multicolm.backend.remote.service import Service
from multicolm.errors import ServerError, VocabularyError, unknown
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.types import Signal

__all__ = [
    "NEUTRAL",
    "Abilities",
    "RequestedModel",
    "find_served_model",
    "fingerprint",
    "is_same",
    "probe",
]

NEUTRAL: dict[str, Any] = {
    "repeat_penalty": 1.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
"""Parameters with which servers do not avoid repetitions, as llama-cpp-python's does."""

WARM_UP = 180.0
"""Seconds that the first request may take: engines compile, and load what they put off."""

_TEXTS = ("What is 2 + 2? It is 4.", "naïve café, Straße; 你好 😀\n\ttabs  and blanks ")
_SOME = 20  # log-probabilities, as many as vLLM and others give by default
_OFTEN_ALLOWED = (_SOME, 10, 5, 1)
_SMALL_VOCABULARY = 4096
# How to ask for all log-probabilities: vLLM takes -1, and llama.cpp gives as many as there are.
_ALL = (-1, 1 << 20)
_SAME = 1e-2  # nats; requests that differ only in form, and rounding in half precision
_LONGEST_LIST = 1 << 22  # bytes
_MOST_LISTED = 20  # models of a server, in a message
_LONGEST_CONTEXT = 1 << 40  # tokens
_LONGEST_NAME = 4096  # characters, as paths have them
_ANOTHER = 0.25  # nats; a model that was fine-tuned differs by more somewhere in a few tokens


@dataclass(frozen=True, slots=True)
class RequestedModel:
    """What the ensemble file asks of a server.

    Attributes:
        served_model: what it calls the model; ``None`` for the only one that it serves.
        logprobs: of how many tokens it shall return the log-probability; ``None`` for what suits.
    """

    served_model: str | None = None
    logprobs: int | Literal["all"] | None = None


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a server has shown that it can do.

    Attributes:
        served_model: what it calls the model.
        answers_as: the model's name in its answers.
        takes_ids: whether prompts may be token ids; else they are text.
        takes_several: whether one request may hold several prompts.
        how_many: the value of ``logprobs`` in requests, for as many as it shall return by id; 0 if
            it returns none.
        n_returned: how many log-probabilities it returns at a time.
        width: number of ids in its vocabulary, as far as that shows.
        returns_named: whether it returns tokens that are named (``logprob_token_ids``); asked only
            where it does not return all.
        unreported: tokens of which no row comes back if it writes them; so it is kept from that.
        scoring: how it returns the log-probabilities of a prompt's own tokens, if it does.
        is_neutral: whether it can be kept from avoiding what it wrote before; asked only of a
            server whose text is all there is.
        max_tokens_0: what it makes of ``max_tokens: 0``; it is never asked for that.
        context_length: the most tokens of a text that it continues; ``None`` if it is not
            known.
        room: the most tokens of all texts of one request, read and written; ``None`` if it takes
            each of them as if it were alone.
        root: where its weights are, in its own words.
    """

    served_model: str
    answers_as: str
    takes_ids: bool
    takes_several: bool
    how_many: int
    n_returned: int
    width: int
    returns_named: bool
    unreported: tuple[int, ...]
    scoring: Scoring | None
    is_neutral: bool
    max_tokens_0: str
    context_length: int | None
    room: int | None
    root: str | None

    @property
    def signals(self) -> frozenset[Signal]:
        """What a policy can ask of the model."""
        if self.max_top_logprobs is None:
            return frozenset({"text", "top1", "topk", "token_logprobs", "logprobs"})
        if self.max_top_logprobs == 0:
            return frozenset({"text"})
        signals: set[Signal] = {"text", "top1"}
        signals |= {"topk"} if self.max_top_logprobs > 1 else set()
        signals |= {"token_logprobs"} if self.returns_named else set()
        return frozenset(signals)

    @property
    def max_top_logprobs(self) -> int | None:
        """How many likeliest tokens it returns; ``None`` for the whole vocabulary."""
        return None if self.how_many in _ALL else self.how_many

    @property
    def request_parameters(self) -> dict[str, Any]:
        """Parameters of every request: what it shall not do, and does by default."""
        return {**(NEUTRAL if self.is_neutral else {}), **_without(self.unreported)}

    @property
    def as_served(self) -> str:
        """Which model it is by the server's account, and how much it returns, in a few words."""
        of = "" if self.root is None else f" from {self.root}"
        returned = "all" if self.max_top_logprobs is None else self.max_top_logprobs
        return f"as served: {self.served_model}{of}, {returned} log-probabilities"

    def sentences(self) -> list[str]:
        """For users."""
        if self.max_top_logprobs is None:
            known = f"log-probabilities of the whole vocabulary ({self.width} tokens)"
        elif self.max_top_logprobs:
            named = " and of tokens that are named" if self.returns_named else ""
            known = f"log-probabilities of the {self.max_top_logprobs} likeliest tokens{named}"
        else:
            own = (
                ""
                if self.is_neutral
                else ": a repetition penalty, if the server has set one, stays"
            )
            known = f"text only, no log-probabilities by token id{own}"
        several = "several at a time" if self.takes_several else "one at a time"
        scoring = f"scored by `{self.scoring}`" if self.scoring else "not scored by the server"
        return [
            f"the server calls it '{self.served_model}'",
            f"prompts are {'token ids' if self.takes_ids else 'text'}, {several}",
            known,
            f"prompts are {scoring}",
            f"`max_tokens: 0` {self.max_tokens_0}",
            f"its context takes {self.context_length or 'an unknown number of'} tokens",
        ]


@dataclass(frozen=True, slots=True)
class _Listing:
    """One model as ``/v1/models`` lists it."""

    served_model: str
    max_length: int | None = None
    room: int | None = None
    root: str | None = None


def probe(
    server: Service, tokenizer: TokenizerAdapter, requested: RequestedModel, name: str
) -> Abilities:
    """Find out what a server can do.

    Args:
        server: whom to ask.
        tokenizer: of the model, as it is known here.
        requested: what the ensemble file asks for.
        name: of the model in the ensemble.

    Raises:
        ServerError: if the server does not answer, or does not serve the model.
        VocabularyError: if it reads texts in other tokens than ``tokenizer``.
    """
    listing = find_served_model(server, requested.served_model)
    trial = _Trial(server, listing.served_model, tokenizer)
    warm = trial.warm_up()
    takes_ids = trial.ask([trial.ids], 1) is not None
    trial.unreported = trial.find_unreported() if takes_ids else ()
    how_many, row = (
        trial.max_top_logprobs(requested.logprobs) if takes_ids else (0, Likeliest([], []))
    )
    abilities = Abilities(
        served_model=listing.served_model,
        answers_as=warm,
        takes_ids=takes_ids,
        takes_several=trial.ask([trial.ids if takes_ids else _TEXTS[0]] * 2, 1) is not None,
        how_many=how_many,
        n_returned=len(row.ids),
        width=max([tokenizer.n_tokens - 1, *row.ids]) + 1,
        returns_named=how_many not in (0, *_ALL) and trial.returns_named(row),
        unreported=trial.unreported,
        scoring=trial.scoring(how_many) if how_many else None,
        is_neutral=not how_many and trial.ask([_TEXTS[0]], 1, **NEUTRAL) is not None,
        max_tokens_0=trial.max_tokens_0(takes_ids),
        context_length=None if listing.max_length is None else listing.max_length - 1,
        room=listing.room,
        root=listing.root,
    )
    trial.check_tokenizer(abilities, name)
    wanted = None if requested.logprobs == "all" else requested.logprobs
    max_top_logprobs = abilities.max_top_logprobs
    if requested.logprobs is not None and wanted != max_top_logprobs:
        raise server.error(
            "probe",
            f"the ensemble file asks for `logprobs: {requested.logprobs}`, and the server returns "
            f"{'all' if max_top_logprobs is None else max_top_logprobs or 'no'} tokens; start it "
            "with a higher limit (vLLM: --max-logprobs), or ask for less.",
        )
    return abilities


def find_served_model(server: Service, wanted: str | None) -> _Listing:
    """The model as the server lists it.

    Raises:
        ServerError: if it does not serve the model, or several of which none is named.
    """
    try:
        answer = server.get("/v1/models", "which models it serves", most=_LONGEST_LIST)
    except ServerError as error:
        # Some servers list nothing; then the first request shows whether the name is right.
        if wanted is None or error.status is None:
            raise
        return _Listing(wanted)
    listed = answer.get("data")
    if not isinstance(listed, list):
        raise server.error("GET /v1/models", "`data` is no list of models.")
    known = {
        entry["id"]: entry
        for entry in listed
        if isinstance(entry, dict) and _name(entry.get("id")) is not None
    }
    if wanted is None and len(known) != 1:
        named = ", ".join(sorted(known)[:_MOST_LISTED])[:1000] or "no model by name"
        more = f" and {len(known) - _MOST_LISTED} more" if len(known) > _MOST_LISTED else ""
        raise server.error(
            "GET /v1/models",
            f"it serves {named}{more}; say which with `served_model:`.",
        )
    served = wanted if wanted is not None else next(iter(known))
    if served not in known:
        raise server.error("GET /v1/models", unknown("served model", served, known)[:1000])
    entry = known[served]
    # llama.cpp's server says more here, and its texts share this room if it chose their number.
    more_known = entry.get("meta")
    try:
        room = _length(more_known, "n_ctx") if isinstance(more_known, dict) else None
        length = _length(entry, "max_model_len")
    except Unreadable as error:
        raise server.error("GET /v1/models", str(error)) from error
    root = entry.get("root")
    return _Listing(served, room if length is None else length, room, _name(root))


def _length(given: dict[str, Any], field: str) -> int | None:
    """A number of tokens that a server reports.

    Raises:
        Unreadable: if there can be no such number.
    """
    length = given.get(field)
    if length is None:
        return None
    if type(length) is not int or not 2 <= length <= _LONGEST_CONTEXT:
        raise Unreadable(f"`{field}` is no number of tokens that a context can have.")
    return length


def _name(given: Any) -> str | None:
    return given if isinstance(given, str) and len(given) <= _LONGEST_NAME else None


class _Trial:
    """Questions to one server; a refusal is an answer, too."""

    def __init__(self, server: Service, served_model: str, tokenizer: TokenizerAdapter) -> None:
        self._server = server
        self._served = served_model
        self._tokenizer = tokenizer
        self.ids = tokenizer.encode(_TEXTS[0])
        self.unreported: tuple[int, ...] = ()

    def ask(
        self,
        prompts: Sequence[Sequence[int] | str],
        n_tokens: int,
        *,
        logprobs: int | None = None,
        scoring: Scoring | None = None,
        **more: Any,
    ) -> list[Completion] | None:
        """What the server answers; ``None`` if it refuses, or its answer cannot be read.

        Raises:
            ServerError: if it does not answer at all.
        """
        try:
            return completions(
                self._server,
                self._served,
                prompts,
                n_tokens,
                width=self._tokenizer.n_tokens,
                logprobs=logprobs,
                scoring=scoring,
                final_500=True,
                **_without(self.unreported),
                **more,
            )[0]
        except Unreadable:
            return None
        except ServerError as error:
            if error.status is None:
                raise
            return None

    def warm_up(self) -> str:
        """Let the server do something for the first time; returns its model's name in answers.

        Raises:
            ServerError: if it cannot continue a text at all.
        """
        try:
            _, answer = completions(
                self._server, self._served, [_TEXTS[0]], 1, width=0, timeout=WARM_UP
            )
        except Unreadable as error:
            raise self._server.error("POST /v1/completions", str(error)) from error
        return str(answer.get("model") or "")

    def find_unreported(self) -> tuple[int, ...]:
        """Tokens of which no row comes back if the server writes them.

        llama.cpp's server keeps back what is a part of a character. It can be kept from writing
        that, which makes no difference to the numbers.
        """
        cuts = {i: _cut(self._tokenizer.token_bytes(i)) for i in range(self._tokenizer.n_tokens)}
        first = next((i for i, cut in cuts.items() if cut == "unexpected end of data"), None)
        if first is None or self._row_of(first) is not None:
            return ()
        whole = self._row_of(self.ids[-1])
        self.unreported = tuple(i for i, cut in cuts.items() if cut is not None)
        kept = self._likeliest(_SOME)
        if whole is None or kept is None or _distance(whole, kept) > _SAME:
            self.unreported = ()
        return self.unreported

    def _row_of(self, token: int) -> Likeliest | None:
        """The row that comes back if the server is made to write a token."""
        answer = self.ask([self.ids], 1, logprobs=_SOME, logit_bias={str(token): 100})
        return answer[0].rows[0] if answer and answer[0].rows else None

    def max_top_logprobs(self, wanted: int | Literal["all"] | None) -> tuple[int, Likeliest]:
        """The value of ``logprobs`` for as many as are wanted and returned, and such a row."""
        n_tokens = self._tokenizer.n_tokens
        small = n_tokens <= _SMALL_VOCABULARY
        if wanted == "all" or (wanted is None and small):
            # A vocabulary may have ids without tokens, and a model no weights for the last ones.
            known = {self._tokenizer.piece(i) for i in range(n_tokens)} - {None}
            for everything in _ALL:
                row = self._likeliest(everything)
                if row is not None and len(row.ids) >= min(len(known), n_tokens):
                    return everything, row
        most = wanted if isinstance(wanted, int) else _SOME
        for k in sorted({most, *_OFTEN_ALLOWED}, reverse=True):
            row = self._likeliest(k) if k <= most else None
            if row is not None and row.ids:
                return min(len(row.ids), k), row
        return 0, Likeliest([], [])

    def _likeliest(self, k: int) -> Likeliest | None:
        answer = self.ask([self.ids], 1, logprobs=k)
        return answer[0].rows[0] if answer and answer[0].rows else None

    def returns_named(self, row: Likeliest) -> bool:
        """Whether the server returns tokens that are named, likely or not."""
        ids = [i for i in range(self._tokenizer.n_tokens) if i not in row.ids][-3:]
        answer = self.ask([self.ids], 1, logprobs=1, logprob_token_ids=ids) if ids else None
        rows = answer[0].rows if answer else []
        return bool(rows) and set(rows[0].ids) >= set(ids)

    def scoring(self, how_many: int) -> Scoring | None:
        """How the server scores a prompt: the way whose numbers are right, if there is one."""
        plain = self.ask([self.ids[:-1]], 1, logprobs=how_many)
        want = plain[0].rows[0] if plain and plain[0].rows else None
        ways: tuple[Scoring, ...] = ("prompt_logprobs", "echo")
        for way in ways:
            answer = self.ask([self.ids], 1, logprobs=how_many, scoring=way)
            if want is None or not answer or len(answer[0].prompt_rows) != len(self.ids):
                continue
            got, last = answer[0].prompt_rows[-1], answer[0].rows
            if got is not None and last and _distance(got, want) <= _SAME:
                return way
        return None

    def max_tokens_0(self, takes_ids: bool) -> str:
        """What the server makes of ``max_tokens: 0``."""
        prompt = self.ids if takes_ids else _TEXTS[0]
        two = self.ask([prompt], 2)
        text = two[0].text if two else ""
        # Where it means "as many as there is room for", these end it soon, but not after one token.
        soon = [text] if text and "\ufffd" not in text else []
        soon += [stop for stop in (" ", "\n", ".", "e") if stop not in text]
        answer = self.ask([prompt], 0, stop=soon[:4])
        if answer is None:
            return "is refused"
        if not answer[0].text and not answer[0].ended:
            return "writes nothing"
        one = not answer[0].ended and len(answer[0].text) < len(text)
        return "writes one token" if one else "writes on without a limit"

    def check_tokenizer(self, abilities: Abilities, name: str) -> None:
        """Whether server and tokenizer read the same tokens in a text.

        Raises:
            VocabularyError: if they do not.
        """
        for text in _TEXTS:
            if not self._tokenizer.covers_text(text):
                continue
            ids = self._tokenizer.encode(text)
            if abilities.max_top_logprobs == 0:
                differs = self._counts_differ(text, len(ids))
            else:
                how_many = abilities.how_many
                asked = [self.ask([form], 1, logprobs=how_many) for form in (text, ids)]
                rows = [a[0].rows[0] for a in asked if a and a[0].rows]
                differs = len(rows) == 2 and _distance(*rows) > _SAME
                beyond = [i for row in rows for i in row.ids if i >= abilities.width]
                differs = differs or len(rows) < 2 or bool(beyond)
            if differs:
                raise VocabularyError(
                    f"model '{name}': server {self._server.url} reads {text!r} in other tokens "
                    "than the tokenizer of `model:`; name the folder or Hub id of "
                    "the model that the server runs."
                )

    def _counts_differ(self, text: str, n_ids: int) -> bool:
        _, answer = completions(self._server, self._served, [text], 1, width=0)
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        # Without ids, how many tokens it counts is all that a server reports, if it does.
        return type(counted) is int and counted > 0 and counted != n_ids


def _without(tokens: Sequence[int]) -> dict[str, Any]:
    """Parameters that keep a server from writing some tokens."""
    return {"logit_bias": {str(token): False for token in tokens}} if tokens else {}


def _cut(content: bytes) -> str | None:
    """What keeps bytes from being whole characters; ``None`` if they are."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.reason
    return None


def _distance(one: Likeliest, other: Likeliest) -> float:
    """The greatest difference of two rows where both know a number, in nats.

    Infinite if they have less than half of their tokens in common.
    """
    numbers = dict(zip(other.ids, other.logprobs, strict=True))
    both = [(p, numbers[i]) for i, p in zip(one.ids, one.logprobs, strict=True) if i in numbers]
    if 2 * len(both) < min(len(one.ids), len(other.ids)) or not both:
        return float("inf")
    # What is all but impossible is rounded in its own way, and no smaller for it.
    return max((abs(p - q) for p, q in both if max(p, q) > -20), default=0.0)


def fingerprint(server: Service, abilities: Abilities, ids: Sequence[int]) -> list[Completion]:
    """What a model says to a text, to know it again.

    Raises:
        ServerError: if it does not say it.
    """
    try:
        prompts: list[Sequence[int] | str] = [ids] if abilities.takes_ids else [_TEXTS[0]]
        n_tokens, logprobs = 8, None
        if abilities.max_top_logprobs != 0:
            n_tokens, logprobs = 4, min(5, abilities.max_top_logprobs or 5)
        return completions(
            server,
            abilities.served_model,
            prompts,
            n_tokens,
            width=abilities.width,
            logprobs=logprobs,
            **abilities.request_parameters,
        )[0]
    except Unreadable as error:
        raise server.error("POST /v1/completions", str(error)) from error


def is_same(before: Sequence[Completion], now: Sequence[Completion]) -> bool:
    """Whether two fingerprints may be of one model."""
    for one, other in zip(before, now, strict=True):
        if len(one.rows) != len(other.rows) and not (one.rows and other.rows):
            return False
        if not one.rows and one.text != other.text:
            return False
        pairs = zip(one.rows, other.rows, one.tokens, other.tokens, strict=False)
        for a, b, token, again in pairs:
            if _distance(a, b) > _ANOTHER:
                return False
            if token != again:  # two that are nearly as likely: what follows is not comparable
                break
    return True

"""What the loop asks of whatever runs a model.

A :class:`Model` opens a :class:`Session` of some rows. A session is fed tokens of the model's own
vocabulary, row by row, and says what the model predicts after them; a row can be cut back at any
time. Everything else (which rows, catching up, translating tokens) is the loop's business.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from jaxtyping import Float, Int

from multicolm.config import ModelConfig
from multicolm.errors import CapabilityError, InputError, ModelError
from multicolm.renamed import Renamed, forbid_old_names
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.types import Signal, Tensor

if TYPE_CHECKING:
    from multicolm.backend.byte_session import ByteSession

__all__ = ["Model", "ModelOutput", "Session", "TokenSession"]


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What a model predicts at some positions, in its own vocabulary.

    Attributes:
        logits: unnormalised log-probabilities of the next token. Of a model that returns its
            likeliest tokens only (:attr:`Model.max_top_logprobs`) log-probabilities as they are, in
            nats: -inf stands for unknown, and +inf for a token that is next, how likely
            unknown.
        hidden: last hidden state after the final norm, if it was asked for.
        n_passes: forward passes that it took.
        n_calls: HTTP requests that it took.
        calls_of: per row that was fed, how many of the requests were about it; empty without any.
        seconds: what it took, of a pass that was shared with others; ``None`` if whoever asked
            for it knows that.
        unspelled: lines of texts that no tokens of the model spell, as where another model wrote a
            byte for which it has none; all tokens are equally likely there, and say nothing.
    """

    logits: Float[Tensor, "positions vocab"]
    hidden: Float[Tensor, "positions hidden"] | None = None
    n_passes: int = 1
    n_calls: int = 0
    calls_of: tuple[int, ...] = ()
    seconds: float | None = None
    unspelled: tuple[int, ...] = ()


class Session(ABC):
    """Some texts that one model follows, each at its own length.

    Attributes:
        lengths: per row, how many tokens have been fed and not cut.
    """

    lengths: list[int]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forbid_old_names(cls, {"tell": "logprobs_of"}, ModelError)

    @abstractmethod
    def feed(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        n_last: Sequence[int],
        *,
        hidden: bool = False,
    ) -> ModelOutput:
        """Append tokens to rows and return the predictions after the last of them.

        Args:
            rows: distinct row numbers, ascending.
            tokens: per row, at least one token of the model's own vocabulary.
            n_last: per row, after how many of its last fed tokens to predict (1 up to all).
            hidden: whether hidden states are wanted too.

        Returns:
            The predictions, row after row, within a row in the order of the text.
        """

    def logprobs_of(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        ids: Sequence[int],
        after: Sequence[Sequence[int]] | None = None,
    ) -> ModelOutput:
        """Log-probabilities of given tokens after the first tokens of rows, in nats.

        Asked of models that show the signal ``token_logprobs`` and not ``logprobs``.

        Args:
            rows: row numbers; one may come several times.
            lengths: per row number, how many of its tokens come before.
            ids: tokens of the model's own vocabulary.
            after: per row number, tokens that follow those, for this call only.

        Returns:
            One line per row number, one column per token.
        """
        raise NotImplementedError(f"a {type(self).__name__} returns every logit")

    @abstractmethod
    def truncate(self, row: int, length: int) -> None:
        """Cut a row back to its first ``length`` tokens; what follows is as if never fed."""


class TokenSession(Session):
    """A session that keeps the tokens of its rows, for models that have to read them again."""

    def __init__(self, n_rows: int) -> None:
        self._ids: list[list[int]] = [[] for _ in range(n_rows)]

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]  # derived, so it cannot go stale
        """Per row, how many tokens it holds."""
        return [len(ids) for ids in self._ids]

    def truncate(self, row: int, length: int) -> None:
        """See :meth:`Session.truncate`."""
        del self._ids[row][length:]


class Model(ABC):
    """One model of an ensemble.

    Attributes:
        name: its name in the ensemble, for messages.
        tokenizer: its tokenizer adapter.
        signals: what models of this backend can show at most.
        max_top_logprobs: of how many of its likeliest tokens it returns the log-probability;
            ``None`` for the whole vocabulary, 0 if it says no more than which token is next.
        server: the address of the server that runs it; empty for a model in this process.
        context_length: the most tokens a row may hold; ``None`` if there is no limit.
        n_parameters: number of weights, 0 if it has none.
        on_cpu: whether it runs on this process's CPU threads.
        identity: what it is, wherever it lies and whatever it is called; empty if unknown. Equal
            identities mean equal weights.
        hidden_size: width of its last hidden state; ``None`` if it shows none.
        precision: the type it computes in, such as ``float32``; of a model in a server, what the
            server says of it. What was kept of a model goes on only where this is equal.
    """

    name: str
    tokenizer: TokenizerAdapter
    max_top_logprobs: int | None = None
    server: str = ""
    signals: ClassVar[frozenset[Signal]] = frozenset({"top1", "topk", "logprobs", "hidden"})
    context_length: int | None = None
    n_parameters: int = 0
    on_cpu: bool = True
    identity: str = ""
    hidden_size: int | None = None
    precision: str = "float32"
    n_likeliest = Renamed("max_top_logprobs", ModelError)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        new_names = {"n_likeliest": "max_top_logprobs", "wait": "synchronize"}
        forbid_old_names(cls, new_names, ModelError)

    @classmethod
    def from_config(cls, name: str, config: ModelConfig) -> Model:
        """Load the model that ``config`` describes.

        Raises:
            ModelError: if it cannot be loaded, or not be served rightly.
        """
        raise NotImplementedError(f"backend {cls.__name__} cannot be loaded from an ensemble file")

    @property
    def shows(self) -> frozenset[Signal]:
        """What this very model shows."""
        return self.signals

    @property
    def abilities(self) -> list[str]:
        """What was found out about it when it was loaded, one sentence each."""
        return []

    def synchronize(self) -> None:
        """Return when all work that was asked of the device is done, so that clocks are right."""
        return

    def embed(self, ids: Int[Tensor, "positions"]) -> Float[Tensor, "positions width"]:
        """Input embeddings of tokens, by the model's own ids; asked of models that show them.

        Raises:
            CapabilityError: if it has none to show.
        """
        raise CapabilityError(f"model '{self.name}' shows no input embeddings.")

    @abstractmethod
    def open(self, n_rows: int) -> Session:
        """A session of ``n_rows`` empty rows."""

    def next_byte_logprobs(self, prefix: str | bytes) -> Float[Tensor, "257"]:
        """What the model expects after a text, byte by byte, under the exact byte bridge.

        Marginal over all tokens that spell the text, as :mod:`multicolm.tokenizer.cover` defines
        it. The text begins as the tokenizer begins texts. Where it puts nothing in front, the
        first token of the text's own encoding is taken for certain: nothing predicts it.

        Args:
            prefix: the text; as bytes it may end within a character.

        Returns:
            Natural logs for the 256 bytes and, the last one, for the end of the text.

        Raises:
            InputError: if nothing stands before the first prediction, the model cannot write the
                text, or it is neither text nor bytes.
            VocabularyError: if the bridge does not cover the tokenizer.
        """
        session = self._read(_as_bytes(prefix, "the prefix"))
        logprobs: Float[Tensor, "257"] = session.next_byte_logprobs([0])[0]
        return logprobs

    def span_logprob(self, prefix: str | bytes, span: str | bytes) -> float:
        """How likely the model finds some text or bytes after a text, in nats.

        Args:
            prefix: the text, as in :meth:`next_byte_logprobs`.
            span: what follows; it need not end where a token or a character does.

        Raises:
            InputError: as :meth:`next_byte_logprobs`.
            VocabularyError: if the bridge does not cover the tokenizer.
        """
        prefix, span = _as_bytes(prefix, "the prefix"), _as_bytes(span, "the span")
        session = self._read(prefix)
        before = session.logprob(0)
        if before == float("-inf"):
            raise InputError(
                f"model '{self.name}' cannot write the {len(prefix)} bytes before the span."
            )
        session.feed([0], [span])
        return session.logprob(0) - before

    def _read(self, prefix: bytes) -> ByteSession:
        from multicolm.backend.byte_session import ByteSession

        session = ByteSession(self, 1, prune=0.0)
        start = self.tokenizer.encode("")
        given = [] if start else self.tokenizer.encode_continuation(_characters(prefix))[:1]
        session.begin(0, start, given)
        taken = self.tokenizer.decode(given)
        if not prefix.startswith(taken):
            raise InputError(
                f"model '{self.name}' cannot write a text that begins with {prefix[:8]!r}: its "
                "tokenizer turns it into another one; normalise the text first."
            )
        session.feed([0], [prefix[len(taken) :]])
        return session


def __getattr__(name: str) -> NoReturn:
    if name == "Look":
        raise ImportError("multicolm.backend.base.Look of 0.1 is called ModelOutput now.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _as_bytes(text: str | bytes, what: str) -> bytes:
    """A text in UTF-8, or bytes as they are.

    Raises:
        InputError: if it is neither, or no Unicode.
    """
    if isinstance(text, bytes | bytearray):
        return bytes(text)
    if not isinstance(text, str):
        raise InputError(f"{what} is a {type(text).__name__}; allowed are text and bytes.")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} is not valid Unicode at character {error.start}; read it as UTF-8 first."
        ) from error


def _characters(content: bytes) -> str:
    """The characters of a text that may break off within one."""
    return codecs.getincrementaldecoder("utf-8")("ignore").decode(content)

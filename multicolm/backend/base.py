"""What the loop asks of whatever runs a model.

A :class:`Model` opens a :class:`Session` of some rows. A session is fed tokens of the model's own
vocabulary, row by row, and says what the model predicts after them; a row can be cut back at any
time. Everything else (which rows, catching up, translating tokens) is the loop's business.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from jaxtyping import Float, Int
from typing_extensions import Self

from multicolm.config import ModelConfig
from multicolm.errors import CapabilityError, ModelError
from multicolm.renamed import Renamed, forbid_old_names
from multicolm.tokenizer.base import TokenizerAdapter
from multicolm.types import Signal, Tensor

if TYPE_CHECKING:
    import torch

__all__ = ["Model", "ModelOutput", "PartialOutput", "Session", "TokenSession"]

_EXACT = "multicolm.exact.probabilities"


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What a model predicts at some positions, in its own vocabulary.

    Attributes:
        logits: unnormalised log-probabilities of the next token.
        hidden: last hidden state after the final norm, if it was asked for.
        n_passes: forward passes that it took.
        n_calls: HTTP requests that it took.
        calls_of: per row that was fed, how many of the requests were about it; empty without any.
        unspelled: lines of texts that no tokens of the model spell, as where another model wrote a
            byte for which it has none; all tokens are equally likely there, and say nothing.
    """

    logits: Float[Tensor, "positions vocab"]
    hidden: Float[Tensor, "positions hidden"] | None = None
    n_passes: int = 1
    n_calls: int = 0
    calls_of: tuple[int, ...] = ()
    unspelled: tuple[int, ...] = ()

    def __len__(self) -> int:
        """At how many positions."""
        return len(self.logits)

    @property
    def logprobs(self) -> Float[Tensor, "positions vocab"]:
        """Log-probabilities of the next token, in nats."""
        return self.logits.float().log_softmax(-1)

    def at(self, lines: Sequence[int]) -> Self:
        """The predictions at some lines, in their order; counts are those of all."""
        index = list(lines)
        first = index[0] if index else 0
        in_a_row = index == list(range(first, first + len(index)))
        chosen = slice(first, first + len(index)) if in_a_row else index
        hidden = None if self.hidden is None else self.hidden[chosen]
        unspelled = tuple(n for n, line in enumerate(index) if line in self.unspelled)
        return replace(self, logits=self.logits[chosen], hidden=hidden, unspelled=unspelled)

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        if self.logits.device == device:
            return self
        hidden = None if self.hidden is None else self.hidden.to(device)
        return replace(self, logits=self.logits.to(device), hidden=hidden)

    @classmethod
    def joined(cls, outputs: Sequence[ModelOutput]) -> ModelOutput:
        """Several outputs of one model as one, which took what they took together."""
        import torch

        if len(outputs) == 1:
            return outputs[0]
        states = [output.hidden for output in outputs if output.hidden is not None]
        starts = itertools.accumulate((len(output) for output in outputs), initial=0)
        return replace(
            outputs[0],
            logits=torch.cat([output.logits for output in outputs]),
            hidden=torch.cat(states) if len(states) == len(outputs) else None,
            n_passes=sum(output.n_passes for output in outputs),
            n_calls=sum(output.n_calls for output in outputs),
            calls_of=(),
            unspelled=tuple(
                start + line
                for start, output in zip(starts, outputs, strict=False)
                for line in output.unspelled
            ),
        )


@dataclass(frozen=True, slots=True)
class PartialOutput(ModelOutput):
    """What a server returns of its likeliest tokens; see :attr:`Model.max_top_logprobs`.

    Its ``logits`` are log-probabilities, in nats, and are not to be normalised: -inf is a token of
    which nothing is known, and +inf one that is next, how likely unknown.
    """

    @property
    def logprobs(self) -> Float[Tensor, "positions vocab"]:
        """Log-probabilities of the tokens that are known, in nats."""
        return self.logits.float()


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

    def add_rows(self, model: Model, n_rows: int) -> None:
        """Append empty rows of a model that has the same weights (:attr:`Model.weights`)."""
        raise NotImplementedError(f"a {type(self).__name__} has rows of one model only")


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
        context_length: maximum number of tokens a row may hold; ``None`` if there is no limit.
        n_parameters: number of weights, 0 if it has none.
        on_cpu: whether it runs on this process's CPU threads.
        identity: what it is, wherever it lies and whatever it is called; empty if unknown. Equal
            identities mean equal weights.
        hidden_size: width of its last hidden state; ``None`` if it shows none.
        precision: the type it computes in, such as ``float32``; of a model in a server, what the
            server says of it. What was kept of a model goes on only where this is equal.
        architecture: what its weights are of, such as ``LlamaForCausalLM``; empty if unknown.
        n_bytes: memory of its weights in this process; 0 if it has none or it is unknown.
        sampling_defaults: generation settings that come with its weights and are not used.
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
    architecture: str = ""
    n_bytes: int = 0
    sampling_defaults: Mapping[str, Any] = MappingProxyType({})
    n_likeliest = Renamed("max_top_logprobs", ModelError)
    next_byte_logprobs = Renamed(f"{_EXACT}.next_byte_logprobs(model, prefix)", ModelError)
    span_logprob = Renamed(f"{_EXACT}.span_logprob(model, prefix, span)", ModelError)

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

    @classmethod
    def from_configs(cls, configs: Mapping[str, ModelConfig]) -> Sequence[Model]:
        """Load the models of an ensemble that have this backend; they may share weights.

        Args:
            configs: by name.

        Returns:
            The models, in the same order.

        Raises:
            ModelError: if one cannot be loaded, or not be served rightly.
        """
        return [cls.from_config(name, config) for name, config in configs.items()]

    @property
    def shows(self) -> frozenset[Signal]:
        """What this very model shows."""
        return self.signals

    @property
    def weights(self) -> object:
        """What models have in common whose rows can be fed in one pass; by default, itself."""
        return self

    @property
    def abilities(self) -> list[str]:
        """What was found out about it when it was loaded, one sentence each."""
        return []

    @property
    def warnings(self) -> list[str]:
        """What is allowed and unwise of it, one sentence each; may take a few seconds to find."""
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


def __getattr__(name: str) -> NoReturn:
    if name == "Look":
        raise ImportError("multicolm.backend.base.Look of 0.1 is called ModelOutput now.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

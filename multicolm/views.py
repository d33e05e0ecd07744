"""What a policy sees: one :class:`View` per model, bundled in :class:`Views`.

A view works its numbers out when they are first asked for, and only once. A signal that the policy
did not declare is refused: a declaration that is too small would make multicolm look cheaper than
it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Int, Shaped

from multicolm.errors import CapabilityError, PolicyError, UnknownNameError, unknown
from multicolm.renamed import Renamed
from multicolm.types import Pooling, Signal, Tensor

if TYPE_CHECKING:
    import torch

__all__ = ["ModelNames", "Role", "View", "Views"]

Role = int | str
"""Which model: its index (0 is the base model), its name, ``"base"``, or ``"assistant"`` (the
first assistant)."""

_IMPLIED: dict[Signal, frozenset[Signal]] = {
    "logprobs": frozenset({"logprobs", "token_logprobs", "topk", "top1", "text"}),
    "token_logprobs": frozenset({"token_logprobs"}),
    "topk": frozenset({"topk", "top1", "text"}),
    "top1": frozenset({"top1", "text"}),
    "text": frozenset({"text"}),
    "hidden": frozenset({"hidden"}),
    "embedding": frozenset({"embedding", "top1", "text"}),
}


def implied(signals: frozenset[Signal]) -> frozenset[Signal]:
    """``signals`` and those that follow from them."""
    return frozenset().union(*(_IMPLIED[signal] for signal in signals))


def prompt_hidden_key(index: int, pooling: Pooling) -> str:
    """Where the context of views keeps a model's hidden state of the prompt."""
    return f"prompt_hidden of {index}, {pooling}"


class ModelNames(tuple[str, ...]):
    """The names of an ensemble's models, the base model first."""

    __slots__ = ()

    def role(self, role: Role) -> int:
        """The index of the model that ``role`` speaks of.

        Raises:
            UnknownNameError: if no model has that name.
            CapabilityError: if there are not that many models.
        """
        if isinstance(role, str) and role in self:
            return self.index(role)
        index = {"base": 0, "assistant": 1}.get(role) if isinstance(role, str) else role
        if index is None:
            raise UnknownNameError(unknown("model", str(role), {*self, "base", "assistant"}))
        if not 0 <= index < len(self):
            raise CapabilityError(
                f"there is no model {index}: this ensemble has {len(self)} "
                f"({', '.join(f'{i} {name}' for i, name in enumerate(self))})."
            )
        return index

    def weights(self, given: Sequence[float] | Mapping[str, float] | None) -> list[float]:
        """One weight per model, summing to 1; equal weights for ``None``.

        Args:
            given: a list in the order of the models, or a mapping from model to weight, in which
                a model that is not named weighs nothing.

        Raises:
            CapabilityError: if the list has another length than the ensemble, or a weight is
                negative or not finite, or all are zero, or a model is named twice.
            UnknownNameError: if a name in the mapping is no model.
        """
        if given is None:
            return [1.0 / len(self)] * len(self)
        if isinstance(given, Mapping):
            weights = [0.0] * len(self)
            named: dict[int, str] = {}
            for role, weight in given.items():
                k = self.role(role)
                if k in named:
                    raise CapabilityError(
                        f"weights name model '{self[k]}' twice, as '{named[k]}' and as '{role}'."
                    )
                named[k] = role
                weights[k] = float(weight)
        else:
            weights = [float(weight) for weight in given]
        fit = len(weights) == len(self) and all(0 <= weight < math.inf for weight in weights)
        if not fit or sum(weights) <= 0:
            raise CapabilityError(
                f"weights {weights} do not fit: allowed is one weight >= 0 for each of "
                f"{', '.join(self)}, not all zero."
            )
        if math.isinf(sum(weights)):  # each is finite, and their sum is not
            greatest = max(weights)
            weights = [weight / greatest for weight in weights]
        total = sum(weights)
        return [weight / total for weight in weights]


class View:
    """What one model shows at some positions.

    Args:
        logits: unnormalised log-probabilities over the shared vocabulary; -inf marks a token
            that the model does not have.
        hidden: last hidden state after the final norm, if it was asked for.
        signals: what the policy declared; ``None`` allows everything.
        name: the model's name, for messages.
        embed: gives the input embeddings of tokens of the shared vocabulary.
        max_top_logprobs: how many of its likeliest tokens the model returns. Then ``logits`` are
            log-probabilities, taken as they are: -inf stands for what is not known, and nothing is
            normalised. ``None`` if the model returns all tokens.
        candidates: per position, tokens that such a model was asked about besides.
    """

    def __init__(
        self,
        logits: Float[Tensor, "positions vocab"],
        hidden: Float[Tensor, "positions hidden"] | None = None,
        *,
        signals: frozenset[Signal] | None = None,
        name: str = "model",
        embed: Callable[[Tensor], Tensor] | None = None,
        max_top_logprobs: int | None = None,
        candidates: Int[Tensor, "positions n"] | None = None,
    ) -> None:
        self._embed = embed
        self._max_top_logprobs = max_top_logprobs
        self._candidates = candidates
        self._logits = logits
        self._hidden = hidden
        self._declared = signals
        self._signals = None if signals is None else implied(signals)
        self.name = name

    def __len__(self) -> int:
        return int(self._logits.shape[0])

    @property
    def device(self) -> torch.device:
        """Where its numbers are."""
        return self._logits.device

    @property
    def n_tokens(self) -> int:
        """How many tokens its rows speak of."""
        return int(self._logits.shape[-1])

    @property
    def _declares_all(self) -> bool:
        """Whether the policy declared every probability, and says how it treats unknown ones."""
        return self._signals is None or "logprobs" in self._signals

    def _allow(self, signal: Signal) -> None:
        if self._signals is not None and signal not in self._signals:
            raise PolicyError(
                f"the policy reads '{signal}' of model '{self.name}' but declared only "
                f"{sorted(self._declared or ()) or 'nothing'}; add '{signal}' to `base_signals` or "
                "`assistant_signals`."
            )

    @cached_property
    def _logprobs(self) -> Float[Tensor, "positions vocab"]:
        if self._max_top_logprobs is not None:
            return self._logits.float()
        # In one go: summing up and subtracting by hand takes several times as long.
        return self._logits.float().log_softmax(-1)

    @cached_property
    def _top1(self) -> tuple[Float[Tensor, "positions"], Int[Tensor, "positions"]]:
        # argmax gives the first of equal entries, which max does not promise.
        ids = self._logits.argmax(-1)
        return self._logprobs.gather(-1, ids[:, None])[:, 0], ids

    @property
    def logprobs(self) -> Float[Tensor, "positions vocab"]:
        """Log-probability of every token, in nats."""
        self._allow("logprobs")
        return self._logprobs

    @property
    def probs(self) -> Float[Tensor, "positions vocab"]:
        """Probability of every token."""
        return self.logprobs.exp()

    @property
    def logits(self) -> Float[Tensor, "positions vocab"]:
        """Unnormalised log-probability of every token, as the model gave it."""
        self._allow("logprobs")
        return self._logits.float()

    @property
    def top1_ids(self) -> Int[Tensor, "positions"]:
        """The most likely token; the lowest id of equally likely ones."""
        self._allow("text")
        return self._top1[1]

    @property
    def top1_logprobs(self) -> Float[Tensor, "positions"]:
        """Log-probability of the most likely token, in nats."""
        self._allow("top1")
        return self._top1[0]

    @property
    def top1_probs(self) -> Float[Tensor, "positions"]:
        """Probability of the most likely token."""
        return self.top1_logprobs.exp()

    @property
    def entropy_nats(self) -> Float[Tensor, "positions"]:
        """Shannon entropy of the next token, in nats."""
        self._allow("logprobs")
        return self._entropy_nats

    @cached_property
    def _entropy_nats(self) -> Float[Tensor, "positions"]:
        # 0 * -inf is 0 here: a token that cannot come adds no entropy.
        return -(self._logprobs.exp() * self._logprobs.clamp_min(-1e30)).sum(-1)

    @property
    def margins(self) -> Float[Tensor, "positions"]:
        """Probability of the most likely token minus that of the second."""
        self._allow("topk")
        self._refuse_beyond(2)
        return self._margins

    @cached_property
    def _margins(self) -> Float[Tensor, "positions"]:
        probs = self._logprobs.topk(min(2, self._logprobs.shape[-1]), dim=-1).values.exp()
        return probs[:, 0] - probs[:, 1:].sum(-1)

    def _refuse_beyond(self, k: int) -> None:
        if self._max_top_logprobs is not None and k > self._max_top_logprobs:
            raise CapabilityError(
                f"the policy asks for the {k} likeliest tokens of model '{self.name}', whose "
                f"server returns {self._max_top_logprobs}; set `logprobs:` of this model to "
                f"{k} or `all` if its server allows it, or choose another policy."
            )

    @property
    def hidden(self) -> Float[Tensor, "positions hidden"]:
        """Last hidden state after the final norm."""
        self._allow("hidden")
        if self._hidden is None:
            raise PolicyError(f"model '{self.name}' was not asked for hidden states.")
        return self._hidden

    def topk_logprobs(self, k: int) -> Float[Tensor, "positions k"]:
        """Log-probabilities of the ``k`` most likely tokens, in nats, the greatest first.

        Where the vocabulary has fewer tokens, -inf stands for the missing ones.

        Raises:
            CapabilityError: if the model returns fewer tokens than its vocabulary and ``k``.
        """
        import torch

        top = self._topk(k)[0]
        return torch.nn.functional.pad(top, (0, k - top.shape[-1]), value=float("-inf"))

    def topk_ids(self, k: int) -> Int[Tensor, "positions n"]:
        """The ``k`` most likely tokens, or all, the most likely first.

        Raises:
            CapabilityError: as :meth:`topk_logprobs`.
        """
        return self._topk(k)[1]

    def _topk(self, k: int) -> tuple[Tensor, Tensor]:
        self._allow("topk")
        self._refuse_beyond(k)
        top = self._logprobs.topk(min(k, self._logprobs.shape[-1]), dim=-1)
        return top.values, top.indices

    @property
    def top1_embeddings(self) -> Float[Tensor, "positions width"]:
        """Input embedding of the most likely token."""
        self._allow("embedding")
        if self._embed is None:
            raise PolicyError(f"model '{self.name}' was not asked for input embeddings.")
        return self._embed(self._top1[1])

    def logprob_of(self, ids: Int[Tensor, "positions"]) -> Float[Tensor, "positions"]:
        """Log-probability in nats of one given token per position."""
        return self.logprobs_of(ids[:, None])[:, 0]

    def logprobs_of(self, ids: Int[Tensor, "positions n"]) -> Float[Tensor, "positions n"]:
        """Log-probabilities in nats of some given tokens per position.

        Raises:
            PolicyError: if a server was not asked about one of them; see
                :meth:`multicolm.policy.base.Policy.candidates`.
        """
        self._allow("token_logprobs")
        known = self._logprobs.gather(-1, ids)
        if self._max_top_logprobs is not None and not self._declares_all:
            unknown = known == float("-inf")
            if self._candidates is not None:
                named = (ids[:, :, None] == self._candidates[:, None, :].to(ids.device)).any(-1)
                unknown = unknown & ~named
            if bool(unknown.any()):
                raise PolicyError(
                    f"the policy reads the probability of a token that the server of model "
                    f"'{self.name}' was not asked about; name it in `candidates`."
                )
        return known


class Views:
    """What the models of an ensemble show at some positions.

    Attributes:
        models: the ensemble's model names, base model first.
        n_positions: how many positions.
    """

    def __init__(
        self,
        models: ModelNames,
        views: Mapping[int, View],
        *,
        n_positions: int,
        context: Mapping[str, Callable[[], Tensor]] | None = None,
        drawn: Callable[[Tensor], Tensor] | None = None,
        starts_word: Bool[Tensor, "vocab"] | None = None,
        first_tokens: Callable[[int], Tensor] | None = None,
        closed: Mapping[int, Tensor] | None = None,
        costs: Sequence[float] | None = None,
        extends: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Bundle views.

        Args:
            models: names, base model first.
            views: per model index, what it shows; models that did not run are absent.
            n_positions: how many positions every view has.
            context: how to work out ``previous``, ``base_run``, ``place``, ``uniform``,
                ``greedy``, ``prompt_mean_nll``, ``text_nll``, ``state``, and ``prompt_hidden`` by
                :func:`prompt_hidden_key`.
            drawn: turns logits into the probabilities that tokens are drawn from.
            starts_word: per token of the shared vocabulary, whether it begins a new word.
            first_tokens: per model index, see :meth:`first_tokens`; every token is itself if not
                given.
            closed: per model index, where it could not go on; nowhere if not given.
            costs: see :attr:`costs`; 1 for every model if not given.
            extends: see :meth:`extends`.
        """
        self._costs = [1.0] * len(models) if costs is None else list(costs)
        if len(self._costs) != len(models):
            raise PolicyError(
                f"views of {len(models)} models need {len(models)} costs, got {len(self._costs)}."
            )
        self._extends = extends
        self._first_tokens = first_tokens
        self._closed = closed or {}
        self.models = models
        self.n_positions = n_positions
        self._views = views
        self._context = context or {}
        self._drawn = drawn
        self._starts_word = starts_word

    def __getitem__(self, role: Role) -> View:
        index = self.models.role(role)
        if index not in self._views:
            raise PolicyError(
                f"the policy reads model '{self.models[index]}', which was not run here; "
                "declare its signals in `base_signals` or `assistant_signals`. With `assistants = "
                '"deferred"` assistants are run only where defers() is true.'
            )
        return self._views[index]

    def __contains__(self, role: Role) -> bool:
        return self.models.role(role) in self._views

    def __iter__(self) -> Iterator[int]:
        """Indices of the models that ran, ascending."""
        return iter(sorted(self._views))

    @property
    def n_tokens(self) -> int:
        """How many tokens there are to choose from."""
        return next(iter(self._views.values())).n_tokens

    @property
    def base(self) -> View:
        """The base model's view."""
        return self[0]

    @property
    def assistants(self) -> list[int]:
        """Indices of the assistants that were looked at, ascending."""
        return [index for index in self if index > 0]

    @cached_property
    def costs(self) -> Float[Tensor, "models"]:
        """What a forward pass of each model costs for one token of one text.

        As the ensemble file declares it (``cost:``, 1 if it does not), in the ensemble's unit, of
        all models in their order, run or not. No policy has to declare that it reads them.
        """
        import torch

        device = next((view.device for view in self._views.values()), None)
        return torch.tensor(self._costs, dtype=torch.float32, device=device)

    def is_open(self, role: Role) -> Bool[Tensor, "positions"]:
        """Where a model could continue: no token of its own would lie across the place, and
        its tokens can spell the text.

        Everywhere in an ensemble of one vocabulary. Elsewhere its view says that it knows nothing.
        """
        import torch

        index = self.models.role(role)
        if index in self._closed:
            return ~self._closed[index]
        return torch.ones(self.n_positions, dtype=torch.bool)

    @property
    def all_open(self) -> bool:
        """Whether every model could continue everywhere."""
        return not self._closed

    def first_tokens(self, role: Role) -> Int[Tensor, "vocab"] | None:
        """Per token, the first one with which a model spells the same text in its own tokens.

        ``None`` where all models have one vocabulary, and every token is itself.
        """
        return None if self._first_tokens is None else self._first_tokens(self.models.role(role))

    def stack(self, number: Callable[[View], Tensor]) -> Tensor:
        """``number(view)`` of every model that ran, by ascending index: [models, ...]."""
        import torch

        return torch.stack([number(self._views[index]) for index in self])

    def _worked_out(self, what: str) -> Tensor:
        if what not in self._context:
            raise PolicyError(
                f"the policy reads 'views.{what}', which is not there; a policy that reads "
                "which models wrote before must declare `history = True`."
            )
        return self._context[what]()

    @property
    def previous(self) -> Int[Tensor, "positions"]:
        """Index of the model that wrote the token before; -1 at the start of a text."""
        return self._worked_out("previous")

    @property
    def base_run(self) -> Int[Tensor, "positions"]:
        """How many tokens the base model has written in a row just before."""
        return self._worked_out("base_run")

    @property
    def place(self) -> Int[Tensor, "positions"]:
        """How many tokens of the text are written before."""
        return self._worked_out("place")

    @property
    def uniform(self) -> Float[Tensor, "positions"]:
        """One random number in [0, 1) per position, the same for equal seeds in any batch."""
        return self._worked_out("uniform")

    @property
    def greedy(self) -> Bool[Tensor, "positions"]:
        """Where the likeliest token is taken, and nothing is random."""
        return self._worked_out("greedy")

    prompt_nats = Renamed("prompt_mean_nll", PolicyError)

    @property
    def prompt_mean_nll(self) -> Float[Tensor, "positions models"]:
        """How unlikely each model finds the prompt, in nats per token of the base model's prompt.

        Minus the logarithm of the probability of the model's own tokens of the prompt after the
        first, those of its chat template included. NaN for a model that the policy does not use.
        """
        if "prompt_mean_nll" not in self._context:
            raise PolicyError(
                "the policy reads 'views.prompt_mean_nll', which is not there; a policy that "
                "weighs models by the prompt must declare `prompts = True`."
            )
        return self._context["prompt_mean_nll"]()

    @property
    def text_nll(self) -> Float[Tensor, "positions models"]:
        """How unlikely each model finds the text so far, in nats, its prompt given.

        Minus the logarithm of the probability of the text's tokens before the position, the
        model's own tokens where vocabularies differ. Infinite where the model rules the text out;
        NaN for a model that does not run here, or could not go on here (:meth:`is_open`).
        """
        if "text_nll" not in self._context:
            raise PolicyError(
                "the policy reads 'views.text_nll', which is not there; a policy that "
                "weighs models by the text has to say so with `likelihoods = True`."
            )
        return self._context["text_nll"]()

    @property
    def prompt_nll(self) -> Float[Tensor, "positions models"]:
        """How unlikely each model finds the whole prompt: :attr:`prompt_mean_nll` summed, in nats.

        NaN for a model that the policy does not use.
        """
        return self.prompt_mean_nll * self._worked_out("prompt_length")[:, None]

    @property
    def state(self) -> Shaped[Tensor, "positions width"]:
        """What the policy remembers of each position's text; see
        :meth:`multicolm.policy.base.Policy.initial_state`.
        """
        if "state" not in self._context:
            raise PolicyError(
                "the policy reads 'views.state', which is not there; a policy that remembers "
                "something of a text has to define `initial_state`."
            )
        return self._context["state"]()

    @property
    def thinking(self) -> Bool[Tensor, "positions"]:
        """Where a text thinks, or has not begun yet and may; nowhere without ``think_end_token``.

        A policy that reads it must declare ``reads_thinking = True``.
        """
        return self._worked_out("thinking")

    def prompt_hidden(
        self, role: Role = "base", pooling: Pooling = "last"
    ) -> Float[Tensor, "positions hidden"]:
        """A model's last hidden state of the prompt, after the final norm, of each position's text.

        Args:
            role: the model.
            pooling: ``last``, the state of the prompt's last token, or ``mean``, that of all its
                tokens, those of the chat template included.
        """
        index = self.models.role(role)
        key = prompt_hidden_key(index, pooling)
        if key not in self._context:
            raise PolicyError(
                f"the policy reads the '{pooling}' hidden state that model '{self.models[index]}' "
                "has of the prompt, which is not there; declare it in `prompt_states`."
            )
        return self._context[key]()

    def drawn_probs(self, role: Role) -> Float[Tensor, "positions vocab"]:
        """The probabilities that ``role`` would draw its token from.

        After temperature, top-k and top-p; all on one token when decoding is greedy.
        """
        if self._drawn is None:
            raise PolicyError("these views were made without sampling settings.")
        return self._drawn(self[role].logits)

    def starts_word(self, ids: Int[Tensor, "positions"]) -> Bool[Tensor, "positions"]:
        """Whether a token begins a new word: leading white space, or the end of the text."""
        if self._starts_word is None:
            raise PolicyError("these views were made without a vocabulary.")
        return self._starts_word.to(ids.device)[ids]

    def extends(self, ids: Int[Tensor, "n"]) -> Bool[Tensor, "n vocab"]:
        """Per given token, which tokens of the vocabulary begin with its text, itself included.

        A special token and one of white space alone are extended by themselves alone.
        """
        if self._extends is None:
            raise PolicyError("these views were made without a vocabulary.")
        return self._extends(ids)

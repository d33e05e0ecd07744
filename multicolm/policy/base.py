"""What a policy is: a pure function from views to who writes, and a declaration of what it needs.

Four kinds, and a policy is one of them:

    SelectPolicy   names one model per position; that model draws the token from its distribution
    MixPolicy      makes one distribution out of several; the token is drawn from it
    VerifyPolicy   gives the distribution that the text must follow; the base model drafts, and
                   each draft token is kept or replaced so that exactly that distribution results
    SegmentPolicy  rates what the models propose to write next, a word or more; the best is written

A class may be two of them and say which one it is as it is set up (`acts`): a learned router that
either picks a model or mixes all. All of them see flat positions, so the same method serves one
text, a batch, and a drafted block.

A policy object never changes. What it has to remember of a text (a model chosen once, weights, a
phase) is a row of numbers per text that the loop keeps: `initial_state` gives it, every method
reads it as `views.state`, and `update` gives the next one after each written token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

from jaxtyping import Bool, Float, Int, Shaped
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import dataclass_transform

from multicolm.errors import CapabilityError, PolicyError
from multicolm.plugins import policies
from multicolm.policy.declaration import check_declaration, check_method
from multicolm.types import Pooling, Signal, Tensor
from multicolm.views import ModelNames, Views

Schedule: TypeAlias = Literal["stepwise", "block"]
"""How models are run: token by token, or a drafted block at a time."""

When: TypeAlias = Literal["always", "deferred"]
"""When assistants are run."""

Support: TypeAlias = Literal["shared", "union", "bytes", "characters"]
"""What distributions that are added up are over."""

Acts: TypeAlias = Literal["select", "mix", "verify", "segment"]
"""Which of the four methods a policy is asked by."""

__all__ = [
    "Deferral",
    "MixPolicy",
    "ModelFacts",
    "Needs",
    "NewTokens",
    "Policy",
    "Schedule",
    "SegmentPolicy",
    "Segments",
    "SelectPolicy",
    "Support",
    "VerifyPolicy",
    "When",
    "check_used",
    "checked_prompt_states",
    "register_policy",
]


@plain_dataclass(frozen=True, slots=True)
class Needs:
    """Which signals of which models a policy looks at, and when.

    Attributes:
        always: per model index, the signals wanted at every position.
        deferred: per model index, the signals wanted only where the policy defers, and of those
            only where :meth:`Policy.models_at` says so, if it is defined. The base model may be
            one of them: then it drafts nothing, and is run like any other.
    """

    always: Mapping[int, frozenset[Signal]]
    deferred: Mapping[int, frozenset[Signal]]

    def of(self, model: int) -> frozenset[Signal]:
        """All signals that are ever wanted of ``model``."""
        return self.always.get(model, frozenset()) | self.deferred.get(model, frozenset())


@plain_dataclass(frozen=True, slots=True)
class Deferral:
    """A policy hands over where its score is on one side of a threshold.

    Attributes:
        param: the name of the threshold among the params.
        above: whether it hands over where the score is greater than the threshold; otherwise where
            it is less.
        never: a threshold with which it never hands over.
        always: one with which it always does.
    """

    param: str
    above: bool
    never: float
    always: float


@plain_dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model of an ensemble, for policies that were made for certain models.

    Attributes:
        name: in the ensemble.
        identity: what it is, wherever it lies and whatever it is called; empty if unknown.
        hidden_size: width of its last hidden state; ``None`` if it shows none.
    """

    name: str
    identity: str
    hidden_size: int | None


@plain_dataclass(frozen=True, slots=True)
class NewTokens:
    """What has just been written, one token per position.

    Attributes:
        ids: the tokens, in the shared vocabulary.
        writers: index of each one's model; the number of models for a mixture.
        logprobs: of the tokens, under the distributions they were drawn from, in nats.
    """

    ids: Int[Tensor, "positions"]
    writers: Int[Tensor, "positions"]
    logprobs: Float[Tensor, "positions"]


class Policy:
    """What all policies share. Subclass one of the four kinds, not this class.

    The fields of the class are its ``params``; the class variables below declare what it needs.
    """

    acts: ClassVar[Acts | None] = None
    """Which of its methods is asked; the four kinds set it."""

    name: ClassVar[str] = "policy"
    """Set by the :func:`register_policy` decorator; the class's own name without it."""

    base_signals: ClassVar[frozenset[Signal] | set[Signal]] = frozenset()
    """Signals of the base model, wanted at every position."""

    assistant_signals: ClassVar[frozenset[Signal] | set[Signal]] = frozenset()
    """Signals of every assistant."""

    assistants: ClassVar[When] = "always"
    """When the assistants are run: everywhere, or only where :meth:`defers` says so."""

    certain: ClassVar[bool] = False
    """Whether a position that :meth:`defers` is sure to be handed over, so that a base model that
    drafts a block need not write past it."""

    history: ClassVar[bool] = False
    """Whether it reads ``views.previous`` or ``views.base_run``."""

    prompts: ClassVar[bool] = False
    """Whether it reads ``views.prompt_mean_nll``; every model in use scores the prompt first."""

    likelihoods: ClassVar[bool] = False
    """Whether it reads ``views.text_nll``; every model that it runs then scores the text."""

    schedule: ClassVar[Schedule] = "stepwise"
    """The schedule that suits it when none is asked for. Never changes the text."""

    support: ClassVar[Support] = "shared"
    """What the distributions that it adds up are over, if it adds up any: the tokens of one
    ``shared`` vocabulary, the ``union`` of the models' tokens, the next ``bytes``, or the next
    ``characters``. A policy that selects can have models of any vocabularies."""

    partial: ClassVar[str] = ""
    """How a policy that needs ``logprobs`` treats the tokens whose probability a server does not
    return, in a sentence for users; empty if it cannot do without them."""

    reads_thinking: ClassVar[bool] = False
    """Whether it reads ``views.thinking``; it is asked token by token then."""

    reads_boundaries: ClassVar[bool] = False
    """Whether a policy that mixes asks where models of other vocabularies could continue
    (:meth:`multicolm.views.Views.is_open`); for one that selects that is always found out."""

    tunable: ClassVar[Mapping[str, Sequence[float]]] = {}
    """Params that are numbers to be found from data, and values worth trying for each."""

    deferral: ClassVar[Deferral | None] = None
    """How :meth:`score` and one threshold say where the base hands over, if they do; with it the
    threshold can be found for a budget."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__
        choices = {"assistants": When, "schedule": Schedule, "support": Support}
        check_declaration(cls, Policy, choices)

    def needs(self, models: ModelNames) -> Needs:
        """What to look at in an ensemble of these models: the declared signals of those in use.

        Raises:
            MulticolmError: if a field names a model that the ensemble does not have, or does not
                fit it in another way.
        """
        used = self.uses(models)
        base = {0: frozenset(self.base_signals)} if self.base_signals and 0 in used else {}
        signals = frozenset(self.assistant_signals)
        others = {k: signals for k in sorted(used - {0})} if signals else {}
        if self.assistants == "always" and not self.names_models:
            return Needs({**base, **others}, {})
        return Needs(base, others)

    def uses(self, models: ModelNames) -> frozenset[int]:
        """Indices of the models that it may look at or let write; all of them if not overridden.

        A model that is not used is never run, and neither its prompt nor its context counts.
        """
        return frozenset(range(len(models)))

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Where the base model may hand over, judged by the base model's view alone.

        Asked only of policies with ``assistants = "deferred"`` or ``certain = True``. Elsewhere
        the base model writes and no assistant is run.
        """
        raise NotImplementedError(f"{type(self).__name__} declares deferral but has no `defers`")

    def models_at(self, views: Views) -> Bool[Tensor, "positions models"]:
        """Which models are run at each position, of those that do not always run.

        Asked, if a policy defines it, at the positions at which the policy is going to be asked;
        the views are of the models that always run (the base model's, as a rule). At a
        position the policy then sees those and the models named here, and no other one is run.
        """
        raise NotImplementedError(f"{type(self).__name__} runs the same models everywhere")

    @property
    def names_models(self) -> bool:
        """Whether :meth:`models_at` is to be asked."""
        return type(self).models_at is not Policy.models_at

    def score(self, views: Views) -> Float[Tensor, "positions"] | None:
        """The number the policy decides on, for the trace; ``None`` if there is no such number.

        Sees the base model's view, and the assistants' where they always run.
        """
        return None

    def model_probs(self, views: Views) -> Float[Tensor, "positions models"] | None:
        """The probability with which it lets each model write; ``None`` without such numbers.

        Sees what :meth:`score` sees.
        """
        return None

    def candidates(self, views: Views, role: int) -> Int[Tensor, "positions n"]:
        """Tokens whose probability it reads of a model: what it has declared as ``token_logprobs``.

        Asked where a server returns its likeliest tokens only, so that it can be asked about
        these too; the views show no more of that model so far.
        """
        raise NotImplementedError(
            f"{type(self).__name__} declares `token_logprobs` but has no `candidates`"
        )

    def params_at(self, threshold: float) -> dict[str, Any] | None:
        """The params with which it hands over by a threshold; ``None`` if it knows no such."""
        return None if self.deferral is None else {self.deferral.param: threshold}

    def prompt_states(self, models: ModelNames) -> Mapping[int, frozenset[Pooling]]:
        """Which models' hidden states of the prompt it reads, and how pooled; none by default.

        By model index; ``last`` and ``mean`` are how. They read the prompt once, before the first
        token; see
        :meth:`multicolm.views.Views.prompt_hidden`. They must be among those that it
        :meth:`uses`; one that :meth:`needs` does not name reads the prompt and nothing else
        until it is chosen to write.
        """
        return {}

    def initial_state(self, views: Views) -> Shaped[Tensor, "positions width"]:
        """What it remembers of each text before the first token; a policy that defines this keeps
        state, and is asked token by token.

        Asked once per text. The views show no model; they show ``prompt_hidden`` and
        ``prompt_mean_nll`` where these are declared, ``greedy``, ``costs``, and in ``uniform`` a
        random number of the text's own. Any dtype and width, the same for all texts and ever after.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no state")

    def update(self, views: Views, written: NewTokens) -> Shaped[Tensor, "positions width"]:
        """What it remembers after a token: by default what it did before.

        Asked of policies that keep state, after every token but those of a :class:`SegmentPolicy`
        (see :meth:`SegmentPolicy.feedback`).

        Args:
            views: at the place of the token, of the models that were run there (``k in views``).
            written: the token.
        """
        return views.state

    def text_uses(self, views: Views) -> Bool[Tensor, "positions models"]:
        """Which models may write the rest of each text; all that it :meth:`uses` by default.

        Asked once per text, after :meth:`initial_state`, with the same views and ``views.state``.
        The others are not run for this text, and their contexts do not limit it. Not for a
        :class:`SegmentPolicy`, whose models all propose.
        """
        raise NotImplementedError(f"{type(self).__name__} uses the same models for every text")

    @property
    def narrows(self) -> bool:
        """Whether :meth:`text_uses` is to be asked."""
        return type(self).text_uses is not Policy.text_uses

    def ends_text(self, ids: Sequence[int], writers: Sequence[int], writer: int) -> bool:
        """Whether a text ends here, in the place of the token that a model is about to write.

        Asked, if a policy defines it, before every token that is written, but not of a
        :class:`SegmentPolicy`, nor where the likelihood of a given text is computed. A text that
        ends so has the finish reason ``stop``. A pure function of the written text, so the same in
        every schedule.

        Args:
            ids: the tokens written so far, in the shared vocabulary.
            writers: index of each one's model; the number of models for a mixture.
            writer: who would write the next token.
        """
        return False

    @property
    def can_end_texts(self) -> bool:
        """Whether :meth:`ends_text` is to be asked."""
        return type(self).ends_text is not Policy.ends_text

    @property
    def keeps_state(self) -> bool:
        """Whether it remembers something of each text."""
        return type(self).initial_state is not Policy.initial_state

    def check_models(self, models: Sequence[ModelFacts]) -> None:
        """Refuse an ensemble that this policy was not made for; every policy fits by default.

        Raises:
            CapabilityError: naming what it was made for and what it got.
        """
        return

    @property
    def table_features(self) -> Mapping[str, int]:
        """What a score table has to keep of the base model for a method ``fit(table)``.

        By feature (``hidden``, ``topk``, ``embedding``) how many numbers ``topk`` is, and 0 for the
        others, which are as wide as the model. If not overridden, the hidden states and embeddings
        that the policy declares to look at.
        """
        return dict.fromkeys(sorted({"hidden", "embedding"} & set(self.base_signals)), 0)

    @property
    def can_defer(self) -> bool:
        """Whether :meth:`defers` is to be asked."""
        return self.certain or self.assistants == "deferred"

    def as_config(self) -> dict[str, Any]:
        """``{"kind": ..., "params": {...}}``, as one writes it in YAML."""
        params: dict[str, Any] = {}
        if is_dataclass(self):
            params = {field.name: getattr(self, field.name) for field in dataclass_fields(self)}
        return {"kind": self.name, "params": params}


class SelectPolicy(Policy):
    """Names the model that writes."""

    acts: ClassVar[Acts | None] = "select"

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """Index of the writing model, 0..M, at every position.

        With ``assistants = "deferred"`` it is asked at deferring positions only.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `select`")


class MixPolicy(Policy):
    """Makes one distribution out of several."""

    acts: ClassVar[Acts | None] = "mix"

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """Unnormalised log-probabilities, in nats; -inf for a token that must not come.

        Temperature, top-k and top-p are applied to what this returns.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `mix`")

    def writers(self, views: Views) -> Int[Tensor, "positions"] | None:
        """Who is named as the writer: a model's index, or the number of models for the mixture.

        Where it names a model, :meth:`mix` returns that model's own distribution. ``None``, if not
        overridden: the mixture writes everywhere.
        """
        return None


class VerifyPolicy(Policy):
    """Gives the distribution that the text must follow, while the base model drafts.

    A draft token x, drawn from the base model's q, is kept with probability
    ``min(1, target(x) / ((1 - lenience) q(x)))``, else a token of ``(target - q)_+``, normalised,
    takes its place. With ``lenience = 0`` the text follows the target exactly.

    Source:
        Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1; Chen et al. 2023 (arXiv 2302.01318).
    """

    lenience: float = 0.0
    acts: ClassVar[Acts | None] = "verify"
    schedule: ClassVar[Schedule] = "block"

    def target_probs(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """Probabilities, each row summing to 1; use ``views.drawn_probs`` for the models' own."""
        raise NotImplementedError(f"{type(self).__name__} has no `target_probs`")

    def replaces(self, models: ModelNames) -> int:
        """Index of the model that is named as the writer of a replaced token."""
        return 1


@plain_dataclass(frozen=True, slots=True)
class Segments:
    """What the models propose to write next, and what each of them thinks of each proposal.

    The models are those in use (:meth:`Policy.uses`), by ascending index, along both axes.

    A model whose server does not return how likely it finds given text proposes and is no judge.

    Attributes:
        nats: minus the log-probability of the segment that a writer proposes, under a judge; NaN
            for who is none.
        n_tokens: how many of the judge's own tokens that is over, an end of text counted as one.
        state: what the policy remembers of each text, if it keeps state.
    """

    nats: Float[Tensor, "rows writers judges"]
    n_tokens: Int[Tensor, "rows writers judges"]
    state: Shaped[Tensor, "rows width"] | None = None


class SegmentPolicy(Policy):
    """Rates what the models propose to write next; the best proposal is written.

    Where tokens are sampled, the models of this process draw their proposals with the same noise,
    each from its own distribution: those that agree propose the same.

    A proposal ends where a word does, and a token of every model: the first such place after
    ``shortest`` of its writer's tokens. Whoever shows ``text`` can propose; to judge the proposals
    of others takes ``token_logprobs``, and one model at least has to.
    """

    acts: ClassVar[Acts | None] = "segment"
    base_signals: ClassVar[frozenset[Signal] | set[Signal]] = frozenset({"text"})
    assistant_signals: ClassVar[frozenset[Signal] | set[Signal]] = frozenset({"text"})

    shortest: int = 1
    """In the writer's tokens; a proposal does not end before, unless the text does."""

    longest: int = 16
    """In the writer's tokens; after it a proposal may end where no word does."""

    def rate(self, segments: Segments) -> Float[Tensor, "rows writers"]:
        """A number for each proposal; the greatest wins, the first of equal ones.

        Not asked where all models propose the same.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `rate`")

    def feedback(
        self, segments: Segments, chosen: Int[Tensor, "rows"]
    ) -> Shaped[Tensor, "rows width"]:
        """What it remembers after a segment; by default what it did before.

        Asked of policies that keep state, where :meth:`rate` was.

        Args:
            segments: as they were rated.
            chosen: the number of the proposal that is written, among the writers.
        """
        assert segments.state is not None
        return segments.state


def check_used(policy: Policy, models: ModelNames) -> None:
    """Refuse an ensemble of which a policy would use no model, and a policy that is not finished.

    Raises:
        CapabilityError: naming both.
        PolicyError: if a method is missing; see :func:`checked_prompt_states`, too.
    """
    for kind, method in (
        (SelectPolicy, "select"),
        (MixPolicy, "mix"),
        (VerifyPolicy, "target_probs"),
        (SegmentPolicy, "rate"),
    ):
        if isinstance(policy, kind):
            check_method(policy, kind, method)
    if policy.can_defer:
        check_method(policy, Policy, "defers")
    if not policy.uses(models):
        raise CapabilityError(
            f"policy '{policy.name}' uses none of the models of this ensemble "
            f"({', '.join(models)}); add the models that it lets write, such as assistants."
        )
    checked_prompt_states(policy, models)


def checked_prompt_states(policy: Policy, models: ModelNames) -> Mapping[int, frozenset[Pooling]]:
    """What a policy's :meth:`Policy.prompt_states` says.

    Raises:
        PolicyError: if it names what is no model of the ensemble, or no way to pool.
    """
    states = policy.prompt_states(models)
    if not isinstance(states, Mapping) or not all(
        isinstance(k, int)
        and 0 <= k < len(models)
        and isinstance(pooling, set | frozenset)
        and pooling <= set(get_args(Pooling))
        for k, pooling in states.items()
    ):
        raise PolicyError(
            f"policy '{policy.name}': prompt_states() must return a mapping from a model's index "
            f"(0 to {len(models) - 1}) to a set of 'last', 'mean' or both, and returned {states!r}."
        )
    return states


P = TypeVar("P", bound=Policy)

if TYPE_CHECKING:

    @dataclass_transform(frozen_default=True)
    def register_policy(name: str) -> Callable[[type[P]], type[P]]:
        """See below."""

else:

    def register_policy(name: str) -> Callable[[type[P]], type[P]]:
        """Decorator: make a class a policy called ``name``, its annotated fields its ``params``.

            @multicolm.register_policy("unsure")
            class Unsure(multicolm.SelectPolicy):
                threshold: float = 0.5
                ...

        The class becomes a frozen pydantic dataclass, so that params from YAML are checked; a
        class that is a dataclass already is left as it is.

        Raises:
            ConfigError: if the name is taken.
        """

        def make(cls: type[P]) -> type[P]:
            if "__dataclass_fields__" not in cls.__dict__:
                cls = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
            cls.name = name
            return policies.register(name)(cls)

        return make

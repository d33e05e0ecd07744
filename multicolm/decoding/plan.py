"""A policy over the models of an ensemble: what loops have to know of the two, found out once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from multicolm.backend.base import Model
from multicolm.errors import PolicyError
from multicolm.exact.byte_vocabulary import ByteVocabulary
from multicolm.policy.base import Needs, Policy, Schedule
from multicolm.tokenizer.bridged import BridgedVocabulary
from multicolm.tokenizer.vocabulary import Outcomes, Vocabulary
from multicolm.types import MIXTURE, Pooling
from multicolm.views import ModelNames

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """A policy over the models of an ensemble.

    Attributes:
        models: the base model first.
        names: their names.
        vocabulary: what texts are written in.
        policy: decides who writes.
        costs: per model, of one forward pass for one text; 1 each if not given.
        needs: which signals the policy reads.
        used: indices of the models that may be run or write, ascending.
        prompt_states: per model index, how its hidden states of the prompt are pooled.
    """

    models: tuple[Model, ...]
    names: ModelNames
    vocabulary: Vocabulary
    policy: Policy
    costs: Sequence[float] | None
    needs: Needs
    used: tuple[int, ...]
    prompt_states: Mapping[int, frozenset[Pooling]]

    @classmethod
    def of(
        cls,
        policy: Policy,
        models: Sequence[Model],
        names: ModelNames,
        vocabulary: Vocabulary,
        costs: Sequence[float] | None = None,
    ) -> Plan:
        """Ask a policy what it wants of these models.

        Raises:
            CapabilityError: if it names a model that is not there.
            PolicyError: if it reads a prompt by a model that it does not use.
        """
        used, states = policy.uses(names), policy.prompt_states(names)
        if unused := sorted(set(states) - used):
            raise PolicyError(
                f"policy '{policy.name}': prompt_states() names model '{names[unused[0]]}', "
                "which uses() leaves out; name it there too."
            )
        needs = policy.needs(names)
        return cls(
            tuple(models), names, vocabulary, policy, costs, needs, tuple(sorted(used)), states
        )

    @cached_property
    def max_known(self) -> Mapping[int, int]:
        """Per model that shows some tokens only, how many; see :attr:`Model.max_top_logprobs`."""
        return {
            k: model.max_top_logprobs
            for k, model in enumerate(self.models)
            if model.max_top_logprobs is not None
        }

    @cached_property
    def end_ids(self) -> tuple[frozenset[int], ...]:
        """Per writer, tokens with which it ends a text; a mixture ends it with any model's."""
        every = range(len(self.models))
        ends = [self.vocabulary.end_ids(k) for k in every]
        return (*ends, self.vocabulary.end_ids(None))

    @cached_property
    def drafts(self) -> bool:
        """Whether the base model writes ahead: it is run everywhere."""
        return 0 in self.needs.always or self.policy.acts == "verify"

    @cached_property
    def first_run(self) -> tuple[int, ...]:
        """Models that are run at the end of every prompt."""
        return (0, *self.wanted_beside_base) if self.drafts else ()

    @cached_property
    def wanted_beside_base(self) -> tuple[int, ...]:
        """Other models that are wanted wherever the base model is run, whatever it writes there."""
        policy = self.policy
        if policy.assistants != "always" or policy.names_models or policy.narrows:
            return ()
        return () if self.has_boundaries else tuple(sorted(self.needs.always.keys() - {0}))

    @cached_property
    def same_weights(self) -> frozenset[int]:
        """Other models that can be run in one pass with the base model."""
        weights, others = self.models[0].weights, set(self.used) - {0}
        if self.has_boundaries or not self.drafts:
            return frozenset()
        return frozenset(k for k in others if self.models[k].weights is weights)

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule that suits the policy and its models."""
        if {0, *self.wanted_beside_base} == {0, *self.same_weights} == set(self.used):
            return "stepwise"  # One pass a token: nothing is cheaper to draft with.
        return self.policy.schedule

    @cached_property
    def _mixes_vocabularies(self) -> bool:
        involved = {*self.used, *self.needs.always, *self.needs.deferred}
        return len({self.vocabulary.groups[k] for k in involved}) > 1

    @cached_property
    def is_bridged(self) -> bool:
        """Whether models of different vocabularies hand over to each other."""
        # What is written together is read by every model token by token.
        return self._mixes_vocabularies and self.policy.acts == "select"

    @cached_property
    def has_boundaries(self) -> bool:
        """Whether a model may be unable to continue at some place, within a token of its own."""
        asks = self.policy.acts == "select" or self.policy.reads_boundaries
        return self._mixes_vocabularies and asks

    @cached_property
    def counts_bytes(self) -> bool:
        """Whether a token may be fewer own tokens of a model than :meth:`Vocabulary.n_read`."""
        return not self.vocabulary.is_shared or isinstance(self.vocabulary, Outcomes)

    def follows_bytes(self, k: int) -> bool:
        """Whether model ``k`` is followed byte by byte, so that it can continue anywhere."""
        vocabulary = self.vocabulary
        if isinstance(vocabulary, ByteVocabulary):
            return True
        return (
            self.is_bridged
            and isinstance(vocabulary, BridgedVocabulary)
            and vocabulary.is_exact(k)
            and "hidden" not in self.needs.of(k)
            and not (self.policy.prompts or self.policy.likelihoods)
            and k not in self.prompt_states
        )

    def same_group(self, writer: int) -> bool:
        """Whether a writer, a mixture among them, has the base model's vocabulary."""
        groups = self.vocabulary.groups
        return writer == len(groups) or groups[writer] == groups[0]

    def name(self, writer: int) -> str:
        """The name of a writer."""
        return self.names[writer] if writer < len(self.names) else MIXTURE

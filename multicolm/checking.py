"""Whether a policy fits the models of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multicolm.backend.base import Model
from multicolm.errors import CapabilityError
from multicolm.exact.paths import covers
from multicolm.policy.base import (
    ModelFacts,
    Policy,
    SegmentPolicy,
    check_used,
    checked_prompt_states,
)
from multicolm.tokenizer.vocabulary import Vocabulary
from multicolm.types import Signal
from multicolm.views import ModelNames, implied

__all__ = ["Shown", "check_policy", "check_signals", "facts_of"]


def facts_of(models: Sequence[Model]) -> list[ModelFacts]:
    """What each model is."""
    return [ModelFacts(m.name, m.identity, m.hidden_size) for m in models]


def check_policy(
    policy: Policy, models: Sequence[Model], names: ModelNames, vocabulary: Vocabulary
) -> list[str]:
    """Refuse a policy that does not fit some models, before anything is read or written.

    Args:
        policy: the policy.
        models: the base model first.
        names: their names.
        vocabulary: the tokens that they write with.

    Returns:
        What has to be known of how it fits them, one sentence each.

    Raises:
        CapabilityError: if it needs what a model cannot show, or was made for other models.
    """
    check_used(policy, names)
    shown = [Shown(m.shows, m.server, m.max_top_logprobs) for m in models]
    sentences = check_signals(policy, names, shown)
    _check_vocabulary(policy, models, names, vocabulary)
    _check_prompts(policy, names)
    policy.check_models(facts_of(models))
    return sentences


def _check_prompts(policy: Policy, names: ModelNames) -> None:
    """Refuse a policy that wants to know what cannot be known of a prompt or a text.

    Raises:
        CapabilityError: naming the policy.
    """
    if isinstance(policy, SegmentPolicy) and (policy.narrows or policy.names_models):
        raise CapabilityError(
            f"policy '{policy.name}' rates what all models that it uses propose, and defines "
            "text_uses() or models_at(), by which some do not; leave models out with uses()."
        )
    reads = policy.prompts or policy.likelihoods or bool(policy.prompt_states(names))
    if policy.support in ("bytes", "characters") and reads:
        raise CapabilityError(
            f"policy '{policy.name}' reads what models make of the prompt or of the text so "
            f"far, and writes in {policy.support}; such a policy writes in tokens (support "
            "shared or union)."
        )


def _check_vocabulary(
    policy: Policy, models: Sequence[Model], names: ModelNames, vocabulary: Vocabulary
) -> None:
    """Refuse a policy whose distributions are over what these models do not share.

    Raises:
        CapabilityError: naming the policy and two models, or a model whose tokenizer the exact
            bridge does not cover.
    """
    used = sorted(policy.uses(names))
    if policy.support == "bytes":
        for k in used:
            if reason := covers(models[k].tokenizer):
                raise CapabilityError(
                    f"policy '{policy.name}' needs model '{names[k]}' byte by byte: {reason}"
                )
    if policy.acts in ("select", "segment") or policy.support != "shared":
        return
    for k in used[1:]:
        if vocabulary.groups[k] != vocabulary.groups[used[0]]:
            one, other = names[used[0]], names[k]
            raise CapabilityError(
                f"policy '{policy.name}' compares the models' probabilities token by token, "
                f"and '{one}' and '{other}' have different vocabularies; choose a policy that "
                "selects one model per token, such as cosd-rule, one that mixes bytes, such as "
                "byte-mixture, or models of one family."
            )


@dataclass(frozen=True, slots=True)
class Shown:
    """What a model shows, as far as it is known.

    Attributes:
        signals: of the model, or of its backend at most.
        server: where it runs.
        max_top_logprobs: how many of its likeliest tokens it returns; ``None`` for all.
    """

    signals: frozenset[Signal]
    server: str = ""
    max_top_logprobs: int | None = None

    @property
    def where(self) -> str:
        """Its server, after its name."""
        return f" (server {self.server})" if self.server else ""


def check_signals(policy: Policy, models: ModelNames, shown: Sequence[Shown]) -> list[str]:
    """Refuse a policy that needs what a model cannot show.

    Returns:
        How the policy treats what a server does not return, one sentence per model.

    Raises:
        CapabilityError: naming the policy, the model, its server, and the signal.
    """
    needs = policy.needs(models)
    states = checked_prompt_states(policy, models)
    sentences = []
    for k, its in enumerate(shown):
        wanted = needs.of(k) | ({"hidden"} if k in states else frozenset())
        wanted |= {"token_logprobs"} if policy.likelihoods and needs.of(k) else frozenset()
        missing = wanted - implied(its.signals)
        if missing == {"logprobs"} and policy.partial and its.max_top_logprobs:
            sentences.append(
                f"policy '{policy.name}' knows only the {its.max_top_logprobs} likeliest tokens of "
                f"model '{models[k]}' ({its.server}): {policy.partial}."
            )
        elif missing:
            raise CapabilityError(
                f"policy '{policy.name}' needs {' and '.join(sorted(missing))} of model "
                f"'{models[k]}'{its.where}, which shows only {', '.join(sorted(its.signals))}; "
                "choose another policy, or another backend for that model."
            )
    if isinstance(policy, SegmentPolicy):
        sentences += _check_judges(policy, models, shown)
    return sentences


def _check_judges(policy: Policy, models: ModelNames, shown: Sequence[Shown]) -> list[str]:
    """Refuse models that propose where none can judge.

    Returns:
        Who proposes and does not judge, one sentence each.

    Raises:
        CapabilityError: naming the policy and the models.
    """
    used = sorted(policy.uses(models))
    silent = [k for k in used if "token_logprobs" not in implied(shown[k].signals)]
    if silent == used:
        listed = " and ".join(f"'{models[k]}'{shown[k].where}" for k in silent)
        raise CapabilityError(
            f"policy '{policy.name}' needs a model that returns the log-probabilities of what "
            f"another one proposes (signal token_logprobs), and {listed} do not; add a local "
            "model, or a server that returns tokens that are named, such as vLLM's."
        )
    return [
        f"policy '{policy.name}' lets model '{models[k]}'{shown[k].where} propose and not "
        "judge: it does not return the log-probabilities of given text."
        for k in silent
    ]

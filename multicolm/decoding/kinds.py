"""How each kind of policy decides: one that selects, one that mixes, one that verifies drafts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from multicolm.decoding.decision import Decision
from multicolm.decoding.draft import Draft
from multicolm.decoding.plan import Plan
from multicolm.errors import PolicyError
from multicolm.policy.base import MixPolicy, Policy, SelectPolicy, VerifyPolicy
from multicolm.views import Views

__all__ = ["Kind", "Mixing", "Selecting", "Verifying", "check_answer", "kind_of", "write"]

P = TypeVar("P", bound=Policy)


class Kind(ABC, Generic[P]):
    """How policies of one kind decide.

    Args:
        policy: the policy.
        plan: the policy and its models.
    """

    def __init__(self, policy: P, plan: Plan) -> None:
        self._policy = policy
        self._plan = plan

    @abstractmethod
    def decide(
        self, views: Views, draft: Draft, which: Sequence[int], decision: Decision
    ) -> dict[int, int]:
        """Ask the policy, and enter what it decides.

        Args:
            views: at the positions numbered ``which``.
            draft: the positions, and what the models show there.
            which: position numbers.
            decision: where decided positions are entered.

        Returns:
            Per position number, the writer that has to be run before it can write.

        Raises:
            PolicyError: if the policy breaks its contract.
        """

    def _used(self) -> str:
        return ", ".join(f"{k} {self._plan.names[k]}" for k in self._plan.used)


def kind_of(plan: Plan) -> Kind[SelectPolicy] | Kind[MixPolicy] | Kind[VerifyPolicy] | None:
    """How the policy of a plan decides on tokens, if it does."""
    policy = plan.policy
    if policy.acts == "select" and isinstance(policy, SelectPolicy):
        return Selecting(policy, plan)
    if policy.acts == "mix" and isinstance(policy, MixPolicy):
        return Mixing(policy, plan)
    if policy.acts == "verify" and isinstance(policy, VerifyPolicy):
        return Verifying(policy, plan)
    return None


def write(draft: Draft, writer: int, which: Sequence[int], decision: Decision) -> None:
    """Let a model that was run write the positions numbered ``which``."""
    output = draft.shown[writer].at(which)
    if writer == 0 and draft.tokens:
        tokens = torch.tensor([draft.tokens[i] for i in which], device=output.logits.device)
    else:
        tokens = draft.draw(which, output.logits)
    decision.enter(which, [writer] * len(which), tokens, output.logprobs)


class Selecting(Kind[SelectPolicy]):
    """The policy names the model that writes."""

    def decide(
        self, views: Views, draft: Draft, which: Sequence[int], decision: Decision
    ) -> dict[int, int]:
        """See :meth:`Kind.decide`."""
        writers = self._chosen(views, draft, which)
        # Where a model cannot continue, its turn is that of who is in the middle of a token.
        writers = [draft.fallback_writer(k, i) for i, k in zip(which, writers, strict=True)]
        waiting: dict[int, int] = {}
        for k in sorted(set(writers)):
            theirs = [i for i, writer in zip(which, writers, strict=True) if writer == k]
            known = k in draft.shown and all(i in draft.shown[k].line_of for i in theirs)
            if known:
                write(draft, k, theirs, decision)
            else:
                waiting.update(dict.fromkeys(theirs, k))
        return waiting

    def _chosen(self, views: Views, draft: Draft, which: Sequence[int]) -> list[int]:
        policy = self._policy
        answer = policy.select(views)
        check_answer(policy, answer, views, "select", {torch.int64, torch.int32})
        writers: list[int] = answer.tolist()
        if wrong := sorted(set(writers) - {*self._plan.used}):
            raise PolicyError(
                f"policy '{policy.name}' chose model {wrong[0]}; allowed are those that it uses "
                f"({self._used()})."
            )
        if policy.narrows:
            rows = draft.positions.rows
            for i, k in zip(which, writers, strict=True):
                if k not in rows[i].models:
                    raise PolicyError(
                        f"policy '{policy.name}' chose model {k} for a text for which text_uses() "
                        f"gave {list(rows[i].models)}."
                    )
        return writers


class Mixing(Kind[MixPolicy]):
    """The policy makes one distribution out of several."""

    def decide(
        self, views: Views, draft: Draft, which: Sequence[int], decision: Decision
    ) -> dict[int, int]:
        """See :meth:`Kind.decide`."""
        policy, width = self._policy, self._plan.vocabulary.size
        mixed = policy.mix(views)
        check_answer(policy, mixed, views, "mix", {torch.float32, torch.float64}, width=width)
        # The greatest of a row is NaN if anything in the row is.
        if not bool(mixed.max(-1).values.isfinite().all()):
            raise PolicyError(
                f"policy '{policy.name}' returned a distribution without any possible token, "
                "or with NaN or infinity."
            )
        tokens = draft.draw(which, mixed)
        writers = self._writers(views)
        for k in sorted(set(writers)):
            lines = [line for line, writer in enumerate(writers) if writer == k]
            theirs = [which[line] for line in lines]
            its = mixed[lines].float()
            # What a server returned is a part of a distribution, and is not normalised.
            logprobs = its if k in self._plan.max_known else its.log_softmax(-1)
            decision.enter(theirs, [k] * len(lines), tokens[lines], logprobs)
        return {}

    def _writers(self, views: Views) -> list[int]:
        """Per position, the model whose own distribution was returned, or the mixture."""
        policy, mixture = self._policy, len(self._plan.models)
        answer = policy.writers(views)
        if answer is None:
            return [mixture] * views.n_positions
        check_answer(policy, answer, views, "writers", {torch.int64, torch.int32})
        writers: list[int] = answer.tolist()
        if wrong := sorted(set(writers) - {*self._plan.used, mixture}):
            raise PolicyError(
                f"policy '{policy.name}': writers() named model {wrong[0]}; allowed are those that "
                f"it uses ({', '.join(map(str, self._plan.used))}), and {mixture} for "
                "the mixture."
            )
        return writers


class Verifying(Kind[VerifyPolicy]):
    """The policy gives the distribution that the text must follow, while the base model drafts."""

    def decide(
        self, views: Views, draft: Draft, which: Sequence[int], decision: Decision
    ) -> dict[int, int]:
        """See :meth:`Kind.decide`."""
        target = self._target(views)
        writer = self._policy.replaces(self._plan.names)
        if writer not in draft.shown or not draft.shown[writer].knows(which):
            raise PolicyError(
                f"policy '{self._policy.name}': replaces() named model {writer}, which was not "
                f"run; name one of its needs ({', '.join(map(str, sorted(draft.shown)))})."
            )
        if draft.forced is not None:  # texts are made to follow the target
            tokens = draft.draw(which, target)
            decision.enter(which, [writer] * len(which), tokens, target.log().float())
            return {}
        kept, tokens = self._accepted(target, views, draft, which)
        for k, chosen in ((0, kept), (writer, ~kept)):
            lines = chosen.nonzero()[:, 0]
            theirs = [which[line] for line in lines.tolist()]
            if theirs:
                logprobs = draft.shown[k].at(theirs).logprobs
                decision.enter(theirs, [k] * len(theirs), tokens[lines], logprobs)
        return {}

    def _target(self, views: Views) -> Tensor:
        policy, width = self._policy, self._plan.vocabulary.size
        target = policy.target_probs(views)
        dtypes = {torch.float32, torch.float64}
        check_answer(policy, target, views, "target_probs", dtypes, width=width)
        # Asked in this way round, so that NaN is refused too.
        if not bool((target >= 0).all()) or not bool(((target.sum(-1) - 1).abs() <= 1e-3).all()):
            raise PolicyError(
                f"policy '{policy.name}' returned target_probs whose rows are no probabilities."
            )
        return target

    def _accepted(
        self, target: Tensor, views: Views, draft: Draft, which: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Which drafted tokens are kept, and the tokens that are written."""
        lenience = self._policy.lenience
        positions = draft.positions.at(which)
        drafted = torch.tensor([draft.tokens[i] for i in which], device=target.device)[:, None]
        proposal = (1 - lenience) * views.drawn_probs(0)
        uniform = positions.uniform("accept")
        wanted, proposed = target.gather(-1, drafted)[:, 0], proposal.gather(-1, drafted)[:, 0]
        # u < p / q without the division: nothing is kept that the target rules out, and with full
        # lenience, where q counts as 0, everything is.
        kept = (uniform.to(target.device) * proposed < wanted) | (lenience >= 1)
        residual = (target - proposal).clamp_min(0)
        # Rounding may leave nothing where target and proposal are equal; nothing is rejected there.
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, target)
        replaced = positions.jittered(residual.log(), "residual")
        return kept, torch.where(kept, drafted[:, 0], replaced.argmax(-1))


def check_answer(
    policy: Policy,
    answer: object,
    views: Views,
    method: str,
    dtypes: set[torch.dtype],
    *,
    width: int | None = None,
) -> None:
    """Refuse what is not one number per position, or one row of ``width`` numbers.

    Raises:
        PolicyError: naming the policy and its method.
    """
    n = views.n_positions
    shape = (n,) if width is None else (n, width)
    got: object = type(answer).__name__
    if isinstance(answer, Tensor):
        if answer.dtype in dtypes and answer.shape == shape:
            return
        got = f"a {answer.dtype} tensor of shape {list(answer.shape)}"
    allowed = " or ".join(sorted(str(dtype) for dtype in dtypes))
    size = f"{n} entries" if width is None else f"{n} rows of {width}"
    raise PolicyError(
        f"policy '{policy.name}': {method}() must return a {allowed} tensor with "
        f"{size}, one per position, and returned {got}."
    )

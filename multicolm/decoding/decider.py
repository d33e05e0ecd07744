"""Asks a policy, hands it the right views, and checks what it answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from multicolm.decoding.decision import Decision
from multicolm.decoding.draft import Draft, Positions, Shown
from multicolm.decoding.kinds import check_answer, kind_of
from multicolm.decoding.plan import Plan
from multicolm.decoding.row import Row
from multicolm.errors import PolicyError
from multicolm.policy.base import Policy
from multicolm.views import View, Views

__all__ = ["Decider"]


class Decider:
    """Asks one policy, hands it the right views, and checks what it answers.

    Args:
        plan: the policy and its models.
        embed: gives the input embeddings of a model, by its index, for tokens of its own.
        text_nll: of positions and some models, see :attr:`multicolm.views.Views.text_nll`.
    """

    def __init__(
        self,
        plan: Plan,
        embed: Callable[[int, Tensor], Tensor],
        text_nll: Callable[[Positions, Sequence[int]], Tensor],
    ) -> None:
        self.plan = plan
        self.policy = plan.policy
        self._embed = embed
        self._text_nll = text_nll
        self._kind = kind_of(plan)
        self._scores = type(plan.policy).score is not Policy.score

    def views(
        self,
        positions: Positions,
        which: Sequence[int],
        shown: dict[int, Shown],
        candidates: Mapping[int, Tensor] | None = None,
        models: Collection[int] | None = None,
    ) -> Views:
        """Views of the positions numbered ``which`` from all models that were run there.

        Args:
            positions: of the draft.
            which: some of them.
            shown: per model index, what it shows.
            candidates: per model index, what its server was asked about besides.
            models: those that are to be seen; all that were run, if not given.
        """
        plan = self.plan
        device = torch.device("cpu")
        views: dict[int, View] = {}
        for k, model in shown.items():
            if not model.knows(which) or (models is not None and k not in models):
                continue
            output = model.at(which)
            device = output.logits.device
            views[k] = View(
                output.logits,
                output.hidden,
                signals=plan.needs.of(k),
                name=plan.names[k],
                embed=partial(self._embed_shared, k),
                max_top_logprobs=plan.max_known.get(k),
                candidates=(candidates or {}).get(k),
            )
        here = positions.at(which)
        context = here.context(device)
        if not self.policy.history:
            del context["previous"], context["base_run"]
        if self.policy.likelihoods:
            context["text_nll"] = partial(self._text_nll, here, sorted(views))
        vocabulary = plan.vocabulary
        return Views(
            plan.names,
            views,
            n_positions=len(which),
            context=context,
            drawn=here.probs,
            starts_word=vocabulary.starts_word,
            first_tokens=None if vocabulary.is_shared else vocabulary.first_tokens,
            closed={
                k: torch.tensor([i in model.mid_token for i in which], device=device)
                for k, model in shown.items()
                if k in views and model.mid_token
            },
            costs=plan.costs,
            extends=vocabulary.extends,
        )

    def _embed_shared(self, k: int, ids: Tensor) -> Tensor:
        """Input embeddings of model ``k`` for tokens of the ensemble that it has."""
        return self._embed(k, self.plan.vocabulary.own_ids(k, ids))

    def text_views(self, positions: Positions) -> Views:
        """What is known of new texts before any model is run: one position of each."""
        device = torch.device("cpu")
        context = positions.text_context(device)
        context["uniform"] = lambda: positions.uniform("text")
        return Views(
            self.plan.names,
            {},
            n_positions=len(positions),
            context=context,
            costs=self.plan.costs,
        )

    def seen(self, draft: Draft, which: Sequence[int]) -> Views:
        """What the policy sees at positions where it sees the same models."""
        models = draft.seen.get(which[0]) if which else None
        return self.views(draft.positions, which, draft.shown, draft.candidates, models)

    def candidates(self, draft: Draft, which: Sequence[int]) -> dict[int, Tensor]:
        """Per model index whose server does not return all tokens: which ones the policy names."""
        needs = self.plan.needs
        wanting = [
            k for k in self.plan.max_known if "token_logprobs" in needs.of(k) and k in draft.shown
        ]
        if not wanting:
            return {}
        if "logprobs" in frozenset().union(*(needs.of(k) for k in wanting)):
            return {}  # it says itself what it makes of the others
        views = self.seen(draft, which)
        wanting = [k for k in wanting if k in views]
        named = {}
        for k in wanting:
            named[k] = self.policy.candidates(views, k)
            if named[k].dtype != torch.int64 or named[k].shape[:1] != (len(which),):
                raise PolicyError(
                    f"policy '{self.policy.name}': candidates() must return an int64 tensor with "
                    f"{len(which)} rows, one per position."
                )
        return named

    def defers(self, views: Views) -> list[bool]:
        """Where the base model may hand over, judged by its own view."""
        answer = self.policy.defers(views)
        check_answer(self.policy, answer, views, "defers", {torch.bool})
        return [bool(flag) for flag in answer.tolist()]

    def scores(self, views: Views) -> list[float | None]:
        """The numbers the policy decides on; ``None`` where it gives none."""
        answer = self.policy.score(views) if self._scores else None
        if answer is None:
            return [None] * views.n_positions
        check_answer(self.policy, answer, views, "score", {torch.float32, torch.float64})
        return [float(number) for number in answer.tolist()]

    def decide(self, draft: Draft, which: Sequence[int], decision: Decision) -> dict[int, int]:
        """Ask the policy about the positions numbered ``which``.

        Decided positions are entered into ``decision``.

        Returns:
            Per position number, the writer that has to be run before it can write.

        Raises:
            PolicyError: if the policy breaks its contract.
        """
        views = self.seen(draft, which)
        if self.policy.assistants == "always" and self._scores:
            for i, score in zip(which, self.scores(views), strict=True):
                draft.scores[i] = score
        if self._kind is None:
            raise PolicyError(
                f"policy '{self.policy.name}' is a {type(self.policy).__name__}; a policy derives "
                "from SelectPolicy, MixPolicy, VerifyPolicy or SegmentPolicy."
            )
        return self._kind.decide(views, draft, which, decision)

    def ends_text(self, row: Row, writer: int) -> bool:
        """Whether the policy ends a text here, in the place of a token of ``writer``'s.

        Raises:
            PolicyError: if it answers anything but a bool.
        """
        if not self.policy.can_end_texts:
            return False
        ids, writers = [t.token for t in row.written], [t.writer for t in row.written]
        answer: object = self.policy.ends_text(ids, writers, writer)
        if not isinstance(answer, bool):
            raise PolicyError(
                f"policy '{self.policy.name}': ends_text() must return True or False, and returned "
                f"{answer!r}."
            )
        return answer

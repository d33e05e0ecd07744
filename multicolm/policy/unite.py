"""UniTE: the few likeliest tokens of every model, weighed by all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Bool, Float, Int
from pydantic import Field

from multicolm.policy.base import Support, register_policy
from multicolm.policy.mixture import WeightedPolicy
from multicolm.types import Signal, Tensor
from multicolm.views import Views

if TYPE_CHECKING:
    from multicolm.learning.queries import JudgedAnswers
    from multicolm.learning.training import Training

__all__ = ["UnitePolicy"]

_NEVER = float("-inf")


@register_policy("unite")
class UnitePolicy(WeightedPolicy):
    """Every model weighs the union of all models' likeliest tokens, and the average writes.

    A model's probabilities are renormalised over the union. A token that it does not have counts as
    the first one with which it spells the same text; one whose probability is 0 stays at 0.

    Which models are added up for a task is determined by :meth:`fit_answers`: the best one alone,
    and those that are at most 0.1 worse in quality and answer at a like length.

    Attributes:
        top_k: how many tokens of each model make up the union.
        weights: one per model, as a list or by name; equal if not given. A model of weight 0 is
            never run.

    Source:
        UniTE, "Determine-then-Ensemble", arXiv 2410.03777 (ICLR 2025), section 4; k = 10 and greedy
        decoding there. It also asks for a like style, which is not judged here. Its code gives a
        logit of 0 to a token whose first part is in the union already; here it has that part's own.
    """

    top_k: int = Field(default=10, ge=1)
    weights: list[float] | dict[str, float] | None = None

    base_signals: ClassVar[set[Signal]] = {"topk", "token_logprobs"}
    assistant_signals: ClassVar[set[Signal]] = {"topk", "token_logprobs"}
    support: ClassVar[Support] = "union"

    def candidates(self, views: Views, role: int) -> Int[Tensor, "positions n"]:
        """The union, each as the first token with which the model spells it."""
        return self._as_spelled(views, role, self._union(views))

    def _union(self, views: Views) -> Int[Tensor, "positions n"]:
        """The likeliest tokens of every model; those of several are there several times."""
        import torch

        return torch.cat([views[k].topk_ids(self.top_k) for k in views], dim=-1)

    def _as_spelled(self, views: Views, role: int, ids: Tensor) -> Int[Tensor, "positions n"]:
        first = views.first_tokens(role)
        return ids if first is None else first.to(ids.device)[ids]

    def mix(self, views: Views) -> Float[Tensor, "positions vocab"]:
        """Logarithm of the average over the union; -inf outside of it."""
        import torch

        weights = views.models.weights(self.weights)
        ids = self._union(views)
        n = min(self.top_k, views.n_tokens)
        # Fewer than k tokens may have any probability at all; of equal ones the first counts.
        likely = torch.cat([views[k].topk_logprobs(n) for k in views], dim=-1) > _NEVER
        counts = likely & ~_is_repeated(ids, likely)
        shown = []
        for k in views:
            weighed = views[k].logprobs_of(self._as_spelled(views, k, ids))
            weighed = weighed.masked_fill(~counts, _NEVER)
            # A model that finds the whole union impossible has nothing to say here.
            share = weighed.log_softmax(-1).nan_to_num(nan=_NEVER, neginf=_NEVER)
            shown.append(share + torch.tensor(weights[k], device=ids.device).log())
        mixed = torch.stack(shown).logsumexp(0)
        whole = torch.full((len(ids), views.n_tokens), _NEVER, device=ids.device)
        # Every token counts once, so the greatest of what is put at one place is its number.
        return whole.scatter_reduce(-1, ids, mixed, "amax")

    def fit_answers(self, answers: JudgedAnswers, training: Training) -> UnitePolicy:
        """The same policy with equal weights for the models that fit together, and 0 for others.

        Args:
            answers: of every model alone.
            training: options (:class:`multicolm.learning.compatible.CompatibleSettings`), and
                what is reported back.

        Raises:
            ConfigError: if an option is unknown or out of range.
            TrainingError: if there is no answer.
        """
        from multicolm.learning.compatible import CompatibleSettings, compatible_models

        chosen, report = compatible_models(answers, training.settings(CompatibleSettings))
        training.report |= report
        return replace(self, weights={name: float(name in chosen) for name in answers.models})


def _is_repeated(
    ids: Int[Tensor, "positions n"], counts: Bool[Tensor, "positions n"]
) -> Bool[Tensor, "positions n"]:
    """Whether a token that counts is nearer the front."""
    same = (ids[:, :, None] == ids[:, None, :]) & counts[:, None, :]
    return same.tril(-1).any(-1)

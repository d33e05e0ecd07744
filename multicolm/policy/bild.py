"""BiLD: a big and a little decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Bool, Float, Int
from pydantic import NonNegativeFloat, NonNegativeInt

from multicolm.policy.base import Needs, Schedule, SelectPolicy, register_policy
from multicolm.policy.threshold import ProbabilityThreshold
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Role, Views

__all__ = ["BildPolicy"]


@register_policy("bild")
class BildPolicy(SelectPolicy):
    """The small base model writes; the large one takes over where either of them objects.

    Fallback: the small model's top-1 probability is below ``fallback``. Rollback: the large model's
    most likely token is another than the small one's, to which it gives a negative log-probability
    above ``rollback``. And the large model writes one token after ``num_small_iters`` of the small
    one in a row, and the first one of a text.

    The paper lets the large model check only when it takes over. Here it sees every token, in one
    pass per drafted block, so the text does not depend on the block size; only the small model's
    last tokens before the end of a text are checked here and not there.

    Attributes:
        fallback: probability; 0 never falls back, above 1 (up to 2) is the large model alone.
        rollback: nats; 0 is the large model alone, infinity never rolls back.
        num_small_iters: tokens; 0 is the large model alone.
        large: the large model.
        large_first: whether the large model writes the first token of a text, as in the authors'
            code; in the paper's algorithm the small one does, if it is sure enough.

    Source:
        arXiv 2302.07863 (NeurIPS 2023), section 3; defaults, the limit of small iterations and the
        condition that the tokens differ are those of the authors' code. Published for greedy
        decoding.
    """

    fallback: ProbabilityThreshold = 0.6
    rollback: NonNegativeFloat = 5.0
    num_small_iters: NonNegativeInt = 10
    large: Role = "assistant"
    large_first: bool = True

    tunable: ClassVar[dict[str, Sequence[float]]] = {
        "fallback": (0.0, 0.2, 0.4, 0.6, 0.8, 0.95),
        "rollback": (1.0, 2.0, 3.0, 5.0, 8.0),
    }
    base_signals: ClassVar[set[Signal]] = {"top1"}
    assistant_signals: ClassVar[set[Signal]] = {"top1", "token_logprobs"}
    certain: ClassVar[bool] = True
    history: ClassVar[bool] = True
    schedule: ClassVar[Schedule] = "block"

    def needs(self, models: ModelNames) -> Needs:
        """Both models always."""
        large = {models.role(self.large): frozenset(self.assistant_signals)}
        return Needs({0: frozenset(self.base_signals), **large}, {})

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The small and the large model."""
        return frozenset({0, models.role(self.large)})

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Fallback, the small model's turn is over, or the text begins."""
        unsure = views.base.top1_probs < self.fallback
        over = views.base_run >= self.num_small_iters
        return unsure | over | ((views.previous < 0) & self.large_first)

    def candidates(self, views: Views, role: int) -> Int[Tensor, "positions n"]:
        """The small model's token."""
        return views.base.top1_ids[:, None]

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Negative log-probability that the large model gives the small one's token, in nats."""
        return -views[self.large].logprob_of(views.base.top1_ids)

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The large model at fallback, at rollback, at first, and after the small one's turn."""
        large = views[self.large]
        objects = (large.top1_ids != views.base.top1_ids) & (self.score(views) > self.rollback)
        return (self.defers(views) | objects).long() * views.models.role(self.large)

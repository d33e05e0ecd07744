"""Nudging: a small aligned model supplies words where the base model is unsure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Annotated, ClassVar

from jaxtyping import Bool, Float, Int
from pydantic import Field

from multicolm.policy.base import Deferral, Needs, SelectPolicy, When, register_policy
from multicolm.policy.threshold import PROBABILITIES, ProbabilityThreshold
from multicolm.types import Signal, Tensor
from multicolm.views import ModelNames, Role, Views

__all__ = ["NudgingPolicy"]


@register_policy("nudging")
class NudgingPolicy(SelectPolicy):
    """Where the base model is unsure, the nudger writes, and it finishes the word it began.

    The base model continues at the next word at which it is sure again or would write the same
    token as the nudger. A word of the nudger ends where its next token would begin with white
    space.

    A text ends where the model that writes ends it, after ``same_nudges`` nudges in a row with the
    same tokens, and where a nudge would begin after ``max_nudges``. Three rules of the authors'
    code are not here, since they take back what is written, or let the nudger write ahead: it
    writes pieces of 16 tokens, and a piece in which it ends the text is the rest of the text; the
    last of equal nudges in a row is taken back; and what the base model repeats is cut out.

    Attributes:
        threshold: top-1 probability below which the base model is unsure (the paper's gamma);
            0 is the base model alone, up to 2 the nudger.
        nudger: the aligned model.
        same_nudges: after how many equal nudges in a row a text ends; ``null`` never.
        max_nudges: the most nudges of a text; ``null`` is no limit.

    Source:
        arXiv 2410.09300 (ACL 2025), section 2; the authors' instructions take 0.4, their code 0.3,
        and the code ends texts after 4 equal nudges and after 150. Published for greedy decoding.
    """

    threshold: ProbabilityThreshold = 0.4
    nudger: Role = "assistant"
    same_nudges: Annotated[int, Field(ge=1)] | None = 4
    max_nudges: Annotated[int, Field(ge=1)] | None = 150

    tunable: ClassVar[dict[str, Sequence[float]]] = {"threshold": PROBABILITIES}
    deferral: ClassVar[Deferral | None] = Deferral("threshold", above=False, never=0.0, always=2.0)
    base_signals: ClassVar[set[Signal]] = {"top1"}
    assistant_signals: ClassVar[set[Signal]] = {"text"}
    assistants: ClassVar[When] = "deferred"
    history: ClassVar[bool] = True

    def needs(self, models: ModelNames) -> Needs:
        """The base model always, the nudger where the base model is unsure or a word is open."""
        signals = frozenset(self.assistant_signals)
        return Needs({0: frozenset(self.base_signals)}, {models.role(self.nudger): signals})

    def uses(self, models: ModelNames) -> frozenset[int]:
        """The base model and the nudger."""
        return frozenset({0, models.role(self.nudger)})

    def score(self, views: Views) -> Float[Tensor, "positions"]:
        """Probability of the base model's most likely token."""
        return views.base.top1_probs

    def defers(self, views: Views) -> Bool[Tensor, "positions"]:
        """Where the base model is unsure, or the nudger may be inside a word."""
        unsure = views.base.top1_probs < self.threshold
        return unsure | (views.previous == views.models.role(self.nudger))

    def select(self, views: Views) -> Int[Tensor, "positions"]:
        """The nudger in its words, and where the base model is unsure and not of its opinion."""
        nudger = views.models.role(self.nudger)
        unsure = views.base.top1_probs < self.threshold
        nudged = views.previous == nudger
        next_word = views.starts_word(views[nudger].top1_ids)
        agrees = views.base.top1_ids == views[nudger].top1_ids
        # The first word of a nudge is the nudger's in any case, and all are with a threshold that
        # no probability reaches.
        goes_on = nudged & next_word & agrees & (self.threshold <= 1)
        return ((unsure & ~goes_on) | (nudged & ~next_word)).long() * nudger

    def ends_text(self, ids: Sequence[int], writers: Sequence[int], writer: int) -> bool:
        """After the same nudge too often, and in the place of one nudge too many."""
        if not writers or (writer == 0) == (writers[-1] == 0):
            return False  # no nudge begins or ends here
        runs = [(k, list(run)) for k, run in groupby(zip(writers, ids, strict=True), itemgetter(0))]
        nudges = [[token for _, token in run] for k, run in runs if k != 0]
        if writer != 0:
            return self.max_nudges is not None and len(nudges) >= self.max_nudges
        n = self.same_nudges
        return n is not None and len(nudges) >= n and all(x == nudges[-1] for x in nudges[-n:])

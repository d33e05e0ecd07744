"""Cool-Fusion: models of any vocabularies propose words, and all of them judge."""

from __future__ import annotations

from jaxtyping import Float
from pydantic import PositiveInt

from multicolm.policy.base import SegmentPolicy, Segments, register_policy
from multicolm.types import Tensor

__all__ = ["CoolFusionPolicy"]


@register_policy("cool-fusion")
class CoolFusionPolicy(SegmentPolicy):
    """Every model proposes the next words, and those of the lowest average perplexity are written.
    The average is over the models that can judge: a server may return what comes next and not how
    likely given text is.

    A proposal ends at a boundary of words that is one of tokens for every model. Its perplexity
    under a model is over the model's own tokens of it. Where all propose the same, it is written
    and nobody scores it.

    Attributes:
        longest: tokens of a proposal after which it may end within a word, as it must where a
            script has no spaces.

    Source:
        Cool-Fusion, arXiv 2407.19807 (ACL 2025), section 3; no code of it was found, and `longest`
        is this library's own.
    """

    longest: PositiveInt = 16

    def rate(self, segments: Segments) -> Float[Tensor, "rows writers"]:
        """Minus the average perplexity, over those who judge."""
        # In single precision a token of 89 nats would be as bad as one that cannot come.
        perplexity = (segments.nats.double() / segments.n_tokens.clamp_min(1)).exp()
        return -perplexity.nanmean(-1)

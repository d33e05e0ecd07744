"""Mixtures across vocabularies on bytes: 256 of them, and the end of a text.

Every model shows the exact probabilities of the next byte, summed over all ways in which its own
tokens can spell the text (:mod:`multicolm.exact.byte_session`). On these 257 outcomes mixtures,
differences and contrasts are what they are on the tokens of one vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

from multicolm.policy.base import Schedule, Support, register_policy
from multicolm.policy.logit_arithmetic import ContrastivePolicy, ProxyTuningPolicy
from multicolm.policy.mixture import AveragePolicy

__all__ = ["ByteContrastivePolicy", "ByteMixturePolicy", "ByteProxyTuningPolicy"]


@register_policy("byte-mixture")
class ByteMixturePolicy(AveragePolicy):
    """Every byte is drawn from the weighted average of all models' distributions.

    Source:
        Linear: arXiv 2410.09303; linear and geometric: arXiv 2506.14123, whose covers of valid
        token paths the exact bridge follows.
    """

    support: ClassVar[Support] = "bytes"
    schedule: ClassVar[Schedule] = "stepwise"


@register_policy("byte-proxy-tuning")
class ByteProxyTuningPolicy(ProxyTuningPolicy):
    """What tuning changed in a small model is added to a large one of another vocabulary.

    Source:
        arXiv 2401.08565, on bytes as in arXiv 2506.14123.
    """

    support: ClassVar[Support] = "bytes"
    schedule: ClassVar[Schedule] = "stepwise"


@register_policy("byte-contrastive")
class ByteContrastivePolicy(ContrastivePolicy):
    """What the expert knows and an amateur of another vocabulary does not.

    ``alpha`` cuts off bytes that the expert finds implausible, not tokens.

    Source:
        arXiv 2309.09117, on bytes as in arXiv 2506.14123.
    """

    support: ClassVar[Support] = "bytes"
    schedule: ClassVar[Schedule] = "stepwise"

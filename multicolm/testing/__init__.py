"""The laws that every plug-in keeps, as checks that its author can run.

    from multicolm.testing import check_policy

    def test_my_policy_keeps_the_laws():
        check_policy(MyPolicy(threshold=0.3))

Each check returns nothing, or raises :class:`LawBroken`, which names the law and what was seen.
multicolm runs the same checks on everything that it ships.
"""

from __future__ import annotations

from multicolm.testing.conformance import Difference, check_against
from multicolm.testing.laws import LawBroken
from multicolm.testing.models import check_model, check_tokenizer
from multicolm.testing.policies import check_policy
from multicolm.testing.routing import check_removable, check_routing

__all__ = [
    "Difference",
    "LawBroken",
    "check_against",
    "check_model",
    "check_policy",
    "check_removable",
    "check_routing",
    "check_tokenizer",
]

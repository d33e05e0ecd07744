"""Policies: who writes the next token. Importing this package registers the built-in ones."""

from __future__ import annotations

from multicolm.plugins import policies
from multicolm.policy.base import MixPolicy, Needs, Policy, SelectPolicy, VerifyPolicy, policy

_BUILT_IN = {
    "average": "mixture:AveragePolicy",
    "bild": "bild:BildPolicy",
    "confidence": "threshold:ConfidencePolicy",
    "contrastive": "logit_arithmetic:ContrastivePolicy",
    "cosd-rule": "cosd:CosdRulePolicy",
    "entropy": "threshold:EntropyPolicy",
    "margin": "threshold:MarginPolicy",
    "max-confidence": "threshold:MaxConfidencePolicy",
    "nudging": "nudging:NudgingPolicy",
    "proxy-tuning": "logit_arithmetic:ProxyTuningPolicy",
    "random": "fixed:RandomPolicy",
    "single": "fixed:SinglePolicy",
    "speculative": "speculative:SpeculativePolicy",
}
for _name, _address in _BUILT_IN.items():
    policies.declare(_name, f"multicolm.policy.{_address}")

__all__ = ["MixPolicy", "Needs", "Policy", "SelectPolicy", "VerifyPolicy", "policy"]

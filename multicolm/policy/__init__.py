"""Policies: who writes the next token."""

from __future__ import annotations

from multicolm.policy.base import (
    MixPolicy,
    Needs,
    NewTokens,
    Policy,
    SegmentPolicy,
    Segments,
    SelectPolicy,
    VerifyPolicy,
    register_policy,
)

__all__ = [
    "MixPolicy",
    "Needs",
    "NewTokens",
    "Policy",
    "SegmentPolicy",
    "Segments",
    "SelectPolicy",
    "VerifyPolicy",
    "register_policy",
]

"""One registry class for everything that has a name: policies, backends and metrics.

A plug-in is known by a decorator, by an entry point of an installed package, or, for the parts of
multicolm that are heavy to import, by a ``"module:Class"`` string that is imported on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from multicolm.errors import ConfigError, UnknownNameError, unknown

__all__ = ["Registry", "backends", "metrics", "policies"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to classes.

    Args:
        noun: what one entry is called in messages, such as ``"policy"``.
        group: the entry-point group that other packages use to add theirs.
        built_in: name -> ``"module:Class"``, imported on first use.
    """

    def __init__(self, noun: str, group: str, built_in: Mapping[str, str] | None = None) -> None:
        self.noun = noun
        self.group = group
        self._classes: dict[str, type[T]] = {}
        self.built_in = frozenset(built_in or {})
        self._addresses: dict[str, str] = dict(built_in or {})
        self._searched = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Decorator that makes a class known under ``name``.

        Raises:
            ConfigError: if another class already has that name.
        """

        def add(cls: type[T]) -> type[T]:
            known = self._classes.get(name)
            same = known is not None and known.__qualname__ == cls.__qualname__
            # A module that runs twice (a notebook cell, a reload) brings the same class anew.
            if known is not None and not same:
                raise ConfigError(
                    f"{self.noun} '{name}' is already registered by "
                    f"{known.__module__}.{known.__qualname__}; choose another name."
                )
            address = self._addresses.get(name)
            if address is not None and address != f"{cls.__module__}:{cls.__name__}":
                raise ConfigError(
                    f"{self.noun} '{name}' is already taken by {address}; choose another name."
                )
            self._classes[name] = cls
            return cls

        return add

    def declare(self, name: str, address: str) -> None:
        """Make ``"module:Class"`` known under ``name`` without importing it."""
        self._addresses[name] = address

    def get(self, name: str) -> type[T]:
        """The class called ``name``.

        Raises:
            UnknownNameError: if nothing has that name; the message offers the nearest one.
        """
        self._search()
        if name not in self._classes and name in self._addresses:
            module, _, attribute = self._addresses[name].partition(":")
            self._classes[name] = getattr(importlib.import_module(module), attribute)
        if name not in self._classes:
            raise UnknownNameError(unknown(self.noun, name, self.names()))
        return self._classes[name]

    def names(self) -> list[str]:
        """Every known name, sorted."""
        self._search()
        return sorted({*self._classes, *self._addresses})

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _search(self) -> None:
        if self._searched:
            return
        self._searched = True
        for point in entry_points(group=self.group):
            self._addresses.setdefault(point.name, point.value)


# The bounds of these live in modules that import this one.
policies: Registry[object] = Registry(
    "policy",
    "multicolm.policies",
    {
        "average": "multicolm.policy.mixture:AveragePolicy",
        "co-llm": "multicolm.policy.co_llm:CoLlmPolicy",
        "bild": "multicolm.policy.bild:BildPolicy",
        "btm": "multicolm.policy.btm:BtmPolicy",
        "byte-contrastive": "multicolm.policy.byte_mixtures:ByteContrastivePolicy",
        "byte-mixture": "multicolm.policy.byte_mixtures:ByteMixturePolicy",
        "byte-proxy-tuning": "multicolm.policy.byte_mixtures:ByteProxyTuningPolicy",
        "chared": "multicolm.policy.chared:CharEdPolicy",
        "confidence": "multicolm.policy.threshold:ConfidencePolicy",
        "contrastive": "multicolm.policy.logit_arithmetic:ContrastivePolicy",
        "cool-fusion": "multicolm.policy.cool_fusion:CoolFusionPolicy",
        "cosd-rule": "multicolm.policy.cosd:CosdRulePolicy",
        "cosd-tree": "multicolm.policy.cosd_tree:CosdTreePolicy",
        "cpr": "multicolm.policy.cpr:CprPolicy",
        "entropy": "multicolm.policy.threshold:EntropyPolicy",
        "fusion-route": "multicolm.policy.fusion_route:FusionRoutePolicy",
        "gac": "multicolm.policy.gac:GacPolicy",
        "gedi": "multicolm.policy.gedi:GediPolicy",
        "margin": "multicolm.policy.threshold:MarginPolicy",
        "max-confidence": "multicolm.policy.threshold:MaxConfidencePolicy",
        "mlp-router": "multicolm.policy.mlp_router:MlpRouterPolicy",
        "nudging": "multicolm.policy.nudging:NudgingPolicy",
        "phases": "multicolm.policy.phases:PhasesPolicy",
        "pack-llm": "multicolm.policy.pack_llm:PackLlmPolicy",
        "query-router": "multicolm.policy.query_router:QueryRouterPolicy",
        "proxy-tuning": "multicolm.policy.logit_arithmetic:ProxyTuningPolicy",
        "r-stitch": "multicolm.policy.r_stitch:RStitchPolicy",
        "random": "multicolm.policy.fixed:RandomPolicy",
        "safe": "multicolm.policy.safe:SafePolicy",
        "single": "multicolm.policy.fixed:SinglePolicy",
        "spec-fuse": "multicolm.policy.spec_fuse:SpecFusePolicy",
        "speculative": "multicolm.policy.speculative:SpeculativePolicy",
        "speculative-cascade": "multicolm.policy.speculative_cascade:SpeculativeCascadePolicy",
        "unite": "multicolm.policy.unite:UnitePolicy",
    },
)
"""Policy kinds; see :mod:`multicolm.policy`."""

backends: Registry[object] = Registry(
    "backend",
    "multicolm.backends",
    {
        "llama-cpp": "multicolm.backend.llama_cpp.model:LlamaCppModel",
        "llama-cpp-server": "multicolm.backend.remote.model:LlamaCppServerModel",
        "openai": "multicolm.backend.remote.model:OpenAIModel",
        "sglang": "multicolm.backend.remote.model:SglangModel",
        "table": "multicolm.backend.table:TableModel",
        "transformers": "multicolm.backend.transformers:TransformersModel",
        "vllm": "multicolm.backend.remote.model:VllmModel",
        "vllm-engine": "multicolm.backend.vllm_engine:VllmEngineModel",
    },
)
"""Backends; see :mod:`multicolm.backend`."""

metrics: Registry[object] = Registry(
    "metric",
    "multicolm.metrics",
    {
        "contains": "multicolm.evaluation.metrics:ContainsMetric",
        "exact-match": "multicolm.evaluation.metrics:ExactMatchMetric",
        "numeric": "multicolm.evaluation.metrics:NumericMetric",
    },
)
"""Metrics; see :mod:`multicolm.evaluation.metrics`."""

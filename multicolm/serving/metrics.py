"""Counts for Prometheus, of the engine and of requests."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from multicolm.serving.engine import Engine
from multicolm.types import MIXTURE

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class _OfEngine(Collector):
    """What an engine has counted, read when it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, value, about in (
            ("active", stats.active, "Texts that are being written."),
            ("slots", stats.slots, "Texts that can be written at a time."),
            ("queue", stats.waiting, "Texts that wait for a slot."),
            ("queue_places", stats.places, "Texts that can wait."),
        ):
            yield GaugeMetricFamily(f"multicolm_{name}", about, value)
        texts = CounterMetricFamily(
            "multicolm_texts", "Texts that have ended, by how.", labels=["outcome"]
        )
        for outcome, count in stats.outcomes.items():
            texts.add_metric([outcome], count)
        yield texts
        written = CounterMetricFamily(
            "multicolm_tokens_written", "Tokens by their writers.", labels=["model"]
        )
        read = CounterMetricFamily(
            "multicolm_tokens_read", "Tokens fed to models, prompts included.", labels=["model"]
        )
        forwards = CounterMetricFamily("multicolm_forwards", "Forward passes.", labels=["model"])
        seconds = CounterMetricFamily(
            "multicolm_model_seconds", "Seconds inside forward passes.", labels=["model"]
        )
        calls = CounterMetricFamily(
            "multicolm_calls", "Requests to the servers of models.", labels=["model"]
        )
        for name, usage in stats.models.items():
            written.add_metric([name], usage.tokens_written)
            if name != MIXTURE:
                read.add_metric([name], usage.tokens_read)
                forwards.add_metric([name], usage.forwards)
                seconds.add_metric([name], usage.seconds)
                calls.add_metric([name], usage.calls)
        yield from (written, read, forwards, seconds, calls)


class Metrics:
    """What ``/metrics`` says.

    Attributes:
        requests: by route and status.
        seconds: from the request to the end of the reply, by route.
        first_token: from the request to the first token of a text.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine))
        self.requests = Counter(
            "multicolm_requests", "Requests.", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "multicolm_request_seconds",
            "Seconds from a request to the end of its reply.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "multicolm_first_token_seconds",
            "Seconds from a request to the first token of its first text.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All of it, in the format of Prometheus."""
        return generate_latest(self._registry)

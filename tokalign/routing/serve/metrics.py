"""What Prometheus reads from a routed server.

Tokens, positions and hand-offs come from the backend's own counts at the moment of the scrape, so they include
cancelled requests as far as those got. Tokens per second is `rate(tokalign_routing_tokens_total[1m])`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tokalign.routing.decode.backend import RoutedBackend
from tokalign.routing.serve.budget import BudgetController

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Load(Protocol):
    """What of the server's own state is shown."""

    draining: bool

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...


class ServerMetrics:
    """One registry a server, so that several can live in one process."""

    def __init__(self, backend: RoutedBackend, load: Load, budget: BudgetController | None):
        self._registry = CollectorRegistry()
        self._registry.register(_Live(backend, load, budget))
        self.requests = Counter(
            "tokalign_routing_requests",
            "Requests by endpoint and HTTP status (499: the client left before an answer began).",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self.broken_streams = Counter(
            "tokalign_routing_broken_streams",
            "Streams that ended early, by reason (client: it left).",
            ("reason",),
            registry=self._registry,
        )
        self.first_token = Histogram(
            "tokalign_routing_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self.latency = Histogram(
            "tokalign_routing_request_seconds",
            "From a request's arrival to the end of its answer.",
            registry=self._registry,
            buckets=_SECONDS,
        )

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)


class _Live(Collector):
    """Numbers that are read when they are asked for."""

    def __init__(self, backend: RoutedBackend, load: Load, budget: BudgetController | None):
        self._backend, self._load, self._budget = backend, load, budget

    def collect(self) -> Iterable[Metric]:
        stats = self._backend.stats
        tokens = CounterMetricFamily(
            "tokalign_routing_tokens", "Tokens by the model that wrote them.", labels=["source"]
        )
        tokens.add_metric(["slm"], stats.slm_tokens)
        tokens.add_metric(["llm"], stats.llm_tokens)
        yield tokens
        positions = CounterMetricFamily(
            "tokalign_routing_positions", "Tokens that went through a model, prompts included.", labels=["model"]
        )
        positions.add_metric(["slm"], stats.slm_positions)
        positions.add_metric(["llm"], stats.llm_positions)
        yield positions
        yield CounterMetricFamily("tokalign_routing_handoffs", "Tokens taken from the SLM.", value=stats.handoffs)
        yield CounterMetricFamily(
            "tokalign_routing_drafted", "Tokens drafted for the LLM to verify.", value=stats.drafted
        )
        gauges = {
            "llm_rate": ("Share of the tokens that the LLM wrote, since the start.", stats.llm_rate),
            "threshold": ("Score from which on a token goes to the LLM.", self._backend.threshold),
            "degraded": ("1 while the SLM goes on without the LLM.", float(self._backend.degraded)),
            "running": ("Completions being written.", float(self._load.running)),
            "queued": ("Completions that wait for a place.", float(self._load.waiting)),
            "draining": ("1 from the first SIGTERM on.", float(self._load.draining)),
        }
        if self._budget is not None:
            gauges["budget_target_rate"] = ("LLM rate that the threshold is steered to.", self._budget.target_rate)
            gauges["budget_rate"] = ("LLM rate as the controller averages it.", self._budget.rate)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"tokalign_routing_{name}", text, value=value)

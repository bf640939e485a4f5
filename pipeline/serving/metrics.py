"""Prometheus counters and gauges of the server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's metrics, in a registry of its own: servers of one process stay apart."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        prefix, registry = "noisy_student_serve", self._registry
        self._answers = Counter(
            f"{prefix}_answers", "Answers by route and status", ["route", "status"], registry=registry
        )
        self._bytes = Counter(f"{prefix}_sent_bytes", "Bytes of shards, labels and files sent", registry=registry)
        self._answering = Gauge(f"{prefix}_answering", "Requests being answered", registry=registry)
        self._connections = Gauge(f"{prefix}_connections", "Open connections", registry=registry)

    def watch(self, answering: Callable[[], int], connections: Callable[[], int]) -> None:
        """Set the functions that the gauges read."""
        self._answering.set_function(answering)
        self._connections.set_function(connections)

    def count_answer(self, route: str, status: int) -> None:
        """Count an answer."""
        self._answers.labels(route, str(status)).inc()

    def count_bytes(self, num_bytes: int) -> None:
        """Count bytes sent."""
        self._bytes.inc(num_bytes)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

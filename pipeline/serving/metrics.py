"""Prometheus counters and gauges of the server, summed over its processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ROUTES = (
    "/", "/manifest.json", "/shards/{name}.tar", "/labels/{name}.parquet", "/samples/{number}", "/healthz", "/metrics",
    "/openapi.json", "/login", "/{file}", "none",
)  # fmt: skip
_PREFIX = "noisy_student_serve"
_STATUSES = 600
_BYTES, _ANSWERING, _CONNECTIONS, _ANSWERS = (
    0,
    1,
    2,
    3,
)  # cells of a process; from the last on, one per route and status
_CELLS = _ANSWERS + len(ROUTES) * _STATUSES


class Counts:
    """Numbers in memory that all processes of a server share: a row for each, which it alone writes."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self._cells = multiprocessing.get_context("spawn").RawArray("q", num_processes * _CELLS)

    def rows(self) -> np.ndarray:
        """The numbers, int64 [processes, cells]."""
        return np.frombuffer(self._cells, np.int64).reshape(self.num_processes, _CELLS)


class Metrics(Collector):
    """One process's part of its server's metrics, in a registry of its own: servers of one process stay apart.

    Args:
        position: the process's row in `counts`.
    """

    def __init__(self, counts: Counts | None = None, position: int = 0) -> None:
        counts = counts or Counts(1)
        self._all = counts.rows()
        self._own = self._all[position]
        self._registry = CollectorRegistry()
        self._registry.register(self)
        if counts.num_processes == 1:  # of several, each answer would be another process's
            ProcessCollector(registry=self._registry)

    @property
    def num_answering(self) -> int:
        """Requests being answered, by all processes."""
        return int(self._all[:, _ANSWERING].sum())

    @property
    def num_connections(self) -> int:
        """Open connections of all processes."""
        return int(self._all[:, _CONNECTIONS].sum())

    def set_answering(self, number: int) -> None:
        """Set the number of requests that this process is answering."""
        self._own[_ANSWERING] = number

    def set_connections(self, number: int) -> None:
        """Set the number of this process's open connections."""
        self._own[_CONNECTIONS] = number

    def count_answer(self, route: str, status: int) -> None:
        """Count an answer; `route` is one of ROUTES."""
        self._own[_ANSWERS + ROUTES.index(route) * _STATUSES + status] += 1

    def count_bytes(self, num_bytes: int) -> None:
        """Count bytes sent."""
        self._own[_BYTES] += num_bytes

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; for prometheus_client."""
        total = self._all.sum(axis=0)
        answers = CounterMetricFamily(f"{_PREFIX}_answers", "Answers by route and status", labels=["route", "status"])
        for cell in np.flatnonzero(total[_ANSWERS:]).tolist():
            route, status = divmod(cell, _STATUSES)
            answers.add_metric([ROUTES[route], str(status)], float(total[_ANSWERS + cell]))
        yield answers
        yield CounterMetricFamily(
            f"{_PREFIX}_sent_bytes", "Bytes of shards, labels and files sent", value=float(total[_BYTES])
        )
        yield GaugeMetricFamily(f"{_PREFIX}_answering", "Requests being answered", value=float(total[_ANSWERING]))
        yield GaugeMetricFamily(f"{_PREFIX}_connections", "Open connections", value=float(total[_CONNECTIONS]))

"""What the server counts, in Prometheus' words."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serve.batching import Observer

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One server's counters; a registry of its own, so that two servers in one process do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix = "pairstream_"
        self.requests = Counter(
            f"{prefix}requests", "Answers by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            f"{prefix}request_seconds",
            "Seconds from the headers to the end of the answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.refused = Counter(
            f"{prefix}refused", "Requests refused, by reason", ["reason"], registry=self.registry
        )
        self.depth = Gauge(
            f"{prefix}queue_items",
            "Items that wait or are worked on",
            ["queue"],
            registry=self.registry,
        )
        self.batch = Histogram(
            f"{prefix}batch_items",
            "Items of a forward pass",
            ["queue"],
            buckets=ITEMS,
            registry=self.registry,
        )
        self.forward = Histogram(
            f"{prefix}forward_seconds",
            "Seconds of a forward pass",
            ["queue"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.wait = Histogram(
            f"{prefix}queue_seconds",
            "Seconds before the first pass of a request",
            ["queue"],
            buckets=SECONDS,
            registry=self.registry,
        )

        self.children: dict[tuple[str, int], Any] = {}

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one answer."""
        if (route, status) not in self.children:  # a look-up by labels costs as much as the counting
            counter = self.requests.labels(route, str(status))
            self.children[route, status] = counter.inc, self.seconds.labels(route).observe
        count, observe = self.children[route, status]
        count()
        observe(seconds)

    def observer(self, queue: str) -> Observer:
        """The reports of one queue."""
        batch, forward, wait = (each.labels(queue) for each in (self.batch, self.forward, self.wait))
        depth = self.depth.labels(queue)

        def passed(items: int, seconds: float) -> None:
            batch.observe(items)
            forward.observe(seconds)

        return Observer(
            batch=passed,
            waited=wait.observe,
            depth=depth.set,
            rejected=lambda reason: self.refused.labels(f"{queue}_{reason}").inc(),
        )

    def text(self) -> bytes:
        """Everything, in the text format."""
        return generate_latest(self.registry)

"""What the gateway counts: sizes and times, never what is in them."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from veilhead.engine import QueryTrace

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Metrics:
    """Counters of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "veilhead_gateway_requests",
            "Answers to POST /predict",
            ["status"],
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "veilhead_gateway_request_seconds",
            "From a request's headers to its answer",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch_texts = Histogram(
            "veilhead_gateway_batch_texts",
            "Texts in a batch",
            buckets=_SIZES,
            registry=self.registry,
        )
        self._batch_wait_seconds = Histogram(
            "veilhead_gateway_batch_wait_seconds",
            "How long a batch's first text waited",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._round_trip_seconds = Histogram(
            "veilhead_gateway_round_trip_seconds",
            "Encrypted query out to reply in, retries included",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._bytes = Counter(
            "veilhead_gateway_upstream_bytes",
            "Bytes of encrypted queries and replies",
            ["direction"],
            registry=self.registry,
        )
        self.waiting = Gauge(
            "veilhead_gateway_waiting_texts", "Texts in no batch yet", registry=self.registry
        )

    def answered(self, status: int, seconds: float) -> None:
        """Count an answer to a caller."""
        self._requests.labels(str(status)).inc()
        self._request_seconds.observe(seconds)

    def batched(self, texts: int, waited: float) -> None:
        """Count a batch."""
        self._batch_texts.observe(texts)
        self._batch_wait_seconds.observe(waited)

    def queried(self, trace: QueryTrace) -> None:
        """Count an encrypted query."""
        self._round_trip_seconds.observe(trace.round_trip_seconds)
        self._bytes.labels("out").inc(trace.query_bytes)
        self._bytes.labels("in").inc(trace.reply_bytes)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

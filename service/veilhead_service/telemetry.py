"""Metrics for Prometheus, in seconds and bytes. docs/operations.md lists them.

Every label is a name from a closed set: routes' templates, published models, configured tenants,
problem codes. Nothing that a client sends becomes a label. Each app has a registry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Protocol

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

if TYPE_CHECKING:
    from veilhead_service.access_log import AccessLog
    from veilhead_service.keys import KeyStore
    from veilhead_service.observation import Observation
    from veilhead_service.strangers import Strangers

MEDIA_TYPE: Final = CONTENT_TYPE_LATEST

#: Upper bounds of histograms: seconds from a fraction of an evaluation to a time-out, bytes from
#: a problem to a file of a backbone.
_SECONDS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
_BYTES: Final = (*(4.0**power * 2**8 for power in range(10)), 2.0**28, 2.0**32)

#: A metric read when it is asked for.
Reading = Callable[[], Iterable[Metric]]


class ModelFigures(Protocol):
    """What is shown of a model that cannot be answered for."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def why(self) -> str:
        """The kind of reason."""


class PoolFigures(Protocol):
    """What is shown of the workers."""

    @property
    def alive(self) -> int:
        """Workers that are up."""

    @property
    def busy(self) -> int:
        """Those of them that evaluate."""

    @property
    def waiting(self) -> int:
        """Queries that wait for a worker."""

    @property
    def restarts(self) -> Mapping[Any, int]:
        """Workers replaced so far, by reason."""

    @property
    def failed_starts(self) -> int:
        """Workers that did not come up so far."""

    @property
    def unavailable(self) -> Sequence[ModelFigures]:
        """Published models that cannot be answered for."""


class BudgetFigures(Protocol):
    """What is shown of a tenant's budget for a model, in ordinary answers."""

    @property
    def tenant(self) -> str:
        """The tenant's name."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def used(self) -> int:
        """Used in the current period."""

    @property
    def remaining(self) -> int | None:
        """Left in the current period; None where there is no limit."""


class _Readings:
    """A collector of metrics that other parts keep."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []

    def collect(self) -> Iterator[Metric]:
        """All of them, as they are now."""
        for reading in self.readings:
            yield from reading()


class Telemetry:
    """The metrics of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._read = _Readings()
        self.registry.register(self._read)
        build = Gauge("veilhead_build_info", "1.", ["version"], registry=self.registry)
        build.labels(version("veilhead")).set(1)
        self._requests = Counter(
            "veilhead_requests_total",
            "Requests answered, by route, model and HTTP status.",
            ["method", "route", "model", "code"],
            registry=self.registry,
        )
        self._tenant_requests = Counter(
            "veilhead_tenant_requests_total",
            "Requests answered, by tenant, model and HTTP status.",
            ["tenant", "model", "code"],
            registry=self.registry,
        )
        self._rejected = Counter(
            "veilhead_rejected_total",
            "Requests refused, by the code of the problem.",
            ["reason"],
            registry=self.registry,
        )
        self._duration = self._seconds(
            "veilhead_request_duration_seconds", "Request to answer, both whole.", "route"
        )
        self._queue = self._seconds(
            "veilhead_queue_seconds", "What a query waited for a worker.", "model"
        )
        self._evaluation = self._seconds(
            "veilhead_evaluation_seconds", "What a worker spent on a query.", "model"
        )
        self._request_bytes = self._bytes("veilhead_request_bytes", "Bodies of requests.")
        self._reply_bytes = self._bytes("veilhead_reply_bytes", "Bodies of answers.")
        self.in_flight = Gauge(
            "veilhead_requests_in_flight", "Requests being answered.", registry=self.registry
        )

    def _seconds(self, name: str, text: str, label: str) -> Histogram:
        return Histogram(name, text, [label], buckets=_SECONDS, registry=self.registry)

    def _bytes(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["route"], buckets=_BYTES, registry=self.registry)

    def watch(self, reading: Reading) -> None:
        """Add metrics that are read whenever they are asked for."""
        self._read.readings.append(reading)

    def observe(self, seen: Observation) -> None:
        """Count an answered request."""
        code = str(seen.status)
        self._requests.labels(seen.method, seen.route, seen.model, code).inc()
        self._tenant_requests.labels(seen.tenant, seen.model, code).inc()
        if seen.problem is not None:
            self._rejected.labels(seen.problem).inc()
        self._duration.labels(seen.route).observe(seen.seconds)
        self._request_bytes.labels(seen.route).observe(seen.request_bytes)
        self._reply_bytes.labels(seen.route).observe(seen.reply_bytes)
        if seen.queue_seconds is not None:
            self._queue.labels(seen.model).observe(seen.queue_seconds)
        if seen.evaluate_seconds is not None:
            self._evaluation.labels(seen.model).observe(seen.evaluate_seconds)

    def expose(self, budgets: Sequence[BudgetFigures] = ()) -> bytes:
        """All metrics in Prometheus' text format.

        Args:
            budgets: what tenants used of their budgets, which only the state knows.
        """
        shown = generate_latest(self.registry)
        if budgets:
            registry = CollectorRegistry()
            readings = _Readings()
            readings.readings.append(budget_metrics(budgets))
            registry.register(readings)
            shown += generate_latest(registry)
        return shown


def key_metrics(keys: KeyStore) -> Reading:
    """Metrics of the registered keys."""

    def read() -> Iterator[Metric]:
        yield GaugeMetricFamily("veilhead_keys_held", "Registered keys.", len(keys))
        yield GaugeMetricFamily(
            "veilhead_key_memory_bytes", "Memory of registered keys.", keys.bytes_held
        )
        dropped = CounterMetricFamily(
            "veilhead_keys_dropped",
            "Keys that were dropped: expired, or evicted to make room.",
            labels=["reason"],
        )
        dropped.add_metric(["expired"], keys.expired_total)
        dropped.add_metric(["evicted"], keys.evicted_total)
        yield dropped

    return read


def access_log_metrics(log: AccessLog) -> Reading:
    """Metrics of the access log."""

    def read() -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "veilhead_access_log_available",
            "1 while records can be written, else 0.",
            int(log.available),
        )
        yield CounterMetricFamily(
            "veilhead_access_log_records", "Records written.", log.records_written
        )
        yield CounterMetricFamily(
            "veilhead_access_log_unrecorded",
            "Requests that could not be recorded, refused for it or not.",
            log.requests_unrecorded,
        )

    return read


def network_metrics(count: Callable[[], int], most: int, strangers: Strangers) -> Reading:
    """Metrics of open connections, and of what was refused without a good API key."""

    def read() -> Iterator[Metric]:
        yield GaugeMetricFamily("veilhead_connections", "Open connections.", count())
        yield GaugeMetricFamily(
            "veilhead_connections_limit", "Open connections that there may be.", most
        )
        refused = CounterMetricFamily(
            "veilhead_strangers_refused",
            "Requests and connections without a good API key that were refused, by kind.",
            labels=["reason"],
        )
        for kind, number in strangers.totals.items():
            refused.add_metric([kind], number)
        yield refused

    return read


def pool_metrics(figures: Callable[[], PoolFigures]) -> Reading:
    """Metrics of the evaluating processes."""

    def read() -> Iterator[Metric]:
        now = figures()
        for name, text, number in (
            ("veilhead_workers_alive", "Workers that are up.", now.alive),
            ("veilhead_workers_busy", "Workers that evaluate, or load a head.", now.busy),
            ("veilhead_queries_waiting", "Queries that wait for a worker.", now.waiting),
        ):
            yield GaugeMetricFamily(name, text, number)
        restarts = CounterMetricFamily(
            "veilhead_worker_restarts", "Workers that were replaced.", labels=["reason"]
        )
        for reason, count in now.restarts.items():
            restarts.add_metric([str(reason)], count)
        yield restarts
        yield CounterMetricFamily(
            "veilhead_worker_failed_starts", "Workers that did not come up.", now.failed_starts
        )
        unavailable = GaugeMetricFamily(
            "veilhead_model_unavailable",
            "1 for a published model that cannot be answered for.",
            labels=["model", "reason"],
        )
        for model, why in {(row.name, str(row.why)) for row in now.unavailable}:
            unavailable.add_metric([model, why], 1)
        yield unavailable

    return read


def budget_metrics(budgets: Sequence[BudgetFigures]) -> Reading:
    """Metrics of tenants' budgets. A remainder is shown only where there is a limit."""

    def read() -> Iterator[Metric]:
        labels = ["tenant", "model"]
        used = GaugeMetricFamily(
            "veilhead_budget_used", "Used in the current period, in answers.", labels=labels
        )
        remaining = GaugeMetricFamily(
            "veilhead_budget_remaining", "Left in the current period, in answers.", labels=labels
        )
        for budget in budgets:
            names = [budget.tenant, budget.model]
            used.add_metric(names, budget.used)
            if budget.remaining is not None:
                remaining.add_metric(names, budget.remaining)
        yield used
        yield remaining

    return read

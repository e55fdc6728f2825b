"""Optional OpenTelemetry spans: a request, and in it receive, queue and evaluate.

Spans are made from what `observation.py` notes, once a request is answered. Their attributes are
names from closed sets, sizes and times. Nothing of a request gets in: no path, no header, and no
trace context either, which a client could choose.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

from veilhead_protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

    from veilhead_service.observation import Observation


class Tracing:
    """Makes spans of answered requests."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("veilhead.service")

    @classmethod
    def over_otlp(cls, endpoint: str | None) -> Self:
        """Spans to an OTLP collector over HTTP.

        Args:
            endpoint: its URL; OpenTelemetry's own variables decide when it is None.

        Raises:
            ConfigurationError: when OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"tracing needs {error.name!r}: pip install 'veilhead[otel]'"
            ) from error
        provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: "veilhead"}), shutdown_on_exit=False
        )
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        return cls(provider)

    def stop(self) -> None:
        """Send what waits."""
        self._provider.shutdown()

    def record(self, seen: Observation) -> None:
        """Make the spans of a request that was answered just now."""
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, StatusCode

        end = time.time_ns()
        start = end - round(seen.seconds * 1e9)
        attributes: dict[str, Any] = {
            "http.request.method": seen.method,
            "http.route": seen.route,
            "http.response.status_code": seen.status,
            "http.request.body.size": seen.request_bytes,
            "http.response.body.size": seen.reply_bytes,
            "veilhead.request_id": seen.request_id,
            "veilhead.model": seen.model,
            "veilhead.tenant": seen.tenant,
        }
        if seen.problem is not None:
            attributes["error.type"] = seen.problem
        span = self._tracer.start_span(
            f"{seen.method} {seen.route}",
            context=Context(),  # a trace of its own
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=start,
        )
        if seen.status >= 500:
            span.set_status(StatusCode.ERROR)
        inside = trace.set_span_in_context(span, Context())
        received = start + round(seen.receive_seconds * 1e9)
        parts = [("receive", start, received)]
        if seen.evaluate_seconds is not None:
            evaluated = received + round((seen.queue_seconds or 0.0) * 1e9)
            if seen.queue_seconds is not None:
                parts.append(("queue", received, evaluated))
            parts.append(("evaluate", evaluated, evaluated + round(seen.evaluate_seconds * 1e9)))
        for name, begun, ended in parts:
            self._tracer.start_span(name, context=inside, start_time=begun).end(min(ended, end))
        span.end(end)

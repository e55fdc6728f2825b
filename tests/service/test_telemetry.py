"""Metrics and spans of the real app, under friendly and hostile requests."""

from __future__ import annotations

import re

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from support.tenants import add_tenant, bearer

from veilhead_protocol.errors import ConfigurationError
from veilhead_service.app import create_app
from veilhead_service.observation import ObservationMiddleware
from veilhead_service.settings import Settings
from veilhead_service.strangers import Strangers
from veilhead_service.telemetry import Telemetry
from veilhead_service.tenants import KeyScope
from veilhead_service.tracing import Tracing


def samples(client):
    """{(name, frozenset of labels): value} of everything that /metrics shows."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(found, name, **labels):
    return found.get((name, frozenset(labels.items())), 0.0)


@pytest.fixture
def added(service):
    """What a function changes in the metrics of the running service."""

    def run(act):
        before = samples(service.client)
        act()
        after = samples(service.client)

        def change(name, **labels):
            return value(after, name, **labels) - value(before, name, **labels)

        return change

    return run


def test_a_query_is_counted_and_timed_under_its_model(service, added):
    query = service.query("digits")
    reply = []
    change = added(lambda: reply.append(service.infer("digits", query.data)))
    route = "/v1/models/{name}/infer"
    assert reply[0].status_code == 200
    assert (
        change("veilhead_requests_total", method="POST", route=route, model="digits", code="200")
        == 1
    )
    labels = {"tenant": "insecure-local", "model": "digits", "code": "200"}
    assert change("veilhead_tenant_requests_total", **labels) == 1
    assert change("veilhead_evaluation_seconds_count", model="digits") == 1
    seconds = change("veilhead_evaluation_seconds_sum", model="digits")
    said = float(reply[0].headers["server-timing"].removeprefix("evaluate;dur=")) / 1e3
    assert seconds == pytest.approx(said, abs=1e-6)
    assert change("veilhead_request_duration_seconds_sum", route=route) > seconds
    assert change("veilhead_request_bytes_sum", route=route) == len(query.data)
    assert change("veilhead_reply_bytes_sum", route=route) == len(reply[0].content)


def test_a_refusal_is_counted_by_its_reason(service, added):
    change = added(lambda: service.infer("digits", service.query("digits").data[:-1]))
    assert change("veilhead_rejected_total", reason="wrong-length") == 1
    assert change("veilhead_rejected_total", reason="not-found") == 0


def test_keys_are_counted_in_number_and_bytes_and_by_how_they_went(
    store, artifacts, make_service, tmp_path
):
    app = create_app(Settings(store=store, key_memory_bytes=2**17, insecure_no_tenants=True))
    small = make_service(TestClient(app), artifacts)
    messages = [small.session("digits")._fresh_enough_key().message for _ in range(6)]
    for message in messages:
        assert small.put(message).status_code == 201
    found = samples(small.client)
    assert value(found, "veilhead_keys_held") == 4
    assert value(found, "veilhead_key_memory_bytes") == 4 * len(messages[0])
    assert value(found, "veilhead_keys_dropped_total", reason="evicted") == 2
    assert value(found, "veilhead_keys_dropped_total", reason="expired") == 0


def test_expired_keys_are_counted(store, artifacts, make_service):
    app = create_app(Settings(store=store, key_idle_seconds=1e-6, insecure_no_tenants=True))
    brief = make_service(TestClient(app), artifacts)
    message = brief.session("digits")._fresh_enough_key().message
    brief.put(message)
    assert brief.put(message).status_code == 201  # it was gone
    assert value(samples(brief.client), "veilhead_keys_dropped_total", reason="expired") == 1


def test_requests_in_flight_are_those_being_answered(service):
    assert value(samples(service.client), "veilhead_requests_in_flight") == 1  # this very one


def test_apps_of_one_process_count_for_themselves(store):
    first, second = (
        TestClient(create_app(Settings(store=store, insecure_no_tenants=True))) for _ in range(2)
    )
    first.get("/livez")
    labels = {"method": "GET", "route": "/livez", "model": "none", "code": "200"}
    assert value(samples(first), "veilhead_requests_total", **labels) == 1
    assert value(samples(second), "veilhead_requests_total", **labels) == 0


def test_what_the_gate_refuses_is_counted_under_its_route(store, tmp_path):
    """And paths of no route still are all one."""
    key = add_tenant(tmp_path / "state", "clinic", scopes={KeyScope.METRICS})
    app = create_app(Settings(store=store, state_directory=tmp_path / "state", access_log="off"))
    client = TestClient(app)
    paths = {
        "/v1/models": "/v1/models",
        "/v1/models/digits": "/v1/models/{name}",
        "/v1/models/nowhere/files/a/b": "/v1/models/{name}/files/{path:path}",
        "/v1/keys/x": "/v1/keys/{id}",
        "/docs": "/docs",
        "/v1/models/digits/nowhere": "other",
        "/v1/models/": "other",
        "/nowhere": "other",
    }
    for number in range(3):
        for path in paths:
            assert client.get(f"{path}{number}" if path == "/nowhere" else path).status_code == 401
    assert client.get("/v1/models", headers=bearer(key)).status_code == 403
    client.headers.update(bearer(key))
    counted = samples(client)

    def count(route, code):
        model = "other" if "{name}" in route else "none"
        labels = {"method": "GET", "route": route, "model": model, "code": code}
        return value(counted, "veilhead_requests_total", **labels)

    assert {route: count(route, "401") for route in paths.values()} == {
        route: 9 if route == "other" else 3 for route in paths.values()
    }
    assert count("/v1/models", "403") == 1


MARKER = "zqxjkmarker"


def test_nothing_that_a_client_chooses_becomes_a_label(store, request_raw):
    """Labels are bounded, whatever paths, methods, names, ids and headers come."""
    app = create_app(Settings(store=store, insecure_no_tenants=True))
    client = TestClient(app)
    hostile = (MARKER, f"{MARKER}\n# TYPE x", f'{MARKER}"}} 1', "../" + MARKER, f"{MARKER}%00")

    def ask(serial):
        for text in hostile:
            tail = f"{text}{serial}"
            for path in (
                f"/{tail}",
                f"/v1/models/{tail}",
                f"/v1/models/{tail}/infer",
                f"/v1/models/digits/files/{tail}",
                f"/v1/keys/{tail}",
            ):
                headers = {
                    "X-Request-Id": tail.replace("\n", ""),
                    "User-Agent": tail.replace("\n", ""),
                    "traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01",
                    "Content-Type": "application/octet-stream",
                }
                for method in ("GET", "PUT", "POST", f"{MARKER}{serial}".upper()):
                    status, _, body = request_raw(app, method, path, headers=headers)
                    assert 400 <= status < 500, (method, path, body)

    samples(client)
    ask(0)
    first = set(samples(client))
    text = client.get("/metrics").text
    for serial in range(1, 4):
        ask(serial)
    assert set(samples(client)) == first  # no new series
    assert MARKER not in text.lower()
    models = set(re.findall(r'model="([^"]*)"', text))
    assert models <= {"digits", "other", "none"}
    routes = set(re.findall(r'route="([^"]*)"', text))
    assert routes <= {route.path for route in app.routes if hasattr(route, "path")} | {
        "other",
        "/v1/models/{name}",
        "/v1/models/{name}/infer",
        "/v1/models/{name}/files/{path:path}",
        "/v1/keys/{id}",
        "/metrics",
    }


# --- spans ----------------------------------------------------------------------------------------


@pytest.fixture
def spans(store, artifacts, make_service):
    """A real app whose spans stay in memory, and the spans."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(Settings(store=store, workers=1, insecure_no_tenants=True))
    app.add_middleware(
        ObservationMiddleware,
        telemetry=Telemetry(),
        strangers=Strangers(None),
        tracing=Tracing(provider),
    )
    with TestClient(app) as client:
        yield make_service(client, artifacts), exporter
    provider.shutdown()


def test_a_query_makes_a_span_with_its_parts_inside(spans):
    service, exporter = spans
    query = service.query("digits")
    exporter.clear()
    headers = {
        "traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01",
        "X-Note": MARKER,
        "Content-Type": "application/octet-stream",
    }
    answer = service.client.post(
        f"/v1/models/digits/infer?note={MARKER}", content=query.data, headers=headers
    )
    assert answer.status_code == 200
    found = {span.name: span for span in exporter.get_finished_spans()}
    request = found.pop("POST /v1/models/{name}/infer")
    assert {"receive", "evaluate"} <= set(found) <= {"receive", "queue", "evaluate"}
    assert request.parent is None
    assert request.context.trace_id != int("ab" * 16, 16)  # not a trace that the client chose
    assert request.attributes["veilhead.model"] == "digits"
    assert request.attributes["http.request.body.size"] == len(query.data)
    assert request.attributes["veilhead.request_id"] == answer.headers["x-request-id"]
    for span in found.values():
        assert span.parent.span_id == request.context.span_id
        assert request.start_time <= span.start_time <= span.end_time <= request.end_time
    assert MARKER not in "".join(span.to_json() for span in exporter.get_finished_spans())


def test_a_refusal_names_its_problem_and_no_path(spans):
    service, exporter = spans
    exporter.clear()
    service.client.get(f"/{MARKER}?{MARKER}")
    (request,) = (span for span in exporter.get_finished_spans() if span.parent is None)
    assert request.attributes["error.type"] == "not-found"
    assert MARKER not in request.to_json()


def test_tracing_is_off_unless_it_is_set(store):
    """FastAPI's own spans, which hold paths and query strings, are never made."""
    from opentelemetry import trace

    app = create_app(Settings(store=store, insecure_no_tenants=True))
    assert not app._native_telemetry.enabled()
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app._native_telemetry.config["tracer_provider"] = provider  # as a global one would be found
    TestClient(app).get(f"/livez?{MARKER}")
    assert exporter.get_finished_spans() == ()
    assert trace.get_current_span().get_span_context().is_valid is False
    provider.shutdown()


def test_tracing_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigurationError, match="otel"):
        create_app(Settings(tracing=True))

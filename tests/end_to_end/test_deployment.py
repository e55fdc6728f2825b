"""What `deploy/` ships is run: Prometheus, docker-compose, and a collector of traces, around one
real service. Programs that are not installed here are skipped. For the proxies there is
`test_proxies.py`."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from support.deployment import DEPLOY, ROOT, free_port, needs, replaced, started, until
from support.heads import artifact, unit_rows
from support.services import running
from support.tenants import add_tenant, bearer

from veilhead import Client
from veilhead_service.model_store import publish
from veilhead_service.tenants import KeyScope


class Collector:
    """A small OTLP collector over HTTP: what it was sent, parsed."""

    def __init__(self):
        self.requests = requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                requests.append((self.path, self.headers["Content-Type"], body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def spans(self):
        """(service, span, attributes) of every span so far."""
        found = []
        for _, _, body in list(self.requests):
            message = ExportTraceServiceRequest.FromString(body)
            for resource in message.resource_spans:
                (service,) = (
                    item.value.string_value
                    for item in resource.resource.attributes
                    if item.key == "service.name"
                )
                for scope in resource.scope_spans:
                    for span in scope.spans:
                        given = {item.key: item.value for item in span.attributes}
                        found.append((service, span, given))
        return found


@pytest.fixture(scope="module")
def collector():
    made = Collector()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def head():
    return artifact(5, 64, name="colours")


@pytest.fixture(scope="module")
def service(tmp_path_factory, head, collector):
    """(URL, API key of every scope) of a service with a tenant, metrics and traces."""
    root = tmp_path_factory.mktemp("deployment")
    head.save(root / "colours")
    publish(root / "colours", root / "store")
    api_key = add_tenant(root / "state", "clinic", scopes=KeyScope)
    tracing = ("--set", "tracing=true", "--set", f"tracing_endpoint={collector.url}")
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "200", "NO_PROXY": "127.0.0.1"}
    state = ("--workers", "1", "--state", str(root / "state"))
    with (root / "service.log").open("wb") as log:
        with running(
            root / "store", *state, *tracing, access=(), log=log, environment=environment
        ) as url:
            yield url, api_key
        assert b'"error"' not in (root / "service.log").read_bytes()


@needs("promtool")
def test_promtool_accepts_the_rules():
    rules = str(DEPLOY / "prometheus/alerts.yml")
    done = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


@needs("prometheus")
@needs("promtool")
def test_prometheus_scrapes_the_service_and_evaluates_rules_and_panels(service, tmp_path):
    url, api_key = service
    (tmp_path / "token").write_text(api_key)
    config = tmp_path / "prometheus.yml"
    config.write_text(
        replaced(
            (DEPLOY / "prometheus/prometheus.yml").read_text(),
            rules=("/etc/prometheus/alerts.yml", str(DEPLOY / "prometheus/alerts.yml")),
            token=("/run/secrets/metrics-token", str(tmp_path / "token")),
            target=("veilhead:8000", url.removeprefix("http://")),
            interval=("15s", "1s"),
        )
    )
    check = ["promtool", "check", "config", str(config)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    port = free_port()
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (
        started([*command, f"--web.listen-address=127.0.0.1:{port}"], tmp_path),
        httpx2.Client(base_url=f"http://127.0.0.1:{port}/api/v1", trust_env=False) as http,
    ):

        def workers():
            query = http.get("/query", params={"query": "veilhead_workers_alive"})
            return query.is_success and query.json()["data"]["result"]

        (sample,) = until(workers)
        assert sample["metric"]["job"] == "veilhead"
        assert sample["value"][1] == "1"
        ranges = {"$__rate_interval": "1m", "$__range": "1h"}
        for panel in json.loads((DEPLOY / "grafana/veilhead.json").read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"]
                for name, length in ranges.items():
                    expression = expression.replace(name, length)
                answer = http.get("/query", params={"query": expression}).json()
                assert answer["status"] == "success", (panel["title"], answer)

        def rules():
            return http.get("/rules").json()["data"]["groups"][0]["rules"]

        def evaluated_again():
            found = rules()
            times = {rule["lastEvaluation"] for rule in found}
            return None if times & earlier else found

        for _ in range(2):  # the first may have begun before the sample was there
            earlier = {rule["lastEvaluation"] for rule in rules()}
            found = until(evaluated_again)
        assert found
        for rule in found:
            assert (rule["health"], rule["state"]) == ("ok", "inactive"), rule["name"]


@needs("docker-compose")
def test_docker_compose_accepts_its_file(tmp_path):
    done = subprocess.run(
        ["docker-compose", "-f", str(ROOT / "compose.yaml"), "config"],
        capture_output=True,
        text=True,
        env=os.environ | {"GRAFANA_PASSWORD": "chosen", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == {"veilhead", "prometheus", "grafana"}


def test_spans_reach_a_collector_over_otlp(service, collector, head):
    url, api_key = service
    marker = "zqxjkmarker"
    with Client(url, "colours", api_key=api_key) as client:
        client.logits(unit_rows(1, 64))
    httpx2.get(f"{url}/{marker}?{marker}", headers=bearer(api_key), trust_env=False)

    def arrived():
        found = collector.spans()
        names = {span.name for _, span, _ in found}
        return found if {"POST /v1/models/{name}/infer", "GET other"} <= names else None

    found = until(arrived)
    assert {(path, kind) for path, kind, _ in collector.requests} == {
        ("/v1/traces", "application/x-protobuf")
    }
    assert {service for service, _, _ in found} == {"veilhead"}
    query, given = next(
        (span, given) for _, span, given in found if span.name == "POST /v1/models/{name}/infer"
    )
    assert given["http.response.status_code"].int_value == 200
    assert given["veilhead.model"].string_value == "colours"
    assert given["veilhead.tenant"].string_value == "clinic"
    inside = {
        span.name: span
        for _, span, _ in found
        if span.trace_id == query.trace_id and span.parent_span_id == query.span_id
    }
    assert set(inside) == {"receive", "queue", "evaluate"}
    for span in inside.values():
        assert query.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= query.end_time_unix_nano
    sent = b"".join(body for _, _, body in collector.requests)
    assert marker.encode() not in sent
    assert api_key.encode() not in sent

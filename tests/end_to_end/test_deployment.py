"""What `deploy/` ships is run: proxies with TLS, Prometheus, and a collector of traces, all around
one real service. Programs that are not installed here are skipped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path

import httpx2
import numpy as np
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from support.heads import artifact, unit_rows
from support.services import running
from support.tenants import add_tenant, bearer

from veilhead import Client
from veilhead_service.model_store import publish
from veilhead_service.tenants import KeyScope

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
NAME = "veilhead.example.com"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def until(condition, *, seconds=60):
    """Wait for something true, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx2.TransportError):
            if found := condition():
                return found
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


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


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A directory with a certificate of its own authority, as the example calls its files."""
    directory = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.now(UTC)
    alternatives = [x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (directory / "fullchain.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (directory / "privkey.pem").write_bytes(private)
    return directory


def replaced(text, **pairs):
    """An example with what its user has to set; everything in it must be found."""
    for old, new in pairs.values():
        assert old in text, old
        text = text.replace(old, new)
    return text


def nginx(directory, certificate, port, upstream):
    """The command line of nginx with the example, on this port."""
    site = replaced(
        (DEPLOY / "nginx.conf").read_text(),
        upstream=("127.0.0.1:8000", upstream),
        listen=("listen 443 ", f"listen 127.0.0.1:{port} "),
        second=("    listen [::]:443 ssl;\n", ""),
        name=(NAME, "localhost"),
        certificate=("/etc/ssl/veilhead", str(certificate)),
    )
    (directory / "site.conf").write_text(site)
    scratch = "".join(
        f"{kind}_temp_path {directory}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"daemon off; pid {directory}/pid; error_log stderr; events {{}} "
        f"http {{ access_log off; {scratch} include {directory}/site.conf; }}"
    )
    return ["nginx", "-e", "stderr", "-p", str(directory), "-c", str(directory / "nginx.conf")]


def caddy(directory, certificate, port, upstream):
    """The command line of Caddy with the example, on this port."""
    tls = f"tls {certificate}/fullchain.pem {certificate}/privkey.pem"
    site = replaced(
        (DEPLOY / "Caddyfile").read_text(),
        upstream=("127.0.0.1:8000", upstream),
        site=(f"{NAME} {{\n", f"https://localhost:{port} {{\n\t{tls}\n"),
    )
    (directory / "Caddyfile").write_text("{\n\tadmin off\n\tauto_https off\n}\n" + site)
    given = ("--config", str(directory / "Caddyfile"), "--adapter", "caddyfile")
    return ["caddy", "run", *given]


@contextlib.contextmanager
def started(command, directory):
    """A program that runs while the block does, its output in `directory`."""
    directory.mkdir(exist_ok=True)
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | {"HOME": str(directory), "XDG_DATA_HOME": str(directory)},
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


PROXIES = [pytest.param(program, marks=needs(program.__name__)) for program in (nginx, caddy)]


@pytest.fixture(scope="module", params=PROXIES)
def proxy(request, tmp_path_factory, service, certificate):
    """(base URL, TLS context) of a proxy with its example, in front of the service."""
    directory = tmp_path_factory.mktemp(request.param.__name__)
    port = free_port()
    command = request.param(directory, certificate, port, service[0].removeprefix("http://"))
    context = ssl.create_default_context(cafile=certificate / "fullchain.pem")
    url = f"https://localhost:{port}"
    with started(command, directory) as process:

        def ready():
            assert process.poll() is None, (directory / "output").read_text()
            return httpx2.get(f"{url}/readyz", verify=context, trust_env=False).is_success

        until(ready)
        yield url, context


def test_the_sdk_gets_its_answers_through_a_proxy(proxy, service, head):
    url, context = proxy
    transport = httpx2.AsyncHTTPTransport(verify=context, trust_env=False)
    rows = unit_rows(20, 64)
    with Client(url, "colours", api_key=service[1], transport=transport) as client:
        error = np.abs(client.logits(rows) - head.logits(rows)).max()
    assert error <= head.manifest.head.error_bound


def test_a_proxy_hides_metrics_bounds_bodies_and_passes_the_rest(proxy, service):
    url, context = proxy
    with httpx2.Client(base_url=url, verify=context, trust_env=False) as http:
        for path in ("/metrics", "/metrics/"):
            assert http.get(path, headers=bearer(service[1])).status_code == 404
        assert http.get("/v1/models").status_code == 401
        answer = http.get("/v1/models/colours", headers=bearer(service[1]))
        assert answer.status_code == 200
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert answer.headers["cache-control"] == "no-cache"
        assert len(answer.headers["x-request-id"]) == 32
        large = http.put(
            "/v1/keys/" + "0" * 64,
            headers=bearer(service[1]) | {"Content-Type": "application/octet-stream"},
            content=bytes(42_500_000),
        )
        assert large.status_code in (413, 502)  # Caddy 2.6 says 502 of a body that it cut off
        if "nginx" in answer.headers["server"]:  # Caddy lets the service see the length first
            assert large.headers.get("content-type") != "application/problem+json"


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

"""The proxies of `deploy/`, with TLS, in front of a real service: what they pass and bound, and
that nothing of a message reaches a disk. Those that are not installed here are skipped."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import anyio
import httpx2
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support.deployment import DEPLOY, free_port, needs, replaced, started, until
from support.heads import artifact, unit_rows
from support.services import running
from support.tenants import add_tenant, bearer

from veilhead import Client
from veilhead_protocol.files import describe_file
from veilhead_protocol.manifest import BackboneSection
from veilhead_service.model_store import publish
from veilhead_service.tenants import KeyScope

NAME = "veilhead.example.com"
MARKER = "zqxjkmarker"
DIMENSIONS = 384
LARGE_FILE = 12_000_000
LARGE_QUERY = 2_000_000

#: The examples' times, short enough for a test.
HASTY = {
    "nginx": [("10s;", "1s;")],
    "caddy": [("header 10s", "header 1s"), ("body 60s", "body 6s"), ("write 15m", "write 4s")],
}
BODY_SECONDS = 2


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head that answers thousands of texts at once, with a large public file."""
    directory = tmp_path_factory.mktemp("backbone")
    (directory / "model.bin").write_bytes(np.random.default_rng(1).bytes(LARGE_FILE))
    section = BackboneSection(
        kind="transformers",
        name="made-up",
        pooling="mean",
        normalise=True,
        max_tokens=16,
        public_parameters=1,
        files=(describe_file(directory, "model.bin"),),
    )
    return artifact(5, DIMENSIONS, name="colours").with_backbone(directory, section)


@pytest.fixture(scope="module")
def service(tmp_path_factory, head):
    """(URL, API key) of a service with a tenant."""
    root = tmp_path_factory.mktemp("service")
    head.save(root / "colours")
    publish(root / "colours", root / "store", allow_bulk=True)
    api_key = add_tenant(root / "state", "clinic", scopes=KeyScope)
    state = ("--workers", "1", "--state", str(root / "state"))
    body = ("--set", f"body_seconds={BODY_SECONDS}")
    with (
        (root / "service.log").open("wb") as log,
        running(root / "store", *state, *body, access=(), log=log) as url,
    ):
        yield url, api_key


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


def nginx(directory, certificate, port, upstream, changes):
    """The command line of nginx with the example, on this port."""
    site = replaced(
        (DEPLOY / "nginx.conf").read_text(),
        ("127.0.0.1:8000", upstream),
        ("listen 443 ", f"listen 127.0.0.1:{port} "),
        ("    listen [::]:443 ssl;\n", ""),
        (NAME, "localhost"),
        ("/etc/ssl/veilhead", str(certificate)),
        *changes,
    )
    (directory / "site.conf").write_text(site)
    scratch = ""
    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        (directory / "scratch" / kind).mkdir(parents=True)
        scratch += f"{kind}_temp_path {directory}/scratch/{kind};"
    # Its workers as the same user, so that they could write there.
    user = "user root;" if os.geteuid() == 0 else ""
    (directory / "nginx.conf").write_text(
        f"daemon off; {user} pid {directory}/pid; error_log stderr; events {{}} "
        f"http {{ access_log off; {scratch} include {directory}/site.conf; }}"
    )
    return ["nginx", "-e", "stderr", "-p", str(directory), "-c", str(directory / "nginx.conf")]


def caddy(directory, certificate, port, upstream, changes):
    """The command line of Caddy with the example, on this port."""
    tls = f"tls {certificate}/fullchain.pem {certificate}/privkey.pem"
    site = replaced(
        (DEPLOY / "Caddyfile").read_text(),
        ("127.0.0.1:8000", upstream),
        (f"{NAME} {{\n", f"https://localhost:{port} {{\n\t{tls}\n"),
        ("\n{\n", "\n{\n\tadmin off\n\tauto_https off\n"),
        *changes,
    )
    (directory / "Caddyfile").write_text(site)
    given = ("--config", str(directory / "Caddyfile"), "--adapter", "caddyfile")
    return ["caddy", "run", *given]


@dataclass(frozen=True)
class Proxy:
    """A proxy that runs, and what it was started in."""

    program: str
    port: int
    context: ssl.SSLContext
    directory: Path
    pid: int

    @property
    def url(self):
        return f"https://localhost:{self.port}"

    def http(self):
        return httpx2.Client(base_url=self.url, verify=self.context, trust_env=False)

    def connect(self):
        """A TLS connection whose reads wait a tenth of a second."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        secured = self.context.wrap_socket(connection, server_hostname="localhost")
        secured.settimeout(0.1)
        return secured

    def output(self):
        return (self.directory / "output").read_text()

    def disk(self):
        """What tells that something was written: every place below its own, and when it changed.

        A file that was made and removed again shows in the time of its directory.
        """
        return {
            path: (path.stat().st_mtime_ns, path.stat().st_size)
            for path in (self.directory, *self.directory.rglob("*"))
        }

    def files_open_for_writing(self):
        """Files on a disk that its processes may write to, removed ones too."""
        found = set()
        for process in self._processes():
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = str(descriptor.readlink())
                    flags = (process / "fdinfo" / descriptor.name).read_text().split()[3]
                    if target.startswith("/") and int(flags, 8) & (os.O_WRONLY | os.O_RDWR):
                        found.add(target)
        return {name for name in found if not name.startswith("/dev/")}

    def _processes(self):
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [Path("/proc") / str(pid) for pid in (self.pid, *children)]


@contextlib.contextmanager
def serving(program, directory, certificate, upstream, *changes):
    """A proxy with its example, in front of what answers at `upstream`."""
    port = free_port()
    directory.mkdir(exist_ok=True)
    command = program(directory, certificate, port, upstream.removeprefix("http://"), changes)
    context = ssl.create_default_context(cafile=certificate / "fullchain.pem")
    with started(command, directory) as process:
        proxy = Proxy(program.__name__, port, context, directory, process.pid)

        def ready():
            assert process.poll() is None, proxy.output()
            return httpx2.get(f"{proxy.url}/metrics", verify=context, trust_env=False)

        assert until(lambda: ready() is not None)
        yield proxy


PROXIES = [pytest.param(program, marks=needs(program.__name__)) for program in (nginx, caddy)]


@pytest.fixture(scope="module", params=PROXIES)
def program(request):
    return request.param


@pytest.fixture(scope="module")
def proxy(program, tmp_path_factory, service, certificate):
    """The example as it is."""
    directory = tmp_path_factory.mktemp(program.__name__)
    with serving(program, directory, certificate, service[0]) as found:
        yield found


@pytest.fixture(scope="module")
def hasty(program, tmp_path_factory, service, certificate):
    """The example with shorter times."""
    directory = tmp_path_factory.mktemp(f"hasty-{program.__name__}")
    changes = HASTY[program.__name__]
    with serving(program, directory, certificate, service[0], *changes) as found:
        yield found


# --- what passes ----------------------------------------------------------------------------------


def test_the_sdk_gets_its_answers_through_a_proxy(proxy, service, head):
    transport = httpx2.AsyncHTTPTransport(verify=proxy.context, trust_env=False)
    rows = unit_rows(20, DIMENSIONS)
    with Client(proxy.url, "colours", api_key=service[1], transport=transport) as client:
        error = np.abs(client.logits(rows) - head.logits(rows)).max()
    assert error <= head.manifest.head.error_bound


def test_a_proxy_hides_metrics_bounds_bodies_and_passes_the_rest(proxy, service):
    with proxy.http() as http:
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
        if proxy.program == "nginx":  # Caddy lets the service see the length first
            assert large.headers.get("content-type") != "application/problem+json"


def test_an_early_refusal_reaches_who_is_still_sending(proxy):
    """The service refuses without reading a body, which goes through the proxy as it comes."""
    with proxy.http() as http:
        octets = {"Content-Type": "application/octet-stream"}
        for headers in (octets, octets | bearer("vh_" + "A" * 40)):
            answer = http.post(
                "/v1/models/colours/infer", headers=headers, content=bytes(LARGE_QUERY)
            )
            assert answer.status_code == 401


def test_a_proxy_speaks_http_1_only(proxy):
    """In HTTP/2 one connection carries many requests at once, past every count of connections."""
    context = ssl.create_default_context()
    context.load_verify_locations(cadata=ssl.DER_cert_to_PEM_cert(_certificate_of(proxy)))
    context.set_alpn_protocols(["h2", "http/1.1"])
    connection = socket.create_connection(("127.0.0.1", proxy.port))
    with context.wrap_socket(connection, server_hostname="localhost") as secured:
        assert secured.selected_alpn_protocol() in (None, "http/1.1")


def _certificate_of(proxy):
    with proxy.connect() as secured:
        return secured.getpeercert(binary_form=True)


# --- nothing on a disk ----------------------------------------------------------------------------


class Halting(httpx2.AsyncBaseTransport):
    """Sends a large body in two halves, and looks at the proxy in between."""

    def __init__(self, proxy):
        self._inner = httpx2.AsyncHTTPTransport(verify=proxy.context, trust_env=False)
        self._proxy = proxy
        self.seen = []

    async def handle_async_request(self, request):
        body = await request.aread()
        if len(body) < LARGE_QUERY:
            return await self._inner.handle_async_request(request)

        async def halves():
            middle = len(body) // 2
            yield body[:middle]
            await anyio.sleep(0.5)
            self.seen.append((self._proxy.disk(), self._proxy.files_open_for_writing()))
            yield body[middle:]

        again = httpx2.Request(request.method, request.url, headers=request.headers)
        again.stream = httpx2.Request("POST", request.url, content=halves()).stream
        return await self._inner.handle_async_request(again)

    async def aclose(self):
        await self._inner.aclose()


def send_large_query(proxy, api_key, head):
    """What is on disk before, in the middle of, and after a query of more than 2 MB."""
    with Client(
        proxy.url, "colours", api_key=api_key, transport=(halting := Halting(proxy))
    ) as client:
        client.logits(unit_rows(1, DIMENSIONS))
        before = (proxy.disk(), proxy.files_open_for_writing())
        rows = unit_rows(1024, DIMENSIONS)
        error = np.abs(client.logits(rows) - head.logits(rows)).max()
    assert error <= head.manifest.head.error_bound
    assert halting.seen
    return [before, *halting.seen, (proxy.disk(), proxy.files_open_for_writing())]


def read_slowly(proxy, api_key):
    """What is on disk before, in the middle of, and after a large answer that is read slowly."""
    found = [(proxy.disk(), proxy.files_open_for_writing())]
    with proxy.http() as http:
        digest = http.get("/v1/models/colours", headers=bearer(api_key)).json()
        assert digest["backbone"]["files"][0]["bytes"] == LARGE_FILE
        path = "/v1/models/colours/files/model.bin"
        with http.stream("GET", path, headers=bearer(api_key)) as answer:
            assert answer.status_code == 200, answer.read()
            chunks = answer.iter_bytes()
            size = len(next(chunks))
            time.sleep(0.5)
            found.append((proxy.disk(), proxy.files_open_for_writing()))
            size += sum(map(len, chunks))
    assert size == LARGE_FILE
    return [*found, (proxy.disk(), proxy.files_open_for_writing())]


def test_nothing_of_a_large_query_or_answer_is_on_a_disk(proxy, service, head):
    for seen in (send_large_query(proxy, service[1], head), read_slowly(proxy, service[1])):
        for now in seen[1:]:
            assert now == seen[0]


@needs("nginx")
def test_what_is_buffered_on_a_disk_would_be_seen(tmp_path, service, head, certificate):
    buffering = [
        ("proxy_request_buffering off", "proxy_request_buffering on"),
        ("proxy_max_temp_file_size 0", "proxy_max_temp_file_size 64m"),
    ]
    with serving(nginx, tmp_path / "nginx", certificate, service[0], *buffering) as proxy:
        for seen in (send_large_query(proxy, service[1], head), read_slowly(proxy, service[1])):
            before, during, after = seen
            assert during[1] - before[1]  # a file was open
            assert after[0] != before[0]  # and its directory tells of it


# --- slow peers -----------------------------------------------------------------------------------


def ended(connection, *, sending=b"", seconds=30):
    """What was received until the other side ended it, while `sending` is sent again and again."""
    received = b""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            chunk = connection.recv(65536)
        except TimeoutError:
            with contextlib.suppress(OSError):
                connection.sendall(sending)
            continue
        except OSError:
            return received
        if not chunk:
            return received
        received += chunk
    raise AssertionError(f"the connection lives on, after {len(received)} bytes")


def test_half_a_header_is_cut_off(hasty):
    """Whether nothing more comes, or a line now and then."""
    for more in (b"", b"X-More: 1\r\n"):
        with hasty.connect() as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
            assert b" 200 " not in ended(connection, sending=more)


def test_half_a_handshake_is_cut_off(hasty):
    with socket.create_connection(("127.0.0.1", hasty.port)) as connection:
        connection.settimeout(0.1)
        assert ended(connection) == b""


def test_slow_bodies_are_cut_off(hasty, service):
    """Where nothing more comes, and where a byte comes now and then."""
    for more in (b"", b"0"):
        with hasty.connect() as connection:
            connection.sendall(
                b"PUT /v1/keys/%b HTTP/1.1\r\nHost: localhost\r\n"
                b"Authorization: %b\r\nContent-Type: application/octet-stream\r\n"
                b"Content-Length: 13672\r\n\r\n0000"
                % (b"0" * 64, bearer(service[1])["Authorization"].encode())
            )
            answer = ended(connection, sending=more)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")


@needs("caddy")
def test_caddy_ends_a_slow_body_whatever_is_behind_it(tmp_path, certificate):
    changes = [("body 60s", "body 1s")]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        upstream = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            serving(caddy, tmp_path / "caddy", certificate, upstream, *changes) as proxy,
            proxy.connect() as connection,
        ):
            connection.sendall(
                b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 13672\r\n\r\n0000"
            )
            ended(connection, sending=b"0")


def test_who_does_not_read_is_cut_off(hasty, service):
    with hasty.connect() as connection:
        connection.sendall(
            b"GET /v1/models/colours/files/model.bin HTTP/1.1\r\nHost: localhost\r\n"
            b"Authorization: %b\r\n\r\n" % bearer(service[1])["Authorization"].encode()
        )
        time.sleep(6)
        assert len(ended(connection)) < LARGE_FILE


def test_others_are_answered_meanwhile(hasty):
    """Connections that wait for the rest of a header hold nobody up."""
    with contextlib.ExitStack() as open_ones:
        for _ in range(200):
            connection = open_ones.enter_context(hasty.connect())
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n")
        with hasty.http() as http:
            assert http.get("/livez").status_code == 200


# --- counts ---------------------------------------------------------------------------------------


@needs("nginx")
def test_requests_of_one_address_are_counted(tmp_path, service, certificate):
    changes = [("rate=500r/s", "rate=1r/s"), ("burst=500 ", "burst=5 ")]
    with (
        serving(nginx, tmp_path / "nginx", certificate, service[0], *changes) as proxy,
        proxy.connect() as connection,
    ):
        request = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(
            request * 49 + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        )
        answer = ended(connection)
    assert answer.count(b"HTTP/1.1 429 ") >= 40
    assert answer.count(b"HTTP/1.1 200 ") >= 1
    assert "limiting" not in proxy.output()  # nobody fills a disk by being refused


@needs("nginx")
@pytest.mark.parametrize("zone", ["veilhead_connections 32", "veilhead_all 512"])
def test_requests_at_once_are_counted(tmp_path, service, certificate, zone):
    changes = [(f"limit_conn {zone};", f"limit_conn {zone.split()[0]} 2;")]
    with (
        serving(nginx, tmp_path / "nginx", certificate, service[0], *changes) as proxy,
        contextlib.ExitStack() as open_ones,
        proxy.http() as http,
    ):
        for _ in range(2):
            connection = open_ones.enter_context(proxy.connect())
            connection.sendall(
                b"PUT /v1/keys/%b HTTP/1.1\r\nHost: localhost\r\nAuthorization: %b\r\n"
                b"Content-Type: application/octet-stream\r\nContent-Length: 13672\r\n\r\n0000"
                % (b"0" * 64, bearer(service[1])["Authorization"].encode())
            )
        until(lambda: http.get("/livez").status_code == 429)
        open_ones.pop_all().close()
        until(lambda: http.get("/livez").status_code == 200)


#: Run in a network of its own: how many of 80 connections at once, by each address, are accepted.
COUNTED = """
import contextlib, fcntl, json, socket, struct, sys
with socket.socket() as up:  # the loopback device: IFF_UP
    fcntl.ioctl(up, 0x8914, struct.pack("16sh14x", b"lo", 1))
found = {}
for address in ("127.0.0.1", "127.0.0.2", "::1"):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as open_ones:
        server = socket.create_server((address, 443), family=family, backlog=200)
        open_ones.enter_context(server)
        found[address] = 0
        for _ in range(80):
            connection = open_ones.enter_context(socket.socket(family))
            connection.settimeout(5)
            connection.bind((address, 0))
            with contextlib.suppress(OSError):
                connection.connect((address, 443))
                found[address] += 1
print(json.dumps(found))
"""


def in_a_network_of_its_own(script):
    return subprocess.run(["unshare", "-n", "sh", "-ec", script], capture_output=True, text=True)


@needs("nft")
def test_the_kernel_counts_connections_of_one_address():
    if in_a_network_of_its_own("nft list ruleset").returncode != 0:
        pytest.skip("no network of its own can be made here")
    count = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(COUNTED)}"
    rules = f"nft -f {shlex.quote(str(DEPLOY / 'connections.nft'))}; "
    counted = in_a_network_of_its_own(rules + count)
    assert counted.returncode == 0, counted.stderr
    assert json.loads(counted.stdout) == dict.fromkeys(("127.0.0.1", "127.0.0.2", "::1"), 64)
    uncounted = json.loads(in_a_network_of_its_own(count).stdout)
    assert set(uncounted.values()) == {80}


def test_a_proxy_writes_no_paths(program, tmp_path, certificate):
    """Not even of a request that fails because nobody answers behind it."""
    dead = f"127.0.0.1:{free_port()}"
    with serving(program, tmp_path / "proxy", certificate, dead) as proxy:
        before = {path for path in proxy.disk() if path.name != "output"}
        with proxy.http() as http:
            for method in ("GET", "PUT"):
                answer = http.request(
                    method, f"/v1/keys/{MARKER}?{MARKER}", headers={"X-Marker": MARKER}
                )
                assert answer.status_code == 502
        for more in (b"Content-Length: 99000000\r\n\r\n0", b"bad header\r\n\r\n"):
            with proxy.connect() as connection:
                head = f"PUT /v1/keys/{MARKER} HTTP/1.1\r\nHost: localhost\r\n"
                connection.sendall(head.encode() + more)
                assert MARKER.encode() not in connection.recv(65536)
    assert MARKER not in proxy.output()
    assert {path for path in proxy.disk() if path.name != "output"} <= before

"""What peers without a key can cost, over real connections to a service with tenants."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from support.heads import artifact
from support.sockets import (
    connect,
    descriptors,
    exchange,
    get,
    is_closed,
    push,
    until,
)
from support.tenants import add_tenant, bearer

from veilhead_benchmarks.processes import ServiceProcess, resident_bytes
from veilhead_protocol.files import describe_file
from veilhead_protocol.manifest import BackboneSection
from veilhead_service.access_log_chain import verify
from veilhead_service.model_store import publish
from veilhead_service.pacing import LONGEST_SECONDS, Pacing
from veilhead_service.tenants import KeyScope

MIB = 2**20


@pytest.fixture
def serve(tmp_path):
    """Start a service with a tenant, an empty store and these settings; the tenant's key."""
    with ExitStack() as stack:

        def serve(descriptors=None, **settings):
            (tmp_path / "store").mkdir(exist_ok=True)
            key = add_tenant(tmp_path / "state", "clinic", scopes={KeyScope.MODELS})
            given = {"insecure_no_tenants": False, "state_directory": tmp_path / "state"}
            service = ServiceProcess(
                tmp_path / "store",
                tmp_path / "log",
                workers=1,
                settings=given | settings,
                descriptors=descriptors,
            )
            return stack.enter_context(service), key

        yield serve


def answers(service):
    """Whether a new connection is answered."""
    return httpx2.get(f"{service.url}/livez", trust_env=False, timeout=20).is_success


class Live:
    """Asks for /livez all the while, from an address of its own."""

    def __init__(self, service):
        self._service, self._stop = service, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answered, self.failed = 0, []

    def _run(self):
        while not self._stop.wait(0.05):
            try:
                answer = exchange(
                    self._service.port,
                    get("/livez", headers=[("Connection", "close")]),
                    address="127.0.0.9",
                )
            except OSError as error:
                self.failed.append(repr(error))
            else:
                if answer.startswith(b"HTTP/1.1 200 "):
                    self.answered += 1
                else:
                    self.failed.append(answer[:100])

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *details):
        self._stop.set()
        self._thread.join()


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", [True, False])
def test_pipelining_costs_no_memory(serve, reads):
    service, _ = serve()
    assert answers(service)
    before = resident_bytes(service.pid)
    peak = 0
    with Live(service) as live:
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            with connect(service.port) as connection:
                push([connection], get("/") * 500, 0.4)
                if reads:
                    is_closed(connection)
                peak = max(peak, resident_bytes(service.pid))
    assert peak - before < 24 * MIB
    assert live.answered
    assert not live.failed


def test_requests_that_are_pipelined_are_answered_in_order(serve):
    service, key = serve()
    one = get("/v1/models", headers=bearer(key).items())
    sent = (get("/livez") + one + get("/v1/models")) * 4 + get(
        "/livez", headers=[("Connection", "close")]
    )
    answer = exchange(service.port, sent)
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"200", b"200", b"401"] * 4 + [b"200"]


def test_more_than_may_be_pipelined_ends_the_connection(serve):
    service, _ = serve()
    answer = exchange(service.port, get("/livez") * 200)
    assert answer.count(b"HTTP/1.1 ") <= 17
    assert answers(service)


def test_answers_that_are_never_read_end_their_connections(serve):
    service, _ = serve(unread_seconds=1, refusals_per_second=1e6)
    assert answers(service)
    before, memory = descriptors(service.pid), resident_bytes(service.pid)
    with ExitStack() as stack, Live(service) as live:
        deaf = [stack.enter_context(connect(service.port, receive_bytes=4096)) for _ in range(100)]
        deadline = time.monotonic() + 6
        while time.monotonic() < deadline:
            push(deaf, get("/") * 8, 0.2)
        assert resident_bytes(service.pid) - memory < 64 * MIB
        until(lambda: descriptors(service.pid) <= before + 4)
    assert live.answered
    assert not live.failed


@pytest.mark.parametrize("fields", [5000, 200])
def test_a_header_of_many_fields_is_refused(serve, fields):
    service, _ = serve()
    answer = exchange(
        service.port, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * fields + b"\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 400 ") or not answer
    assert answers(service)


def test_a_refused_body_is_not_taken_for_ever(serve):
    service, _ = serve()
    head = b"POST /v1/models/a/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
    with connect(service.port) as connection:
        connection.sendall(head)
        sent = push([connection], bytes(MIB), 8)
        until(lambda: is_closed(connection))
    assert sent < 128 * MIB


# --- descriptors --------------------------------------------------------------------------------


def test_the_limit_of_open_files_is_raised_to_what_is_allowed(serve):
    service, _ = serve(descriptors=(400, 3000))
    limits = Path(f"/proc/{service.pid}/limits").read_text()
    assert re.search(r"Max open files\s+3000\s+3000", limits)


def test_too_few_open_files_are_named_at_the_start(serve, tmp_path):
    with pytest.raises(RuntimeError):
        serve(descriptors=(200, 200))
    assert "the limit of open files is 200" in (tmp_path / "log").read_text()


def test_connections_beyond_the_limit_cost_neither_descriptors_nor_lines(serve, tmp_path):
    service, key = serve(descriptors=(512, 512))
    with ExitStack() as stack, Live(service) as live:
        idle = []
        for number in range(1200):
            address = f"127.0.0.{10 + number % 3}"
            idle.append(stack.enter_context(connect(service.port, address=address)))
        assert descriptors(service.pid) < 512
        shown = httpx2.get(
            f"{service.url}/v1/models", headers=bearer(key), trust_env=False, timeout=20
        )
        assert shown.status_code == 200
        assert sum(is_closed(connection) for connection in idle) > 600
    assert not live.failed
    assert len((tmp_path / "log").read_text().splitlines()) < 40
    until(lambda: descriptors(service.pid) < 60)


def test_one_address_cannot_take_every_connection(serve):
    service, _ = serve(max_connections=40, peer_connections=10)
    with ExitStack() as stack:
        busy = get("/livez") + b"GET /livez HTTP/1.1\r\nHost"
        greedy = [stack.enter_context(connect(service.port)) for _ in range(30)]
        other = [stack.enter_context(connect(service.port, address="127.0.0.2")) for _ in range(10)]
        for connection in other:
            connection.sendall(busy)
        until(lambda: sum(map(is_closed, greedy)) >= 20)
        assert not any(map(is_closed, other))


def test_a_connection_that_sends_nothing_is_closed(serve):
    service, _ = serve(body_seconds=0.5)
    for sent in (b"", b"\r\n", b"GET"):
        with connect(service.port) as connection:
            connection.sendall(sent)
            assert connection.recv(100) == b""


def test_line_breaks_are_no_requests_and_keep_nothing_open(serve):
    service, _ = serve(body_seconds=1)
    with connect(service.port) as connection:
        connection.sendall(get("/livez"))
        deadline = time.monotonic() + 10
        while not is_closed(connection):
            assert time.monotonic() < deadline
            try:
                connection.send(b"\r\n")
            except OSError:
                break
            time.sleep(0.1)


# --- disk ---------------------------------------------------------------------------------------


def test_strangers_fill_neither_the_log_nor_the_access_log(serve, tmp_path):
    """Tenants' refusals are recorded all the same, one by one."""
    service, key = serve(refusals_per_second=1e6)
    strange = (
        (get("/v1/models"), b"401"),
        (get("/v1/models", headers=[("Authorization", "Bearer vh_no")]), b"401"),
        (get("/livez", headers=[("Connection", "Upgrade"), ("Upgrade", "websocket")]), b"200"),
    )
    for sent, status in strange:
        with connect(service.port) as connection:
            for _ in range(400):
                connection.sendall(sent)
                answer = b""
                while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
                    answer += connection.recv(65536)
                assert answer.startswith(b"HTTP/1.1 " + status)
    for _ in range(400):
        exchange(service.port, b"NONSENSE\r\n\r\n")
    for _ in range(5):
        refused = httpx2.post(
            f"{service.url}/v1/models/a/infer", headers=bearer(key), trust_env=False
        )
        assert refused.status_code == 403
    log = (tmp_path / "log").stat().st_size
    assert service.terminate() == 0
    assert log < 16 * 1024
    records = [
        json.loads(line) for line in (tmp_path / "state" / "access.log").read_text().splitlines()
    ]
    requests = [record for record in records if record["event"] == "request"]
    assert [record["tenant"] for record in requests] == ["clinic"] * 5
    assert {record["problem"] for record in requests} == {"forbidden"}
    counted = {
        record["problem"]: record["count"] for record in records if record["event"] == "refused"
    }
    assert counted == {"unauthenticated": 800, "malformed-request": 400}
    assert verify(tmp_path / "state" / "access.log").records == len(records)


# --- what is no request -------------------------------------------------------------------------

GOOD = b"GET /livez HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"GET /livez HTTP/1.1\r\n\r\n", id="no host"),
        pytest.param(GOOD + b"Host: x\r\n\r\n", id="the same host twice"),
        pytest.param(GOOD + b"hOST: y\r\n\r\n", id="two hosts"),
        pytest.param(b"GET /livez HTTP/1.1\r\nHost: a/b\r\n\r\n", id="no host's name"),
        pytest.param(b"GET /livez HTTP/1.1\r\nHost: a@b\r\n\r\n", id="user in host"),
        pytest.param(b"GET /livez\r\n\r\n", id="HTTP/0.9"),
        pytest.param(b"GET /livez HTTP/0.9\r\nHost: x\r\n\r\n", id="HTTP/0.9 by name"),
        pytest.param(b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n", id="HTTP/2"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="preface of HTTP/2"),
        pytest.param(b"GET http://y/livez HTTP/1.1\r\nHost: x\r\n\r\n", id="another authority"),
        pytest.param(b"GET http://u@x/livez HTTP/1.1\r\nHost: x\r\n\r\n", id="user"),
        pytest.param(b"GET ftp://x/livez HTTP/1.1\r\nHost: x\r\n\r\n", id="another scheme"),
        pytest.param(b"GET http:///livez HTTP/1.1\r\nHost:\r\n\r\n", id="no authority"),
        pytest.param(b"GET livez HTTP/1.1\r\nHost: x\r\n\r\n", id="no slash"),
        pytest.param(b"GET * HTTP/1.1\r\nHost: x\r\n\r\n", id="asterisk"),
        pytest.param(b"GET /livez#a HTTP/1.1\r\nHost: x\r\n\r\n", id="fragment"),
        pytest.param(b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", id="not ASCII"),
        pytest.param(b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n", id="CONNECT"),
        pytest.param(
            b"POST /livez HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            id="chunks in HTTP/1.0",
        ),
        pytest.param(
            GOOD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", id="another coding"
        ),
        pytest.param(
            GOOD + b"Connection: Upgrade\r\nUpgrade: x\r\n\r\nGET / HTTP/1.1\r\n",
            id="more after an upgrade",
        ),
    ],
)
def test_what_is_no_request_gets_400_and_no_more(serve_once, request_bytes):
    answer = exchange(serve_once.port, request_bytes)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    document = json.loads(body)
    assert document["type"] == "urn:veilhead:problem:malformed-request"
    assert f"x-request-id: {document['request_id']}".encode() in head


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /livez HTTP/1.0\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: [::1]:80\r\nConnection: close\r\n\r\n",
        b"GET http://x/livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        GOOD + b"Connection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n",
        b"\r\n" + GOOD + b"Connection: close\r\n\r\n",
    ],
)
def test_what_is_unusual_and_right_is_answered(serve_once, request_bytes):
    assert exchange(serve_once.port, request_bytes).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("pieces", [1, 2])
def test_trailers_are_no_headers(serve_once, pieces):
    key = add_tenant(serve_once.state_directory, f"of-trailers-{pieces}")
    head = (
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
    )
    rest = b"\r\n1\r\na\r\n0\r\n"
    field = f"Authorization: Bearer {key}\r\n".encode()
    sent = [head + field + rest + b"\r\n", head + rest + field + b"\r\n"]
    time.sleep(0.5)  # the service notices the tenant
    for request_bytes, status in zip(sent, (b"200", b"401"), strict=True):
        if pieces == 1:
            answer = exchange(serve_once.port, request_bytes)
        else:
            at = request_bytes.index(b"0\r\n") + 3
            answer = exchange(serve_once.port, request_bytes[:at], request_bytes[at:], pause=0.2)
        assert answer.startswith(b"HTTP/1.1 " + status)


@pytest.fixture(scope="module")
def serve_once(tmp_path_factory):
    """A service for tests that leave it as it is."""
    work = tmp_path_factory.mktemp("network")
    (work / "store").mkdir()
    add_tenant(work / "state", "clinic")
    settings = {"insecure_no_tenants": False, "state_directory": work / "state"}
    with ServiceProcess(work / "store", work / "log", workers=1, settings=settings) as service:
        yield service


# --- signals ------------------------------------------------------------------------------------


def test_sighup_changes_nothing_and_sigquit_drains(serve):
    service, _ = serve()
    workers = service.workers()
    for pid in (service.pid, *workers):
        os.kill(pid, signal.SIGHUP)
    time.sleep(0.5)
    assert answers(service)
    assert service.workers() == workers
    os.kill(service.pid, signal.SIGQUIT)
    assert service.wait() == 0


# --- refusals -----------------------------------------------------------------------------------


def test_who_ignores_retry_after_is_refused_ever_more_slowly(serve):
    """Each refusal costs as much as an answer; who asks for more of them waits for them."""
    service, key = serve(rate_per_second=1, rate_burst=1, refusals_per_second=20)
    sent = get("/v1/models", headers=bearer(key).items())
    stop, counts = threading.Event(), [0] * 24

    def hammer(number):
        with connect(service.port) as connection:
            while not stop.is_set():
                connection.sendall(sent)
                answer = b""
                while not answer.endswith(b"}"):
                    answer += connection.recv(65536)
                counts[number] += answer.startswith(b"HTTP/1.1 429 ")

    threads = [threading.Thread(target=hammer, args=[number]) for number in range(24)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    with Live(service) as live:
        time.sleep(4)
    stop.set()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - started
    assert 24 <= sum(counts) <= 20 * (seconds + 1) + 24
    assert live.answered
    assert not live.failed
    # Another tenant's, and this one's once it waits, are answered at once.
    other = add_tenant(service.state_directory, "other", scopes={KeyScope.MODELS})
    until(
        lambda: (
            httpx2.get(
                f"{service.url}/v1/models", headers=bearer(other), trust_env=False
            ).status_code
            == 200
        )
    )


def test_refusals_that_wait_do_not_take_every_connection(serve):
    service, _ = serve(max_connections=40, peer_connections=40, refusals_per_second=0.1)
    live = get("/livez", headers=[("Connection", "close")])
    with ExitStack() as stack:
        many = [stack.enter_context(connect(service.port)) for _ in range(40)]
        for connection in many:
            connection.sendall(get("/v1/models") * 2)  # the first one of all need not wait
        time.sleep(1)  # all of them have been read
        for _ in range(3):
            assert exchange(service.port, live).startswith(b"HTTP/1.1 200 ")


def test_what_was_refused_is_counted_in_the_metrics(serve):
    service, _ = serve()
    operator = add_tenant(service.state_directory, "operator", scopes={KeyScope.METRICS})
    exchange(service.port, b"NONSENSE\r\n\r\n")
    exchange(service.port, get("/v1/models", headers=[("Connection", "close")]))

    def shown():
        answer = httpx2.get(f"{service.url}/metrics", headers=bearer(operator), trust_env=False)
        return answer.text if answer.is_success else ""

    until(shown)
    text = shown()
    assert 'veilhead_strangers_refused_total{reason="malformed-request"} 1.0' in text
    assert 'veilhead_strangers_refused_total{reason="unauthenticated"}' in text
    assert "veilhead_connections_limit " in text


def test_refusals_are_paced_by_who_they_are_for():
    now = [0.0]
    pacing = Pacing(10, clock=lambda: now[0])
    assert [pacing.take("one", "peer", 429) for _ in range(10)] == [0] * 10
    assert [round(pacing.take("one", "peer", 503), 3) for _ in range(3)] == [0, 0.1, 0.2]
    assert max(pacing.take("one", "peer", 429) for _ in range(1000)) == LONGEST_SECONDS
    # Neither another's, nor what is no refusal, nor an answer to what it asked.
    assert pacing.take("two", "peer", 429) == 0
    assert pacing.take(None, "peer", 401) == 0
    assert pacing.take("one", "peer", 200) == pacing.take("one", "peer", 422) == 0
    now[0] += 20
    pacing.forget()
    assert pacing.take("one", "peer", 429) == 0
    assert [pacing.take(None, "peer", 401) for _ in range(12)][-1] > 0
    assert pacing.take(None, "peer", 200) == 0
    assert pacing.take(None, "elsewhere", 401) == 0


# --- files on their way out ---------------------------------------------------------------------


def test_one_tenant_cannot_take_every_place_for_downloads(serve, tmp_path):
    """Whoever reads slowly keeps a place, and never the last one."""
    files = tmp_path / "backbone"
    files.mkdir()
    (files / "model.safetensors").write_bytes(bytes(16 * MIB))
    section = BackboneSection(
        kind="transformers",
        name="toy",
        pooling="mean",
        normalise=True,
        max_tokens=16,
        public_parameters=1,
        files=(describe_file(files, "model.safetensors"),),
    )
    artifact(3, 8, name="files").with_backbone(files, section).save(tmp_path / "artifact")
    publish(tmp_path / "artifact", tmp_path / "store")
    service, greedy = serve(max_downloads=4, unread_seconds=30)
    other = add_tenant(service.state_directory, "other", scopes={KeyScope.MODELS})
    path = "/v1/models/files/files/model.safetensors"
    sent = get(path, headers=bearer(greedy).items())
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(service.port, receive_bytes=4096)) for _ in range(4)]
        begins = []
        for connection in slow:
            connection.sendall(sent)
            begins.append(connection.recv(100)[9:12])
        assert begins == [b"200", b"200", b"429", b"429"]
        time.sleep(0.3)  # the service notices the tenant
        found = httpx2.get(service.url + path, headers=bearer(other), trust_env=False, timeout=20)
        assert found.content == bytes(16 * MIB)

    def comes_in():
        answer = httpx2.get(service.url + path, headers=bearer(greedy), trust_env=False, timeout=20)
        return answer.status_code == 200

    until(comes_in)  # the places of connections that ended are free again

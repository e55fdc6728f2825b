"""Calls end: each attempt of a request, a whole call, and closing, whatever a service does."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
from support.backbones import WORDS
from support.heads import unit_rows
from support.hostile_servers import (
    ENDLESS,
    HostileServer,
    answer,
    dripping_body,
    dripping_head,
    in_time,
    silence,
    unread,
)

from veilhead import (
    AsyncClient,
    BatchError,
    CallTimeoutError,
    Client,
    NotSentError,
    ServiceResponseError,
    TransportError,
)
from veilhead.connections import Connections
from veilhead.transport import Transport
from veilhead_protocol.manifest import FileEntry

#: Far longer than any of these calls may take, far shorter than their servers would make them.
TIMEOUT = 0.2


@pytest.fixture
def hostile(served):
    """Makes hostile servers in front of the real one."""
    servers = []

    def make(**behaviours):
        server = HostileServer(served, **behaviours)
        servers.append(server.__enter__())
        return server

    yield make
    for server in servers:
        server.__exit__()


@pytest.fixture
def clients(make_client):
    """Makes clients; closed in the end, in time."""
    made = []

    def make(server, model="model", **options):
        client = in_time(lambda: make_client(server.url, model, **options))
        made.append(client)
        return client

    yield make
    for client in made:
        in_time(client.close)


@pytest.fixture
def once(monkeypatch):
    """One attempt for each request."""
    monkeypatch.setattr("veilhead.transport._ATTEMPTS", 1)


@pytest.fixture
def twice(monkeypatch):
    """Two attempts for each request."""
    monkeypatch.setattr("veilhead.transport._ATTEMPTS", 2)


def errors_of(work):
    with pytest.raises(BatchError) as caught:
        in_time(work)
    return caught.value.errors


class TestAttempts:
    @pytest.mark.parametrize("behaviour", ENDLESS)
    @pytest.mark.parametrize("route", ["infer", "key"])
    def test_none_waits_beyond_its_deadline(self, hostile, clients, twice, behaviour, route):
        server = hostile(**{route: ENDLESS[behaviour]})
        client = clients(server, timeout=TIMEOUT)
        errors = errors_of(lambda: client.logits(unit_rows(1, 32)))
        assert isinstance(errors[0], TransportError)
        assert "2 attempts" in str(errors[0])
        assert server.seen[route] == 2

    @pytest.mark.parametrize("behaviour", [silence, dripping_head, dripping_body])
    def test_connecting_ends_too(self, hostile, make_client, once, behaviour):
        server = hostile(manifest=behaviour)
        with pytest.raises(TransportError, match=r"within 0\.2 s"):
            in_time(lambda: make_client(server.url, "model", timeout=TIMEOUT))

    def test_so_does_a_handshake_that_is_not_answered(self, hostile, make_client, once):
        server = hostile(connection=silence)
        url = server.url.replace("http:", "https:")
        with pytest.raises(TransportError, match="1 attempts"):
            in_time(lambda: make_client(url, "model", timeout=TIMEOUT))

    def test_a_body_of_any_length_that_nobody_reads(self, hostile, once):
        server = hostile(infer=unread)

        async def run():
            async with Transport(server.url, timeout=TIMEOUT, connections=1) as transport:
                pieces = [bytes(2**20)] * 64
                await transport.infer("model", lambda: pieces, 64 * 2**20, 100)

        with pytest.raises(TransportError):
            in_time(lambda: asyncio.run(run()))

    def test_a_large_head_gets_the_seconds_that_it_takes(self, hostile, once):
        def late(visit):
            visit.read_body()
            visit.wait(4 * TIMEOUT)
            answer(200, body=b"reply")(visit)

        server = hostile(infer=late)

        async def run(more_seconds):
            async with Transport(server.url, timeout=TIMEOUT, connections=1) as transport:
                return await transport.infer(
                    "model", lambda: [b"query"], 5, 5, more_seconds=more_seconds
                )

        assert in_time(lambda: asyncio.run(run(15.0))).body == b"reply"
        with pytest.raises(TransportError):
            in_time(lambda: asyncio.run(run(0.0)))

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["timeout", "call_timeout"])
    def test_seconds_are_checked(self, name, seconds):
        with pytest.raises(ValueError, match=f"{name} must be"):
            Client("http://127.0.0.1:9", "model", **{name: seconds})


class TestDownloads:
    SIZE = 200_000
    ENTRY = FileEntry(path="model.bin", bytes=SIZE, sha256="0" * 64)

    def fetch(self, server, target):
        async def run():
            async with Transport(server.url, timeout=TIMEOUT, connections=1) as transport:
                await transport.download("model", "0" * 64, self.ENTRY, target)

        return in_time(lambda: asyncio.run(run()))

    def test_a_file_may_take_long_as_long_as_it_grows(self, hostile, once, tmp_path):
        def slowly(visit):
            visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % self.SIZE)
            for _ in range(20):  # 1.2 s in all, four times the limit
                visit.wait(TIMEOUT / 5)
                visit.send(bytes(self.SIZE // 20))

        self.fetch(hostile(file=slowly), tmp_path / "file")
        assert (tmp_path / "file").stat().st_size == self.SIZE

    @pytest.mark.parametrize("behaviour", ["silence", "endless-continue", "dripping-head"])
    def test_one_that_does_not_begin_fails(self, hostile, once, tmp_path, behaviour):
        with pytest.raises(TransportError):
            self.fetch(hostile(file=ENDLESS[behaviour]), tmp_path / "file")

    def test_a_drip_fails_and_what_came_is_continued(self, hostile, twice, tmp_path):
        asked = []

        def drip(visit):
            asked.append(visit.head)
            known = Path(tmp_path / "file").stat().st_size if len(asked) > 1 else 0
            status = b"206 Partial Content" if known else b"200 OK"
            part = b"bytes %d-%d/%d" % (known, self.SIZE - 1, self.SIZE)
            left = b"%d" % (self.SIZE - known)
            visit.send(b"HTTP/1.1 " + status + b"\r\nContent-Range: " + part + b"\r\n")
            visit.send(b"Content-Length: " + left + b"\r\n\r\n" + bytes(1000))
            visit.drip(b"a")

        with pytest.raises(TransportError, match="4096 bytes a second"):
            self.fetch(hostile(file=drip), tmp_path / "file")
        assert len(asked) == 2
        assert b"range: bytes=" in asked[1].lower()
        assert (tmp_path / "file").stat().st_size >= 2000


class TestCalls:
    def test_the_whole_call_ends_and_rows_that_are_answered_are_kept(self, hostile, clients):
        server = hostile()
        client = clients(server, concurrency=1, call_timeout=2.0)
        first, *others = client._engine.session.plan(201)
        held = []

        def relay_once(visit):
            if held:
                silence(visit)
            held.append(visit)
            server.relay(visit)

        server.behaviours["infer"] = relay_once
        with pytest.raises(BatchError) as caught:
            in_time(lambda: client.logits(unit_rows(201, 32)))
        answered = [row is not None for row in caught.value.results]
        assert answered == [True] * first + [False] * sum(others)
        assert {type(error) for error in caught.value.errors.values()} == {CallTimeoutError}
        assert "call_timeout" in str(caught.value.errors[200])
        assert server.seen["infer"] == 2  # nothing more was sent

    @pytest.mark.parametrize("method", ["classify", "predict", "predict_proba", "classify_frame"])
    def test_every_call_on_texts_ends(self, hostile, clients, text_artifact, method):
        server = hostile(infer=silence)
        client = clients(server, "colours", backbone=text_artifact / "backbone", call_timeout=1.0)
        client.embed([""])
        work = getattr(client, method)
        if method == "classify_frame":
            pandas = pytest.importorskip("pandas")
            frame = in_time(lambda: work(pandas.Series(["a", "b"])))
            assert frame["error"].str.contains("call_timeout").all()
            return
        assert set(map(type, errors_of(lambda: work(["a", "b"])).values())) == {CallTimeoutError}

    def test_a_single_text_raises_the_error_itself(self, hostile, clients, text_artifact):
        server = hostile(infer=silence)
        client = clients(server, "colours", backbone=text_artifact / "backbone", call_timeout=0.5)
        client.embed([""])
        with pytest.raises(CallTimeoutError):
            in_time(lambda: client.classify("pain"))

    def test_embedding_counts_and_what_is_late_is_not_sent(
        self, hostile, clients, text_artifact, texts
    ):
        server = hostile()
        client = clients(server, "colours", backbone=text_artifact / "backbone", call_timeout=0.5)
        client.embed([""])
        inner = getattr(client, "_client", client)
        work = inner._on_backbone_thread

        async def slow(embed):
            await asyncio.sleep(1.0)
            return await work(embed)

        inner._on_backbone_thread = slow
        errors = errors_of(lambda: client.classify(texts))
        assert set(map(type, errors.values())) == {CallTimeoutError}
        assert server.seen["infer"] == 0

    def test_fetching_a_backbone_counts(self, hostile, clients, tmp_path, monkeypatch):
        monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path))
        client = clients(hostile(file=silence), "colours", call_timeout=0.5)
        for _ in range(2):  # the first one has let go of what the second one needs
            with pytest.raises(CallTimeoutError):
                in_time(lambda: client.classify("pain"))

    def test_connecting_and_the_card_are_calls(self, hostile, make_client, clients):
        server = hostile(manifest=silence)
        with pytest.raises(CallTimeoutError):
            in_time(lambda: make_client(server.url, "model", call_timeout=0.5))
        open_server = hostile()
        client = clients(open_server, call_timeout=0.5)
        open_server.behaviours["manifest"] = dripping_body
        with pytest.raises(CallTimeoutError):
            in_time(client.card)

    def test_a_call_that_ended_leaves_the_client_usable(self, hostile, clients):
        server = hostile(key=silence)
        client = clients(server, call_timeout=1.0)
        errors = errors_of(lambda: client.logits(unit_rows(1, 32)))
        assert set(map(type, errors.values())) == {CallTimeoutError}
        del server.behaviours["key"]
        client._engine.transport._timeout = 30.0
        assert in_time(lambda: client.logits(unit_rows(1, 32))).shape == (1, 5)

    def test_a_hung_goodbye_of_an_earlier_key_holds_no_call(self, hostile, clients, monkeypatch):
        monkeypatch.setattr("veilhead.session.MAX_QUERIES_PER_KEY", 1)
        server = hostile(forget=silence)
        client = clients(server)
        for _ in range(3):
            assert in_time(lambda: client.logits(unit_rows(1, 32))).shape == (1, 5)
        assert server.seen["forget"] >= 1

    def test_a_chunk_of_a_stream_has_the_time_of_a_call(self, hostile, clients, text_artifact):
        server = hostile()
        client = clients(server, "colours", backbone=text_artifact / "backbone", call_timeout=1.5)
        client.embed([""])
        size = client._engine.chunk
        texts = [WORDS[row % len(WORDS)] for row in range(4 * size)]
        queries = []

        def relay_one_chunk(visit):
            queries.append(visit)
            if len(queries) > len(client._engine.session.plan(size)):
                silence(visit)
            server.relay(visit)

        server.behaviours["infer"] = relay_one_chunk

        def run():
            return list(client.classify_many(iter(texts), concurrency=1))

        rows = in_time(run)
        assert len(rows) == len(texts)
        assert [type(row) for row in rows[:size]] == [list] * size
        assert {type(row) for row in rows[size : 2 * size]} == {CallTimeoutError}
        assert {type(row) for row in rows[2 * size :]} == {NotSentError}
        assert f"row {size}:" in str(rows[size])

    def test_a_stream_may_take_longer_than_each_of_its_chunks(
        self, hostile, clients, text_artifact
    ):
        client = clients(
            hostile(), "colours", backbone=text_artifact / "backbone", call_timeout=2.0
        )

        def run():
            rows = client.classify_many(iter(["a", "b"] * client._engine.chunk))
            found = [next(rows)]
            time.sleep(2.5)
            return found + list(rows)

        assert {type(row) for row in in_time(run)} == {list}

    def test_no_attempt_is_waited_for_that_would_come_too_late(self, hostile, clients):
        server = hostile(infer=answer(503, "Retry-After: 20"))
        client = clients(server, call_timeout=10.0)
        error = errors_of(lambda: client.logits(unit_rows(1, 32)))[0]
        assert isinstance(error, ServiceResponseError)
        assert (error.status, error.retry_after) == (503, 20)
        assert server.seen["infer"] == 1


class TestClosing:
    @pytest.mark.parametrize("behaviour", ENDLESS)
    def test_a_service_that_does_not_take_leave_holds_nobody(self, hostile, make_client, behaviour):
        server = hostile(forget=ENDLESS[behaviour])
        client = make_client(server.url, "model")
        client.logits(np.eye(32)[:1])
        in_time(client.close, seconds=10)
        assert server.seen["forget"] == 1

    def test_what_is_under_way_is_given_up(self, hostile, make_client):
        server = hostile(infer=silence)
        client = make_client(server.url, "model")

        def ask():
            with contextlib.suppress(Exception):
                client.logits(unit_rows(1, 32))

        call = threading.Thread(target=ask, daemon=True)
        call.start()
        while not server.seen["infer"]:
            time.sleep(0.01)
        in_time(client.close, seconds=10)
        call.join(10)
        assert not call.is_alive()

    def test_bytes_that_nobody_takes_hold_no_connection_open(self, hostile):
        server = hostile(infer=unread)

        async def pieces():
            for _ in range(64):
                yield bytes(2**20)

        async def run():
            async with Connections(httpx2.URL(server.url), limit=1) as connections:
                request = httpx2.Request(
                    "POST",
                    f"{server.url}/v1/models/model/infer",
                    content=pieces(),
                    headers={"Content-Length": str(64 * 2**20)},
                    extensions={"timeout": httpx2.Timeout(TIMEOUT).as_dict()},
                )
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(TIMEOUT):
                        await connections.handle_async_request(request)
                opened = list(connections._sockets)
                held = [each.fileno() for each in opened]
            return held, [each.fileno() for each in opened]

        held, left = in_time(lambda: asyncio.run(run()), seconds=10)
        assert all(number != -1 for number in held)  # it was given up, and stayed
        assert left == [-1]

    def test_the_kernel_ends_what_is_not_taken(self):
        connections = Connections(httpx2.URL("http://127.0.0.1"), limit=1)
        address = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))
        with connections._new_socket(address) as opened:
            assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000

    def test_leaving_the_context_of_an_async_client_ends_too(self, hostile):
        server = hostile(forget=silence, infer=silence)

        async def run():
            async with AsyncClient(server.url, "model") as client:
                task = asyncio.create_task(client.logits(np.eye(32)[:1]))
                while not server.seen["infer"]:
                    await asyncio.sleep(0.01)
            await asyncio.wait((task,), timeout=5)
            assert task.done()
            return await asyncio.gather(task, return_exceptions=True)

        in_time(lambda: asyncio.run(run()), seconds=15)

"""The client's connections, against servers that behave and others, over real sockets."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import httpx2
import pytest

from veilhead.connections import Connections, _proxy_of

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello"


class Server:
    """Answers every request with the same bytes; None keeps silent."""

    def __init__(self, answer, *, close=False):
        self.answer = answer
        self.close = close
        self.requests = []
        self.connections = 0

    async def serve(self, reader, writer):
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = 0
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        length = int(line.partition(b":")[2])
                self.requests.append((head, await reader.readexactly(length)))
                if self.answer is None:
                    await asyncio.sleep(60)
                writer.write(self.answer)
                await writer.drain()
                if self.close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


class Waiting(Server):
    """Says when the first piece of a body is here."""

    def __init__(self, first, rest):
        super().__init__(ANSWER)
        self.first = first
        self.rest = rest
        self.arrived = asyncio.Event()

    async def serve(self, reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(len(self.first)) == self.first
        self.arrived.set()
        assert await reader.readexactly(len(self.rest)) == self.rest
        writer.write(self.answer)
        writer.close()


@asynccontextmanager
async def connected(server, *, limit=2):
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    url = httpx2.URL(f"http://127.0.0.1:{port}")
    try:
        async with Connections(url, limit=limit) as connections:
            yield connections, url
    finally:
        listener.close()


async def ask(connections, url, *, read=5.0, content=b"query", headers=None):
    timeout = httpx2.Timeout(5.0, read=read)
    request = httpx2.Request(
        "POST",
        f"{url}/v1/x?y=%7E",
        headers={"Accept-Encoding": "identity", **(headers or {})},
        content=content,
        extensions={"timeout": timeout.as_dict()},
    )
    response = await connections.handle_async_request(request)
    try:
        return response.status_code, dict(response.headers), await response.aread()
    finally:
        await response.aclose()


def test_a_piece_of_a_body_is_sent_before_the_next_is_asked_for():
    async def run():
        server = Waiting(b"header", b"polynomials")

        async def pieces():
            yield server.first
            await asyncio.wait_for(server.arrived.wait(), 5)
            yield server.rest

        length = str(len(server.first + server.rest))
        async with connected(server) as (connections, url):
            status, _, body = await ask(
                connections, url, content=pieces(), headers={"Content-Length": length}
            )
        assert (status, body) == (200, b"hello")

    asyncio.run(run())


def test_requests_share_a_connection_and_carry_nothing_that_was_not_asked_for():
    server = Server(ANSWER)

    async def run():
        async with connected(server) as (connections, url):
            for _ in range(3):
                status, headers, body = await ask(connections, url)
                assert (status, headers["x-a"], body) == (200, "b", b"hello")
            return url

    url = asyncio.run(run())
    assert server.connections == 1
    for head, body in server.requests:
        line, *rest = head.decode().rstrip().split("\r\n")
        assert line == "POST /v1/x?y=%7E HTTP/1.1"
        assert {row.lower() for row in rest} == {
            f"host: 127.0.0.1:{url.port}",
            "accept-encoding: identity",
            "content-length: 5",
        }
        assert body == b"query"


def test_no_more_connections_than_allowed():
    server = Server(ANSWER)

    async def run():
        async with connected(server, limit=2) as (connections, url):
            await asyncio.gather(*(ask(connections, url) for _ in range(10)))

    asyncio.run(run())
    assert len(server.requests) == 10
    assert server.connections == 2


def test_a_response_that_was_not_read_ends_its_connection():
    server = Server(b"HTTP/1.1 200 OK\r\nContent-Length: 500000\r\n\r\n" + bytes(1000))

    async def run():
        async with connected(server) as (connections, url):
            for _ in range(2):
                request = httpx2.Request(
                    "GET", url, extensions={"timeout": httpx2.Timeout(5.0).as_dict()}
                )
                response = await connections.handle_async_request(request)
                await response.aclose()

    asyncio.run(run())
    assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (None, httpx2.ReadTimeout),
        (b"", httpx2.RemoteProtocolError),
        (b"nonsense\r\n\r\n", httpx2.RemoteProtocolError),
        (ANSWER[:-2], httpx2.RemoteProtocolError),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
            httpx2.RemoteProtocolError,
        ),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", httpx2.RemoteProtocolError),
    ],
    ids=["silence", "end", "nonsense", "half a body", "half a chunk", "a huge header"],
)
def test_failures_are_those_of_httpx2(answer, error):
    async def run():
        async with connected(Server(answer, close=True)) as (connections, url):
            with pytest.raises(error):
                await ask(connections, url, read=0.2)

    asyncio.run(run())


def test_a_server_that_is_not_there_cannot_be_connected_to():
    async def run():
        async with connected(Server(ANSWER)) as (_, url):
            pass
        async with Connections(url, limit=1) as connections:
            with pytest.raises(httpx2.ConnectError):
                await ask(connections, url)

    asyncio.run(run())


def test_a_redirect_and_a_cookie_are_left_alone():
    answer = (
        b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /elsewhere\r\nSet-Cookie: a=b\r\n"
        b"Content-Length: 0\r\n\r\n"
    )
    server = Server(answer)

    async def run():
        async with connected(server) as (connections, url):
            for _ in range(2):
                status, headers, _ = await ask(connections, url)
                assert (status, headers["location"]) == (307, "/elsewhere")

    asyncio.run(run())
    assert len(server.requests) == 2
    assert not any(b"cookie" in head.lower() for head, _ in server.requests)


def test_a_password_of_the_users_netrc_is_not_sent(tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    server = Server(ANSWER)

    async def run():
        async with connected(server) as (connections, url):
            await ask(connections, url)

    asyncio.run(run())
    assert b"authorization" not in server.requests[0][0].lower()


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    server = Server(ANSWER)

    async def run():
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        url = httpx2.URL("http://service.example")
        async with Connections(url, limit=1) as connections:
            assert (await ask(connections, url))[2] == b"hello"
        listener.close()

    asyncio.run(run())
    assert server.requests[0][0].startswith(b"POST http://service.example/v1/x?y=%7E HTTP/1.1")


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("https://service.example", "http://proxy.example:3128"),
        ("https://inside.example", None),
        ("http://127.0.0.1:8000", None),
        ("http://localhost", None),
        ("http://[::1]:1", None),
    ],
)
def test_which_hosts_are_reached_by_a_proxy(monkeypatch, url, proxy):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name.lower(), "proxy.example:3128")
        monkeypatch.setenv(name, "proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    monkeypatch.setenv("NO_PROXY", "inside.example")
    assert _proxy_of(httpx2.URL(url)) == proxy

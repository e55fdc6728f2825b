"""What a caller's connection can cost the gateway, over real sockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
import uvicorn

from veilhead import AsyncClient
from veilhead.gateway.app import Gateway, Limits, create_app
from veilhead.gateway.connections import guarded
from veilhead.gateway.metrics import Metrics

GET = b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"
CONNECTIONS = 8


class Running:
    """The gateway's routes and its server, without a service behind them."""

    def __init__(self):
        gateway = Gateway(AsyncClient("http://127.0.0.1:9", "m"), None, Limits(), Metrics())
        self.asked = 0
        app = create_app(gateway)

        async def counting(scope, receive, send):
            self.asked += scope["type"] == "http"
            await app(scope, receive, send)

        guard, options = guarded(counting, CONNECTIONS, header_seconds=1.0, unread_seconds=1.0)
        config = uvicorn.Config(
            guard, port=0, lifespan="off", access_log=False, log_config=None, **options
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(30)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def status(self):
        with self.connect() as connection:
            connection.sendall(GET)
            return connection.recv(12)[9:]


def ended(connection):
    """Whether the gateway ends a connection that is only waited for."""
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.fixture
def running():
    with Running() as found:
        yield found


def test_there_is_a_number_of_connections_that_is_not_passed(running):
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(running.connect()) for _ in range(CONNECTIONS)]
        for connection in held:  # all of them are accepted
            connection.sendall(GET)
            assert connection.recv(12)[9:] == b"200"
        connection = stack.enter_context(running.connect())
        held[0].settimeout(0.8)  # before it would be closed for being idle
        assert ended(held[0])  # the longest idle one makes room: nobody is locked out
        connection.sendall(GET)
        assert connection.recv(12)[9:] == b"200"
        assert all(ended(connection) for connection in held)
        assert running.status() == b"200"


@pytest.mark.parametrize("begin", [b"", b"GET /metr", GET + b"GET /metr"])
def test_a_header_that_does_not_come_ends_its_connection(running, begin):
    with running.connect() as connection:
        connection.sendall(begin)
        assert ended(connection)
    assert running.status() == b"200"


def test_a_header_that_trickles_ends_its_connection(running):
    def trickle(connection):
        for number in range(200):
            connection.sendall(b"x-%d: y\r\n" % number)
            time.sleep(0.05)

    with running.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(OSError, match=r"pipe|reset"):
            trickle(connection)


def test_a_header_without_end_is_refused(running):
    with running.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nx: ")
        with contextlib.suppress(OSError):
            for _ in range(40):
                connection.sendall(b"a" * 65536)
        assert ended(connection)
    assert running.status() == b"200"


def test_who_asks_and_never_reads_is_left_with_few_answers(running):
    """Requests by the thousand in one line: answered one by one, and only while they are read."""
    sent = 0

    def ask_on(connection):
        nonlocal sent
        for _ in range(2000):
            connection.sendall(GET * 1000)
            sent += 1000

    with running.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(OSError, match=r"pipe|reset"):  # and not that we waited in vain
            ask_on(connection)
    assert running.asked < sent + 1000
    assert running.status() == b"200"

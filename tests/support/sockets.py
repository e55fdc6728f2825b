"""Raw connections to a service on loopback, and what its process holds."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from pathlib import Path


def connect(port, *, timeout=20, address="127.0.0.1", receive_bytes=None):
    """A connection from this address of the loopback net."""
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(timeout)
    connection.bind((address, 0))
    connection.connect(("127.0.0.1", port))
    return connection


def read_all(connection):
    """What comes until the other side closes."""
    answer = b""
    with suppress(ConnectionError):
        while piece := connection.recv(65536):
            answer += piece
    return answer


def exchange(port, *pieces, address="127.0.0.1", pause=0.0):
    """Send pieces on a connection of their own, and read until the other side closes."""
    with connect(port, address=address) as connection:
        for piece in pieces:
            with suppress(ConnectionError):
                connection.sendall(piece)
            time.sleep(pause)
        return read_all(connection)


def get(path, *, headers=()):
    """The bytes of a GET."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode()


def push(connections, data, seconds):
    """Send the same bytes on all of these, as fast as they take them; how many went."""
    sent, deadline = 0, time.monotonic() + seconds
    live = list(connections)
    for connection in live:
        connection.setblocking(False)
    while live and time.monotonic() < deadline:
        for connection in list(live):
            try:
                sent += connection.send(data)
            except BlockingIOError:
                time.sleep(0.0005)
            except OSError:
                live.remove(connection)
    return sent


def is_closed(connection):
    """Whether the other side has ended a connection; what it has sent is read and thrown away."""
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def descriptors(pid):
    """Open files of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def until(condition, seconds=20):
    """Wait for something that comes about by itself."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)

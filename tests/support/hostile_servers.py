"""Servers on loopback that do what no service should, in threads of their own.

A `HostileServer` relays every request to an honest service, but for the routes that a test gives it
a behaviour for: a function of the connection, which may send what it likes for as long as it likes.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

#: Between two bytes that drip: many of them within any time limit of a test.
_DRIP_SECONDS = 0.02


class Visit:
    """A connection whose request's head was read, and nothing of its body."""

    def __init__(self, server, connection, head):
        self.connection = connection
        self.head = head
        #: Bytes of the body that are still to be read.
        self.length = int(_field(head, b"content-length") or 0)
        self._ended = server.ended

    def read_body(self):
        """Take the body, or what comes of it."""
        while self.length and (piece := self.connection.recv(min(self.length, 2**16))):
            self.length -= len(piece)

    def wait(self, seconds=None):
        """Whether the server ends."""
        return self._ended.wait(seconds)

    def send(self, data):
        self.connection.sendall(data)

    def drip(self, data):
        """Send a byte at a time, and go on with the last one."""
        place = 0
        while not self.wait(_DRIP_SECONDS):
            self.send(data[place : place + 1] or data[-1:])
            place += 1


class HostileServer:
    """Relays to the service at `upstream`, as HTTP/1.1 with a connection for each request.

    Attributes:
        behaviours: what happens to the requests of a route, instead of being relayed.
        seen: requests of each route.
        connections: how many were made.
    """

    def __init__(self, upstream=None, *, tls=None, **behaviours):
        self.behaviours = behaviours
        self.seen = Counter()
        self.connections = 0
        self.ended = threading.Event()
        self._upstream = upstream
        self._tls = tls
        self._listener = socket.socket()
        # Inherited by connections: what is not read is soon not taken either.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._open = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self):
        self._accepting.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._accepting.join(10)

    def _accept(self):
        while not self.ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            if "connection" in self.behaviours:
                self.behaviours["connection"](Visit(self, connection, b""))
                return
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
                self._open.append(connection)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (piece := connection.recv(1)):
                    return
                head += piece
            route = _route(head)
            self.seen[route] += 1
            visit = Visit(self, connection, head)
            if (behaviour := self.behaviours.get(route)) is not None:
                behaviour(visit)
            else:
                self.relay(visit)

    def relay(self, visit):
        """Let the honest service answer."""
        host, port = self._upstream.removeprefix("http://").split(":")
        head = visit.head[:-2] + b"Connection: close\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=30) as upstream:
            upstream.sendall(head)
            while visit.length and (piece := visit.connection.recv(min(visit.length, 2**16))):
                upstream.sendall(piece)
                visit.length -= len(piece)
            while piece := upstream.recv(2**16):
                visit.send(piece)


def _route(head):
    method, path = head.split(b" ")[:2]
    if b"/files/" in path:
        return "file"
    names = {b"POST": "infer", b"PUT": "key", b"DELETE": "forget", b"CONNECT": "connect"}
    return names.get(method, "manifest")


def _field(head, name):
    for line in head.split(b"\r\n"):
        if line.lower().startswith(name + b":"):
            return line.partition(b":")[2].strip()
    return None


def silence(visit):
    """Reads the request, and never answers."""
    visit.read_body()
    visit.wait()


def unread(visit):
    """Never reads the body."""
    visit.wait()


def endless_continue(visit):
    """Answers `100 Continue` again and again."""
    while not visit.wait(_DRIP_SECONDS):
        visit.send(b"HTTP/1.1 100 Continue\r\n\r\n")


def dripping_head(visit):
    """A head that comes byte by byte, and never ends."""
    visit.read_body()
    visit.drip(b"HTTP/1.1 200 OK\r\nX-A: a")


def dripping_body(visit):
    """A body that comes byte by byte."""
    visit.read_body()
    visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    visit.drip(b"a")


def dripping_chunks(visit):
    """A body of chunks of a byte each, without end."""
    visit.read_body()
    visit.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not visit.wait(_DRIP_SECONDS):
        visit.send(b"1\r\na\r\n")


def dripping_problem(visit):
    """A refusal whose reason comes byte by byte."""
    visit.read_body()
    visit.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 60000\r\n\r\n")
    visit.drip(b" ")


def answer(status, *lines, body=b"{}"):
    """A behaviour: this answer, with these header lines, and then the end of the connection."""

    def behave(visit):
        visit.read_body()
        head = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}", "Connection: close"]
        visit.send("\r\n".join([*head, *lines, "", ""]).encode() + body)

    return behave


#: Behaviours that never end, by what they do to a request with a body.
ENDLESS = {
    "silence": silence,
    "unread": unread,
    "endless-continue": endless_continue,
    "dripping-head": dripping_head,
    "dripping-body": dripping_body,
    "dripping-chunks": dripping_chunks,
    "dripping-problem": dripping_problem,
}


def in_time(work, *, seconds=20.0):
    """What `work` returns or raises; it fails when it has not ended after so many seconds."""
    found = {}

    def run():
        try:
            found["value"] = work()
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, f"it has not ended after {seconds:g} s"
    if "error" in found:
        raise found["error"]
    return found["value"]


def self_signed(directory, *, name="localhost", days=1):
    """(certificate, key) files of a certificate for `name` and 127.0.0.1, which ends in `days`."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    ends = datetime.now(UTC) + timedelta(days=days)
    names = [x509.DNSName(name)]
    if name == "localhost":
        names.append(x509.IPAddress(IPv4Address("127.0.0.1")))
    made = (
        x509.CertificateBuilder(
            subject, subject, key.public_key(), 1, ends - timedelta(days=2), ends
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = directory / "certificate.pem", directory / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files

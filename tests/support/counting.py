"""A service that notes how many bytes of each query reach it, over a real socket."""

from __future__ import annotations

import contextlib
import socketserver
import threading

from veilhead_protocol.wire import ReplyMessage

#: Where a query says how many texts it holds (docs/wire-format.md, section 6).
TEXTS = slice(108, 112)


class Counting(socketserver.ThreadingTCPServer):
    """A service that notes how many bytes of each query reach it, and answers with zeros."""

    daemon_threads = True

    def __init__(self, manifest):
        super().__init__(("127.0.0.1", 0), Handler)
        self.manifest = manifest
        self.counts = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        with contextlib.suppress(ConnectionError):
            while line := self.rfile.readline():
                self.answer(line.split()[0], self.headers())

    def headers(self):
        found = {}
        while (line := self.rfile.readline().strip()) and b":" in line:
            name, _, value = line.partition(b":")
            found[name.lower()] = value.strip()
        return found

    def answer(self, method, headers):
        body = self.rfile.read(int(headers.get(b"content-length", 0)))
        manifest, content = self.server.manifest, b""
        if method == b"POST":
            self.server.counts.append(len(body))
            layout = manifest.layout_of(int.from_bytes(body[TEXTS], "little"))
            content = bytes(ReplyMessage.size(layout, manifest.head.reply_bits))
        elif method == b"GET":
            content = manifest.serialize()
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)


@contextlib.contextmanager
def counting(manifest):
    with Counting(manifest) as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        try:
            yield service
        finally:
            service.shutdown()
            thread.join()

"""Services whose answers a test writes down, and real ones in a process of their own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time

import httpx2


class ScriptedService(httpx2.AsyncBaseTransport):
    """A real app behind a transport that can be told to fail, and that remembers every request.

    `script` holds, for each route, what happens to its next requests: a response, an exception to
    raise, a function of the request, or None to let the app answer.
    """

    def __init__(self, inner):
        self.inner = inner
        self.script = {}
        self.requests = []

    def on(self, route, *events):
        self.script.setdefault(route, []).extend(events)

    def seen(self, route):
        return [body for found, body in self.requests if found == route]

    async def __aenter__(self):
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *details):
        await self.inner.__aexit__(*details)

    async def handle_async_request(self, request):
        body = await request.aread()
        route = {"POST": "infer", "PUT": "key", "DELETE": "forget"}.get(request.method)
        if route is None:
            route = "file" if "/files/" in request.url.path else "manifest"
        self.requests.append((route, body))
        event = self.script[route].pop(0) if self.script.get(route) else None
        if isinstance(event, Exception):
            raise event
        if isinstance(event, httpx2.Response):
            return event
        if event is not None:
            return await event(self.inner, request)
        return await self.inner.handle_async_request(request)


def problem(status, code, **headers):
    return httpx2.Response(
        status,
        json={"type": f"urn:veilhead:problem:{code}", "detail": "scripted", "retryable": False},
        headers={"X-Request-Id": "r1", **headers},
    )


@contextlib.contextmanager
def running(
    store,
    *arguments,
    access=("--insecure-no-tenants",),
    log=subprocess.PIPE,
    environment=None,
    ready="/readyz",
):
    """The URL of `veilhead-server run` on a store, as its own process, whose log goes to `log`.

    It is handed out once `ready` is answered.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "veilhead_service", "run", "--store", str(store)]
    process = subprocess.Popen(
        [*command, "--port", str(port), *access, *arguments],
        env=os.environ | {"PYTHONWARNINGS": "ignore"} | (environment or {}),
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{url}{ready}", trust_env=False).is_success:
                    break
            if process.poll() is not None:
                raise AssertionError("" if process.stderr is None else process.stderr.read())
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=30)

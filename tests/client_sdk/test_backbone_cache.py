"""Fetching the backbone: what is kept of a broken transfer, and what is not."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time

import httpx2
import pytest
from support.services import running

from veilhead import Client, ReplyError, ServiceResponseError, TransportError
from veilhead.local import InProcessTransport
from veilhead_protocol.errors import BackboneError
from veilhead_service.app import create_app
from veilhead_service.model_store import SingleModel, publish
from veilhead_service.settings import Settings

WEIGHTS = "model.safetensors"


class _Cut(httpx2.AsyncByteStream):
    """The first bytes of a body, and then a connection that breaks."""

    def __init__(self, content):
        self.content = content

    async def __aiter__(self):
        yield self.content
        raise httpx2.ReadError("the connection broke")


class FileServer(httpx2.AsyncBaseTransport):
    """The real service; its answers to requests for the weights can be changed.

    `cuts` holds after how many bytes the next such answers break off; `answer` makes another one
    of the real one. `asked` remembers the range and tag of each request for the weights, and
    `paths` every file that was asked for.
    """

    def __init__(self, directory):
        app = create_app(
            Settings(workers=1, insecure_no_tenants=True), models=SingleModel(directory)
        )
        self.inner = InProcessTransport(app)
        self.cuts = []
        self.answer = None
        self.asked = []
        self.paths = []

    async def __aenter__(self):
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *details):
        await self.inner.__aexit__(*details)

    async def handle_async_request(self, request):
        response = await self.inner.handle_async_request(request)
        if "/files/" not in request.url.path:
            return response
        self.paths.append(request.url.path.rpartition("/files/")[2])
        if self.paths[-1] != WEIGHTS:
            return response
        self.asked.append((request.headers.get("range"), request.headers.get("if-range")))
        if self.cuts:
            body = await response.aread()
            return httpx2.Response(
                response.status_code,
                headers=response.headers,
                stream=_Cut(body[: self.cuts.pop(0)]),
            )
        if self.answer is not None:
            return await self.answer(response)
        return response


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path))
    monkeypatch.setattr("veilhead.transport._FIRST_PAUSE_SECONDS", 0.001)
    return tmp_path


@pytest.fixture
def fetching(cache, text_artifact):
    """Clients of one artefact, each behind a file server of its own; closed in the end."""
    clients = []

    def make():
        server = FileServer(text_artifact)
        client = Client("http://127.0.0.1", "colours", transport=server, device="cpu")
        clients.append(client)
        return client, server

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def weights(text_artifact):
    return (text_artifact / "backbone" / WEIGHTS).read_bytes()


def tag_of(content):
    return f'"{hashlib.sha256(content).hexdigest()}"'


def unfinished(cache):
    return [path for path in cache.rglob(".partial-*/*") if path.is_file()]


def fetched(cache):
    (path,) = cache.rglob(WEIGHTS)
    return path.read_bytes()


def test_a_broken_transfer_is_continued(fetching, cache, weights):
    client, server = fetching()
    server.cuts = [1000, 500]
    client.embed(["pain"])
    tag = tag_of(weights)
    assert server.asked == [(None, None), ("bytes=1000-", tag), ("bytes=1500-", tag)]
    assert fetched(cache) == weights
    assert unfinished(cache) == []


def test_what_arrived_is_kept_for_the_next_client(fetching, cache, weights):
    client, server = fetching()
    server.cuts = [1000, 0, 0, 0, 0]
    with pytest.raises(TransportError):
        client.embed(["pain"])
    (partial,) = unfinished(cache)
    assert partial.read_bytes() == weights[:1000]
    again, server = fetching()
    again.embed(["pain"])
    assert server.asked == [("bytes=1000-", tag_of(weights))]
    assert fetched(cache) == weights


KILLED = """
import os, sys
import anyio
import httpx2
from veilhead import Client


class Stalling(httpx2.AsyncHTTPTransport):
    async def handle_async_request(self, request):
        response = await super().handle_async_request(request)
        if not request.url.path.endswith("model.safetensors"):
            return response
        content = await response.aread()

        class Part(httpx2.AsyncByteStream):
            async def __aiter__(self):
                yield content[:5000]
                await anyio.sleep(60)

        return httpx2.Response(200, headers=response.headers, stream=Part())


Client(sys.argv[1], "colours", transport=Stalling()).embed(["pain"])
"""


def test_a_killed_fetch_is_continued(fetching, cache, weights, text_artifact, tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    publish(text_artifact, root / "store")
    with running(root / "store", log=subprocess.DEVNULL) as url:
        process = subprocess.Popen([sys.executable, "-c", KILLED, url])
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size >= 4000 for path in unfinished(cache)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
    (partial,) = unfinished(cache)
    size = partial.stat().st_size
    assert 4000 <= size < len(weights)
    client, server = fetching()
    client.embed(["pain"])
    assert server.asked == [(f"bytes={size}-", tag_of(weights))]
    assert fetched(cache) == weights


def test_an_earlier_part_of_other_bytes_is_discarded(fetching, cache, weights):
    client, server = fetching()
    server.cuts = [1000, 0, 0, 0, 0]
    with pytest.raises(TransportError):
        client.embed(["pain"])
    (partial,) = unfinished(cache)
    partial.write_bytes(bytes(1000))
    again, server = fetching()
    again.embed(["pain"])
    assert [asked for asked, _ in server.asked] == ["bytes=1000-", None]
    assert fetched(cache) == weights


@pytest.mark.parametrize("excess", [0, 7])
def test_an_earlier_part_that_is_long_enough_is_not_asked_for(
    fetching, cache, weights, excess, monkeypatch
):
    client, server = fetching()
    server.cuts = [1000, 0, 0, 0, 0]
    with pytest.raises(TransportError):
        client.embed(["pain"])
    (partial,) = unfinished(cache)
    partial.write_bytes(weights + bytes(excess))
    again, server = fetching()
    again.embed(["pain"])
    assert server.asked == ([] if excess == 0 else [(None, None)])
    assert fetched(cache) == weights


def test_a_service_without_ranges_sends_the_whole(fetching, cache, weights):
    client, server = fetching()
    server.cuts = [1000]

    async def whole(response):
        return httpx2.Response(200, content=weights)

    server.answer = whole
    client.embed(["pain"])
    assert len(server.asked) == 2
    assert fetched(cache) == weights


def test_another_part_than_the_one_asked_for_is_refused(fetching, cache, weights):
    client, server = fetching()
    server.cuts = [1000]

    async def earlier(response):
        size = len(weights)
        part = {"Content-Range": f"bytes 900-{size - 1}/{size}"}
        return httpx2.Response(206, content=weights[900:], headers=part)

    server.answer = earlier
    with pytest.raises(ReplyError, match="another part"):
        client.embed(["pain"])


def test_a_part_that_nobody_asked_for_is_refused(fetching, weights):
    client, server = fetching()

    async def part(response):
        size = len(weights)
        headers = {"Content-Range": f"bytes 0-{size - 1}/{size}"}
        return httpx2.Response(206, content=weights, headers=headers)

    server.answer = part
    with pytest.raises(ReplyError, match="another part"):
        client.embed(["pain"])


def test_a_refused_range_begins_anew(fetching, cache):
    client, server = fetching()
    server.cuts = [1000]

    async def refuse(response):
        return httpx2.Response(416, headers={"Content-Range": "bytes */10"})

    server.answer = refuse
    with pytest.raises(ServiceResponseError):
        client.embed(["pain"])
    assert unfinished(cache) == []
    server.answer = None
    client.embed(["pain"])
    assert server.asked[-1] == (None, None)


def test_more_bytes_than_the_manifest_says_are_not_read(fetching, cache, weights):
    client, server = fetching()
    server.cuts = [1000]

    async def longer(response):
        part = {"Content-Range": response.headers["content-range"]}
        return httpx2.Response(206, content=weights[1000:] + b"x", headers=part)

    server.answer = longer
    with pytest.raises(ReplyError, match="longer"):
        client.embed(["pain"])


def test_two_clients_fetch_it_once(fetching, cache):
    (first, slow), (second, quick) = fetching(), fetching()
    entered, go_on = threading.Event(), threading.Event()

    async def wait(response):
        entered.set()
        assert go_on.wait(30)
        return response

    slow.answer = wait
    errors = []

    def embed(client):
        try:
            client.embed(["pain"])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=embed, args=(client,)) for client in (first, second)]
    threads[0].start()
    assert entered.wait(30)
    threads[1].start()
    time.sleep(0.3)  # it finds the lock taken, more than once
    assert quick.paths == []
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert len(slow.paths) == len(set(slow.paths)) == len(first.manifest.backbone.files)
    assert quick.paths == []


def test_a_cache_that_is_a_file_is_named(fetching, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path / "file"))
    client, _ = fetching()
    with pytest.raises(BackboneError, match="VEILHEAD_CACHE"):
        client.embed(["pain"])

"""What the service sees of a classification: everything that crosses the wire, as it crosses.

A recorder sits between the client and the real service. It prints each request as the service gets
it, and looks for the texts and for their embeddings in all that passed.

Run it with `python examples/what_the_server_sees.py`.
"""

import tempfile
import zlib
from pathlib import Path

import httpx2
import numpy as np

from veilhead import Client
from veilhead.local import serve_locally
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import minilm

TEXTS = ["HIV positive since 2019, on antiretroviral therapy", "flu, mild"]
COMMON_HEADERS = {"accept", "accept-encoding", "connection", "content-length", "host"}


class Recorder(httpx2.AsyncBaseTransport):
    """Hands requests on, and keeps what they and their answers were made of."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self.inner = inner
        self.passed: list[bytes] = []

    async def __aenter__(self) -> "Recorder":
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self.inner.__aexit__()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Let the service answer, and keep what passed."""
        body = await request.aread()
        response = await self.inner.handle_async_request(request)
        answer = await response.aread()
        self.passed += [str(request.url).encode(), str(request.headers).encode(), body, answer]
        self.show(request, body, response, answer)
        return response

    def show(
        self, request: httpx2.Request, body: bytes, response: httpx2.Response, answer: bytes
    ) -> None:
        """Print one request and its answer."""
        print(f"{request.method} {request.url.path[:48]}")
        for name, value in request.headers.items():
            if name not in COMMON_HEADERS:
                print(f"    {name}: {value}")
        for way, content in (("up", body), ("down", answer)):
            if content:
                packed = len(zlib.compress(content, 9)) / len(content)
                start = content[:12].hex(" ")
                print(f"    {way:5}{len(content):7,} bytes, {start} ..., packs to {packed:.0%}")
        print(f"    status {response.status_code}")


directory, section = minilm()
generator = np.random.default_rng(0)
head = HeadArtifact.from_weights(generator.normal(size=(4, 384)), None, ["a", "b", "c", "d"])

with tempfile.TemporaryDirectory() as name:
    made = Path(name) / "notes"
    head.with_backbone(directory, section).save(made)
    service = serve_locally(made)
    recorder = Recorder(service.transport)
    with Client(
        service.url, service.model, transport=recorder, backbone=service.backbone
    ) as client:
        for text in TEXTS:
            print(f"\nclassify a text of {len(text)} characters\n")
            client.classify(text)
        embeddings = client.embed(TEXTS)

needles = [text.encode() for text in TEXTS]
needles += [
    row.astype(kind)[:4].tobytes() for row in embeddings for kind in ("<f8", "<f4", "<f2", ">f4")
]
found = sum(needle in passed for needle in needles for passed in recorder.passed)
print(f"\ntexts or embeddings found in what passed: {found}")

"""The service's twin without privacy: `python -m veilhead_benchmarks.plaintext_twin HEAD PORT`.

The same HTTP stack as the service (FastAPI and uvicorn with httptools, a body read in pieces), one
route, and a head in plaintext: float32 embeddings in, float32 logits out. It exists to be compared
with, and is on loopback only. Its client embeds all the texts of a call at once, which pads least,
and posts the embeddings in one request.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx2
import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray

from veilhead_benchmarks.heads import Head
from veilhead_benchmarks.peers.plaintext import answer
from veilhead_models.backbone import Backbone

MESSAGE_TYPE: Final = "application/octet-stream"

_START_SECONDS: Final = 60.0


def create_twin(weight: NDArray[np.float32], bias: NDArray[np.float32]) -> FastAPI:
    """The application for weight [d, C] and bias [C]."""
    app = FastAPI(title="plaintext twin")

    @app.get("/livez")
    async def livez() -> Response:
        return Response()

    @app.post("/v1/logits", response_class=Response)
    async def logits(request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
        return Response(answer(bytes(body), weight, bias), media_type=MESSAGE_TYPE)

    return app


class TwinProcess:
    """The twin in a process of its own; as a context manager it runs meanwhile."""

    def __init__(self, head: Head, work: Path) -> None:
        """Describe it; its head is written below the directory `work`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._head = work / "twin.npz"
        np.savez(
            self._head,
            weight=head.weight.T.astype(np.float32),
            bias=head.bias.astype(np.float32),
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        module = "veilhead_benchmarks.plaintext_twin"
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", module, str(self._head), str(self.port)]
        )
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__(None, None, None)
                raise RuntimeError("the plaintext twin did not come up")
            time.sleep(0.05)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/livez", trust_env=False).is_success
        except httpx2.TransportError:
            return False


class TwinClient:
    """The twin's client; as a context manager it keeps its connection meanwhile."""

    def __init__(self, url: str, backbone: Backbone, classes: int) -> None:
        self._http = httpx2.Client(base_url=url, trust_env=False, timeout=60)
        self._backbone = backbone
        self._classes = classes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def classify(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Logits [len(texts), C]."""
        embeddings = self._backbone.embed(texts)
        response = self._http.post(
            "/v1/logits",
            content=embeddings.astype("<f4").tobytes(),
            headers={"Content-Type": MESSAGE_TYPE},
        )
        response.raise_for_status()
        logits = np.frombuffer(response.content, "<f4").reshape(-1, self._classes)
        return logits.astype(np.float64)


def main(head: str, port: str) -> None:
    """Serve the head of a file until the process is killed."""
    with np.load(head) as arrays:
        app = create_twin(arrays["weight"], arrays["bias"])
    uvicorn.run(
        app, host="127.0.0.1", port=int(port), access_log=False, log_config=None, http="httptools"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

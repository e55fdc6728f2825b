"""An evaluating process: `python -m veilhead_service.worker`.

It starts as a module of its own, so that it works below a script without a main guard, a notebook
or standard input. It holds heads and public keys, and answers one frame at a time on the socket
that it inherits. When the service goes away the socket closes, and so does the worker.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.errors import VeilheadError, WireError
from veilhead_service import frames, logs
from veilhead_service.encrypted_head import ClientKey, EncryptedHead

_HEADS: Final = 32
_KEYS: Final = 256

_Value = TypeVar("_Value")

logger = logging.getLogger("veilhead.worker")


class _Recent(OrderedDict[bytes, _Value]):
    """The most recently used values."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity

    def find(self, key: bytes, make: Callable[[], _Value]) -> _Value:
        if key not in self:
            self[key] = make()
            if len(self) > self._capacity:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


class Evaluator:
    """Heads and keys that this process has met, and the evaluation of a query with them."""

    def __init__(self) -> None:
        self._heads: _Recent[EncryptedHead] = _Recent(_HEADS)
        self._keys: _Recent[ClientKey] = _Recent(_KEYS)

    def evaluate(
        self, model_digest: bytes, directory: bytes, key_id: bytes, key: bytes, query: bytes
    ) -> bytes:
        """The reply to a query, under the key of that id and message."""
        head = self._heads.find(model_digest, lambda: _load_head(Path(os.fsdecode(directory))))
        client_key = self._keys.find(key_id, lambda: ClientKey.from_message(key))
        return head.evaluate(query, client_key)


def _load_head(directory: Path) -> EncryptedHead:
    artifact = HeadArtifact.load(directory, verify_backbone=False)
    return EncryptedHead(artifact.manifest, artifact.weight, artifact.bias)


def _answer(evaluator: Evaluator, request: list[bytes]) -> list[bytes]:
    """The parts of the answer to a request's parts."""
    started = time.perf_counter()
    _, model_digest, directory, key_id, key, query = request
    try:
        reply = evaluator.evaluate(model_digest, directory, key_id, key, query)
    except WireError as error:
        refusal = json.dumps([type(error).__name__, str(error)])
        return [frames.REFUSED, refusal.encode()]
    except VeilheadError as error:
        logger.error("evaluation failed: %s", error)
        return [frames.FAILED]
    except Exception as error:
        # Only the kind: a message could hold bytes of the request.
        logger.error("evaluation failed: %s", type(error).__name__)
        return [frames.FAILED]
    return [frames.REPLY, reply, struct.pack("<d", time.perf_counter() - started)]


def _read_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _read(connection: socket.socket) -> list[bytes]:
    (count,) = frames.COUNT.unpack(_read_exactly(connection, frames.COUNT.size))
    lengths = [
        frames.LENGTH.unpack(_read_exactly(connection, frames.LENGTH.size))[0] for _ in range(count)
    ]
    return [_read_exactly(connection, length) for length in lengths]


def main(descriptor: int) -> None:
    """Answer frames until the service closes the socket."""
    evaluator = Evaluator()
    with socket.socket(fileno=descriptor) as connection:
        connection.sendall(frames.write([frames.READY]))
        try:
            while True:
                connection.sendall(frames.write(_answer(evaluator, _read(connection))))
        except (EOFError, ConnectionError):
            return


if __name__ == "__main__":
    logs.inherit()
    try:
        main(int(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(0)

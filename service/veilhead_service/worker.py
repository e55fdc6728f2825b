"""An evaluating process: `python -m veilhead_service.worker`.

It starts as a module of its own, so that it works below a script without a main guard, a notebook
or standard input. It holds heads and public keys, and answers one frame at a time on the socket
that it inherits. When the service goes away the socket closes, and so does the worker.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from veilhead_protocol.errors import ModelUnavailableError, VeilheadError, WireError
from veilhead_protocol.hardening import forbid_core_dumps
from veilhead_protocol.wire import QueryHeader
from veilhead_service import frames, logs
from veilhead_service.encrypted_head import ClientKey, EncryptedHead
from veilhead_service.head_encryption import HeadKey
from veilhead_service.head_loading import HeadLoader

#: Bytes of heads, and by how many a load may let the process grow, when nobody says.
_HEAD_BYTES: Final = 2**30
_MEMORY_BYTES: Final = 2 * 2**30

#: Keys that a worker has ready; the least recently used go first.
KEYS: Final = 256

#: Zeros that are encrypted ahead, while nothing else is asked for: so many for a key, unless the
#: command line says otherwise, for so many of the keys that asked last. A zero of the largest set
#: takes 128 KiB.
ZEROS_AHEAD: Final = 16
KEYS_AHEAD: Final = 8

#: After an answer to a query that came out of a rest, before work is done ahead: the cores are
#: wanted for its way to the client. Queries that come one upon another leave no such time.
_PAUSE_MILLISECONDS: Final = 2
_REST_SECONDS: Final = 0.005

#: Below the service's own priority: when every core evaluates, it must still answer at once.
_NICENESS: Final = 5

#: Added to the kernel's score of what to kill when memory runs out, proc(5): a worker before the
#: service, since it is replaced, and before it a worker that loads, which may be the reason.
_OOM_SCORE: Final = 300
_OOM_SCORE_LOADING: Final = 600

_Value = TypeVar("_Value")

logger = logging.getLogger("veilhead.worker")


class _Recent(OrderedDict[bytes, _Value]):
    """The most recently used values, as many as the capacity holds; the newest always stays."""

    def __init__(self, capacity: int, size: Callable[[_Value], int] = lambda _: 1) -> None:
        super().__init__()
        self._capacity = capacity
        self._size = size

    def find(self, key: bytes, make: Callable[[], _Value]) -> _Value:
        if key not in self:
            self[key] = make()
            self.trim()
        self.move_to_end(key)
        return self[key]

    def trim(self) -> None:
        """Drop the oldest values until the capacity holds the others; values may have grown."""
        while len(self) > 1 and sum(map(self._size, self.values())) > self._capacity:
            self.popitem(last=False)


class Evaluator:
    """Heads and keys that this process has met, and the evaluation of a query with them."""

    def __init__(
        self,
        head_bytes: int = _HEAD_BYTES,
        memory_bytes: int = _MEMORY_BYTES,
        zeros_ahead: int = ZEROS_AHEAD,
        announce: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        """Make an evaluator without heads or keys.

        Args:
            head_bytes: encoded heads to keep.
            memory_bytes: by how much a load may let the process grow.
            zeros_ahead: zeros to encrypt ahead for each of the last keys.
            announce: called with `frames.LOADING` before a head is loaded, and with
                `frames.LOADED` after it, whatever came of it.
        """
        self._zeros_ahead = zeros_ahead
        self._heads = _Recent[EncryptedHead](head_bytes, lambda head: head.held_bytes)
        self._memory_bytes = memory_bytes
        self._announce = announce
        self._loader = HeadLoader(memory_bytes=memory_bytes)
        self._keys: _Recent[ClientKey] = _Recent(KEYS)
        self._ahead: OrderedDict[bytes, tuple[ClientKey, int]] = OrderedDict()

    def use_head_key(self, key: bytes) -> None:
        """Load encrypted heads with this key from now on."""
        self._loader = HeadLoader(HeadKey(key), memory_bytes=self._memory_bytes)

    def evaluate(
        self, model_digest: bytes, directory: bytes, key_id: bytes, key: bytes, query: bytes
    ) -> bytes:
        """The reply to a query, under the key of that id and message.

        A key that the query carries serves it alone, and is not kept.
        """
        head = self.head(model_digest, directory)
        header = QueryHeader.deserialize(query)
        if header.has_key:
            client_key = ClientKey.from_message(key)
        else:
            client_key = self._keys.find(key_id, lambda: ClientKey.from_message(key))
        held = head.held_bytes
        reply = head.evaluate(query, client_key)
        if head.held_bytes != held:  # it has encoded its weights for another layout
            self._heads.trim()
        if not header.has_key:
            self._expect(client_key, head.layout.replies)
        return reply

    def _expect(self, key: ClientKey, replies: int) -> None:
        self._ahead[key.id] = key, min(replies, self._zeros_ahead)
        self._ahead.move_to_end(key.id)
        if len(self._ahead) > KEYS_AHEAD:
            _, (oldest, _) = self._ahead.popitem(last=False)
            oldest.forget_prepared()

    def prepare(self) -> bool:
        """Do a small part of the next query's work; False when there is nothing to do.

        The next query is likely to be under a key that asked just now.
        """
        return any(key.prepare(zeros) for key, zeros in reversed(self._ahead.values()))

    def head(self, model_digest: bytes, directory: bytes) -> EncryptedHead:
        """The head of this version, loaded when it is not here yet."""
        return self._heads.find(model_digest, lambda: self._load(Path(os.fsdecode(directory))))

    def _load(self, directory: Path) -> EncryptedHead:
        self._announce(frames.LOADING)
        try:
            return self._loader.load(directory)
        finally:
            self._announce(frames.LOADED)


def _answer(evaluator: Evaluator, request: list[bytes]) -> list[bytes]:
    """The parts of the answer to a request's parts."""
    started = time.perf_counter()
    if request[0] == frames.HEAD_KEY:
        evaluator.use_head_key(request[1])
        return [frames.READY]
    try:
        if request[0] == frames.LOAD:
            evaluator.head(*request[1:])
            return [frames.READY]
        _, model_digest, directory, key_id, key, query = request
        reply = evaluator.evaluate(model_digest, directory, key_id, key, query)
    except (WireError, ModelUnavailableError) as error:
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
    data = b""
    while len(data) < size:  # a signal may cut a read short
        piece = connection.recv(size - len(data), socket.MSG_WAITALL)
        if not piece:
            raise EOFError
        data += piece
    return data


def _read(connection: socket.socket) -> list[bytes]:
    count, size = frames.HEADER.unpack(_read_exactly(connection, frames.HEADER.size))
    return frames.read(count, _read_exactly(connection, size))


def _score_for_killing(score: int) -> None:
    """Tell the kernel how soon to kill this process when memory runs out."""
    with suppress(OSError):  # not everywhere is /proc writable
        Path("/proc/self/oom_score_adj").write_text(str(score), "ascii")


def main(
    descriptor: int,
    head_bytes: int = _HEAD_BYTES,
    memory_bytes: int = _MEMORY_BYTES,
    zeros_ahead: int = ZEROS_AHEAD,
) -> None:
    """Answer frames until the service closes the socket.

    Args:
        descriptor: the inherited socket.
        head_bytes: encoded heads to keep, in bytes.
        memory_bytes: by how much a load may let the process grow.
        zeros_ahead: zeros to encrypt ahead for each of the last keys.
    """
    forbid_core_dumps()
    os.nice(_NICENESS)
    _score_for_killing(_OOM_SCORE)
    with socket.socket(fileno=descriptor) as connection:

        def announce(kind: bytes) -> None:
            _score_for_killing(_OOM_SCORE_LOADING if kind == frames.LOADING else _OOM_SCORE)
            connection.sendall(frames.write([kind]))

        evaluator = Evaluator(head_bytes, memory_bytes, zeros_ahead, announce)
        connection.sendall(frames.write([frames.READY]))
        waiting = select.poll()
        waiting.register(connection, select.POLLIN)
        pause = 0
        try:
            while True:
                answered = time.perf_counter()
                while not waiting.poll(pause) and evaluator.prepare():
                    pause = 0
                request = _read(connection)
                rested = time.perf_counter() - answered > _REST_SECONDS
                pause = _PAUSE_MILLISECONDS if rested else 0
                connection.sendall(frames.write(_answer(evaluator, request)))
        except (EOFError, ConnectionError):
            return


if __name__ == "__main__":
    logs.inherit()
    try:
        main(*map(int, sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(0)

"""HTTP to the service: limits, retries, errors.

A retry sends the same bytes again, and depends on the connection, the status, the headers and the
length of the answer, never on what an answer decrypts to: a service that could see a reaction to a
crafted reply would learn about the key from it.

Whatever a service does, an attempt ends: each has a deadline for all of it, from waiting for a
connection to the last byte of the answer. Only a file of the backbone may take longer, as long as
it grows.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import anyio
import httpx2

from veilhead.connections import Connections, PermanentError
from veilhead_protocol.copies import keep_for_ever, process_mark
from veilhead_protocol.errors import (
    AccessError,
    BudgetExhaustedError,
    ClientError,
    InsecureTransportError,
    ReplyError,
    ServiceResponseError,
    TransportError,
    VeilheadError,
)
from veilhead_protocol.loopback import is_loopback
from veilhead_protocol.manifest import MAX_MANIFEST_BYTES, FileEntry
from veilhead_protocol.redaction import redacted
from veilhead_protocol.signatures import MAX_CARD_BYTES, SIGNATURE_HEADER

MESSAGE_TYPE: Final = "application/octet-stream"
PROBLEM_TYPE: Final = "urn:veilhead:problem:"

_ATTEMPTS: Final = 5
_FIRST_PAUSE_SECONDS: Final = 0.1
#: A `Retry-After` up to this is slept; a longer one is for the caller to decide about.
_LONGEST_PAUSE_SECONDS: Final = 30.0
#: What a longer `Retry-After` is taken for: three years, in eight digits.
_FOREVER_SECONDS: Final = 99_999_999
#: A file of the backbone that comes more slowly than this is not coming, bytes a second.
_SLOWEST_DOWNLOAD: Final = 4096
_RETRYABLE: Final = frozenset({429, 502, 503, 504})
_ACCESS_ADVICE: Final = (
    "give the vendor's API key with api_key=, --api-key-file or VEILHEAD_API_KEY"
)
_MAX_PROBLEM_BYTES: Final = 64 * 2**10
_TIMING: Final = re.compile(r"evaluate;dur=([0-9]{1,9}(?:\.[0-9]{1,6})?)")

#: Why a client does nothing in another process than its own.
NOT_HERE: Final = (
    "the client was made in another process, and a client stays where it was made: make one after "
    "the fork, in each process that uses one"
)

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Answer:
    """A reply's bytes, and the seconds that the service says its evaluation took."""

    body: bytes
    evaluate_seconds: float


@dataclass(frozen=True)
class SignedAnswer:
    """Bytes, and the header that holds their signatures: nothing of it is checked."""

    body: bytes
    signatures: str


def check_url(url: str) -> httpx2.URL:
    """The service's base URL.

    Raises:
        InsecureTransportError: for plain HTTP to anything but loopback, where replies could be
            replaced on the way.
    """
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InsecureTransportError(
            f"the service's URL is not a URL: {redacted(error)}"
        ) from error
    if parsed.scheme == "https" or (parsed.scheme == "http" and is_loopback(parsed.host)):
        return parsed
    raise InsecureTransportError(
        "plain HTTP is only for a service on this machine, expected https:// "
        "(or http://127.0.0.1, http://[::1] or http://localhost)"
    )


class Transport:
    """The service's routes, as the client uses them."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        connections: int,
        api_key: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        base = check_url(url)
        self._process = process_mark()
        self._base = str(base).rstrip("/")
        # Lengths are checked, and a compressed answer could grow without bound.
        self._headers = httpx2.Headers({"Accept-Encoding": "identity"})
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._connections = transport or Connections(base, limit=connections)

    async def __aenter__(self) -> Self:
        await self._connections.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if not self.is_here:
            keep_for_ever(self._connections)  # another process uses them
            return
        await self._connections.__aexit__(kind, error, traceback)

    @property
    def is_here(self) -> bool:
        """Whether this process made the connections, and is no copy of the one that did."""
        return self._process == process_mark()

    async def get_manifest(self, model: str, digest: str | None) -> SignedAnswer:
        """A manifest, of the version with this digest or of the current one, and its signatures."""
        url = f"/v1/models/{quote(model, safe='')}"
        return await self._get_signed(url, digest, MAX_MANIFEST_BYTES)

    async def get_card(self, model: str, digest: str) -> SignedAnswer:
        """The Markdown of a version's model card, and its signatures."""
        url = f"/v1/models/{quote(model, safe='')}/card"
        return await self._get_signed(url, digest, MAX_CARD_BYTES)

    async def _get_signed(self, url: str, digest: str | None, limit: int) -> SignedAnswer:
        async def attempt() -> SignedAnswer:
            parameters = {} if digest is None else {"digest": digest}
            async with self._request("GET", url, params=parameters) as response:
                signatures = response.headers.get(SIGNATURE_HEADER, "")
                return SignedAnswer(await _read(response, limit), signatures)

        return await _retried(partial(_within, self._timeout, attempt))

    async def download(self, model: str, digest: str, entry: FileEntry, target: Path) -> None:
        """Write a file of the backbone to `target`, or the rest of it to what is there already.

        What arrived stays there when the connection breaks, so that it can be continued. Only the
        size is checked. An attempt has no deadline as long as each `timeout` seconds bring their
        share of the file, at 4,096 bytes a second.
        """
        share = max(1, int(_SLOWEST_DOWNLOAD * self._timeout))

        async def attempt(scope: anyio.CancelScope) -> None:
            url = f"/v1/models/{quote(model, safe='')}/files/{quote(entry.path)}"
            known = target.stat().st_size if target.exists() else 0
            if known >= entry.bytes:
                if known == entry.bytes > 0:
                    return
                known = 0
            headers = {}
            if known:
                headers["Range"] = f"bytes={known}-"
                headers["If-Range"] = f'"{entry.sha256}"'  # the file's tag at the service
            try:
                async with self._request(
                    "GET", url, params={"digest": digest}, headers=headers
                ) as response:
                    known = due = _first_byte(response, known, entry)
                    async with await anyio.open_file(target, "ab" if known else "wb") as file:
                        async for piece in _pieces(response, entry.bytes - known):
                            known += await file.write(piece)
                            if known >= due:
                                due = known + share
                                scope.deadline = anyio.current_time() + self._timeout
            except ServiceResponseError as error:
                if error.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    target.unlink(missing_ok=True)  # or it would be asked for again and again
                raise
            if known != entry.bytes:
                raise ReplyError(
                    f"the file {entry.path!r} has {known} bytes, the manifest says {entry.bytes}"
                )

        async def bounded() -> None:
            with anyio.move_on_after(self._timeout) as scope:
                return await attempt(scope)
            raise httpx2.ReadTimeout(f"the file came below {_SLOWEST_DOWNLOAD} bytes a second")

        await _retried(bounded)

    async def probe(self) -> None:
        """Ask once whether the service is ready; nothing of a text, a key or a model is sent.

        Raises:
            TransportError: when it does not answer.
            ServiceResponseError: when it answers that it is not ready.
        """
        try:
            async with self._request("GET", "/readyz"):
                pass
        except _PauseError as refusal:
            raise refusal.error from None
        except httpx2.HTTPError as error:
            raise TransportError(f"no answer ({type(error).__name__})") from error

    async def put_key(self, key_id: bytes, message: bytes) -> None:
        """Register a key message."""

        async def attempt() -> None:
            url = f"/v1/keys/{key_id.hex()}"
            headers = {"Content-Type": MESSAGE_TYPE}
            async with self._request("PUT", url, content=message, headers=headers) as response:
                await _read(response, _MAX_PROBLEM_BYTES)

        await _retried(partial(_within, self._timeout, attempt))

    async def delete_key(self, key_id: bytes) -> None:
        """Ask once for a key to be forgotten; it expires anyway."""

        async def attempt() -> None:
            async with self._request("DELETE", f"/v1/keys/{key_id.hex()}"):
                pass

        with suppress(ServiceResponseError, _PauseError):
            await _within(self._timeout, attempt)

    async def infer(
        self,
        model: str,
        query: Callable[[], Iterable[bytes]],
        query_bytes: int,
        reply_bytes: int,
        *,
        more_seconds: float = 0.0,
    ) -> Answer:
        """Post a query and read the reply, each of which must have exactly so many bytes.

        `query` gives the same pieces whenever it is called. Each is sent before the next is asked
        for: the service reads the header while the rest is encrypted. Each attempt may take
        `more_seconds` beyond the usual time.
        """
        seconds = self._timeout + more_seconds

        async def pieces() -> AsyncIterator[bytes]:
            for piece in query():
                yield piece

        async def attempt() -> Answer:
            url = f"/v1/models/{quote(model, safe='')}/infer"
            headers = {"Content-Type": MESSAGE_TYPE, "Content-Length": str(query_bytes)}
            async with self._request(
                "POST",
                url,
                content=pieces(),
                headers=headers,
                timeout=httpx2.Timeout(self._timeout, read=seconds),
            ) as response:
                body = await _read(response, reply_bytes)
                if len(body) != reply_bytes:
                    raise ReplyError(f"the reply has {len(body)} bytes, expected {reply_bytes}")
                timing = _TIMING.search(response.headers.get("server-timing", ""))
                return Answer(body, float(timing[1]) / 1e3 if timing else 0.0)

        return await _retried(partial(_within, seconds, attempt))

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        url: str,
        *,
        params: dict[str, str] | None = None,
        content: bytes | AsyncIterator[bytes] | None = None,
        headers: dict[str, str] | None = None,
        timeout: httpx2.Timeout | None = None,
    ) -> AsyncIterator[httpx2.Response]:
        """A successful response, its body unread."""
        if not self.is_here:  # a task that was under way
            raise ClientError(NOT_HERE)
        # Straight to the transport: there is no redirect, cookie or authentication to look after.
        request = httpx2.Request(
            method,
            _parsed(self._base + url),
            params=params or None,
            headers=[*self._headers.multi_items(), *(headers or {}).items()],
            content=content,
            extensions={"timeout": (timeout or httpx2.Timeout(self._timeout)).as_dict()},
        )
        response = await self._connections.handle_async_request(request)
        try:
            response.request = request
            if not response.is_success:
                raise await _problem(response)
            yield response
        finally:
            await response.aclose()


@lru_cache(maxsize=64)
def _parsed(url: str) -> httpx2.URL:
    """A URL, whose parsing takes as long as all else about a request."""
    return httpx2.URL(url)


@dataclass
class _PauseError(Exception):
    """An attempt that may be repeated, after the pause that the service asked for."""

    error: ServiceResponseError
    seconds: float


async def _within(seconds: float, attempt: Callable[[], Awaitable[_Value]]) -> _Value:
    """An attempt's value.

    Raises:
        httpx2.ReadTimeout: when it takes longer, whatever the service does meanwhile.
    """
    with anyio.move_on_after(seconds):
        return await attempt()
    raise httpx2.ReadTimeout(f"no whole answer within {seconds:g} s")


async def _retried(attempt: Callable[[], Awaitable[_Value]]) -> _Value:
    """The attempt's value, after as many attempts as it takes, are allowed and are in time.

    The deadline of a whole call is that of the cancel scope around this.
    """
    pause = _FIRST_PAUSE_SECONDS
    for number in range(1, _ATTEMPTS + 1):
        asked = 0.0
        failure: VeilheadError
        cause: Exception | None = None
        try:
            return await attempt()
        except _PauseError as refusal:
            failure, asked = refusal.error, refusal.seconds
        except PermanentError as error:  # what libraries say in it is redacted
            raise TransportError(f"the request failed, and would again: {error}") from error
        except httpx2.UnsupportedProtocol as error:
            raise TransportError(
                f"the request failed, and would again: {redacted(error)}"
            ) from error
        except httpx2.TransportError as error:
            cause = error
            failure = TransportError(
                f"no answer from the service after {number} attempts "
                f"({type(error).__name__}: {redacted(error)}); check the URL and that it runs"
            )
        except httpx2.HTTPError as error:
            raise TransportError(f"the request failed ({type(error).__name__})") from error
        # Random, so that clients that failed together do not return together.
        wait = max(asked, pause * random.uniform(0.5, 1.5))  # noqa: S311
        left = anyio.current_effective_deadline() - anyio.current_time()
        if number == _ATTEMPTS or asked > _LONGEST_PAUSE_SECONDS or wait >= left:
            raise failure from cause
        await anyio.sleep(wait)
        pause *= 2
    raise AssertionError("the last attempt returns or raises")


def _first_byte(response: httpx2.Response, asked: int, entry: FileEntry) -> int:
    """Where in the file the body begins: at the byte that was asked for, or at the first.

    Raises:
        ReplyError: when it is another part of the file.
    """
    if response.status_code != HTTPStatus.PARTIAL_CONTENT:
        return 0
    part = f"bytes {asked}-{entry.bytes - 1}/{entry.bytes}"
    if asked == 0 or response.headers.get("content-range") != part:
        raise ReplyError(f"the service sent another part of {entry.path!r} than was asked for")
    return asked


async def _pieces(response: httpx2.Response, limit: int) -> AsyncIterator[bytes]:
    """The body's pieces; more than `limit` bytes are not read."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ReplyError("the answer is compressed, which was not asked for")
    total = 0
    # The stream itself: nothing is left to decode.
    if not isinstance(response.stream, httpx2.AsyncByteStream):
        raise TypeError("the transport's answer cannot be read asynchronously")
    async for piece in response.stream:
        total += len(piece)
        if total > limit:
            raise ReplyError(f"the answer is longer than the expected {limit} bytes")
        yield piece


async def _read(response: httpx2.Response, limit: int) -> bytes:
    return b"".join([piece async for piece in _pieces(response, limit)])


async def _problem(response: httpx2.Response) -> Exception:
    """The error that an unsuccessful response becomes."""
    status = response.status_code
    try:
        document = json.loads(await _read(response, _MAX_PROBLEM_BYTES))
    except (ValueError, RecursionError, ReplyError):
        document = {}
    if not isinstance(document, dict):
        document = {}
    code = str(document.get("type", "")).removeprefix(PROBLEM_TYPE)
    # What the service repeats of the API key goes no further: errors end up in logs.
    api_key = response.request.headers.get("authorization", "").removeprefix("Bearer ")
    code, detail, request_id = (
        text.replace(api_key, "<API key>") if api_key else text
        for text in (
            code,
            str(document.get("detail", "no detail")),
            response.headers.get("x-request-id", ""),
        )
    )
    message = (
        f"the service answered {status} {_printable(code)}: {_printable(detail)} "
        f"(request {_printable(request_id or 'unknown')})"
    )
    about: dict[str, Any] = {
        "status": status,
        "problem": _printable(code),
        "request_id": _printable(request_id) or None,
        "retryable": status in _RETRYABLE,
    }
    retry_after = _retry_after(response.headers.get("retry-after", ""))
    if retry_after is not None and retry_after > _LONGEST_PAUSE_SECONDS:
        message += f"; it asks to wait {retry_after} s"
    if status in (401, 403):
        return AccessError(f"{message}; {_ACCESS_ADVICE}", **about)
    if status == 429 and code == BudgetExhaustedError.code:
        return BudgetExhaustedError(message, retry_after=retry_after or 0, **about)
    error = ServiceResponseError(message, retry_after=retry_after, **about)
    return _PauseError(error, retry_after or 0) if status in _RETRYABLE else error


def _retry_after(asked: str) -> int | None:
    """Whole seconds that a `Retry-After` asks for, as a number or (proxies do) as a date.

    What is neither asks for nothing, a date that has passed for 0 seconds, and more than eight
    digits for 99,999,999.
    """
    if re.fullmatch(r"[0-9]+", asked):
        digits = asked.lstrip("0") or "0"
        return int(digits) if len(digits) <= 8 else _FOREVER_SECONDS
    try:
        date = parsedate_to_datetime(asked)
        seconds = math.ceil((date - datetime.now(UTC)).total_seconds())
        return min(max(0, seconds), _FOREVER_SECONDS)
    except (ValueError, TypeError, OverflowError):  # not a date, or one without a zone
        return None


def _printable(text: str) -> str:
    """Text of a service, short and without characters that would drive a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:300])

"""Connections to the service, by aiohttp.

httpx2's own connections parse HTTP in Python, which takes longer than the encryption of a query.
aiohttp's are compiled, and send a small request in one piece. They stand behind httpx2's interface,
so that a client may be given any other transport. What their errors say is written here: aiohttp's
own texts repeat what a server or a proxy sent, and a proxy's URL with its password.
"""

from __future__ import annotations

import socket
import ssl
import weakref
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import anyio
import httpx2

from veilhead_protocol.errors import TransportError
from veilhead_protocol.loopback import is_loopback
from veilhead_protocol.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Iterator

    import aiohttp

#: Less than the five seconds after which uvicorn closes an idle connection.
_IDLE_SECONDS: Final = 4.0

#: What was sent and is not taken for so long ends its connection, whoever still waits for it.
_UNREAD_SECONDS: Final = 60.0

#: Open connections have so long to end by themselves when all are closed, and then once more.
_CLOSE_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 0.01

#: Of a proxy that refuses, what may be otherwise a moment later.
_PASSING_STATUSES: Final = frozenset({408, 425, 429})

#: A name that does not exist, as opposed to one that could not be looked up.
_NO_SUCH_NAME: Final = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", -5)})

#: OpenSSL's codes (x509_vfy.h) for a certificate of another name, e-mail or IP address.
_MISMATCHES: Final = frozenset({62, 63, 64})

#: Nothing is sent that was not asked for.
_AUTOMATIC_HEADERS: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class PermanentError(httpx2.TransportError):
    """A failure that no further attempt mends; its message says what does."""


class Connections(httpx2.AsyncBaseTransport):
    """At most so many connections to one service; as a context manager they are kept meanwhile."""

    def __init__(self, url: httpx2.URL, *, limit: int) -> None:
        """Look up the proxy and the authorities; nothing is sent.

        Raises:
            TransportError: when the environment names a proxy that cannot be used.
        """
        self._limit = limit
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._proxy = _proxy_of(url)
        self._secrets = () if self._proxy is None else _proxy_secrets(self._proxy)
        # Of certificates, and of where their authorities come from, httpx2 decides.
        self._tls = httpx2.create_ssl_context() if url.scheme == "https" else None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        import aiohttp

        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._limit,
                keepalive_timeout=_IDLE_SECONDS,
                ssl=self._tls or True,
                socket_factory=self._new_socket,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_AUTOMATIC_HEADERS,
            auto_decompress=False,
            trust_env=False,  # it would take a password from ~/.netrc
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if self._session is None:
            return
        # It waits until what was sent is taken, which a peer may never do.
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            await self._session.close()
        # And of connections that were given up it knows nothing.
        left = [opened for opened in self._sockets if opened.fileno() != -1]
        for opened in left:
            with suppress(OSError):  # not connected yet
                opened.shutdown(socket.SHUT_RDWR)
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            while any(opened.fileno() != -1 for opened in left):
                await anyio.sleep(_LOOK_SECONDS)

    def _new_socket(self, address: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, _, _ = address
        opened = socket.socket(family, kind, protocol)
        if family in (socket.AF_INET, socket.AF_INET6):
            # Nobody else ends a connection that was given up while it still had bytes to send.
            milliseconds = int(_UNREAD_SECONDS * 1e3)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._sockets.add(opened)
        return opened

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request, piece by piece, and return the response, its body unread.

        Raises:
            httpx2.TransportError: one of its kinds, when there is no response.
        """
        import aiohttp
        import yarl

        if self._session is None:
            raise RuntimeError("the connections are not open: use them in `async with`")
        seconds = request.extensions["timeout"]
        is_whole = isinstance(request.stream, httpx2.ByteStream)
        secrets = (*self._secrets, *_credentials(request.headers.get("authorization", "")))
        with _translated(secrets):
            response = await self._session.request(
                request.method,
                yarl.URL(str(request.url), encoded=True),
                headers=request.headers.multi_items(),
                data=(request.content or None) if is_whole else request.stream,
                allow_redirects=False,
                proxy=self._proxy,
                timeout=aiohttp.ClientTimeout(
                    connect=seconds["pool"],
                    sock_connect=seconds["connect"],
                    sock_read=seconds["read"],
                ),
            )
        return httpx2.Response(
            response.status,
            headers=response.raw_headers,
            stream=_Body(response, secrets),
            request=request,
        )


class _Body(httpx2.AsyncByteStream):
    """The body of a response, as it arrives."""

    def __init__(self, response: aiohttp.ClientResponse, secrets: Sequence[str]) -> None:
        self._response = response
        self._secrets = secrets

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _translated(self._secrets):
            async for piece in self._response.content.iter_any():
                yield piece

    async def aclose(self) -> None:
        # A connection whose response was not read to its end is closed, any other one kept.
        self._response.release()


@contextmanager
def _translated(secrets: Sequence[str]) -> Iterator[None]:
    """aiohttp's errors as those of httpx2, without these secrets, which a proxy may repeat."""
    import aiohttp

    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise httpx2.ConnectTimeout("no connection in time") from error
    except TimeoutError as error:
        raise httpx2.ReadTimeout("no answer in time") from error
    except (aiohttp.ClientError, ssl.SSLError) as error:
        if (reason := _permanent_reason(error, secrets)) is not None:
            raise PermanentError(reason) from error
        match error:
            case aiohttp.ClientHttpProxyError():
                raise httpx2.ProxyError(f"the proxy answered {error.status}") from error
            case aiohttp.ClientProxyConnectionError():
                raise httpx2.ProxyError(redacted(error, *secrets)) from error
            case aiohttp.ClientConnectorError():
                raise httpx2.ConnectError(redacted(error, *secrets)) from error
            case OSError():
                said = error.strerror or type(error).__name__
                raise httpx2.ReadError(redacted(said, *secrets)) from error
            case _:
                raise httpx2.RemoteProtocolError(type(error).__name__) from error


def _permanent_reason(error: Exception, secrets: Sequence[str]) -> str | None:
    """Why it will be the same the next time, and what to do; None when it may be otherwise."""
    import aiohttp

    if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
        return "the service's URL cannot be used: expected https://NAME, perhaps with a port"
    if isinstance(error, aiohttp.ClientHttpProxyError):
        if error.status >= 500 or error.status in _PASSING_STATUSES:
            return None
        if error.status == 407:
            return (
                "the proxy wants a user and a password (407): give them in HTTPS_PROXY as "
                "http://USER:PASSWORD@HOST:PORT, or name the service in NO_PROXY"
            )
        return (
            f"the proxy refuses to connect ({error.status}): ask who runs it to allow the "
            "service, or name the service in NO_PROXY"
        )
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        if error.os_error.errno in _NO_SUCH_NAME:
            host = redacted(repr(error.host), *secrets)
            return f"there is no host of the name {host}: check the URL and HTTPS_PROXY"
        return None
    return _tls_reason(error, secrets)


def _tls_reason(error: Exception, secrets: Sequence[str]) -> str | None:
    """Why TLS will fail the next time too, and what to do; None when it is not that."""
    import aiohttp

    causes = (error.__cause__, getattr(error, "os_error", None), error)
    cause = next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None)
    if isinstance(cause, ssl.SSLCertVerificationError):
        if cause.verify_code in _MISMATCHES:
            advice = "check the URL: the certificate is for another name"
        else:
            advice = (
                "name the file of the authority in SSL_CERT_FILE, check this machine's clock, or "
                "ask the vendor for a valid certificate"
            )
        said = redacted(cause.verify_message, *secrets)
        return f"the service's certificate is refused ({said}): {advice}"
    if cause is None or isinstance(cause, ssl.SSLEOFError | ssl.SSLSyscallError):
        return None  # the connection ended, which is no refusal
    # TLS 1.3 refuses a client once the handshake is over, by an alert.
    if not isinstance(error, aiohttp.ClientSSLError) and "ALERT" not in (cause.reason or ""):
        return None
    return (
        f"TLS with the service fails ({cause.reason}): check that the URL's port speaks TLS, and "
        "ask the vendor which versions it takes"
    )


def _credentials(authorization: str) -> tuple[str, ...]:
    """What a header of authorization holds that nobody else may see."""
    credentials = authorization.partition(" ")[2]
    return (credentials,) if credentials else ()


def _proxy_secrets(proxy: str) -> tuple[str, ...]:
    """A proxy's password, and the forms in which it travels."""
    userinfo = unquote(urlsplit(proxy).netloc.rpartition("@")[0])
    password = userinfo.partition(":")[2]
    return (userinfo, password, b64encode(userinfo.encode()).decode()) if password else ()


def _proxy_of(url: httpx2.URL) -> str | None:
    """The proxy that the environment names for a URL, as `HTTPS_PROXY` and `NO_PROXY` do.

    Raises:
        TransportError: when it is of another kind than HTTP; its URL may hold a password.
    """
    # One for loopback would carry what is for this machine off it.
    if is_loopback(url.host) or proxy_bypass(url.host):
        return None
    proxies = getproxies()
    found = proxies.get(url.scheme) or proxies.get("all")
    if found is None:
        return None
    proxy = found if "://" in found else f"http://{found}"
    try:
        usable = httpx2.URL(proxy).scheme in ("http", "https") and bool(httpx2.URL(proxy).host)
    except httpx2.InvalidURL:
        usable = False
    if not usable:
        raise TransportError(
            "the proxy that HTTPS_PROXY or ALL_PROXY names cannot be used: expected "
            "http://HOST:PORT or https://HOST:PORT, or the service's name in NO_PROXY"
        )
    return proxy

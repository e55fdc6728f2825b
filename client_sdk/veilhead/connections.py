"""Connections to the service, by aiohttp.

httpx2's own connections parse HTTP in Python, which takes longer than the encryption of a query.
aiohttp's are compiled, and send a small request in one piece. They stand behind httpx2's interface,
so that a client may be given any other transport.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

from veilhead_protocol.loopback import is_loopback
from veilhead_protocol.redaction import redacted

if TYPE_CHECKING:
    from collections.abc import Iterator

    import aiohttp

#: Less than the five seconds after which uvicorn closes an idle connection.
_IDLE_SECONDS: Final = 4.0

#: Nothing is sent that was not asked for.
_AUTOMATIC_HEADERS: Final = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class Connections(httpx2.AsyncBaseTransport):
    """At most so many connections to one service; as a context manager they are kept meanwhile."""

    def __init__(self, url: httpx2.URL, *, limit: int) -> None:
        self._limit = limit
        self._proxy = _proxy_of(url)
        self._secrets = () if self._proxy is None else _proxy_secrets(self._proxy)
        # Of certificates, and of where their authorities come from, httpx2 decides.
        self._tls = httpx2.create_ssl_context() if url.scheme == "https" else None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        import aiohttp

        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._limit, keepalive_timeout=_IDLE_SECONDS, ssl=self._tls or True
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
        if self._session is not None:
            await self._session.close()

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
        raise httpx2.ConnectTimeout(redacted(error, *secrets)) from error
    except TimeoutError as error:
        raise httpx2.ReadTimeout(redacted(error, *secrets)) from error
    except aiohttp.ClientConnectorError as error:
        raise httpx2.ConnectError(redacted(error, *secrets)) from error
    except (aiohttp.ClientHttpProxyError, aiohttp.ClientProxyConnectionError) as error:
        raise httpx2.ProxyError(redacted(error, *secrets)) from error
    except aiohttp.ClientOSError as error:
        raise httpx2.ReadError(redacted(error, *secrets)) from error
    except aiohttp.ClientError as error:
        raise httpx2.RemoteProtocolError(redacted(error, *secrets)) from error


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
    """The proxy that the environment names for a URL, as `HTTPS_PROXY` and `NO_PROXY` do."""
    # One for loopback would carry what is for this machine off it.
    if is_loopback(url.host) or proxy_bypass(url.host):
        return None
    proxies = getproxies()
    found = proxies.get(url.scheme) or proxies.get("all")
    return found if found is None or "://" in found else f"http://{found}"

"""What cannot get better is not tried again, and the error says what to do."""

from __future__ import annotations

import socket
import ssl

import pytest
from support.hostile_servers import HostileServer, answer, in_time, self_signed

from veilhead import TransportError


@pytest.fixture
def certified(tmp_path, monkeypatch):
    """Makes servers that speak TLS with a certificate of their own, trusted or not."""
    servers = []

    def make(*, trusted=True, status=404, **options):
        files = self_signed(tmp_path, **options)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*files)
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(files[0]))
        servers.append(HostileServer(tls=context, manifest=answer(status)).__enter__())
        return servers[-1]

    yield make
    for server in servers:
        server.__exit__()


def failure(make_client, url):
    with pytest.raises(TransportError) as caught:
        in_time(lambda: make_client(url, "model"))
    return str(caught.value)


def test_a_trusted_certificate_is_spoken_with_and_its_service_asked_again(
    certified, make_client, quick
):
    server = certified(status=503)
    with pytest.raises(Exception, match="503"):
        in_time(lambda: make_client(server.url, "model"))
    assert server.seen["manifest"] == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trusted": False}, "SSL_CERT_FILE"),
        ({"days": -1}, "clock"),
        ({"name": "elsewhere.example"}, "check the URL"),
    ],
    ids=["unknown authority", "expired", "another name"],
)
def test_a_certificate_that_is_refused(certified, make_client, options, says):
    server = certified(**options)
    message = failure(make_client, server.url)
    assert "certificate" in message
    assert says in message
    assert server.connections == 1


def test_a_port_that_does_not_speak_tls(make_client):
    with HostileServer(manifest=answer(404), connection=_plain) as server:
        message = failure(make_client, server.url.replace("http:", "https:"))
        assert "speaks TLS" in message
        assert server.connections == 1


def _plain(visit):
    visit.connection.recv(1)
    visit.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    visit.wait(0.2)


def test_a_handshake_that_is_cut_off_is_tried_again(make_client, quick):
    with HostileServer(connection=lambda visit: visit.connection.recv(10)) as server:
        message = failure(make_client, server.url.replace("http:", "https:"))
        assert "5 attempts" in message
        assert server.connections == 5


@pytest.fixture
def proxied(monkeypatch):
    """Makes a proxy that answers CONNECT so, and is the environment's."""
    servers = []

    def make(behaviour):
        server = HostileServer(connect=behaviour).__enter__()
        servers.append(server)
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://user:secret-word@127.0.0.1:{server.port}")
        return server

    yield make
    for server in servers:
        server.__exit__()


@pytest.mark.parametrize(
    ("status", "attempts", "says"),
    [
        (407, 1, "user and a password"),
        (403, 1, "NO_PROXY"),
        (404, 1, "NO_PROXY"),
        (302, 1, "NO_PROXY"),
        (502, 5, "the proxy answered 502"),
        (503, 5, "the proxy answered 503"),
        (429, 5, "the proxy answered 429"),
    ],
)
def test_a_proxy_that_refuses(make_client, proxied, quick, status, attempts, says):
    server = proxied(answer(status, body=b"echo: user:secret-word"))
    message = failure(make_client, "https://service.example")
    assert says in message
    assert "secret-word" not in message
    assert server.seen["connect"] == attempts


@pytest.mark.parametrize(
    "proxy", ["socks5://me:secret-word@127.0.0.1:1", "ftp://127.0.0.1:1", "http://", "http://[::1"]
)
def test_a_proxy_of_another_kind(make_client, monkeypatch, proxy):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, proxy)
    message = failure(make_client, "https://service.example")
    assert "HTTPS_PROXY" in message
    assert "secret-word" not in message


@pytest.mark.parametrize(
    ("number", "attempts", "says"),
    [(socket.EAI_NONAME, 1, "no host of the name"), (socket.EAI_AGAIN, 5, "5 attempts")],
    ids=["unknown", "not found out"],
)
def test_a_name_that_does_not_exist(make_client, monkeypatch, quick, number, attempts, says):
    asked = []

    def look_up(*arguments, **_):
        asked.append(arguments[0])
        raise socket.gaierror(number, "said")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert says in failure(make_client, "https://service.example")
    assert asked == ["service.example"] * attempts


def test_a_url_that_aiohttp_refuses(make_client, quick):
    assert "cannot be used" in failure(make_client, "https://127.1")
    assert quick == []


def test_what_a_server_sends_is_not_repeated(make_client, quick):
    def echo(visit):
        visit.send(b"HTTP/1.1 200 OK\r\n" + b"\x01 secret-word\r\n\r\n")

    with HostileServer(manifest=echo) as server:
        assert "secret-word" not in failure(make_client, server.url)

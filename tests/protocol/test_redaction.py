"""What a library's message may show, and what not."""

from __future__ import annotations

import aiohttp
import httpx2
import pytest
import yarl
from multidict import CIMultiDict, CIMultiDictProxy

from veilhead_protocol.redaction import redacted

KEY = "vh_0123456789abcdef_" + "S" * 43


@pytest.mark.parametrize(
    "message",
    [
        "407, message='no', url='http://agent:pa55word@proxy.example:3128'",
        "407, message='no', url='http://agent:p@55/word@proxy.example:3128'",
        "cannot connect to agent:pa55word@proxy.example:3128",
        "https://host/path?token=pa55word#pa55word failed",
        "headers=<CIMultiDictProxy('Authorization': 'Bearer pa55word.pa55word')>",
        "Authorization: Bearer pa55word",
        "Proxy-Authorization: Basic pa55word==",
        "b'Proxy-Authorization: Basic pa55word=='",
        "{'password': 'pa55word', 'x': 1}",
        "api_key=pa55word, retried",
        "X-Api-Key: pa55word",
        "Set-Cookie: 'pa55word; Path=/'",
    ],
)
def test_credentials_are_hidden_wherever_libraries_write_them(message):
    assert "55" not in redacted(message)
    assert "word" not in redacted(message).replace("password", "").replace("pa55word", "word")


def test_what_a_failure_is_stays_readable():
    text = "Cannot connect to host vendor.example:443 ssl:default [Connect call failed]"
    assert redacted(text) == text
    assert (
        redacted("url='https://vendor.example/v1/models'")
        == "url='https://vendor.example/v1/models'"
    )


def test_known_secrets_are_hidden_in_every_form():
    secret = "a b/c%d"
    for form in (secret, "a%20b%2Fc%25d"):
        assert redacted(f"said {form}.", secret) == "said [hidden]."
    assert KEY not in redacted(f"the key {KEY} is wrong")
    assert "SSS" not in redacted(f"the key {KEY[:40]}")


def test_it_is_one_short_line():
    assert redacted("a\nb\x1b[31m") == "a?b?[31m"
    assert len(redacted("x" * 10_000)) == 300
    assert "55" not in redacted("x" * 290 + " http://agent:pa55word@proxy")


def test_what_aiohttp_says_of_a_proxy_holds_no_password():
    url = yarl.URL("http://agent:pa55word@proxy.example:3128")
    headers = CIMultiDictProxy(CIMultiDict({"Authorization": f"Bearer {KEY}"}))
    request = aiohttp.RequestInfo(url, "CONNECT", headers, url)
    error = aiohttp.ClientHttpProxyError(request, (), status=407, message=f"who is {KEY}?")
    for text in (error, repr(error), httpx2.ProxyError(str(error))):
        assert "pa55word" not in redacted(text)
        assert KEY not in redacted(text)

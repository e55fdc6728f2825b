from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilhead_models.mail import message_text

HTML = "<html><head><title>no</title><style>p {}</style></head><body>Pay&nbsp;<b>now</b>!</body>"


def message(body: str, *headers: str) -> str:
    return "\n".join(["Subject: a subject", *headers, "", body])


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (message("one\n two"), "a subject one two"),
        (message(HTML, "Content-Type: text/html"), "a subject Pay now !"),
        (message("=C3=A9", "Content-Transfer-Encoding: quoted-printable"), "a subject é"),
        (message("x", 'Content-Type: text/plain; charset="no-such"'), "a subject x"),
        ("Subject: =?utf-8?q?caf=C3=A9?=\n\n", "café"),
        ("", ""),
    ],
)
def test_what_a_reader_sees(raw: str, text: str) -> None:
    assert message_text(raw) == text


def test_plain_text_comes_before_html() -> None:
    raw = message(
        "--b\nContent-Type: text/html\n\n<p>rich</p>\n"
        "--b\nContent-Type: text/plain\n\nplain\n--b--\n",
        "MIME-Version: 1.0",
        "Content-Type: multipart/alternative; boundary=b",
    )
    assert message_text(raw) == "a subject plain"


@given(
    st.text(max_size=400),
    st.lists(
        st.sampled_from(
            [
                "Content-Type: ",
                "Subject: ",
                "\n",
                "--b",
                "multipart/mixed; boundary=b",
                "text/html; charset=",
                "=?x?q?",
                "base64",
            ]
        ),
        max_size=12,
    ),
)
def test_malformed_messages_give_what_can_be_read(noise: str, parts: list[str]) -> None:
    text = message_text("".join(parts) + noise)
    assert text == " ".join(text.split())

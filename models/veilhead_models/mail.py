"""What a reader of a mail message sees, from its raw form."""

from __future__ import annotations

import email
import email.policy
from email.message import EmailMessage
from html.parser import HTMLParser
from typing import Final

#: Elements whose content nobody sees.
_HIDDEN: Final = frozenset({"script", "style", "head", "title"})


class _Text(HTMLParser):
    """Collects the visible text of HTML."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self._hidden += tag in _HIDDEN

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in _HIDDEN))

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def message_text(raw: str) -> str:
    """Subject and readable body of a message (RFC 5322), on one line; empty when there is neither.

    Plain text is preferred to HTML, whose visible text is taken. Malformed messages, which spam is
    full of, give what can be read of them.
    """
    message = email.message_from_string(raw, policy=email.policy.default)
    try:
        subject = str(message["subject"] or "")
    except (ValueError, TypeError, IndexError, AttributeError):  # a malformed header
        subject = ""
    return " ".join(f"{subject} {_body(message)}".split())


def _body(message: EmailMessage) -> str:
    try:
        part = message.get_body(("plain", "html"))
    except (ValueError, AttributeError, KeyError):
        part = None
    if part is None:
        return ""
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    try:
        text = payload.decode(part.get_content_charset("utf-8"), "replace")
    except (LookupError, ValueError):  # no such character set
        text = payload.decode("latin-1")
    if part.get_content_type() != "text/html":
        return text
    parser = _Text()
    parser.feed(text)
    parser.close()
    return " ".join(parser.parts)

"""What a library says of a failure, without the credentials that it repeats.

Messages of HTTP libraries, proxies and services hold URLs with passwords, headers with tokens, and
whatever the other side sent. Wherever such a message reaches a user, a log or an answer, it goes
through `redacted`. What is not known to be harmless is better left out: over-redaction is fine.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, unquote

_LONGEST: Final = 300
_SHORTEST_SECRET: Final = 4

_HIDDEN: Final = "[hidden]"

_PATTERNS: Final = (
    # scheme://user:password@host: to the last @, as a password may hold one, and a slash.
    (re.compile(r"([a-z][a-z0-9+.-]*://)[^\s'\"<>]*@", re.IGNORECASE), rf"\1{_HIDDEN}@"),
    (re.compile(r"([a-z][a-z0-9+.-]*://[^\s'\"<>?#]*)[?#][^\s'\"<>]*", re.IGNORECASE), r"\1"),
    # user:password@host without a scheme
    (re.compile(r"[^\s'\"<>/@:]+:[^\s'\"<>@]+@(?=[\w\[])"), f"{_HIDDEN}@"),
    (re.compile(r"vh_[0-9a-f]{16}_[\w-]*"), _HIDDEN),
    (
        re.compile(r"\b(bearer|basic|digest|negotiate|ntlm)\s+[\w.~+/=-]{4,}", re.IGNORECASE),
        rf"\1 {_HIDDEN}",
    ),
    (
        re.compile(
            r"((?:authorization|cookie|api[-_ ]?key|token|passw(?:or)?d|secret)"
            r"['\"]?\s*[:=]\s*)(?:['\"][^'\"]*['\"]?|[^\s,;)}\]]+)",
            re.IGNORECASE,
        ),
        rf"\1{_HIDDEN}",
    ),
)


def redacted(message: object, *secrets: str) -> str:
    """A message of a library in one short line: no credentials, nothing that drives a terminal.

    Args:
        message: text, or an exception, whose text counts.
        secrets: credentials that are known here; they are hidden wherever they stand, as they are
            or as a URL writes them.
    """
    text = str(message)
    forms = {form for secret in secrets for form in (secret, quote(secret, ""), unquote(secret))}
    for form in sorted(forms, key=len, reverse=True):
        if len(form) >= _SHORTEST_SECRET:
            text = text.replace(form, _HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return "".join(letter if letter.isprintable() else "?" for letter in text[:_LONGEST])

"""When a published version stops being served: a date beside it, read at every look-up."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, Final

from veilhead_protocol.errors import StoreError

FORMAT: Final = "veilhead-retirement/1"

_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}(?:[T ].+)?")


@dataclass(frozen=True)
class Retirement:
    """The moment, in UTC and whole seconds, from which a version is not served any more."""

    after: datetime

    def __post_init__(self) -> None:
        if self.after.utcoffset() is None:
            raise StoreError("a retirement needs a moment with a time zone")
        object.__setattr__(self, "after", self.after.astimezone(UTC).replace(microsecond=0))

    def __str__(self) -> str:
        return self.after.isoformat().replace("+00:00", "Z")

    def is_over(self, now: datetime) -> bool:
        """Whether the version is retired at `now`."""
        return now >= self.after

    @property
    def http_date(self) -> str:
        """The value of a `Sunset` header (RFC 8594): an HTTP-date."""
        return format_datetime(self.after, usegmt=True)

    @classmethod
    def parse(cls, text: str) -> Retirement:
        """The moment of an ISO 8601 date (its first second) or date and time; UTC unless it says.

        Raises:
            StoreError: when the text is neither.
        """
        text = text.strip()
        try:
            if not _DATE.fullmatch(text):  # fromisoformat knows week dates and shorter forms too
                raise ValueError
            moment = datetime.fromisoformat(text)
            return cls(moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC))
        except (ValueError, OverflowError):
            raise StoreError(
                f"got {text[:40]!r}, expected a date such as 2027-03-31 or 2027-03-31T18:00:00Z"
            ) from None

    def serialize(self) -> bytes:
        """The record's bytes."""
        return (json.dumps({"format": FORMAT, "after": str(self)}) + "\n").encode()

    @classmethod
    def deserialize(cls, content: bytes) -> Retirement:
        """The retirement of a record's bytes.

        Raises:
            StoreError: when they are not one.
        """
        try:
            document: Any = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError):
            document = None
        if (
            not isinstance(document, dict)
            or set(document) != {"format", "after"}
            or document["format"] != FORMAT
            or not isinstance(document["after"], str)
        ):
            raise StoreError(f"not a record of format {FORMAT!r}: retire the version again")
        return cls.parse(document["after"])

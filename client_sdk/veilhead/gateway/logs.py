"""The gateway's log: one line a record, without a traceback and without a library's secrets."""

from __future__ import annotations

import logging
import traceback
from pathlib import PurePath

from veilhead_protocol.redaction import redacted


class RedactingFormatter(logging.Formatter):
    """A record as one line.

    An exception becomes its type and place: its message and the variables of its traceback may hold
    text, a token or a password.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        message = record.getMessage()
        if record.name.partition(".")[0] != "veilhead":
            message = message.partition("\n")[0]  # libraries append what failed, line by line
        plain = logging.makeLogRecord(
            {**record.__dict__, "exc_info": None, "exc_text": None, "stack_info": None, "args": ()}
        )
        plain.msg = redacted(message)
        line = super().format(plain)
        if record.exc_info and record.exc_info[0] is not None:
            line += f" ({record.exc_info[0].__name__}{_place(record)})"
        return line


def _place(record: logging.LogRecord) -> str:
    frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else None
    return f" at {PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def configure() -> None:
    """Send every record of this process to standard error, in this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    # It warns of every malformed request: any caller could fill the log.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)

"""Logs: one JSON object a line, with the id of the request that it belongs to.

An exception is logged as its type and the place where it was raised. Its message and the local
variables of its traceback may hold bytes of a request, and never get here.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import PurePath
from types import TracebackType
from typing import Any, Final, Literal

from veilhead_protocol.redaction import redacted

#: State of the request that the current task answers: `request_id`, and `tenant` once it is known.
request_state: ContextVar[Mapping[str, Any] | None] = ContextVar("request_state", default=None)

#: Loggers whose messages are written by this project, and hold nothing of a request.
_OWN: Final = "veilhead"

#: Records like each other that are shown in so long: so many of this project's, one of others'.
_REPEAT_SECONDS: Final = 60.0
_OWN_REPEATS: Final = 20

_FORMAT_VARIABLE: Final = "VEILHEAD_SERVER_LOG_FORMAT"
_LEVEL_VARIABLE: Final = "VEILHEAD_SERVER_LOG_LEVEL"

_logger = logging.getLogger("veilhead.service")


def _location(found: TracebackType | None) -> str:
    """File, line and function where an exception was raised."""
    frames = traceback.extract_tb(found)
    if not frames:
        return ""
    frame = frames[-1]
    return f"{PurePath(frame.filename).name}:{frame.lineno} in {frame.name}"


class Repeats(logging.Filter):
    """Lets a warning or an error through so many times a minute, and then says how many there were.

    Requests and connections cause them, and whoever reaches the port causes those. What counts as
    the same is the message before its arguments are put in, where it was logged, and what failed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[object, ...], tuple[float, int]] = {}  # since when, how many
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a record, which then says how many others like it were left out."""
        if record.levelno < logging.WARNING:
            return True
        own = record.name.partition(".")[0] == _OWN
        failed = record.exc_info[0] if record.exc_info else None
        # Libraries put what failed into the message; its place in the source says as much.
        key = (record.name, record.pathname, record.lineno, record.msg if own else None, failed)
        allowed = _OWN_REPEATS if own else 1
        now = self._clock()
        with self._lock:
            since, count = self._seen.get(key, (now, 0))
            if count and now - since < _REPEAT_SECONDS:
                self._seen[key] = since, count + 1
                return count < allowed
            self._seen[key] = now, 1
        if count > allowed:
            message = record.getMessage().partition("\n")[0].rstrip()
            left_out = count - allowed
            record.msg, record.args = f"{message} ({left_out} more like it were left out)", ()
        return True


class _Formatter(logging.Formatter):
    """What the two formats have in common: which parts of a record may be shown."""

    def _parts(self, record: logging.LogRecord) -> dict[str, str]:
        message = record.getMessage()
        if record.name.partition(".")[0] != _OWN:
            # Libraries append representations of whatever failed: asyncio does, line by line.
            message = redacted(message.partition("\n")[0].rstrip())
        when = datetime.fromtimestamp(record.created, UTC)
        parts = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        state = request_state.get() or {}
        for name in ("request_id", "tenant"):
            if (value := state.get(name)) is not None:
                parts[name] = str(value)
        if record.exc_info and record.exc_info[0] is not None:
            parts["error"] = record.exc_info[0].__name__
            parts["error_at"] = _location(record.exc_info[2])
        return parts


class JsonFormatter(_Formatter):
    """A record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        return json.dumps(self._parts(record), ensure_ascii=False)


class TextFormatter(_Formatter):
    """A record as one line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        parts = self._parts(record)
        head = " ".join(parts.pop(name) for name in ("time", "level", "logger", "message"))
        # A line break in a message would let it pose as a record of its own.
        head = head.replace("\r", " ").replace("\n", " ")
        return " ".join([head, *(f"{name}={value}" for name, value in parts.items())])


def configure(log_format: Literal["json", "text"], level: str) -> None:
    """Send every log record of this process to standard error, in this format.

    Exceptions that nothing caught, in threads and finalisers, are logged as the others are.
    Processes that this one starts find the same choice in their environment: see `inherit`.
    """
    os.environ[_FORMAT_VARIABLE] = log_format
    os.environ[_LEVEL_VARIABLE] = level
    formatter = "veilhead_service.logs.JsonFormatter"
    if log_format == "text":
        formatter = "veilhead_service.logs.TextFormatter"
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"()": formatter}},
            "filters": {"repeats": {"()": "veilhead_service.logs.Repeats"}},
            "handlers": {
                "stderr": {
                    "class": "logging.StreamHandler",
                    "formatter": "line",
                    "filters": ["repeats"],
                }
            },
            "root": {"handlers": ["stderr"], "level": level.upper()},
            "loggers": {
                "uvicorn": {"handlers": [], "propagate": True},
                "uvicorn.error": {"handlers": [], "propagate": True},
            },
        }
    )
    logging.captureWarnings(True)
    threading.excepthook = lambda failed: _log_uncaught(
        "a thread ended", failed.exc_type, failed.exc_traceback
    )
    sys.unraisablehook = lambda failed: _log_uncaught(
        "an exception could not be raised", failed.exc_type, failed.exc_traceback
    )


def inherit() -> None:
    """Log as the process that started this one does; as text when it configured nothing."""
    level = os.environ.get(_LEVEL_VARIABLE, "info")
    configure("json" if os.environ.get(_FORMAT_VARIABLE) == "json" else "text", level)


def _log_uncaught(message: str, kind: type[BaseException], found: TracebackType | None) -> None:
    _logger.error("%s: %s at %s", message, kind.__name__, _location(found))

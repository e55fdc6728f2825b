"""Between a running service and the vendor's command, in small files of the state directory.

    STATE/models-unavailable.json   written by the service: the models that it cannot answer for
    STATE/retry.NAME                written by `models retry`, and removed by the service

A file works from every shell and container that sees the directory, needs no key and no port, and
is nobody's but the operator's.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol

from veilhead_protocol.errors import StateError
from veilhead_protocol.formats import read_regular
from veilhead_protocol.manifest import NAME_PATTERN
from veilhead_service.background import keep_running
from veilhead_service.loads import Unavailable
from veilhead_service.store_files import write_atomically

FORMAT: Final = "veilhead-unavailable-models/1"

_FILE: Final = "models-unavailable.json"
_RETRY: Final = "retry."

#: Between two looks at either side.
_LOOK_SECONDS: Final = 1.0

logger = logging.getLogger("veilhead.service")


class Models(Protocol):
    """What knows of the models of a running service."""

    def unavailable(self) -> Sequence[Unavailable]:
        """Those that cannot be answered for."""

    def retry(self, name: str) -> bool:
        """Try one again; whether it is unavailable."""


class ModelStatus:
    """The service's side: tells which models are unavailable, and hears which to try again."""

    def __init__(self, directory: Path, models: Models) -> None:
        """Nothing is touched before `start`.

        Args:
            directory: the state directory; nothing is told while there is none.
            models: what is asked and told.
        """
        self._directory = directory
        self._models = models
        self._told: list[tuple[Any, ...]] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, in the background."""
        self._task = asyncio.create_task(keep_running("telling of models", self._run))

    async def stop(self) -> None:
        """End the looking; what was told is withdrawn."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        with suppress(OSError):
            (self._directory / _FILE).unlink()

    async def _run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Take what was asked for, and tell what is new.

        Raises:
            OSError: when the directory cannot be read or written.
        """
        if not self._directory.is_dir():
            return
        for name in _take_retries(self._directory):
            if not self._models.retry(name):
                logger.warning("the model %s is not unavailable: there is nothing to retry", name)
        rows = self._models.unavailable()
        # What is left until the next attempt changes all the time, and is not told for itself.
        told = [(row.name, row.digest, row.why, row.reason) for row in rows]
        if told != self._told:
            # On a thread: it waits for the disk.
            await asyncio.to_thread(_tell, self._directory, rows)
            self._told = told


def _tell(directory: Path, rows: Iterable[Unavailable]) -> None:
    written = {
        "format": FORMAT,
        "time": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "models": [
            {"name": row.name, "digest": row.digest, "why": str(row.why), "reason": row.reason}
            for row in rows
        ],
    }
    write_atomically(directory / _FILE, json.dumps(written, indent=1).encode() + b"\n", mode=0o600)


def _take_retries(directory: Path) -> list[str]:
    names = []
    for path in directory.glob(f"{_RETRY}*"):
        name = path.name.removeprefix(_RETRY)
        if NAME_PATTERN.fullmatch(name):
            path.unlink(missing_ok=True)
            names.append(name)
    return names


def read_unavailable(directory: Path) -> list[dict[str, Any]]:
    """What the service on this state directory told last: `name`, `digest`, `why` and `reason`.

    Raises:
        StateError: when it cannot be read.
    """
    path = directory / _FILE
    try:
        written = json.loads(read_regular(path))
        if written["format"] != FORMAT:
            raise StateError(f"{path} is of another version: expected {FORMAT}")
        rows: list[dict[str, Any]] = written["models"]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StateError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(f"{path} is damaged: restart the service, which writes it") from error
    return rows


def ask_retry(directory: Path, name: str) -> None:
    """Ask the service on this state directory to try a model again.

    Raises:
        StateError: when that cannot be written.
    """
    if not directory.is_dir():
        raise StateError(
            f"there is no directory {directory}: give --state of the service that is to try again"
        )
    try:
        (directory / f"{_RETRY}{name}").touch(mode=0o600)
    except OSError as error:
        raise StateError(f"{directory} cannot be written ({error.strerror})") from error

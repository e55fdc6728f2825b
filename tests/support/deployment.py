"""Programs of others that run with the files of `deploy/`, and what a test needs around them."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx2
import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def until(condition, *, seconds=60):
    """Wait for something true, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx2.TransportError):
            if found := condition():
                return found
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def replaced(text, *pairs, **named):
    """An example with what its user has to set; everything in it must be found."""
    for old, new in (*pairs, *named.values()):
        assert old in text, old
        text = text.replace(old, new)
    return text


@contextlib.contextmanager
def started(command, directory):
    """A program that runs while the block does, its output in `directory`."""
    directory.mkdir(exist_ok=True)
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ
            | {"HOME": str(directory), "XDG_DATA_HOME": str(directory), "TMPDIR": str(directory)},
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)

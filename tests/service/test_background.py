"""Work in the background does not end in silence."""

from __future__ import annotations

import asyncio
import logging

import pytest

from veilhead_protocol.errors import StoreError
from veilhead_service.background import keep_running, pause_after, reason_of


def test_work_that_fails_is_told_and_begins_again(caplog):
    failures = [StoreError("the store\nis away"), PermissionError(13, "Permission denied", "/s/m")]
    failures.append(ZeroDivisionError("secret detail"))
    calls = []

    async def work():
        calls.append(1)
        if failures:
            raise failures.pop(0)

    asyncio.run(keep_running("the work", work, first_pause=0.001, longest_pause=0.002))
    assert len(calls) == 4
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition("; it begins")[0] for line in told] == [
        "the work failed (StoreError): the store is away",
        "the work failed (PermissionError): /s/m: Permission denied",
        "the work failed (ZeroDivisionError): ZeroDivisionError",
    ]
    assert all(record.levelno == logging.ERROR for record in caplog.records)


def test_a_cancellation_ends_it():
    async def work():
        await asyncio.Event().wait()

    async def run():
        task = asyncio.create_task(keep_running("the work", work))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_pauses_grow_up_to_the_longest():
    assert [pause_after(n, 0.5, 30.0) for n in (1, 2, 3, 6, 7, 8, 1000)] == [
        *(0.5, 1.0, 2.0, 16.0),
        *(30.0, 30.0, 30.0),
    ]


def test_reasons_hold_nothing_of_foreign_messages():
    assert reason_of(ValueError("bytes of a request")) == "ValueError"
    assert reason_of(OSError("bytes of a request")) == "OSError"
    assert reason_of(OSError(5, "Input/output error")) == "Input/output error"

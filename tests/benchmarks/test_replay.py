"""The generator of recorded queries: every answer is judged, every query counted once."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager

from veilhead_benchmarks.replay import Caller, Outcome, Recorded, Stream, Tally, replay

REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody"
RIGHT = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nheader"
FULL = (
    b"HTTP/1.1 503 \r\nretry-after: 1\r\ncontent-length: 35\r\n\r\n"
    b'{"t":"urn:veilhead:problem:queue-fu'
)
NO_KEY = b"HTTP/1.1 401 \r\ncontent-length: 0\r\n\r\n"


@asynccontextmanager
async def serving(answers):
    """A server that gives these answers in turn, and the last one ever after; None hangs up."""
    left = list(answers)

    async def serve(reader, writer):
        while await reader.readexactly(len(REQUEST)) == REQUEST:
            answer = left.pop(0) if len(left) > 1 else left[0]
            if answer is None:
                break
            await asyncio.sleep(0.01)
            writer.write(answer)
        writer.close()

    async def handle(reader, writer):
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def replayed(answers, *, seconds=0.1, polite=True, header=b"head", size=6):
    async def run():
        async with serving(answers) as port:
            caller = Caller("one", 1, (Recorded(REQUEST, header, size),))
            stream = Stream(port, (caller,), seconds, polite=polite)
            return await replay(Stream.from_json(stream.to_json()), time.monotonic())

    outcome = asyncio.run(run())
    assert Outcome.from_json(outcome.to_json()) == outcome
    (tally,) = outcome.tallies.values()
    failed = sum(tally.failed.values())
    assert tally.asked == tally.answered + tally.wrong + failed + tally.abandoned
    assert len(tally.latencies) == tally.answered
    return tally, outcome


def test_right_replies_are_answers_and_some_are_kept():
    tally, outcome = replayed([RIGHT])
    assert tally.answered == tally.asked > 0
    assert tally.in_time in (tally.asked, tally.asked - 1)
    assert outcome.samples[0] == (0, 0, b"header")


def test_replies_of_another_length_or_header_are_wrong():
    for wrong in ({"size": 7}, {"header": b"other"}):
        tally, outcome = replayed([RIGHT], **wrong)
        assert tally.wrong == tally.asked > 0
        assert outcome.samples == []


def test_a_polite_caller_waits_and_sends_the_same_query_again():
    tally, _ = replayed([FULL, RIGHT])
    assert tally == Tally(
        asked=1,
        answered=1,
        refused={"queue-fu": 1},
        latencies=tally.latencies,
    )
    assert tally.latencies[0] >= 1.0


def test_an_impolite_caller_asks_at_once_and_gives_up_in_the_end():
    tally, _ = replayed([FULL], polite=False)
    assert (tally.asked, tally.answered, tally.abandoned) == (1, 0, 1)
    assert tally.refused["queue-fu"] > 1


def test_an_error_that_is_no_refusal_fails_the_query():
    tally, _ = replayed([NO_KEY])
    assert tally.failed["401"] == tally.asked > 0


def test_a_query_whose_connection_ends_is_sent_on_a_new_one():
    tally, _ = replayed([None, RIGHT])
    assert tally.broken == 1
    assert tally.answered == tally.asked

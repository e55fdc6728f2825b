"""The throughput of a real service in short, and that the generator cannot flatter it."""

from __future__ import annotations

import asyncio
import math
import os
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilhead_benchmarks import load_generator
from veilhead_benchmarks.load_generator import Load, Outcome, generate, precise_loop
from veilhead_benchmarks.memory import Memory
from veilhead_benchmarks.processes import publish_random
from veilhead_benchmarks.rows import Row
from veilhead_benchmarks.throughput import (
    Loads,
    Queries,
    Throughput,
    measure_throughput,
    percentile,
    poisson_arrivals,
)
from veilhead_protocol.errors import WireError
from veilhead_service.encrypted_head import ClientKey, EncryptedHead

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"

REPLY = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nreply"
REQUEST = b"POST / HTTP/1.1\r\n\r\n"


@pytest.fixture(scope="module")
def rows():
    return measure_throughput(Loads(22, closed_seconds=0.5, open_seconds=0.5))


def test_a_service_is_measured_saturated_with_two_workers_and_below(rows):
    assert [(row.load, row.workers) for row in rows] == [
        ("closed", 1),
        ("closed", 2),
        ("open", 1),
        ("open", 1),
    ]
    one, two, half, most = rows
    assert two.two_against_one == two.texts_per_second / one.texts_per_second
    assert half.offered_per_second == 0.5 * one.texts_per_second
    assert most.offered_per_second == 0.8 * one.texts_per_second
    for row in (half, most):
        assert 0 < row.p50_ms <= row.p95_ms <= row.p99_ms


def test_every_load_is_checked_and_its_processes_counted(rows):
    for row in rows:
        assert row.texts_per_second == row.texts / row.seconds
        assert row.checked >= min(row.texts, 32)
        assert 0 < row.max_error < 2**-10 + 2**-13
        assert 0 < row.generator_cores < 1
        assert row.worker_cores > 0
        assert row.texts_per_worker_core < math.inf


@given(st.lists(st.floats(0, 1e3), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(values, percent):
    found = percentile(values, percent)
    assert found in values
    assert 100 * sum(value <= found for value in values) >= percent * len(values)
    assert 100 * sum(value < found for value in values) < percent * len(values)


def test_arrivals_are_poisson_and_the_same_in_every_run():
    arrivals = poisson_arrivals(1000.0, 20.0, 1)
    assert arrivals == poisson_arrivals(1000.0, 20.0, 1)
    gaps = np.diff((0.0, *arrivals))
    assert (gaps > 0).all()
    # An exponential distribution deviates by its mean; evenly spaced arrivals would not at all.
    assert gaps.mean() == pytest.approx(1e-3, rel=0.05)
    assert gaps.std() == pytest.approx(1e-3, rel=0.05)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Queries for a head, and its replies."""
    work = tmp_path_factory.mktemp("head")
    queries = Queries.encrypt(publish_random(work / "store", work, "benchmark", 22, 384))
    artifact = queries.artifact
    head = EncryptedHead(artifact.manifest, artifact.weight, artifact.bias)
    replies = {
        index: head.evaluate(query.data, ClientKey.from_message(query.key.message))
        for index, query in enumerate(queries.encrypted[:10])
    }
    return queries, replies


def test_right_replies_pass(answered):
    queries, replies = answered
    assert queries.max_error(replies) <= queries.artifact.manifest.head.error_bound


def test_a_reply_that_decrypts_to_something_else_is_noticed(answered):
    queries, replies = answered
    damaged = bytearray(replies[3])
    damaged[-len(damaged) // 2] ^= 0x55
    with pytest.raises((RuntimeError, WireError)):
        queries.max_error(replies | {3: bytes(damaged)})
    shifted = replace(queries, logits=queries.logits + 0.01)
    with pytest.raises(RuntimeError, match=r"a reply is wrong by 0\.01"):
        shifted.max_error(replies)
    with pytest.raises(RuntimeError, match="wrong by nan"):
        replace(queries, logits=queries.logits * np.nan).max_error(replies)


def test_a_reply_to_another_query_is_noticed(answered):
    queries, replies = answered
    with pytest.raises(WireError):
        queries.max_error(replies | {3: replies[4]})


@asynccontextmanager
async def fake_service(answer, seconds=0.0):
    """A service that answers one request at a time, after so long."""
    turn = asyncio.Lock()
    talks = set()

    async def talk(reader, writer):
        talks.add(asyncio.current_task())
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                async with turn:
                    await asyncio.sleep(seconds)
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            await asyncio.wait(talks)  # they end, for the generator closes its connections


def outcome_of(answer, *, service_seconds=0.0, connections=1, arrivals=None):
    async def run():
        async with fake_service(answer, service_seconds) as port:
            return await generate(
                Load(
                    port=port,
                    requests=(REQUEST, REQUEST),
                    reply_bytes=5,
                    connections=connections,
                    seconds=0.2,
                    arrivals=arrivals,
                    service=os.getpid(),
                    workers=(os.getpid(),),
                )
            )

    with (
        pytest.MonkeyPatch.context() as patch,
        asyncio.Runner(loop_factory=precise_loop) as runner,
    ):
        patch.setattr(load_generator, "_WARM_UP_SECONDS", 0.02)
        return runner.run(run())


@pytest.mark.parametrize("connections", [1, 20])
def test_waiting_counts_from_when_a_request_was_to_be_sent(connections):
    # Twice as many as the service can answer: the last one waits for half of all the others,
    # whether in the service or, with one connection, in the generator.
    arrivals = tuple(0.01 * number for number in range(20))
    outcome = outcome_of(REPLY, service_seconds=0.02, connections=connections, arrivals=arrivals)
    assert len(outcome.latencies) == 20
    assert percentile(outcome.latencies, 99) >= 20 * 0.02 - 19 * 0.01 - 0.01


def test_a_closed_load_sends_again_after_each_reply():
    outcome = outcome_of(REPLY, service_seconds=0.01)
    assert 2 <= len(outcome.latencies) <= 21
    assert outcome.replies == {0: b"reply", 1: b"reply"}
    assert outcome == Outcome.from_json(outcome.to_json())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 5\r\n\r\nreply", "expected a reply"),
        (b"HTTP/1.1 200 OK\r\n\r\nreply", "expected a reply"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nrepl", "a reply has 4 bytes, expected 5"),
    ],
)
def test_an_answer_that_is_no_reply_ends_the_load(answer, message):
    with pytest.raises(ExceptionGroup) as caught:
        outcome_of(answer)
    assert message in str(caught.value.exceptions[0])


def test_a_load_survives_its_text():
    load = Load(1, (b"\x00\xff", b"two"), 5, 3, 1.5, (0.1, 0.25), 7, (8, 9))
    assert Load.from_json(load.to_json()) == load
    assert Load.from_json(replace(load, arrivals=None).to_json()).arrivals is None


@pytest.mark.parametrize("kind", [Row, Throughput, Memory])
def test_the_document_describes_every_field(kind):
    lines = DOCUMENT.read_text("utf-8").splitlines()
    described = {line.split("`")[1] for line in lines if line.startswith("| `")}
    assert {field.name for field in fields(kind)} <= described

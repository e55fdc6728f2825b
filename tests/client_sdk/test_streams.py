"""`classify_many`: texts that need not fit into memory, and errors in their places."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import httpx2
import pytest
from support.services import ScriptedService, problem

from veilhead import (
    AsyncClient,
    Client,
    ClientError,
    InputError,
    NotSentError,
    ServiceResponseError,
)
from veilhead_models.backbone import Backbone

#: How far the noise of two encryptions may move a score.
NOISE = 2e-3


def by_label(rows):
    return [{item.label: item.score for item in row} for row in rows]


def alike(rows, others):
    """Whether the scores of every label are the same, up to the noise."""
    return all(
        one.keys() == other.keys() and all(abs(one[label] - other[label]) <= NOISE for label in one)
        for one, other in zip(by_label(rows), by_label(others), strict=True)
    )


def test_the_answers_are_those_of_classify_in_order(connect, text_artifact, texts):
    client, _ = connect(text_artifact)
    found = list(client.classify_many(iter(texts * 3), top_k=None))
    assert alike(found, client.classify(texts * 3, top_k=None))
    assert list(client.classify_many([])) == []


def test_no_more_is_read_than_is_under_way(connect, text_artifact, texts):
    client, service = connect(text_artifact)
    read = itertools.count()
    chunk = client._engine.chunk
    many = itertools.islice(itertools.cycle(texts), 20 * chunk)
    answers = client.classify_many(
        (text for text, _ in zip(many, read, strict=False)), concurrency=2
    )
    taken = 5 * chunk
    for _ in itertools.islice(answers, taken):
        pass
    # Two chunks under way, as many that are answered and not yet taken, and the one in hand.
    assert taken <= next(read) <= taken + 5 * chunk
    answers.close()
    sent = len(service.seen("infer"))
    assert alike(client.classify(["pain"]), client.classify(["pain"]))
    assert len(service.seen("infer")) <= sent + 2


def test_a_bad_row_is_an_error_in_its_place_that_names_it(connect, text_artifact):
    client, _ = connect(text_artifact)
    secret = "zanzibar"
    rows = list(client.classify_many([secret, None, "fever", 7, f"{secret} \ud800"], start=1000))
    assert [isinstance(row, InputError) for row in rows] == [False, True, False, True, True]
    assert [str(row).partition(":")[0] for row in (rows[1], rows[3], rows[4])] == [
        "row 1001",
        "row 1003",
        "row 1004",
    ]
    assert secret not in str(rows)


def test_progress_counts_every_row(connect, text_artifact, texts):
    client, _ = connect(text_artifact)
    done = []
    rows = [*texts, None, *texts * 4]
    assert len(list(client.classify_many(rows, progress=done.append))) == len(rows)
    assert sum(done) == len(rows)
    assert len(done) > 1


def test_once_the_service_refuses_nothing_more_is_embedded_or_sent(
    connect, text_artifact, texts, monkeypatch
):
    client, service = connect(text_artifact, concurrency=1)
    service.on("infer", None, problem(410, "retired"))
    embedded = []
    embed = Backbone.embed_batches
    monkeypatch.setattr(
        Backbone,
        "embed_batches",
        lambda self, chunk: (embedded.append(chunk), embed(self, chunk))[1],
    )
    rows = list(client.classify_many(texts * 10, concurrency=1))
    chunk = client._engine.chunk
    kinds = [type(row) for row in rows]
    assert kinds[:chunk] == [list] * chunk
    assert kinds[chunk : 2 * chunk] == [ServiceResponseError] * chunk
    assert kinds[2 * chunk :] == [NotSentError] * (len(rows) - 2 * chunk)
    assert [str(row).partition(":")[0] for row in rows[chunk:]] == [
        f"row {number}" for number in range(chunk, 1000)
    ]
    assert all(str(row).count("row ") <= 3 for row in rows[chunk:])
    assert len(service.seen("infer")) == len(embedded) == 2
    assert len(client.classify("pain")) == 1  # the next call tries again


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"texts": "pain"}, InputError, "one string"),
        ({"concurrency": 0}, ValueError, "concurrency"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"function_to_apply": "relu"}, ValueError, "softmax, sigmoid, none"),
    ],
)
def test_arguments_are_checked_before_the_first_row(
    connect, text_artifact, options, error, message
):
    client, _ = connect(text_artifact)
    with pytest.raises(error, match=message):
        list(client.classify_many(**({"texts": []} | options)))


def test_what_the_iterable_raises_comes_out(connect, text_artifact, texts):
    client, _ = connect(text_artifact)

    def broken():
        yield from texts
        raise LookupError("the cursor is gone")

    with pytest.raises(LookupError, match="cursor"):
        list(client.classify_many(broken()))
    assert len(client.classify(texts)) == 100


def test_a_chunk_is_embedded_while_an_earlier_one_is_on_the_wire(
    connect, text_artifact, texts, monkeypatch
):
    embedded, embed = [], Backbone.embed_batches
    monkeypatch.setattr(
        Backbone,
        "embed_batches",
        lambda self, chunk: (list(embed(self, chunk)), embedded.append(chunk))[0],
    )
    seen = []

    async def until_the_next_is_embedded(inner, request):
        with anyio.move_on_after(10):
            while len(embedded) < 2:
                await anyio.sleep(0.005)
        seen.append(len(embedded))
        return await inner.handle_async_request(request)

    client, service = connect(text_artifact)
    service.on("infer", until_the_next_is_embedded)
    assert len(list(client.classify_many(texts * 3))) == 300
    assert seen[0] >= 2


def test_what_is_sent_does_not_depend_on_what_the_answers_decrypt_to(connect, text_artifact, texts):
    async def forged(inner, request):
        response = await inner.handle_async_request(request)
        body = bytearray(await response.aread())
        body[-400:-200] = bytes(byte ^ 0x55 for byte in body[-400:-200])
        return httpx2.Response(200, content=bytes(body))

    client, service = connect(text_artifact)
    client.classify("pain")

    def sent(events):
        service.requests.clear()
        service.on("infer", *events)
        rows = list(client.classify_many(texts * 3, top_k=None))
        service.script.clear()
        # Their order is left to chance: several are under way at once. So is whether a key that
        # is done with is forgotten in this call or at the beginning of the next.
        return rows, sorted(
            (route, len(body)) for route, body in service.requests if route != "forget"
        )

    honest, expected = sent([])
    answers, found = sent([forged] * 99)
    assert found == expected
    assert not alike(answers, honest)


def test_closing_a_client_ends_its_streams(connect, text_artifact, texts):
    client, _ = connect(text_artifact)
    answers = client.classify_many(itertools.cycle(texts))
    next(answers)
    client.close()
    with pytest.raises((ClientError, RuntimeError), match=r"closed|not running"):
        for _ in answers:
            pass


def test_a_stream_that_is_dropped_stops(connect, text_artifact, texts):
    client, _ = connect(text_artifact)
    answers = client.classify_many(itertools.cycle(texts))
    next(answers)
    del answers
    gc.collect()
    assert all(not window._tasks for window in client._client._windows)
    assert len(client.classify("pain")) == 1


class TestClient:
    @pytest.fixture
    def make_client(self):
        return Client

    def test_threads_share_it(self, connect, text_artifact, texts):
        client, _ = connect(text_artifact)
        expected = client.classify(texts, top_k=None)
        found = {}

        def work(number):
            mine = texts[number % 10 :: 10]
            how = client.classify_many if number % 2 else client.classify
            found[number] = list(how(mine, top_k=None))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 32
        assert all(alike(found[number], expected[number % 10 :: 10]) for number in found)

    def test_the_iterable_is_read_in_the_thread_of_the_caller(self, connect, text_artifact, texts):
        client, _ = connect(text_artifact)
        readers = set()

        def rows():
            for text in texts * 3:
                readers.add(threading.get_ident())
                yield text

        list(client.classify_many(rows()))
        assert readers == {threading.get_ident()}

    def test_an_interrupt_stops_what_is_under_way(self, connect, text_artifact):
        client, service = connect(text_artifact)
        client.classify("pain")
        main, ended = threading.main_thread(), threading.Event()

        async def hold(inner, request):
            signal.pthread_kill(main.ident, signal.SIGINT)
            try:
                await anyio.sleep_forever()
            finally:
                ended.set()

        service.on("infer", hold)
        # A run in the background of a shell ignores interrupts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                client.classify("pain")
        finally:
            signal.signal(signal.SIGINT, before)
        assert ended.wait(10)
        assert len(client.classify("pain")) == 1

    def test_closing_ends_the_call_of_another_thread(self, connect, text_artifact):
        client, service = connect(text_artifact)
        held = threading.Event()

        async def hold(inner, request):
            held.set()
            await anyio.sleep_forever()

        service.on("infer", hold)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(client.classify, "pain")
            assert held.wait(10)
            client.close()
            with pytest.raises(ClientError, match="closed"):
                call.result(10)


class TestAsyncClient:
    @pytest.fixture
    def service(self):
        return ScriptedService(httpx2.AsyncHTTPTransport())

    @pytest.fixture
    def client(self, served, service):
        return AsyncClient(served, "colours", transport=service)

    def test_tasks_share_it(self, client, texts):
        async def main():
            async with client:
                expected = await client.classify(texts, top_k=None)
                tasks = (client.classify(text, top_k=None) for text in texts)
                return expected, await asyncio.gather(*tasks)

        assert alike(*asyncio.run(main()))

    def test_a_cancelled_task_leaves_it_usable(self, client, service, texts):
        async def main():
            held = asyncio.Event()

            async def hold(inner, request):
                held.set()
                await asyncio.sleep(3600)

            async with client:
                await client.classify("pain")
                service.on("infer", hold)
                task = asyncio.create_task(client.classify(texts[0]))
                await held.wait()
                others = asyncio.gather(*(client.classify(text) for text in texts[1:]))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                return await others

        assert len(asyncio.run(main())) == 99

    def test_a_time_limit_of_asyncio_works(self, client, service):
        async def hold(inner, request):
            await asyncio.sleep(3600)

        async def main():
            async with client:
                await client.classify("pain")
                service.on("infer", hold)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.classify("pain"), 0.2)
                return await client.classify("pain")

        assert len(asyncio.run(main())) == 1

    def test_a_cancelled_stream_leaves_it_usable(self, client, service, texts):
        async def main():
            async def consume():
                async for _ in client.classify_many(itertools.cycle(texts)):
                    started.set()

            started = asyncio.Event()
            async with client:
                task = asyncio.create_task(consume())
                await started.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                return await client.classify(texts)

        assert len(asyncio.run(main())) == 100

    def test_texts_may_be_asynchronous(self, client, texts):
        async def rows():
            for text in texts:
                await asyncio.sleep(0)
                yield text

        async def main():
            async with client:
                expected = await client.classify(texts, top_k=None)
                return expected, [row async for row in client.classify_many(rows(), top_k=None)]

        assert alike(*asyncio.run(main()))

    def test_connections_are_used_again(self, served, text_artifact):
        asked, local_ports = [], set()

        class Watched(httpx2.AsyncHTTPTransport):
            async def handle_async_request(self, request):
                response = await super().handle_async_request(request)
                stream = response.extensions["network_stream"]
                asked.append(request.url)
                local_ports.add(stream.get_extra_info("client_addr")[1])
                return response

        async def main():
            backbone = text_artifact / "backbone"
            async with AsyncClient(
                served, "colours", backbone=backbone, concurrency=3, transport=Watched()
            ) as client:
                await asyncio.gather(*(client.classify("pain") for _ in range(40)))

        asyncio.run(main())
        assert len(asked) >= 42  # the manifest and a key with them
        assert len(local_ports) <= 3

    def test_it_must_be_entered_and_once(self, client):
        assert "not connected" in repr(client)

        async def outside():
            with pytest.raises(ClientError, match="async with"):
                await client.classify("pain")
            async with client:
                with pytest.raises(ClientError, match="entered once"):
                    await client.__aenter__()
            with pytest.raises(ClientError, match="closed"):
                await client.classify("pain")

        asyncio.run(outside())

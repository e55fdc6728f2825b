"""A client in a copy of the process that made it: it refuses at once, and the other one goes on."""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import httpx2
import numpy as np
import pytest
from support.copies import WAYS, in_copy, in_every_way
from support.heads import unit_rows
from support.services import ScriptedService

from veilhead import AsyncClient, Client, ClientError
from veilhead.connections import Connections
from veilhead.transport import Transport
from veilhead_service.workers import WorkerPool

ADVICE = "make one after the fork"

#: Every public method that does something, as it is called.
CALLS = {
    "classify": lambda client: client.classify("fever"),
    "classify_frame": lambda client: client.classify_frame(frame()),
    "classify_many": lambda client: first_of(client.classify_many(["fever"])),
    "classify_tokens": lambda client: client.classify_tokens("fever"),
    "card": lambda client: client.card(),
    "embed": lambda client: client.embed(["fever"]),
    "logits": lambda client: client.logits(np.ones((1, 16))),
    "predict": lambda client: client.predict(["fever"]),
    "predict_proba": lambda client: client.predict_proba(["fever"]),
}

#: What a copy may do all the same: read what the client knows, and leave it.
HARMLESS = {"close", "deidentifier", "labels", "local", "manifest"}


def frame():
    import pandas as pd

    return pd.Series(["fever"])


def first_of(stream):
    return anext(stream) if inspect.isasyncgen(stream) else next(stream)


@pytest.fixture(scope="module")
def colours(served):
    """A `Client` that has answered, with its keys and connections, and zeros made ahead."""
    with Client(served, "colours") as client:
        client.classify("fever")
        yield client


@pytest.fixture(scope="module")
def async_colours(served):
    """The same as an `AsyncClient`, and the event loop that it belongs to."""
    with asyncio.Runner() as runner:

        async def entered():
            client = await AsyncClient(served, "colours").__aenter__()
            await client.classify("fever")
            return client

        client = runner.run(entered())
        yield client, runner
        runner.run(client.close())


@pytest.fixture(params=["Client", "AsyncClient"])
def made(request, colours, async_colours):
    """A client, and what runs a call of it here or in a copy."""
    if request.param == "Client":
        return colours, lambda call: call()
    client, runner = async_colours

    async def awaited(call):
        return await call()

    here = os.getpid()

    def run(call):
        if os.getpid() == here:
            return runner.run(awaited(call))
        return asyncio.run(awaited(call))

    return client, run


def test_every_public_method_is_called_here_or_harmless():
    for kind in (Client, AsyncClient):
        public = {name for name in vars(kind) if not name.startswith("_")}
        assert public == CALLS.keys() | HARMLESS


@pytest.mark.parametrize("way", WAYS)
def test_every_call_in_a_copy_is_refused_at_once_and_says_what_to_do(made, way):
    client, run = made

    def refusals():
        found = {}
        for name, call in CALLS.items():
            try:
                run(lambda call=call: call(client))
            except Exception as error:
                found[name] = type(error), str(error)
        return found

    found = in_copy(way, refusals)
    assert found.keys() == CALLS.keys()
    for kind, message in found.values():
        assert kind is ClientError
        assert ADVICE in message
    assert run(lambda: client.classify("fever"))


def test_a_copy_of_the_same_process_id_is_refused_too(served):
    def work(way):
        with Client(served, "model") as client:
            client.logits(unit_rows(1, 32))

            def refused():
                with pytest.raises(ClientError, match=ADVICE):
                    client.logits(unit_rows(1, 32))
                client.close()
                return os.getpid()

            assert in_copy(way, refused) == os.getpid()
            return client.logits(unit_rows(1, 32)).shape

    assert in_every_way("same-id", work) == (1, 5)


def test_a_stream_begun_before_is_refused_and_can_be_dropped(colours, texts):
    stream = colours.classify_many(texts * 3)
    next(stream)

    def work():
        # What has come already is here; nothing further comes.
        with pytest.raises(ClientError, match=ADVICE):
            list(stream)
        other.close()
        return True

    other = colours.classify_many(texts * 3)
    next(other)
    assert in_copy("fork", work)
    assert len(list(stream)) == len(list(other)) == 299


def test_an_async_stream_begun_before_is_refused_and_can_be_dropped(async_colours, texts):
    client, runner = async_colours

    async def taken(stream):
        return [answer async for answer in stream]

    streams = [client.classify_many(texts * 3) for _ in range(2)]
    for stream in streams:
        runner.run(_next(stream))

    def work():
        with pytest.raises(ClientError, match=ADVICE):
            asyncio.run(taken(streams[0]))
        asyncio.run(_close(streams[1]))
        asyncio.run(client.close())  # with rows of both under way, elsewhere
        return True

    assert in_copy("fork", work)
    assert [len(runner.run(taken(stream))) for stream in streams] == [299, 299]


async def _next(stream):
    return await anext(stream)


async def _close(stream):
    await stream.aclose()


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_may_leave_a_client_and_the_service_hears_nothing_of_it(
    served, made, way, monkeypatch
):
    client, run = made

    def leave():
        """Whatever is sent here is an error."""

        async def send(*_, **__):
            raise AssertionError("sent something")

        monkeypatch.setattr(httpx2.AsyncHTTPTransport, "handle_async_request", send)
        monkeypatch.setattr(Transport, "_request", send)
        for _ in range(2):
            run(client.close) if isinstance(client, AsyncClient) else client.close()
        return repr(client), client.labels, client.manifest.digest

    assert in_copy(way, leave) == (repr(client), client.labels, client.manifest.digest)
    registered = []
    put_key = Transport.put_key

    async def noted(transport, key_id, message):
        registered.append(key_id)
        await put_key(transport, key_id, message)

    monkeypatch.setattr(Transport, "put_key", noted)
    assert run(lambda: client.classify("fever"))
    assert registered == []  # the service still has the key


def test_a_client_that_was_not_entered_yet_is_refused_when_it_is(served):
    client = AsyncClient(served, "model")

    async def enter():
        async with client:
            raise AssertionError("entered")

    with pytest.raises(ClientError, match=ADVICE):
        in_copy("fork", lambda: asyncio.run(enter()))


def test_a_task_that_was_under_way_sends_nothing_in_a_copy(served):
    """A fork on the event loop's own thread, whose copy goes on running the loop."""

    async def both():
        async with AsyncClient(served, "model") as client:
            task = client._engine.transport.get_manifest("model", None)
            with pytest.raises(ClientError, match=ADVICE):
                in_copy("fork", lambda: asyncio.run(task))
            task.close()
            return await client.logits(unit_rows(1, 32))

    assert asyncio.run(both()).shape == (1, 5)


@pytest.mark.parametrize("local", [False, True])
def test_the_end_of_an_event_loop_in_a_copy_closes_nothing_of_a_client(
    local, served, head_artifact, monkeypatch
):
    """As in a child that leaves `asyncio.run` by an exception: asyncio ends the loop there too."""
    runner = asyncio.Runner()

    async def entered():
        made = AsyncClient.local(head_artifact) if local else AsyncClient(served, "model")
        client = await made.__aenter__()
        await client.logits(unit_rows(1, 32))
        return client

    client = runner.run(entered())

    def work():
        done = []

        async def noted(*_):
            done.append("something")

        monkeypatch.setattr(Connections, "handle_async_request", noted)
        monkeypatch.setattr(Connections, "__aexit__", noted)
        monkeypatch.setattr(WorkerPool, "stop", noted)
        failures = []
        runner.get_loop().set_exception_handler(lambda _, found: failures.append(found["message"]))
        runner.close()
        # Of the frameworks' own generators, some cannot be closed like this.
        return done + [message for message in failures if "opened_engine" in message]

    assert in_copy("fork", work) == []
    assert runner.run(client.logits(unit_rows(1, 32))).shape == (1, 5)
    runner.run(client.close())
    runner.close()


def test_a_copy_makes_a_client_of_its_own(served):
    rows = unit_rows(3, 32)
    with Client(served, "model") as client:
        before = client.logits(rows)

        def work():
            with Client(served, "model") as other:
                return other.logits(rows)

        bound = client.manifest.head.error_bound
        assert np.abs(in_copy("fork", work) - before).max() <= 2 * bound
        assert np.abs(client.logits(rows) - before).max() <= 2 * bound


def test_a_local_client_is_refused_in_a_copy_and_goes_on_here(head_artifact):
    row = unit_rows(1, 32)
    with Client.local(head_artifact) as client:
        client.logits(row)

        def work():
            with pytest.raises(ClientError, match=ADVICE):
                client.logits(row)
            client.close()
            return True

        for way in WAYS:
            assert in_copy(way, work)
        assert client.logits(row).shape == (1, 5)


def test_nothing_is_made_ahead_with_prepare_off(served, make_client):
    """For a process that may be resumed twice from a snapshot, which no process notices."""
    service = ScriptedService(httpx2.AsyncHTTPTransport())
    found = {}
    for prepare in (True, False):
        client = make_client(served, "model", transport=service, prepare=prepare)
        try:
            session, made = engine_of(client).session, []
            prepared = session.prepare
            session.prepare = lambda made=made, prepared=prepared: made.append(prepared())
            for _ in range(3):
                client.logits(unit_rows(1, 32))
                settle(client)
            found[prepare] = len(made), len(session._fresh_enough_key()._zeros)
        finally:
            client.close()
    assert found[True][0] > 0 < found[True][1]
    assert found[False] == (0, 0)


def engine_of(client):
    return (client if isinstance(client, Client) else client._client)._engine


def settle(client):
    """Let the client's event loop come to rest."""
    client._portal.call(asyncio.sleep, 0.05)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_client_can_be_neither_pickled_nor_copied(kind, colours, async_colours):
    client = colours if kind is Client else async_colours[0]
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(ClientError, match=ADVICE):
            attempt(client)


# --- programs, to their very end ------------------------------------------------------------------

_PROGRAM = """
import asyncio, concurrent.futures, gc, multiprocessing, os, signal, sys, warnings
import numpy as np
from veilhead import AsyncClient, Client, ClientError

warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, and here are forks
URL, DIRECTORY = sys.argv[1:3]
ROWS = np.eye(32)[:2]

def forked(work):
    "The exit status of a child that does this and then ends as any program does."
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # which ends it
        work()
        sys.exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def refused(call, *arguments):
    try:
        call(*arguments)
    except ClientError as error:
        assert "after the fork" in str(error), error
    else:
        raise AssertionError("not refused")

def logits():
    "In whichever process this is, by the client of its module."
    try:
        return client.logits(ROWS).shape
    except ClientError:
        return "refused"

def of_its_own():
    with Client(URL, "model") as other:
        return other.logits(ROWS).shape

def main():
    global client
    signal.alarm(100)
{body}

if __name__ == "__main__":
    main()
"""

_EXITS = """
client = {client}
client.logits(ROWS)
streams = [client.classify_many([])]

def use():
    refused(client.logits, ROWS)

def drop():
    global client
    streams.clear()
    del client
    gc.collect()

def close():
    with client:
        pass

def raise_in_it():
    with client:
        os.close(2)  # the traceback is meant
        raise KeyboardInterrupt

for work, status in [(lambda: None, 7), (use, 7), (close, 7), (drop, 7), (raise_in_it, None)]:
    found = forked(work)
    assert found == status or (status is None and found != -signal.SIGALRM), (work, found)
    for _ in range(3):
        assert client.logits(ROWS).shape == (2, 5)
client.close()
print("well")
"""

_ASYNC_EXITS = """
runner = asyncio.Runner()

async def entered():
    client = await AsyncClient(URL, "model").__aenter__()
    await client.logits(ROWS)
    return client

client = runner.run(entered())

def use():
    refused(asyncio.run, client.logits(ROWS))

def close():
    asyncio.run(client.close())

def drop():
    global client
    del client
    gc.collect()

async def threaded():
    "Forked while the loop runs, in a thread that is not the loop's."
    return await asyncio.to_thread(forked, lambda: (use(), os._exit(7)))

for work in (lambda: None, use, close, drop):
    assert forked(work) == 7, work
    for _ in range(3):
        assert runner.run(client.logits(ROWS)).shape == (2, 5)
assert runner.run(threaded()) == 7
assert runner.run(client.logits(ROWS)).shape == (2, 5)
runner.run(client.close())
runner.close()
print("well")
"""

_POOLS = """
client = Client(URL, "model")
client.logits(ROWS)
forking = multiprocessing.get_context("fork")
with concurrent.futures.ProcessPoolExecutor(2, mp_context=forking) as pool:
    found = [pool.submit(work).result(30) for work in (logits, logits, of_its_own, logits)]
assert found == ["refused", "refused", (2, 5), "refused"], found
with forking.Pool(2) as pool:
    assert pool.apply_async(logits).get(30) == "refused"
    assert pool.apply_async(of_its_own).get(30) == (2, 5)
for method in ("spawn", "forkserver"):
    context = multiprocessing.get_context(method)
    refused(context.Process(target=print, args=(client,)).start)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        refused(pool.submit(client.logits, ROWS).result, 30)
        assert pool.submit(of_its_own).result(30) == (2, 5)
assert logits() == (2, 5)
client.close()
print("well")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(_EXITS.replace("{client}", 'Client(URL, "model")'), id="Client"),
        pytest.param(_EXITS.replace("{client}", "Client.local(DIRECTORY)"), id="Client.local"),
        pytest.param(_ASYNC_EXITS, id="AsyncClient"),
        pytest.param(_POOLS, id="pools"),
    ],
)
def test_programs_that_fork_end_and_go_on(body, served, head_artifact, tmp_path):
    """One that hangs is a failure, and is ended with its children."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM.replace("{body}", textwrap.indent(body, "    ")))
    process = subprocess.Popen(
        [sys.executable, program, served, head_artifact],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
    assert output.strip() == "well", errors

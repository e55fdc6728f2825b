"""Log lines: what they hold, and what they never do."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys

import httpx2
import pytest
from starlette.testclient import TestClient
from support.services import running

from veilhead_service.app import create_app
from veilhead_service.logs import JsonFormatter, Repeats, TextFormatter, request_state
from veilhead_service.settings import Settings

SECRET = "zqxjkmarker"


@pytest.fixture(params=[JsonFormatter, TextFormatter])
def log(request):
    """A logger, and what it wrote."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(request.param())

    def make(name):
        logger = logging.Logger(name)
        logger.addHandler(handler)
        return logger

    return make, stream, request.param is JsonFormatter


def fail():
    local = SECRET
    raise ValueError(f"message with {local}")


def test_an_exception_is_its_type_and_place(log):
    make, stream, _ = log
    try:
        fail()
    except ValueError:
        make("veilhead.service").exception("it failed")
    line = stream.getvalue()
    assert SECRET not in line
    assert "ValueError" in line
    assert re.search(r"test_logging\.py:\d+ in fail", line)
    assert line.count("\n") == 1


def test_what_asyncio_appends_is_dropped(log):
    make, stream, _ = log
    message = f"Task exception was never retrieved\nfuture: <Task exception=ValueError({SECRET!r})>"
    make("asyncio").error(message)
    assert "Task exception was never retrieved" in stream.getvalue()
    assert SECRET not in stream.getvalue()


def test_a_message_cannot_pose_as_a_second_record(log):
    make, stream, _ = log
    make("veilhead.service").error("first\n2026 error veilhead.service second\r\nthird")
    assert stream.getvalue().count("\n") == 1
    assert "\r" not in stream.getvalue()


def test_a_record_carries_the_request_it_belongs_to(log):
    make, stream, is_json = log
    logger = make("veilhead.service")
    token = request_state.set({"request_id": "r1", "tenant": "clinic"})
    logger.warning("inside")
    request_state.reset(token)
    logger.warning("outside")
    inside, outside = stream.getvalue().splitlines()
    if is_json:
        record = json.loads(inside)
        assert (record["request_id"], record["tenant"]) == ("r1", "clinic")
        assert (record["level"], record["logger"]) == ("warning", "veilhead.service")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
        assert "request_id" not in json.loads(outside)
    else:
        assert "request_id=r1 tenant=clinic" in inside
        assert "request_id" not in outside


def test_a_failure_is_logged_with_the_id_that_the_client_got(store, caplog):
    app = create_app(Settings(store=store, insecure_no_tenants=True))
    seen = []

    class Handler(logging.Handler):
        def emit(self, record):
            seen.append(json.loads(JsonFormatter().format(record)))

    @app.get("/broken")
    def broken():
        fail()

    handler = Handler()
    logging.getLogger("veilhead.service").addHandler(handler)
    try:
        answer = TestClient(app).get("/broken")
    finally:
        logging.getLogger("veilhead.service").removeHandler(handler)
    assert answer.status_code == 500
    (record,) = seen
    assert record["request_id"] == answer.json()["request_id"]
    assert SECRET not in json.dumps(record) + answer.text


def test_requests_at_once_keep_their_ids_apart(store):
    import anyio

    app = create_app(Settings(store=store, insecure_no_tenants=True))
    found = {}

    @app.get("/slow/{number}")
    async def slow(number: str):
        await anyio.sleep(0.02)
        return {"logged": request_state.get()["request_id"]}

    async def ask():
        transport = httpx2.ASGITransport(app)
        async with (
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
            anyio.create_task_group() as tasks,
        ):

            async def one(number):
                answer = await client.get(f"/slow/{number}")
                found[number] = (answer.headers["x-request-id"], answer.json()["logged"])

            for number in range(20):
                tasks.start_soon(one, number)

    anyio.run(ask)
    assert all(sent == logged for sent, logged in found.values())
    assert len({sent for sent, _ in found.values()}) == 20


def test_exceptions_of_threads_and_finalisers_are_lines_too():
    script = f"""
import threading
from veilhead_service.logs import configure
configure("json", "info")
def fail():
    raise ValueError({SECRET!r}[:])
thread = threading.Thread(target=fail)
thread.start()
thread.join()
class Broken:
    def __del__(self):
        raise KeyError({SECRET!r}[:])
del Broken
import gc
def make():
    class Broken:
        def __del__(self):
            raise KeyError(''.join({SECRET!r}))
    Broken()
make()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert ["ValueError" in line["message"] for line in lines] == [True, False]
    assert "KeyError" in lines[1]["message"]
    assert SECRET not in done.stderr


@pytest.fixture(scope="module")
def server_log(store, tmp_path_factory):
    """What the real command writes while it is asked for odd things."""
    path = tmp_path_factory.mktemp("log") / "stderr"
    with (
        path.open("wb") as stream,
        running(store, "--workers", "1", "--log-level", "debug", log=stream) as url,
    ):
        httpx2.get(f"{url}/{SECRET}?{SECRET}", headers={"X": SECRET}, trust_env=False)
        httpx2.post(f"{url}/v1/models/{SECRET}/infer", content=SECRET, trust_env=False)
    return path.read_text()


def test_every_line_of_the_command_is_json(server_log):
    lines = [json.loads(line) for line in server_log.splitlines()]
    assert {"uvicorn.error"} <= {line["logger"] for line in lines}
    assert any("Application startup complete" in line["message"] for line in lines)


def test_no_line_of_the_command_holds_paths_queries_headers_or_bodies(server_log):
    assert SECRET not in server_log


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_processes_that_the_service_starts_log_as_it_does(log_format):
    worker = """
import logging
from veilhead_service.logs import inherit
inherit()
logging.getLogger("veilhead.worker").error("here")
"""
    script = f"""
import subprocess, sys
from veilhead_service.logs import configure
configure({log_format!r}, "info")
subprocess.run([sys.executable, "-c", {worker!r}], check=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert "here" in done.stderr
    assert done.stderr.startswith("{") is (log_format == "json")


def test_what_is_said_again_and_again_is_counted_instead():
    """Peers cause warnings as often as they like; each would be a line."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    now = [0.0]
    handler.addFilter(Repeats(lambda: now[0]))
    shown = {}
    for name in ("uvicorn.error", "veilhead.service"):
        logger = logging.Logger(name)
        logger.addHandler(handler)
        for minute in range(2):
            for number in range(1000):
                logger.warning("it failed: %d", number)
                logger.warning("another")
                now[0] += 0.01
            logger.info("no warning")
            now[0] += 60
            shown[name, minute] = stream.getvalue().splitlines()
            stream.truncate(0)
            stream.seek(0)
    assert shown["uvicorn.error", 0] == ["it failed: 0", "another", "no warning"]
    assert shown["uvicorn.error", 1] == [
        "it failed: 0 (999 more like it were left out)",
        "another (999 more like it were left out)",
        "no warning",
    ]
    assert len(shown["veilhead.service", 0]) == 41
    assert shown["veilhead.service", 1][0] == "it failed: 0 (980 more like it were left out)"

"""The application as a whole: health, errors that nobody foresaw, and what its log may say."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import threading
from importlib.metadata import version

import httpx2
import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from veilhead_protocol.errors import ServiceError, StoreError, WorkerError
from veilhead_service import routes
from veilhead_service.app import create_app
from veilhead_service.settings import Settings

OCTETS = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def idle(store):
    """A client of an app that was never started."""
    return TestClient(create_app(Settings(store=store, insecure_no_tenants=True)))


# --- health -------------------------------------------------------------------------------------


def test_a_running_service_is_live_and_ready(service):
    assert service.client.get("/livez").json() == {"status": "live"}
    response = service.client.get("/readyz")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


def test_it_is_live_but_not_ready_before_its_workers_are_up(idle):
    assert idle.get("/livez").status_code == 200
    assert idle.get("/readyz").status_code == 503


def test_it_is_not_ready_after_it_has_stopped(store):
    with TestClient(
        create_app(Settings(store=store, workers=1, insecure_no_tenants=True))
    ) as client:
        assert client.get("/readyz").status_code == 200
    assert client.get("/readyz").status_code == 503


def test_the_version_names_the_service_and_its_formats(service):
    assert service.client.get("/version").json() == {
        "service": version("veilhead"),
        "wire_format": 2,
        "manifest_format": "veilhead-manifest/2",
    }


# --- routing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/model", "/v2/models", "/livez/x", "/metrics2"])
def test_an_unknown_route_is_a_problem(service, problem, path):
    problem(service.client.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/models", {"GET"}),
        ("DELETE", "/v1/models/digits", {"GET"}),
        ("GET", "/v1/models/digits/infer", {"POST"}),
        ("POST", "/livez", {"GET"}),
        ("PUT", "/v1/models/digits/files/config.json", {"GET"}),
    ],
)
def test_another_method_is_a_problem(service, problem, method, path, allowed):
    response = service.client.request(method, path)
    problem(response, 405, "method-not-allowed")
    assert allowed <= {name.strip() for name in response.headers["allow"].split(",")}


def test_every_answer_has_an_id_of_its_own(service):
    paths = ["/livez", "/v1/models", "/v1/models/digits", "/v1/models/none", "/none"]
    answers = [service.client.get(path) for path in paths for _ in range(20)]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)
    assert len(set(ids)) == len(ids)


def test_the_id_is_not_the_clients_to_choose(service):
    chosen = "0" * 32
    response = service.client.get("/livez", headers={"X-Request-Id": chosen})
    assert response.headers["x-request-id"] != chosen


def test_the_openapi_document_lists_every_route(service):
    document = service.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    listed = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert listed == {
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name}"),
        ("GET", "/v1/models/{name}/card"),
        ("GET", "/v1/models/{name}/files/{path}"),
        ("POST", "/v1/models/{name}/infer"),
        ("PUT", "/v1/keys/{id}"),
        ("HEAD", "/v1/keys/{id}"),
        ("DELETE", "/v1/keys/{id}"),
        ("GET", "/livez"),
        ("GET", "/readyz"),
        ("GET", "/metrics"),
        ("GET", "/v1/usage"),
        ("GET", "/version"),
    }
    declared = {
        (method, route.path.replace(":path}", "}"))
        for route in (*routes.router.routes, *service.client.app.routes)
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert declared == listed
    for path, method in (("/v1/keys/{id}", "put"), ("/v1/models/{name}/infer", "post")):
        assert (
            "application/octet-stream" in document["paths"][path][method]["requestBody"]["content"]
        )
    assert service.client.get("/docs").status_code == 200


# --- errors that nobody foresaw -----------------------------------------------------------------


class FailingSource:
    """A source of models that fails, with something in its message that nobody may read."""

    def __init__(self, error):
        self.error = error

    def names(self):
        raise self.error

    def current(self, name):
        raise self.error

    def version(self, name, digest):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("secret detail"),
        ValueError("secret detail"),
        KeyError("secret detail"),
        OSError(2, "secret detail"),
        ServiceError("secret detail"),
        TimeoutError("secret detail"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/digits"),
        ("GET", "/v1/models/digits?digest=" + "0" * 64),
        ("GET", "/v1/models/digits/files/config.json"),
        ("POST", "/v1/models/digits/infer"),
    ],
)
def test_an_unforeseen_error_is_told_to_nobody(problem, caplog, capfd, error, method, path):
    caplog.set_level(logging.DEBUG)
    client = TestClient(create_app(Settings(insecure_no_tenants=True), models=FailingSource(error)))
    response = client.request(method, path, headers=OCTETS)
    body = problem(response, 500, "internal")
    assert body["detail"] == "the service failed"
    shown = response.text + str(response.headers) + caplog.text + "".join(capfd.readouterr())
    assert "secret detail" not in shown
    assert all(record.exc_info is None for record in caplog.records)
    # What is logged leads from the answer to the kind of error.
    if not isinstance(error, ServiceError):
        assert body["request_id"] in caplog.text
        assert type(error).__name__ in caplog.text


def test_a_store_that_fails_is_logged_for_its_operator_only(problem, caplog):
    source = FailingSource(StoreError("/srv/store/model cannot be read"))
    client = TestClient(create_app(Settings(insecure_no_tenants=True), models=source))
    response = client.get("/v1/models/digits")
    problem(response, 503, "model-unavailable", retryable=True)
    assert "/srv" not in response.text
    assert "/srv/store/model" in caplog.text
    for _ in range(20):
        client.get("/v1/models/digits")
    assert caplog.text.count("/srv/store/model") == 1  # who asks does not fill the log


def test_a_service_without_room_says_when_to_come_back(problem):
    source = FailingSource(WorkerError("nobody is free"))
    client = TestClient(create_app(Settings(insecure_no_tenants=True), models=source))
    problem(client.get("/v1/models/digits"), 503, "worker-unavailable", retryable=True)


def test_a_start_that_fails_fails_the_application(store, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with (
        pytest.raises(WorkerError),
        TestClient(create_app(Settings(store=store, workers=1, insecure_no_tenants=True))),
    ):
        raise AssertionError("it started")


def test_nothing_of_a_request_reaches_the_log(service, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    query = service.query("digits")
    assert service.infer("digits", query.data).status_code == 200
    assert service.infer("digits", query.data[:-1]).status_code == 422
    assert service.infer("digits", b"\xff" * len(query.data)).status_code == 422
    broken = query.data[:-64] + query.key.message[-64:]
    assert service.infer("digits", broken).status_code == 422
    ours = [record.getMessage() for record in caplog.records if "veilhead" in record.name]
    shown = "".join(ours) + "".join(capfd.readouterr())
    for secret in (query.key.id, query.key.message[-64:], query.data[-64:], query.data[136:168]):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown


# --- the event loop -----------------------------------------------------------------------------


def test_the_service_listens_while_an_evaluation_is_stuck(store, service, child_workers):
    query = service.query("digits")
    key_path = f"/v1/keys/{query.key.id.hex()}"
    before = child_workers()

    async def run():
        app = create_app(Settings(store=store, workers=1, insecure_no_tenants=True))
        transport = httpx2.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            await client.put(key_path, content=query.key.message, headers=OCTETS)
            (pid,) = child_workers() - before
            os.kill(pid, signal.SIGSTOP)
            # If the loop were blocked, only another thread could end this test.
            rescue = threading.Timer(60, os.kill, (pid, signal.SIGCONT))
            rescue.daemon = True
            rescue.start()
            infer = "/v1/models/digits/infer"
            stuck = asyncio.create_task(client.post(infer, content=query.data, headers=OCTETS))
            async with asyncio.timeout(30):
                for path in ("/livez", "/readyz", "/v1/models", "/v1/models/digits", "/version"):
                    assert (await client.get(path)).status_code == 200
                assert (await client.head(key_path)).status_code == 200
                refused = await client.post(infer, content=b"short", headers=OCTETS)
                assert refused.status_code == 422
                assert not stuck.done()
                rescue.cancel()
                os.kill(pid, signal.SIGCONT)
                assert (await stuck).status_code == 200

    asyncio.run(run())
    assert child_workers() <= before

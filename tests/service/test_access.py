"""Every route wants a key, keys are told apart by nothing, tenants do not see each other, and
budgets hold, all over the real app."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from support.copies import WAYS, in_copy
from support.heads import artifact, unit_rows
from support.tenants import add_tenant, bearer

from veilhead.session import SecretKey, Session
from veilhead_protocol.errors import StateError, WorkerError
from veilhead_protocol.policy import BudgetClause, PolicySection
from veilhead_service.access import OPEN_PATHS, scope_of
from veilhead_service.app import create_app
from veilhead_service.limits import Budget, Period, Rate
from veilhead_service.model_store import publish
from veilhead_service.problems import Problem
from veilhead_service.settings import Settings
from veilhead_service.state import State
from veilhead_service.state_file import STATE_FILE
from veilhead_service.tenant_access import TenantAccess
from veilhead_service.tenants import KeyScope

#: What each route needs. A new route must be added here, on purpose.
NEEDED = {
    "/v1/models": KeyScope.MODELS,
    "/v1/models/{name}": KeyScope.MODELS,
    "/v1/models/{name}/card": KeyScope.MODELS,
    "/v1/models/{name}/files/{path:path}": KeyScope.MODELS,
    "/v1/keys/{id}": KeyScope.INFER,
    "/v1/models/{name}/infer": KeyScope.INFER,
    "/v1/usage": KeyScope.USAGE,
    "/metrics": KeyScope.METRICS,
    "/version": None,
    "/docs": None,
    "/docs/oauth2-redirect": None,
    "/openapi.json": None,
}


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def api_key(directory):
    return add_tenant(directory, "clinic")


@pytest.fixture
def make_app(store, directory):
    """The app of the store and the state, with settings."""

    def make(**settings):
        return create_app(Settings(store=store, state_directory=directory, workers=1, **settings))

    return make


@pytest.fixture
def client(make_app, api_key):
    """A client without workers, which most of these tests need not."""
    return TestClient(make_app(), headers=bearer(api_key))


@pytest.fixture
def stranger(client):
    return TestClient(client.app)


def routes_of(app):
    """(method, template, path) of everything that the app can route."""
    found = {
        (method.upper(), template)
        for template, methods in app.openapi()["paths"].items()
        for method in methods
    }
    for route in app.routes:
        for path, methods in [(getattr(route, "path", None), getattr(route, "methods", None))]:
            if path is not None:
                found |= {(method, path) for method in methods or {"GET"}}
    return [(method, path, re.sub(r"{[^}]*}", "a", path)) for method, path in sorted(found)]


async def never():
    raise AssertionError("the body was read")


# --- default deny -------------------------------------------------------------------------------


def test_no_route_but_health_answers_without_a_key(make_app, request_raw):
    app = make_app()
    routes = routes_of(app)
    templates = {template for _, template, _ in routes}
    assert {"/docs", "/openapi.json", "/version", "/v1/models/{name}/infer"} <= templates
    unknown = [("GET", None, path) for path in ("/", "/nowhere", "/livez/", "/v1", "//livez", "")]
    for method, template, path in [*routes, *unknown]:
        if template in OPEN_PATHS:
            continue
        headers = {"content-type": "application/octet-stream"}
        status, found, body = request_raw(app, method, path, headers=headers, receive=never)
        assert status == 401, (method, path)
        assert found["www-authenticate"] == "Bearer"
        assert found["content-type"] == "application/problem+json"
        assert b"urn:veilhead:problem:unauthenticated" in body


def test_health_is_open(stranger):
    assert stranger.get("/livez").status_code == 200
    assert stranger.get("/readyz").status_code == 503  # no workers here


def test_every_route_has_a_scope_that_was_chosen(make_app):
    for _, template, path in routes_of(make_app()):
        if template not in OPEN_PATHS:
            known = template if template in NEEDED else template.replace("{path}", "{path:path}")
            assert scope_of(path) == NEEDED[known], template


@pytest.mark.parametrize("needed", list(KeyScope))
def test_a_scope_opens_its_routes_and_no_others(make_app, directory, request_raw, needed):
    written = add_tenant(directory, "narrow", scopes={needed})
    app = make_app()
    refused = 0
    for method, template, path in routes_of(app):
        if template in OPEN_PATHS:
            continue
        status, _, body = request_raw(app, method, path, headers=bearer(written))
        scope = scope_of(path)
        forbidden = scope not in (None, needed)
        refused += forbidden
        assert (status == 403) == forbidden, (method, path)
        assert (b"problem:forbidden" in body) == forbidden
    assert refused


def test_a_forbidden_body_is_not_read(make_app, directory, request_raw):
    written = add_tenant(directory, "narrow", scopes={KeyScope.MODELS})
    headers = bearer(written) | {"content-type": "application/octet-stream"}
    status, _, _ = request_raw(
        make_app(), "POST", "/v1/models/digits/infer", headers=headers, receive=never
    )
    assert status == 403


def test_a_websocket_is_closed(stranger):
    with pytest.raises(WebSocketDisconnect), stranger.websocket_connect("/livez"):
        pass


# --- keys ---------------------------------------------------------------------------------------


def refusal(response):
    body = response.json()
    headers = {name: value for name, value in response.headers.items() if name != "x-request-id"}
    assert body.pop("request_id") == response.headers["x-request-id"]
    return response.status_code, headers, body


def test_all_bad_keys_get_the_same_answer(stranger, directory, api_key, problem):
    expired = add_tenant(directory, "expired", expires=time.time() - 1)
    revoked = add_tenant(directory, "revoked")
    with State(directory) as state:
        state.revoke("revoked", None)
    time.sleep(0.3)
    last = "A" if api_key[-1] != "A" else "B"
    bad = {
        "none": {},
        "expired": bearer(expired),
        "revoked": bearer(revoked),
        "wrong secret": bearer(api_key[:-1] + last),
        "unknown id": bearer("vh_" + "0" * 16 + api_key[19:]),
        "another's id": bearer(expired[:20] + api_key[20:]),
        "no key": bearer("hello"),
        "empty": {"Authorization": ""},
        "no scheme": {"Authorization": api_key},
        "basic": {"Authorization": f"Basic {api_key}"},
        "space": {"Authorization": f"Bearer  {api_key}"},
        "long": bearer("vh_" + "a" * 20_000),
    }
    found = {name: refusal(stranger.get("/v1/models", headers=how)) for name, how in bad.items()}
    problem(stranger.get("/v1/models"), 401, "unauthenticated")
    assert all(answer == found["none"] for answer in found.values())
    assert found["none"][0] == 401
    assert stranger.get("/v1/models", headers=bearer(api_key)).status_code == 200
    twice = [("Authorization", f"Bearer {api_key}")] * 2
    assert stranger.get("/v1/models", headers=twice).status_code == 401


def test_the_scheme_is_written_in_any_case(stranger, api_key):
    for scheme in ("bearer", "BEARER"):
        headers = {"Authorization": f"{scheme} {api_key}"}
        assert stranger.get("/version", headers=headers).status_code == 200


def within_a_second(condition):
    deadline = time.monotonic() + 1
    while not condition():
        assert time.monotonic() < deadline, "not within a second"
        time.sleep(0.02)


def test_a_running_service_notices_what_the_command_does(client, directory, api_key):
    assert client.get("/version").status_code == 200
    added = add_tenant(directory, "bank")
    within_a_second(lambda: client.get("/version", headers=bearer(added)).status_code == 200)
    with State(directory) as state:
        state.revoke("clinic", None)
    within_a_second(lambda: client.get("/version").status_code == 401)
    assert client.get("/version", headers=bearer(added)).status_code == 200


def test_a_key_expires_while_the_service_runs(directory):
    now = time.time()
    written = add_tenant(directory, "clinic", expires=now + 100)
    clock = {"now": now}
    access = TenantAccess(
        directory, rate=Rate(9, 9), budget=Budget(None, Period.DAY), clock=lambda: clock["now"]
    )

    async def admitted():
        return await access.admit([f"Bearer {written}"], "/version")

    async def run():
        assert await admitted() == "clinic"
        clock["now"] = now + 100
        with pytest.raises(Problem) as caught:
            await admitted()
        await access.stop()
        return caught.value.code

    assert asyncio.run(run()) == "unauthenticated"


def test_the_tenant_is_in_the_requests_state(make_app, api_key):
    app = make_app()
    seen = []

    @app.get("/probe")
    async def probe(request: Request) -> None:
        seen.append(request.state.tenant)

    assert TestClient(app).get("/probe", headers=bearer(api_key)).status_code == 200
    assert seen == ["clinic"]


def test_without_tenants_everybody_is_one(store):
    app = create_app(Settings(store=store, insecure_no_tenants=True))
    client = TestClient(app)
    assert client.get("/v1/models").status_code == 200
    usage = client.get("/v1/usage").json()
    assert usage == {"tenant": "insecure-local", "rate": None, "models": []}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])  # noqa: S104
def test_without_tenants_means_loopback(host):
    with pytest.raises(ValueError, match="loopback"):
        Settings(insecure_no_tenants=True, host=host)
    assert not Settings(host=host).insecure_no_tenants


def test_a_service_without_a_tenant_starts_and_lets_nobody_in(make_app, directory, caplog):
    """On every route but health, until there is a tenant; the log says what to do."""
    with TestClient(make_app()) as client:
        (line,) = (record.message for record in caplog.records if "no tenant" in record.message)
        assert "veilhead-server tenants add" in line
        assert "--insecure-no-tenants" in line
        for _, template, path in routes_of(client.app):
            if template not in OPEN_PATHS:
                assert client.get(path).status_code == 401, template
        assert client.get("/livez").status_code == client.get("/readyz").status_code == 200
        headers = bearer(add_tenant(directory, "clinic"))
        within_a_second(lambda: client.get("/v1/models", headers=headers).status_code == 200)
        assert client.get("/v1/models").status_code == 401


# --- one tenant's encryption keys ---------------------------------------------------------------


@pytest.fixture
def message(artifacts):
    manifest = artifacts["digits"].manifest
    return SecretKey(manifest.parameter_set).message


def path_of(message):
    return f"/v1/keys/{hashlib.sha256(message).hexdigest()}"


def test_anothers_key_cannot_be_told_from_none(
    store, directory, make_app, artifacts, make_service, message
):
    """Same status, headers and body, whether the key is another's or nobody's."""
    owner, other = (add_tenant(directory, name) for name in ("owner", "other"))
    with TestClient(make_app()) as client:
        service = make_service(client, artifacts)
        client.headers.update(bearer(owner))
        query = service.query("digits")  # registered by the owner
        assert service.infer("digits", query.data).status_code == 200
        unregistered = service.session("digits").encrypt(artifacts["digits"].weight[0])

        client.headers.update(bearer(other))
        answers = []
        for asked in (query, unregistered):
            path = path_of(asked.key.message)
            head = client.head(path)
            headers = {n: v for n, v in head.headers.items() if n != "x-request-id"}
            answers.append(
                (
                    (head.status_code, headers),
                    refusal(client.delete(path)),
                    refusal(service.infer("digits", asked.data)),
                )
            )
        assert answers[0] == answers[1]
        assert answers[0][2][0] == 404
        assert answers[0][2][2]["type"].endswith("key-not-registered")

        # It may register the same bytes, as new ones, and forget its own alone.
        assert service.put(query.key.message).status_code == 201
        assert client.delete(path_of(query.key.message)).status_code == 204
        client.headers.update(bearer(owner))
        assert service.infer("digits", query.data).status_code == 200


# --- rates and budgets --------------------------------------------------------------------------


def test_a_rate_is_a_tenants_and_is_told_in_seconds(make_app, directory, api_key, problem):
    other = add_tenant(directory, "bank")
    client = TestClient(make_app(rate_per_second=0.01, rate_burst=3))
    answers = [client.get("/version", headers=bearer(api_key)) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    problem(answers[3], 429, "rate-limited", retryable=True)
    assert 90 <= int(answers[3].headers["retry-after"]) <= 100
    assert client.get("/version", headers=bearer(other)).status_code == 200
    assert client.get("/livez").status_code == 200


def test_a_tenants_own_rate_takes_the_place_of_the_default(make_app, directory, api_key):
    with State(directory) as state:
        state.set_rate("clinic", 0.01, 1)
    client = TestClient(make_app(), headers=bearer(api_key))
    assert [client.get("/version").status_code for _ in range(2)] == [200, 429]


def usage_of(client, model="digits"):
    (row,) = [row for row in client.get("/v1/usage").json()["models"] if row["model"] == model]
    return row


def test_a_budget_is_used_up_shown_and_survives_a_restart(
    make_app, directory, api_key, artifacts, make_service, problem
):
    with State(directory) as state:
        state.set_budget("clinic", "digits", Budget(3, Period.MONTH))
    with TestClient(make_app(), headers=bearer(api_key)) as client:
        service = make_service(client, artifacts)
        query = service.query("digits")
        assert usage_of(client)["remaining"] == 3
        for used in (1, 2):
            assert service.infer("digits", query.data).status_code == 200
            row = usage_of(client)
            assert (row["budget"], row["used"], row["remaining"]) == (3, used, 3 - used)
        # Refused queries cost nothing.
        assert service.infer("digits", query.data[:-1]).status_code == 422
        spoilt = query.data[:1000] + b"\xff" * 100 + query.data[1100:]  # the worker refuses it
        assert service.infer("digits", spoilt).status_code == 422
        assert usage_of(client)["used"] == 2
    with TestClient(make_app(), headers=bearer(api_key)) as client:
        service = make_service(client, artifacts)
        service.register(query.key.message)
        assert service.infer("digits", query.data).status_code == 200
        refused = service.infer("digits", query.data)
        problem(refused, 429, "budget-exhausted", sent=query.data, retryable=True)
        row = usage_of(client)
        assert (row["used"], row["remaining"], row["period"]) == (3, 0, "month")
        ends = Period.MONTH.ends(time.time())
        assert abs(int(refused.headers["retry-after"]) - (ends - time.time())) < 5
        # Other models have budgets of their own.
        assert service.infer("chapters", service.query("chapters").data).status_code == 200


def test_usage_lists_every_model_with_its_default(make_app, api_key, artifacts):
    client = TestClient(make_app(query_budget=7), headers=bearer(api_key))
    body = client.get("/v1/usage").json()
    assert body["tenant"] == "clinic"
    assert body["rate"] == {"per_second": 1000.0, "burst": 2000}
    assert [row["model"] for row in body["models"]] == sorted(artifacts)
    assert {(row["budget"], row["used"], row["period"]) for row in body["models"]} == {
        (7, 0, "day")
    }


def test_the_policys_budget_is_that_of_its_model_unless_the_operator_says_otherwise(
    directory, api_key, tmp_path, make_service, problem
):
    clause = BudgetClause(units=1, period="month")
    heads = {
        "asked": replace(artifact(3, 32, name="asked"), policy=PolicySection(query_budget=clause)),
        "plain": artifact(3, 32, name="plain"),
    }
    for name, head in heads.items():
        head.save(tmp_path / name)
        publish(tmp_path / name, tmp_path / "store")
    settings = Settings(store=tmp_path / "store", state_directory=directory, workers=1)
    with TestClient(create_app(settings), headers=bearer(api_key)) as client:
        service = make_service(client, heads)
        shown = usage_of(client, "asked")
        assert (shown["budget"], shown["remaining"], shown["period"]) == (1, 1, "month")
        assert usage_of(client, "plain")["budget"] is None
        query = service.query("asked")
        assert service.infer("asked", query.data).status_code == 200
        refused = service.infer("asked", query.data)
        problem(refused, 429, "budget-exhausted", sent=query.data, retryable=True)
        assert (usage_of(client, "asked")["used"], usage_of(client, "asked")["remaining"]) == (1, 0)
        plain = service.query("plain")
        assert [service.infer("plain", plain.data).status_code for _ in range(2)] == [200, 200]
        with State(directory) as state:
            state.set_budget("clinic", "asked", Budget(2, Period.MONTH))
        time.sleep(0.3)  # a change is seen as late as a revocation
        assert service.infer("asked", query.data).status_code == 200


def test_a_budget_that_is_used_up_is_refused_without_the_state(
    make_app, api_key, artifacts, make_service, problem, monkeypatch
):
    asked = []
    real = State.charge

    def charge(state, *arguments):
        asked.append(arguments)
        return real(state, *arguments)

    monkeypatch.setattr(State, "charge", charge)
    with TestClient(make_app(query_budget=1), headers=bearer(api_key)) as client:
        service = make_service(client, artifacts)
        query = service.query("digits")
        assert service.infer("digits", query.data).status_code == 200
        for _ in range(5):
            refused = service.infer("digits", query.data)
            problem(refused, 429, "budget-exhausted", sent=query.data, retryable=True)
        assert len(asked) == 2
        assert service.infer("chapters", service.query("chapters").data).status_code == 200


def test_what_is_left_of_a_budget_and_what_is_given_back_can_be_used(directory, api_key):
    async def run():
        access = TenantAccess(directory, rate=Rate(1e3, 1000), budget=Budget(3, Period.DAY))
        await access.start()
        await access.admit([f"Bearer {api_key}"], "/version")

        async def charged(model, units):
            async with access.charged("clinic", model, units):
                pass

        for units, refused in ((4, True), (4, True), (5, True), (2, False), (2, True), (1, False)):
            with pytest.raises(Problem, match="left") if refused else nullcontext():
                await charged("m", units)

        async def fail():
            async with access.charged("clinic", "n", 3):
                with pytest.raises(Problem):
                    await charged("n", 1)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        await charged("n", 1)
        await access.stop()

    asyncio.run(run())


def test_a_command_gives_a_budget_back_that_was_used_up(directory, api_key):
    """Also one that comes while a charge is refused."""

    async def run():
        access = TenantAccess(directory, rate=Rate(1e3, 1000), budget=Budget(1, Period.DAY))
        await access.start()

        async def charged():
            await access.admit([f"Bearer {api_key}"], "/version")
            async with access.charged("clinic", "m", 1):
                pass

        await charged()
        charges = access._charges
        real = charges.run

        async def run_before_a_command(call):
            found = await real(call)
            with State(directory) as state:
                state.set_budget("clinic", "m", Budget(2, Period.DAY))
            await asyncio.sleep(0.6)  # it is seen before the refusal is noted
            return found

        charges.run = run_before_a_command
        with pytest.raises(Problem):
            await charged()
        charges.run = real
        await charged()
        await access.stop()

    asyncio.run(run())


@pytest.mark.parametrize("way", WAYS)
def test_a_copied_process_admits_nobody_and_waits_for_nothing(directory, api_key, way):
    async def admitted():
        await access.admit([f"Bearer {api_key}"], "/version")

    async def refused():
        for call in (
            access._keys.run(lambda _: None),
            access._upkeep.run(State.tenants),
            access.charged("clinic", "m", 1).__aenter__(),
            access.usage_snapshot({}),
        ):
            with pytest.raises(StateError, match="after the fork"):
                await call
        for lane in (access._keys, access._charges, access._upkeep):
            await lane.close()
        access._checked = -math.inf
        with pytest.raises(StateError, match="after the fork"):
            await admitted()

    access = TenantAccess(directory, rate=Rate(9, 9), budget=Budget(9, Period.DAY))
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(access.start())
        loop.run_until_complete(access._counts.run(State.tenants))
        loop.run_until_complete(access.charged("clinic", "m", 1).__aenter__())
        in_copy(way, lambda: asyncio.run(refused()))
        loop.run_until_complete(admitted())
        assert loop.run_until_complete(access.usage_snapshot({}))[0].used == 1
        loop.run_until_complete(access.stop())
    finally:
        loop.close()


class _FailingPool:
    """Stands where the pool is when every worker is lost; the rest of the app is real."""

    ready = True

    def admit(self, tenant):
        pass

    def check(self, model):
        pass

    async def evaluate(self, *_, **__):
        raise WorkerError("lost")


def replace_service(app, **parts):
    for name, part in parts.items():
        object.__setattr__(app.state.services, name, part)


def test_what_was_not_delivered_is_given_back(
    make_app, directory, api_key, artifacts, make_service, problem
):
    app = make_app(query_budget=1)
    replace_service(app, pool=_FailingPool())
    service = make_service(TestClient(app, headers=bearer(api_key)), artifacts)
    query = service.query("digits")
    for _ in range(3):
        problem(service.infer("digits", query.data), 503, "worker-unavailable", retryable=True)
    assert usage_of(service.client)["used"] == 0


def test_concurrent_queries_never_pass_a_budget(
    make_app, directory, api_key, artifacts, make_service
):
    with State(directory) as state:
        state.set_budget("clinic", "digits", Budget(17, Period.DAY))
    with TestClient(make_app(), headers=bearer(api_key)) as client:
        service = make_service(client, artifacts)
        query = service.query("digits")
        with ThreadPoolExecutor(16) as threads:
            statuses = list(
                threads.map(lambda _: service.infer("digits", query.data).status_code, range(60))
            )
        assert statuses.count(200) == 17
        assert statuses.count(429) == 43
        assert usage_of(client)["remaining"] == 0


def test_the_snapshot_is_of_all_tenants(directory, api_key):
    add_tenant(directory, "bank")
    with State(directory) as state:
        for tenant in ("bank", "clinic"):
            state.charge(tenant, "digits", 2, Budget(5, Period.DAY))
    access = TenantAccess(directory, rate=Rate(9, 9), budget=Budget(5, Period.DAY))

    async def run():
        rows = await access.usage_snapshot({})
        await access.stop()
        return rows

    found = [(row.tenant, row.model, row.used, row.remaining) for row in asyncio.run(run())]
    assert found == [("bank", "digits", 2, 3), ("clinic", "digits", 2, 3)]


# --- a state that fails -------------------------------------------------------------------------


def test_no_query_is_answered_when_it_cannot_be_charged(
    make_app, directory, api_key, artifacts, make_service, problem
):
    evaluated = []

    class Counting(_FailingPool):
        async def evaluate(self, *_, **__):
            evaluated.append(1)
            raise WorkerError("lost")

    app = make_app()
    replace_service(app, pool=Counting())
    service = make_service(TestClient(app, headers=bearer(api_key)), artifacts)
    query = service.query("digits")
    state = app.state.services.access._charges._open_state()
    app.state.services.access._charges._state = state
    state._rows("PRAGMA query_only = ON")  # every write fails, as on a disk gone read-only
    problem(
        service.infer("digits", query.data),
        503,
        "state-unavailable",
        sent=query.data,
        retryable=True,
    )
    assert evaluated == []
    state._rows("PRAGMA query_only = OFF")
    problem(service.infer("digits", query.data), 503, "worker-unavailable", retryable=True)
    assert evaluated == [1]


def test_a_damaged_state_opens_nothing(make_app, directory, problem):
    directory.mkdir()
    (directory / STATE_FILE).write_bytes(b"damaged " * 1000)
    app = make_app()
    response = TestClient(app).get("/v1/models", headers=bearer("vh_x"))
    body = problem(response, 503, "state-unavailable", retryable=True)
    assert str(directory) not in str(body)
    with pytest.raises(StateError, match="damaged"), TestClient(app):
        pass


def test_a_lock_does_not_hold_up_the_event_loop(directory, api_key):
    """While a charge waits for the file, the loop goes on."""
    access = TenantAccess(directory, rate=Rate(9, 9), budget=Budget(None, Period.DAY))

    async def run():
        await access.start()
        lock = sqlite3.connect(directory / STATE_FILE, isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")

        async def use():
            async with access.charged("clinic", "m", 1):
                return "charged"

        waiting = asyncio.create_task(use())
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert not waiting.done()
        lock.execute("ROLLBACK")
        lock.close()
        done = await waiting
        await access.stop()
        return done

    assert asyncio.run(run()) == "charged"


@pytest.fixture
def locked(directory, api_key, monkeypatch):
    """A running access of a tenant, and what another process holds its state with."""
    monkeypatch.setattr("veilhead_service.state_lane.BUSY_SECONDS", 2.0)

    def run(work):
        async def drive():
            access = TenantAccess(directory, rate=Rate(99, 99), budget=Budget(None, Period.DAY))
            await access.start()
            lock = sqlite3.connect(directory / STATE_FILE, isolation_level=None)
            lock.execute("BEGIN IMMEDIATE")
            try:
                return await work(access, lock)
            finally:
                lock.close()
                await access.stop()

        return asyncio.run(drive())

    return run


async def use(access):
    async with access.charged("clinic", "m", 1):
        return "charged"


def test_a_lock_costs_nobody_more_than_it_says(locked, api_key):
    """Ten charges wait together, not one after the other; who is not charged does not wait."""

    async def work(access, lock):
        started = time.monotonic()
        charges = [asyncio.create_task(use(access)) for _ in range(10)]
        for _ in range(5):
            await asyncio.sleep(0.06)  # so that the state is looked at again
            assert await access.admit([f"Bearer {api_key}"], "/v1/models") == "clinic"
            assert await access.usage("clinic", {})
            assert await access.usage_snapshot({}) == []
            assert not any(charge.done() for charge in charges)
        outcomes = await asyncio.gather(*charges, return_exceptions=True)
        assert all(isinstance(outcome, StateError) for outcome in outcomes)
        assert time.monotonic() - started < 4 * 2.0
        lock.execute("ROLLBACK")
        return await use(access)

    assert locked(work) == "charged"


def test_what_is_owed_during_a_lock_is_given_back_after_it(locked, directory):
    async def work(access, lock):
        lock.execute("ROLLBACK")

        async def lose():
            async with access.charged("clinic", "m", 3):
                lock.execute("BEGIN IMMEDIATE")
                raise WorkerError("lost")

        with pytest.raises(WorkerError):
            await lose()
        (row,) = (await access.usage("clinic", {}))[1]
        assert row.used == 3
        lock.execute("ROLLBACK")
        for _ in range(100):
            (row,) = (await access.usage("clinic", {}))[1]
            if row.used == 0:
                return True
            await asyncio.sleep(0.05)
        return False

    assert locked(work)


def test_a_long_count_holds_up_no_query(directory, api_key):
    async def run():
        access = TenantAccess(directory, rate=Rate(99, 99), budget=Budget(None, Period.DAY))
        await access.start()
        over = threading.Event()
        count = asyncio.create_task(access._counts.run(lambda _: over.wait(20)))
        await asyncio.sleep(0.3)  # so that the state is looked at again
        await access.admit([f"Bearer {api_key}"], "/v1/models")
        done = await use(access)
        assert not count.done()
        over.set()
        await count
        await access.stop()
        return done

    assert asyncio.run(run()) == "charged"


def test_a_line_feed_after_a_path_opens_nothing(make_app, directory, request_raw):
    """The router's patterns let one pass, the scopes' do not: such a path is no route."""
    written = add_tenant(directory, "narrow", scopes={KeyScope.USAGE})
    app = make_app()
    for path in ("/metrics", "/v1/models", "/v1/models/digits/infer", "/v1/keys/" + "0" * 64):
        for method in ("GET", "POST", "PUT", "HEAD"):
            status, _, body = request_raw(app, method, path + "\n", headers=bearer(written))
            assert status in (403, 404), (method, path)
            assert b"not-found" in body or b"forbidden" in body
            assert request_raw(app, method, path + "\n")[0] == 401


def test_a_slash_too_many_is_no_route_and_no_redirect(make_app, directory, request_raw):
    written = add_tenant(directory, "clinic-two")
    status, found, _ = request_raw(make_app(), "GET", "/v1/usage/", headers=bearer(written))
    assert status == 404
    assert "location" not in found


def test_a_key_that_is_revoked_while_its_body_is_on_its_way_is_refused(
    make_app, api_key, directory, store, artifacts
):
    """A body may take half a minute: what matters is the key when it is here."""
    query = Session(artifacts["digits"].manifest, fresh_keys=True).encrypt(unit_rows(1, 64)[0])

    def body(revoked):
        yield query.data[:1000]
        if revoked:
            with State(directory) as state:
                state.revoke("clinic", None)
            time.sleep(0.5)  # twice as long as a revocation may go unseen
        yield query.data[1000:]

    headers = bearer(api_key) | {"Content-Type": "application/octet-stream"}
    with TestClient(make_app(), headers=headers) as client:
        found = [
            client.post("/v1/models/digits/infer", content=body(revoked)).status_code
            for revoked in (False, True)
        ]
    assert found == [200, 401]

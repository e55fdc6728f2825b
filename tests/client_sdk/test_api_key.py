"""The client's API key: where it comes from, where it goes, and where it is never seen."""

from __future__ import annotations

import logging

import httpx2
import pytest
from support.heads import unit_rows
from support.services import ScriptedService, problem
from support.tenants import add_tenant
from typer.testing import CliRunner

from veilhead import (
    AccessError,
    BatchError,
    BudgetExhaustedError,
    Client,
    InputError,
    NotSentError,
    ServiceResponseError,
)
from veilhead.api_key import API_KEY_VARIABLE, find_api_key, read_api_key_file
from veilhead.cli import app as command
from veilhead.local import InProcessTransport
from veilhead_service.app import create_app
from veilhead_service.limits import Budget, Period
from veilhead_service.model_store import SingleModel
from veilhead_service.settings import Settings
from veilhead_service.state import State
from veilhead_service.tenants import KeyScope

KEY = "vh_0123456789abcdef_" + "S3cret-" * 6 + "x"


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def tenants(head_artifact, state):
    """Clients of a real service that has tenants, behind a scripted transport."""
    clients = []

    def connect(api_key=None, **settings):
        models = SingleModel(head_artifact)
        given = {"access_log": "off"} | settings
        app = create_app(Settings(workers=1, state_directory=state, **given), models=models)
        service = ScriptedService(InProcessTransport(app))
        client = Client("http://127.0.0.1", "model", api_key=api_key, transport=service)
        clients.append(client)
        return client, service

    yield connect
    for client in clients:
        client.close()


def only_error(client, rows=1):
    with pytest.raises(BatchError) as caught:
        client.logits(unit_rows(rows, 32))
    return caught.value.errors[min(caught.value.errors)]


# --- where it comes from ------------------------------------------------------------------------


def test_a_key_opens_the_service(tenants, state):
    client, _ = tenants(add_tenant(state, "clinic"))
    assert client.logits(unit_rows(3, 32)).shape == (3, 5)


def test_the_environment_gives_a_key_and_an_argument_goes_before_it(tenants, state, monkeypatch):
    good = add_tenant(state, "clinic")
    monkeypatch.setenv(API_KEY_VARIABLE, good)
    client, _ = tenants()
    assert client.logits(unit_rows(1, 32)).shape == (1, 5)
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    client, _ = tenants(good)
    assert client.logits(unit_rows(1, 32)).shape == (1, 5)
    with pytest.raises(AccessError):
        tenants()


def test_an_empty_variable_is_no_key(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    assert find_api_key(None) is None
    monkeypatch.delenv(API_KEY_VARIABLE)
    assert find_api_key(None) is None


@pytest.mark.parametrize("bad", ["", "a b", KEY + "\n", KEY + "\r\nX: y", "schlüssel", "x" * 600])
def test_what_no_header_can_carry_is_refused_without_showing_it(bad, monkeypatch):
    with pytest.raises(InputError, match="api_key does not hold an API key") as caught:
        Client("http://127.0.0.1:9", "model", api_key=bad)
    assert not bad or bad not in str(caught.value)
    if bad:
        monkeypatch.setenv(API_KEY_VARIABLE, bad)
        with pytest.raises(InputError, match=API_KEY_VARIABLE):
            Client("http://127.0.0.1:9", "model")


def test_a_file_for_its_owner_alone_gives_a_key(tmp_path):
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    file.chmod(0o600)
    assert read_api_key_file(file) == KEY
    file.chmod(0o400)
    assert read_api_key_file(file) == KEY


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620, 0o601])
def test_a_file_that_others_can_open_is_refused(tmp_path, mode):
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(mode)
    with pytest.raises(InputError, match="chmod 600") as caught:
        read_api_key_file(file)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"two\nlines", b"x" * 5000])
def test_a_file_without_a_key_is_refused(tmp_path, content):
    file = tmp_path / "key"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(InputError, match="does not hold"):
        read_api_key_file(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_api_key_file(tmp_path / "absent")


@pytest.mark.parametrize(
    "arguments",
    [["classify", "text"], ["evaluate", "--file", "x.csv", "--text", "a", "--label", "b"]],
)
def test_the_command_takes_a_file(tmp_path, arguments):
    (tmp_path / "x.csv").write_text("a,b\nx,y\n")
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o644)
    arguments = [str(tmp_path / "x.csv") if item == "x.csv" else item for item in arguments]
    at = ["--url", "http://127.0.0.1:9", "--model", "m", "--api-key-file", str(file)]
    done = CliRunner().invoke(command, [*arguments, *at])
    assert done.exit_code == 1
    assert "chmod 600" in " ".join(done.stderr.split())
    assert KEY not in done.output


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "code"), [(401, "unauthenticated"), (403, "forbidden")])
def test_a_refused_key_is_a_typed_error_and_not_tried_again(tenants, state, quick, status, code):
    client, service = tenants(add_tenant(state, "clinic"))
    service.on("infer", problem(status, code))
    error = only_error(client)
    assert isinstance(error, AccessError)
    assert (error.status, error.problem, error.retryable) == (status, code, False)
    assert "--api-key-file" in str(error)
    assert len(service.seen("infer")) == 1
    assert quick == []


def test_without_a_key_and_without_the_scope(tenants, state):
    with pytest.raises(AccessError, match="unauthenticated"):
        tenants()
    narrow = add_tenant(state, "narrow", scopes={KeyScope.MODELS})
    client, _ = tenants(narrow)  # it may read the manifest
    error = only_error(client)
    assert isinstance(error, AccessError)
    assert error.problem == "forbidden"


def test_a_rate_limit_is_waited_for(tenants, state, quick):
    client, service = tenants(add_tenant(state, "clinic"))
    service.on("infer", problem(429, "rate-limited", **{"Retry-After": "7"}))
    service.on("infer", problem(429, "rate-limited", **{"Retry-After": "30"}))
    assert client.logits(unit_rows(1, 32)).shape == (1, 5)
    assert quick == [7, 30]
    assert len(set(service.seen("infer"))) == 1


def test_a_long_rate_limit_is_raised_at_once(tenants, state, quick):
    client, service = tenants(add_tenant(state, "clinic"))
    service.on("infer", problem(429, "rate-limited", **{"Retry-After": "31"}))
    error = only_error(client)
    assert isinstance(error, ServiceResponseError)
    assert error.problem == "rate-limited"
    assert len(service.seen("infer")) == 1
    assert quick == []


def test_a_real_rate_limit_lets_a_whole_batch_through(tenants, state):
    key = add_tenant(state, "clinic")
    with State(state) as opened:
        opened.set_rate("clinic", 60.0, 4)
    client, _ = tenants(key)
    assert client.logits(unit_rows(12, 32)).shape == (12, 5)


def test_an_exhausted_budget_is_raised_at_once_and_keeps_what_was_answered(tenants, state, quick):
    key = add_tenant(state, "clinic")
    with State(state) as opened:
        opened.set_budget("clinic", "model", Budget(100, Period.MONTH))
    client, service = tenants(key)
    with pytest.raises(BatchError) as caught:
        client.logits(unit_rows(170, 32))
    # A request of several texts is answered, and charged, as a whole.
    assert 0 < sum(row is not None for row in caught.value.results) <= 100
    kinds = {type(error) for error in caught.value.errors.values()}
    assert BudgetExhaustedError in kinds
    assert kinds <= {BudgetExhaustedError, NotSentError}
    exhausted = [e for e in caught.value.errors.values() if isinstance(e, BudgetExhaustedError)]
    assert all(0 < error.retry_after <= 31 * 86400 for error in exhausted)
    assert exhausted[0].status == 429
    assert quick == []
    assert len(service.seen("infer")) == len(client._engine.session.plan(170))


# --- where it is never seen ---------------------------------------------------------------------


class Echo(httpx2.AsyncBaseTransport):
    """A service that repeats the key everywhere it can, and notes what it was sent."""

    def __init__(self):
        self.sent = []

    async def handle_async_request(self, request):
        self.sent.append(request.headers.get("authorization"))
        body = {"type": f"urn:veilhead:problem:{KEY}", "detail": f"your key {KEY} is wrong"}
        return httpx2.Response(401, json=body, headers={"X-Request-Id": KEY})


def test_the_key_goes_into_the_header_and_nowhere_else(caplog):
    caplog.set_level(logging.DEBUG)
    echo = Echo()
    with pytest.raises(AccessError) as caught:
        Client("http://127.0.0.1", "model", api_key=KEY, transport=echo)
    assert echo.sent == [f"Bearer {KEY}"]
    error = caught.value
    shown = f"{error} {error!r} {vars(error)}"
    assert "<API key>" in shown
    assert KEY not in shown
    assert KEY not in caplog.text


def test_no_repr_shows_it(tenants, state, caplog):
    caplog.set_level(logging.DEBUG)
    key = add_tenant(state, "clinic")
    client, _ = tenants(key)
    client.logits(unit_rows(1, 32))
    engine = client._engine
    shown = " ".join(
        [repr(client), repr(engine), repr(engine.transport), repr(engine.transport._headers)]
    )
    assert key not in shown
    assert key.split("_", 2)[2] not in shown
    assert key.split("_", 2)[2] not in caplog.text


def test_without_a_key_no_header_is_sent(monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    echo = Echo()
    with pytest.raises(AccessError):
        Client("http://127.0.0.1", "model", transport=echo)
    assert echo.sent == [None]

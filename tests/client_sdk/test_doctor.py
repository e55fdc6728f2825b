"""`veilhead doctor`: this machine, and services good and bad."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import pytest
from starlette.testclient import TestClient
from support.hostile_servers import ENDLESS, HostileServer, in_time
from support.services import running
from support.tenants import add_tenant
from typer.testing import CliRunner

from veilhead import doctor
from veilhead.cli import app
from veilhead.doctor import examine
from veilhead_protocol.checks import Outcome, healthy, render
from veilhead_service.app import create_app
from veilhead_service.model_store import SingleModel, publish
from veilhead_service.settings import Settings
from veilhead_service.state import State
from veilhead_service.tenants import KeyScope


def outcomes(checks):
    return {check.name: check.outcome for check in checks}


def test_this_machine_passes(monkeypatch, tmp_path):
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path / "cache"))
    checks = examine()
    assert healthy(checks)
    found = outcomes(checks)
    assert {"python", "tenseal", "cache", "backbone", "parameters compact"} <= set(found)
    assert found["encryption standard"] is found["encryption compact"] is Outcome.OK


@pytest.mark.parametrize(
    ("absent", "outcome", "found"),
    [
        ((), Outcome.OK, "torch"),
        (("torch",), Outcome.OK, "onnxruntime"),
        (("torch", "onnxruntime"), Outcome.WARN, "not installed: torch"),
    ],
)
def test_one_runtime_for_the_backbone_is_enough(monkeypatch, absent, outcome, found):
    present = doctor.installed
    monkeypatch.setattr(
        doctor, "installed", lambda package: None if package in absent else present(package)
    )
    (check,) = doctor._check_backbone_packages()
    assert check.outcome is outcome
    assert check.found.startswith(found)


def test_a_cache_that_anybody_may_write_to_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    assert outcomes(examine())["cache"] is Outcome.FAIL


def test_a_real_service_passes(head_artifact, tmp_path):
    publish(head_artifact, tmp_path / "store")
    with running(tmp_path / "store", "--workers", "1") as url:
        arguments = ["doctor", "--url", url, "--model", "model", "--json"]
        result = CliRunner().invoke(app, arguments)
        absent = CliRunner().invoke(app, [*arguments[:-2], "absent"])
    found = {check["name"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == 0
    for name in ("url", "service", "clock", "formats", "model"):
        assert found[name]["outcome"] == "ok"
    assert "loopback" in found["url"]["found"]
    assert "standard" in found["model"]["found"]
    assert absent.exit_code == 1
    assert "404 for absent" in absent.stdout
    assert "-> no such model" in absent.stdout


@pytest.fixture
def guarded(head_artifact, tmp_path):
    """Requests as a doctor makes them to a real service that wants keys: (transport, state)."""
    app = create_app(
        Settings(workers=1, state_directory=tmp_path / "state", access_log="off"),
        models=SingleModel(head_artifact),
    )
    client = TestClient(app)

    def answer(request):
        found = client.request(request.method, request.url.path, headers=dict(request.headers))
        headers = {"Date": format_datetime(datetime.now(UTC), usegmt=True)}
        return httpx2.Response(found.status_code, headers=headers, content=found.content)

    return httpx2.MockTransport(answer), tmp_path / "state"


def key_file(tmp_path, written):
    file = tmp_path / "key"
    file.write_text(written)
    file.chmod(0o600)
    return file


def api_key_check(transport, file=None):
    checks = examine("http://127.0.0.1", "model", api_key_file=file, transport=transport)
    assert "vh_" not in render(checks, as_json=True)
    (check,) = (check for check in checks if check.name == "API key")
    return check, outcomes(checks)


def test_an_api_key_is_sent_and_what_it_may_do_is_said(guarded, tmp_path, monkeypatch):
    transport, state = guarded
    written = add_tenant(state, "clinic")
    check, others = api_key_check(transport, key_file(tmp_path, written))
    assert (check.outcome, check.found) == (Outcome.OK, "accepted, for: models, infer, usage")
    assert others["formats"] is others["model"] is Outcome.OK
    monkeypatch.setenv("VEILHEAD_API_KEY", written)
    assert api_key_check(transport)[0] == check


def test_a_key_that_is_not_enough_is_said(guarded, tmp_path):
    transport, state = guarded
    narrow = add_tenant(state, "narrow", scopes={KeyScope.MODELS})
    assert "none given" in api_key_check(transport)[0].found
    check, _ = api_key_check(transport, key_file(tmp_path, narrow))
    assert (check.outcome, check.found) == (Outcome.FAIL, "accepted, for: models")
    assert "infer" in check.advice
    with State(state) as opened:
        opened.revoke("narrow", None)
    time.sleep(0.3)
    check, others = api_key_check(transport, key_file(tmp_path, narrow))
    assert check.outcome is others["model"] is Outcome.FAIL
    assert "does not accept" in check.found


def test_a_key_file_that_others_may_read_fails(tmp_path):
    file = key_file(tmp_path, add_tenant(tmp_path / "state", "clinic"))
    file.chmod(0o644)
    checks = examine(api_key_file=file)
    assert outcomes(checks)["API key"] is Outcome.FAIL
    shown = CliRunner().invoke(app, ["doctor", "--api-key-file", str(file)])
    assert shown.exit_code == 1
    assert "chmod 600" in shown.stdout
    assert "vh_" not in shown.stdout


def test_plain_http_to_elsewhere_is_not_tried():
    found = outcomes(examine("http://veilhead.example.com"))
    assert found["url"] is Outcome.FAIL
    assert "service" not in found


def test_nobody_there_fails():
    found = outcomes(examine("http://127.0.0.1:9", "model"))
    assert found["service"] is Outcome.FAIL


@pytest.mark.parametrize("behaviour", ENDLESS)
def test_a_service_that_never_ends_its_answer_fails(monkeypatch, behaviour):
    monkeypatch.setattr(doctor, "_TIMEOUT_SECONDS", 0.2)
    with HostileServer(manifest=ENDLESS[behaviour]) as server:
        found = outcomes(in_time(lambda: examine(server.url, "model")))
    assert found["service"] is Outcome.FAIL


def test_an_endless_body_is_not_kept():
    def flood(visit):
        visit.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
        while not visit.wait(0):
            visit.send(bytes(2**20))

    with HostileServer(manifest=flood) as server:
        found = outcomes(in_time(lambda: examine(server.url, "model")))
    assert found["formats"] is Outcome.WARN
    assert found["model"] is Outcome.FAIL


def test_a_model_needs_a_url():
    assert outcomes(examine(None, "model"))["model"] is Outcome.FAIL


GOOD = {"wire_format": 1, "manifest_format": "veilhead-manifest/1"}


def service(*, ready=200, versions=None, date=None, model=None):
    """Answers that a test writes down."""

    def answer(request):
        headers = {} if date is None else {"Date": date}
        if request.url.path == "/readyz":
            return httpx2.Response(ready, headers=headers, json={})
        if request.url.path == "/version":
            return httpx2.Response(200, json=GOOD if versions is None else versions)
        return model if model is not None else httpx2.Response(404)

    return httpx2.MockTransport(answer)


@pytest.mark.parametrize(
    ("answers", "name", "outcome"),
    [
        ({"ready": 503}, "service", Outcome.FAIL),
        ({}, "clock", Outcome.WARN),
        ({"date": "nonsense"}, "clock", Outcome.WARN),
        ({"versions": GOOD | {"wire_format": 2}}, "formats", Outcome.FAIL),
        ({"versions": {}}, "formats", Outcome.FAIL),
        ({"versions": [1]}, "formats", Outcome.WARN),
        ({"model": httpx2.Response(401)}, "model", Outcome.FAIL),
        ({"model": httpx2.Response(410)}, "model", Outcome.FAIL),
        ({"model": httpx2.Response(200, content=b"{}")}, "model", Outcome.FAIL),
        ({"model": httpx2.Response(200, content=b"x" * 2**25)}, "model", Outcome.FAIL),
    ],
)
def test_what_is_wrong_with_a_service_is_named(answers, name, outcome):
    checks = examine("https://veilhead.example.com", "model", transport=service(**answers))
    (check,) = (check for check in checks if check.name == name)
    assert check.outcome is outcome
    assert check.advice


@pytest.mark.parametrize(("seconds", "outcome"), [(5, Outcome.OK), (3600, Outcome.WARN)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_clocks_are_compared(seconds, outcome, sign):
    date = format_datetime(datetime.now(UTC) + sign * timedelta(seconds=seconds), usegmt=True)
    checks = examine("https://veilhead.example.com", transport=service(date=date))
    assert outcomes(checks)["clock"] is outcome

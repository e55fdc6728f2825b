"""`veilhead-server doctor`: each check, and the command."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import threading
import time
from datetime import UTC, datetime

import pytest
import uvicorn
from support.heads import artifact
from support.tenants import add_tenant
from typer.testing import CliRunner

from veilhead_protocol.checks import Check, Outcome, check_packages, healthy, render
from veilhead_service import doctor
from veilhead_service.cli import app
from veilhead_service.head_encryption import HeadKey
from veilhead_service.settings import Settings
from veilhead_service.state_file import STATE_FILE


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_good_machine_passes(store, tmp_path):
    where = ["--set", f"port={free_port()}", "--set", f"state_directory={tmp_path / 'state'}"]
    result = run("--store", store, *where, "--set", "workers=1", "--json")
    checks = {item["name"]: item for item in json.loads(result.stdout)}
    assert result.exit_code == 0, result.stdout
    assert {item["outcome"] for item in checks.values()} <= {"ok", "warn"}
    assert "model digits" in checks
    assert checks["parameters standard"]["outcome"] == "ok"
    assert "MiB" in checks["memory"]["found"]
    assert {"python", "tenseal", "swap", "core dumps", "clock", "port"} <= set(checks)
    assert not (tmp_path / "state").exists()  # nothing is changed


def test_a_failure_is_told_with_advice_and_exit_status_one(tmp_path):
    result = run("--store", tmp_path / "absent")
    assert result.exit_code == 1
    assert "fail  store" in result.stdout
    assert "-> `veilhead-server publish" in result.stdout


def test_bad_settings_are_a_failed_check(tmp_path):
    result = run("--set", "nonsense=1")
    assert result.exit_code == 1
    assert "there is no setting 'nonsense'" in result.stdout


@pytest.fixture
def copy(store, tmp_path):
    return shutil.copytree(store, tmp_path / "store")


def outcomes(checks):
    return {check.name: check.outcome for check in checks}


def test_a_head_that_others_can_read_fails(copy):
    assert healthy(doctor.check_store(Settings(store=copy)))
    head = next(copy.glob("*/*/head*"))
    head.chmod(0o640)
    failed = [
        check for check in doctor.check_store(Settings(store=copy)) if check.outcome is Outcome.FAIL
    ]
    assert [check.name for check in failed] == ["private head"]
    assert f"chmod 600 {head}" in failed[0].advice


def test_a_store_that_anybody_may_write_to_fails(copy):
    copy.chmod(0o777)
    assert outcomes(doctor.check_store(Settings(store=copy)))["store directory"] is Outcome.FAIL


def test_a_damaged_model_fails_and_an_empty_store_warns(copy, tmp_path):
    (copy / "digits" / "current").write_text("nonsense")
    assert not healthy(doctor.check_store(Settings(store=copy)))
    (tmp_path / "empty").mkdir()
    assert (
        outcomes(doctor.check_store(Settings(store=tmp_path / "empty")))["models"] is Outcome.WARN
    )


def test_the_state_directory_is_the_services_alone(tmp_path):
    directory = tmp_path / "state"
    (check,) = doctor.check_state(directory)
    assert check.outcome is Outcome.OK
    directory.mkdir(mode=0o755)
    assert doctor.check_state(directory)[0].outcome is Outcome.FAIL
    directory.chmod(0o700)
    assert doctor.check_state(directory)[0].outcome is Outcome.OK
    (tmp_path / "file").touch()
    assert doctor.check_state(tmp_path / "file")[0].outcome is Outcome.FAIL


def test_whether_anybody_may_ask_is_said(tmp_path):
    settings = Settings(state_directory=tmp_path / "state")
    assert "none yet" in doctor.check_tenants(settings).found
    assert not (tmp_path / "state").exists()
    add_tenant(tmp_path / "state", "clinic")
    before = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    assert doctor.check_tenants(settings).outcome is Outcome.OK
    assert (
        before.items() <= {p.name: p.read_bytes() for p in (tmp_path / "state").iterdir()}.items()
    )
    (tmp_path / "state" / STATE_FILE).write_bytes(b"damaged " * 1000)
    assert doctor.check_tenants(settings).outcome is Outcome.FAIL
    open_to_all = Settings(insecure_no_tenants=True)
    assert doctor.check_tenants(open_to_all).outcome is Outcome.WARN


def test_encrypted_heads_need_a_head_key_that_is_private(vendor, tmp_path):
    key = HeadKey.create(tmp_path / "head.key")
    vendor.publish(artifact(2, 8), head_key=key)
    assert not healthy(doctor.check_store(Settings(store=vendor.store)))
    given = Settings(store=vendor.store, head_key_file=tmp_path / "head.key")
    found = outcomes(doctor.check_store(given))
    assert found["head key"] is found["model model"] is Outcome.OK
    (tmp_path / "head.key").chmod(0o640)
    (failed,) = (check for check in doctor.check_store(given) if not healthy([check]))
    assert failed.name == "head key"
    assert "chmod 600" in failed.found


def test_a_service_that_runs_is_reached(service, tmp_path):
    """The port is taken by the very service that is asked about."""
    config = uvicorn.Config(service.client.app, port=0, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        check = doctor.check_port("127.0.0.1", port)
        assert (check.outcome, "ready" in check.found) == (Outcome.OK, True)
    finally:
        server.should_exit = True
        thread.join()


def test_a_port_in_use_fails():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert doctor.check_port("127.0.0.1", port).outcome is Outcome.FAIL
    assert doctor.check_port("127.0.0.1", port).outcome is Outcome.OK


def test_core_dumps_warn():
    before = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, before[1]))
        assert doctor.check_core_dumps().outcome is Outcome.OK
        if before[1] != 0:
            resource.setrlimit(resource.RLIMIT_CORE, (4096, before[1]))
            assert doctor.check_core_dumps().outcome is Outcome.WARN
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)


def test_swap_warns(tmp_path):
    table = tmp_path / "swaps"
    head = "Filename\tType\tSize\tUsed\tPriority\n"
    table.write_text(head)
    assert doctor.check_swap(table).outcome is Outcome.OK
    table.write_text(head + "/dev/sda2 partition 1048572 0 -2\n")
    assert doctor.check_swap(table).outcome is Outcome.WARN
    assert doctor.check_swap(tmp_path / "absent").outcome is Outcome.WARN


def test_workers_must_fit_into_memory():
    each = doctor.worker_bytes()
    assert 20 * 2**20 < each < 500 * 2**20
    for times, outcome in ((10, Outcome.OK), (2.2, Outcome.WARN), (1, Outcome.FAIL)):
        assert doctor.check_memory(2, 0, int(each * times)).outcome is outcome
    assert doctor.check_memory(2, 0, None).outcome is Outcome.WARN


def test_a_clock_from_before_this_version_fails():
    assert doctor.check_clock(datetime(1970, 1, 1, tzinfo=UTC)).outcome is Outcome.FAIL
    assert doctor.check_clock(datetime.now(UTC)).outcome is Outcome.OK


def test_a_missing_package_says_what_brings_it():
    (check,) = check_packages(["no-such-package"], "veilhead[service]")
    assert check.outcome is Outcome.FAIL
    assert "veilhead[service]" in check.advice


def test_only_failures_fail():
    checks = [Check("a", Outcome.OK, "fine"), Check("b", Outcome.WARN, "hm", "do it")]
    assert healthy(checks)
    assert not healthy([*checks, Check("c", Outcome.FAIL, "bad")])
    assert render(checks, as_json=False).splitlines()[1:] == ["warn  b  hm", "         -> do it"]


@pytest.mark.parametrize(
    ("hard", "set_", "outcome"),
    [
        (20_000, {}, Outcome.OK),
        (600, {}, Outcome.WARN),
        (600, {"max_connections": 100}, Outcome.OK),
        (20_000, {"max_connections": 20_000}, Outcome.FAIL),
        (256, {}, Outcome.FAIL),
    ],
)
def test_the_limit_of_open_files_is_compared_with_connections(monkeypatch, hard, set_, outcome):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, hard))
    found = doctor.check_descriptors(Settings(workers=2, **set_))
    assert found.outcome is outcome
    assert str(hard) in found.found


def test_a_disk_that_holds_little_more_than_the_reserve_is_told(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    where = {"state_directory": tmp_path / "absent" / "state"}
    for reserve, outcome in ((0, Outcome.OK), (free, Outcome.WARN)):
        found = doctor.check_disk(Settings(disk_reserve_bytes=reserve, **where))
        assert found.outcome is outcome

"""The access log: what it holds, what its chain notices, and what happens when a disk is full."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from support.copies import WAYS, in_copy
from typer.testing import CliRunner

from veilhead_protocol.errors import AccessLogError
from veilhead_service import access_log
from veilhead_service.access_log import AccessLog, shortened
from veilhead_service.access_log_chain import GENESIS, files_of, verify
from veilhead_service.app import create_app
from veilhead_service.cli import app as command
from veilhead_service.settings import Settings


def opened(path, **options):
    log = AccessLog(path, **({"sync_seconds": 0, "file_bytes": 2**20} | options))
    log.start()
    return log


def written(path, count=5, **options):
    """A log of so many records, closed."""
    log = opened(path, **options)
    for number in range(count):
        log.append(status=200, number=number).result(10)
    log.stop()
    return path


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "access.log"


def test_a_log_is_a_chain_of_hashes_as_documented(path):
    """Verified here by another program than the product's."""
    written(path)
    previous = "0" * 64
    for sequence, record in enumerate(lines(path), 1):
        digest = record.pop("hash")
        canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        assert hashlib.sha256(canonical).hexdigest() == digest
        assert (record["previous"], record["sequence"]) == (previous, sequence)
        previous = digest
    found = verify(path, anchor=previous)
    assert (found.records, found.head, found.notes) == (5, previous, ())


def test_files_are_for_their_owner_alone(path):
    written(path)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def edited(data):
    return data.replace(b'"number":2', b'"number":7')


def forged(data):
    """A line whose own hash is right, but not that of the next line's `previous`."""
    rows = data.splitlines()
    record = json.loads(rows[2])
    del record["hash"]
    record["number"] = 7
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    record["hash"] = hashlib.sha256(canonical).hexdigest()
    rows[2] = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    return b"\n".join(rows) + b"\n"


def renumbered(data):
    """A chain whose hashes all fit, with a number left out."""
    rows, previous = [], "0" * 64
    for row in data.splitlines():
        record = json.loads(row)
        del record["hash"]
        record["previous"] = previous
        record["sequence"] += record["sequence"] > 2
        canonical = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        previous = record["hash"] = hashlib.sha256(canonical).hexdigest()
        rows.append(json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return b"".join(rows)


def rearranged(order):
    def change(data):
        rows = data.splitlines()
        return b"".join(rows[index] + b"\n" for index in order)

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (edited, 3),
        (forged, 4),
        (renumbered, 3),
        (rearranged([0, 1, 3, 4]), 3),
        (rearranged([1, 2, 3, 4]), 1),
        (rearranged([0, 2, 1, 3, 4]), 2),
        (rearranged([0, 1, 1, 2, 3, 4]), 3),
        (lambda data: data.replace(b'"number":2', b'"number": 2'), 3),
        (lambda data: data + b"{}\n", 6),
        (lambda data: data.replace(b"}\n", b"}\nnoise\n", 1), 2),
    ],
    ids=[
        "edit",
        "forge",
        "renumber",
        "remove",
        "behead",
        "swap",
        "repeat",
        "spaces",
        "append",
        "insert",
    ],
)
def test_what_was_tampered_with_is_found_and_its_line_named(path, change, line):
    written(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(AccessLogError, match=rf"access\.log line {line} "):
        verify(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_byte_is_found(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "shared" / "access.log"
    if not path.exists():
        written(path)
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 2))  # the last line break: see the torn tail
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[at]))
    other = path.with_name("changed") / "access.log"
    other.parent.mkdir(exist_ok=True)
    other.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
    with pytest.raises(AccessLogError):
        verify(other)


def test_a_missing_end_is_noticed_with_an_anchor_only(path):
    head = verify(written(path)).head
    path.write_bytes(rearranged([0, 1, 2])(path.read_bytes()))
    assert verify(path).records == 3
    with pytest.raises(AccessLogError, match="cut off"):
        verify(path, anchor=head)


def test_an_anchor_stays_good_while_the_log_grows(path):
    head = verify(written(path)).head
    assert verify(written(path), anchor=head).records == 10


def test_a_restart_continues_the_chain(path):
    written(path, 3)
    assert verify(written(path, 2)).records == 5


def test_a_torn_line_is_kept_and_marked(path):
    written(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert "unfinished" in verify(path).notes[0]
    written(path, 2)
    assert path.read_bytes().startswith(whole[:-20] + b"\n")
    rows = path.read_bytes().splitlines()
    marker = json.loads(rows[3])
    assert marker["event"] == "recovered"
    assert marker["torn_sha256"] == hashlib.sha256(rows[2]).hexdigest()
    found = verify(path)
    assert found.records == 2 + 1 + 2
    assert "torn by a crash" in found.notes[0]
    path.write_bytes(b"\n".join([*rows[:2], *rows[3:]]) + b"\n")
    with pytest.raises(AccessLogError, match=r"torn line before .* was removed"):
        verify(path)
    path.write_bytes(b"\n".join([*rows[:2], b"{}", *rows[3:]]) + b"\n")
    with pytest.raises(AccessLogError, match="line 3 is not a record"):
        verify(path)


def test_a_damaged_end_is_not_continued(path):
    written(path)
    path.write_bytes(path.read_bytes().replace(b'"number":4', b'"number":5'))
    with pytest.raises(AccessLogError, match=r"last record .* is damaged"):
        opened(path)


def test_the_chain_goes_on_across_files(path):
    written(path, 40, file_bytes=4096)
    written(path, 40, file_bytes=4096)
    files = files_of(path)
    assert len(files) > 3
    assert all(file.stat().st_size < 4096 + 1000 for file in files)
    head = verify(path).head
    assert verify(path, anchor=head).records == 80 + len(files) - 1
    assert [lines(file)[0].get("reason") for file in files] == [None, *["full"] * (len(files) - 1)]
    last = lines(files[0])[-1]["hash"]
    files[0].unlink()
    with pytest.raises(AccessLogError, match=r"line 1 does not follow.*forerunners"):
        verify(path)
    assert verify(path, anchor=head, after=last).records < 80
    with pytest.raises(AccessLogError, match="forerunners"):
        verify(files[2], *files[3:])


def test_two_processes_do_not_share_a_log(path):
    log = opened(path)
    with pytest.raises(AccessLogError, match="another process"):
        opened(path)
    log.stop()
    written(path)


def test_interval_syncing_writes_all_the_same(path):
    written(path, 5, sync_seconds=0.01)
    assert verify(path).records == 5


# --- other programs that rotate it ----------------------------------------------------------------


def rename(path, name="access.log.1"):
    path.rename(path.with_name(name))


def copy_and_truncate(path, name="access.log.1"):
    path.with_name(name).write_bytes(path.read_bytes())
    os.truncate(path, 0)


def replace_by_another(path, name="access.log.1"):
    rename(path, name)
    path.write_text("somebody else's line without an end")


@pytest.mark.parametrize("rotate", [rename, copy_and_truncate])
def test_the_chain_goes_on_when_another_program_rotates(path, rotate):
    log = opened(path)
    for number in range(9):
        if number in (3, 6):
            rotate(path, f"access.log.{number}")
        log.append(number=number).result(10)
    log.stop()
    files = [path.with_name("access.log.3"), path.with_name("access.log.6"), path]
    assert [len(lines(file)) for file in files] == [3, 4, 4]
    assert lines(path)[0]["previous"] == lines(files[1])[-1]["hash"]
    found = verify(*files)
    assert (found.records, len(found.notes)) == (11, 2)
    with pytest.raises(AccessLogError, match="forerunners"):
        verify(path)
    with pytest.raises(AccessLogError, match="does not follow"):
        verify(files[0], path)
    assert verify(path, after=lines(files[1])[-1]["hash"]).records == 4


@pytest.mark.parametrize("rotate", [rename, copy_and_truncate])
def test_the_chain_goes_on_when_it_was_rotated_while_nobody_wrote(path, rotate):
    written(path, 3)
    rotate(path)
    written(path, 2)
    first, *_ = lines(path)
    assert (first["event"], first["reason"], first["sequence"]) == ("continued", "moved", 4)
    assert verify(path.with_name("access.log.1"), path).records == 6


def test_a_log_that_was_replaced_is_broken_and_no_record_is_lost(path):
    log = opened(path)
    log.append(number=0).result(10)
    replace_by_another(path)
    log.append(number=1).result(10)
    log.stop()
    rows = path.read_bytes().splitlines()
    assert [json.loads(row)["event"] for row in rows[1:]] == ["continued", "request"]
    with pytest.raises(AccessLogError, match="line 1 is not a record"):
        verify(path.with_name("access.log.1"), path)


def test_a_log_that_is_cut_while_the_disk_is_full_holds_no_zeros(path, monkeypatch):
    log = opened(path)
    log.append(number=0).result(10)
    undo = full_disk(monkeypatch)
    with pytest.raises(AccessLogError):
        log.append(number=1).result(10)
    copy_and_truncate(path)
    undo()
    until(lambda: log.available)
    log.append(number=2).result(10)
    log.stop()
    assert b"\0" not in path.read_bytes()
    assert [row["event"] for row in lines(path)] == ["continued", "interrupted", "request"]


def test_an_empty_log_is_whole_only_for_who_expects_that(path):
    written(path, 0)
    with pytest.raises(AccessLogError, match="there is no record"):
        verify(path)
    assert verify(path, anchor=GENESIS).records == 0
    written(path)
    path.write_bytes(b"")
    with pytest.raises(AccessLogError, match="there is no record"):
        verify(path)


def test_a_restarted_chain_is_broken(path):
    """Somebody removed the log; the service began anew, as if there had been none."""
    head = verify(written(path)).head
    old = path.read_bytes()
    path.unlink()
    written(path)
    with pytest.raises(AccessLogError, match="written anew"):
        verify(path, anchor=head)
    path.with_name("first").write_bytes(old)
    with pytest.raises(AccessLogError, match="does not follow"):
        verify(path.with_name("first"), path)


# --- the real app ---------------------------------------------------------------------------------


def served(store, state, mode, **more):
    return create_app(
        Settings(
            store=store,
            workers=1,
            state_directory=state,
            access_log=mode,
            insecure_no_tenants=True,
            **more,
        )
    )


def test_requests_are_recorded_without_anything_that_a_client_chose(
    store, artifacts, make_service, tmp_path
):
    with TestClient(served(store, tmp_path, "on")) as client:
        service = make_service(client, artifacts)
        query = service.query("digits")
        reply = service.infer("digits", query.data)
        client.get("/zqxjkmarker?zqxjkmarker", headers={"X-Note": "zqxjkmarker"})
        client.post("/v1/models/zqxjkmarker/infer", content=b"zqxjkmarker")
        client.get("/livez")
    records = lines(tmp_path / "access.log")
    put, infer, nowhere, unknown = records  # and none for /livez
    assert infer["request_id"] == reply.headers["x-request-id"]
    assert infer["route"] == "/v1/models/{name}/infer"
    assert infer["model_digest"] == artifacts["digits"].manifest.digest.hex()
    assert infer["key"] == put["key"] == shortened(query.key.id)
    assert (infer["request_bytes"], infer["reply_bytes"]) == (len(query.data), len(reply.content))
    assert (infer["status"], infer["tenant"], infer["problem"]) == (200, "insecure-local", None)
    assert (nowhere["route"], nowhere["status"], nowhere["problem"]) == ("other", 404, "not-found")
    assert (unknown["model"], unknown["problem"]) == ("other", "model-not-found")
    text = (tmp_path / "access.log").read_text()
    assert "zqxjkmarker" not in text
    assert query.key.id.hex() not in text
    assert verify(tmp_path / "access.log").records == 4


def full_disk(monkeypatch):
    """From now on, half of each line is written, then the disk is full; until undone."""
    real = os.write

    def write(descriptor, data):
        if b'"previous"' in bytes(data):
            real(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    patch = monkeypatch.context()
    inner = patch.__enter__()
    inner.setattr(os, "write", write)
    return lambda: patch.__exit__(None, None, None)


def until(condition):
    for _ in range(100):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it never happened")


def test_when_records_are_required_nothing_is_answered_without_one(
    store, tmp_path, monkeypatch, problem
):
    app = served(store, tmp_path, "required", access_log_sync_seconds=0)
    asked = []

    @app.get("/asked")
    def ask():
        asked.append(1)

    with TestClient(app) as client:
        assert client.get("/v1/models").status_code == 200
        undo = full_disk(monkeypatch)
        for _ in range(3):
            problem(client.get("/asked"), 503, "access-log-unavailable", retryable=True)
        assert len(asked) == 1  # the first one found out, the others were refused unread
        assert client.get("/livez").status_code == 200
        undo()
        until(lambda: client.get("/v1/models").status_code == 200)
    found = verify(tmp_path / "access.log")
    assert any("not recorded" in note for note in found.notes)
    statuses = [row.get("status") for row in lines(tmp_path / "access.log") if "status" in row]
    assert statuses == [200, 200]


def test_when_records_are_not_required_the_gap_is_recorded(store, tmp_path, monkeypatch):
    app = served(store, tmp_path, "on", access_log_sync_seconds=0)
    with TestClient(app) as client:
        undo = full_disk(monkeypatch)
        for _ in range(3):
            assert client.get("/v1/models").status_code == 200
        until(lambda: "veilhead_access_log_available 0.0" in client.get("/metrics").text)
        undo()
        until(lambda: "veilhead_access_log_available 1.0" in client.get("/metrics").text)
        assert "veilhead_access_log_unrecorded_total 3.0" in client.get("/metrics").text
    rows = lines(tmp_path / "access.log")
    assert sum(row["unrecorded"] for row in rows if row["event"] == "interrupted") == 3
    assert verify(tmp_path / "access.log").records == len(rows)


def test_without_tenants_there_is_no_log_unless_it_is_asked_for(store, tmp_path):
    with TestClient(served(store, tmp_path / "state", "auto")) as client:
        client.get("/v1/models")
    assert not (tmp_path / "state").exists()


# --- the command ----------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(command, ["access-log", "verify", *map(str, arguments)])


def test_the_command_verifies(path: Path):
    written(path)
    result = run(path)
    assert result.exit_code == 0
    head = verify(path).head
    assert f"whole: 5 records, head {head}" in result.stdout
    assert "cannot be told" in result.stdout
    assert "cannot be told" not in run(path, "--head", head).stdout
    path.write_bytes(edited(path.read_bytes()))
    result = run(path)
    assert result.exit_code == 1
    assert "BROKEN: access.log line 3" in result.stderr
    assert run(path.with_name("absent")).exit_code == 1


def test_a_failure_that_nobody_expected_does_not_end_the_writer(path, monkeypatch, caplog):
    """Who waits is told, and the next record is written."""
    log = opened(path)
    with monkeypatch.context() as fault:
        fault.setattr(access_log, "sealed", lambda _: 1 / 0)
        with pytest.raises(AccessLogError):
            log.append(status=200).result(10)
    log.append(status=200).result(10)
    log.stop()
    assert "the access log failed: ZeroDivisionError" in caplog.text
    assert [record["event"] for record in lines(path)] == ["interrupted", "request"]
    assert verify(path).records == 2


def test_a_log_leaves_a_reserve_of_its_disk_free(path, monkeypatch):
    """The state is on the same disk: a log that fills it ends every answer."""
    log = opened(path, reserve_bytes=2**30)
    log.append(status=200).result(10)
    real = os.fstatvfs
    disk = {"f_bavail": 2**18 - 1}  # blocks of 4 KiB: a byte less than the reserve

    class Disk:
        f_frsize, f_blocks = 4096, 2**30
        f_bavail = property(lambda _: disk["f_bavail"])

    monkeypatch.setattr(os, "fstatvfs", lambda _: Disk())
    with pytest.raises(AccessLogError):
        log.append(status=201).result(10)
    assert not log.available
    disk["f_bavail"] = 2**18
    deadline = time.monotonic() + 20
    while not log.available:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    log.append(status=202).result(10)
    monkeypatch.setattr(os, "fstatvfs", real)
    log.stop()
    found = [
        (record["event"], record.get("status", record.get("unrecorded"))) for record in lines(path)
    ]
    assert found == [("request", 200), ("interrupted", 1), ("request", 202)]
    verify(path)


@pytest.mark.parametrize("way", WAYS)
def test_a_copied_process_writes_no_record(path, way):
    """The thread that writes is not there: nobody waits for it, and the file stays whole."""
    log = opened(path)
    log.append(status=200).result(10)

    def work():
        with pytest.raises(AccessLogError, match="after the fork"):
            log.append(status=201).result(10)
        log.stop()
        return os.fstat(log._file).st_size  # open still

    assert in_copy(way, work) == path.stat().st_size
    log.append(status=202).result(10)
    log.stop()
    assert [record["status"] for record in lines(path)] == [200, 202]
    verify(path)

"""`veilhead classify --out`: a file of answers, which a killed run leaves fit to be continued."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from rich.console import Console
from support.hostile_servers import HostileServer, in_time, silence
from typer.testing import CliRunner

from veilhead.cli import app
from veilhead.tables import TableFile
from veilhead.transport import Transport
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import Backbone, describe
from veilhead_protocol.errors import ClientError, InputError, TransportError

NOISE = 2e-3


@pytest.fixture
def notes(tmp_path, texts, text_artifact, tiny_directory):
    """A CSV file of 3,000 rows, none of which is near to the border between two labels."""
    backbone = Backbone.load(tiny_directory, describe(tiny_directory), device="cpu")
    logits = np.sort(HeadArtifact.load(text_artifact).logits(backbone.embed(texts)))
    clear = [text for text, row in zip(texts, logits, strict=True) if row[-1] - row[-2] > 0.05]
    assert len(clear) > 50
    with (tmp_path / "notes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "note"])
        writer.writerows((number, clear[number % len(clear)]) for number in range(3000))
    return tmp_path / "notes.csv"


@pytest.fixture
def few(notes):
    """The first forty rows of it."""
    lines = notes.read_text().splitlines(keepends=True)
    notes.write_text("".join(lines[:41]))
    return notes


@pytest.fixture
def arguments(served, text_artifact):
    backbone = str(text_artifact / "backbone")
    at = ["classify", "--url", served, "--model", "colours", "--backbone", backbone]
    return [*at, "--device", "cpu", "--column", "note"]


@pytest.fixture
def run(arguments):
    def invoke(*more):
        return CliRunner().invoke(app, [*arguments, *map(str, more)])

    return invoke


def answers(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(len(rows)))
    return rows


def same(path, other):
    """Whether two files of answers are the same, up to the noise of the encryption."""
    found, expected = answers(path), answers(other)
    labels = [
        [[item["label"] for item in row["predictions"]] for row in rows]
        for rows in (found, expected)
    ]
    scores = [
        [[item["score"] for item in row["predictions"]] for row in rows]
        for rows in (found, expected)
    ]
    return labels[0] == labels[1] and np.allclose(*scores, rtol=0, atol=NOISE)


def test_a_killed_run_that_is_continued_gives_the_same_file(run, arguments, notes, tmp_path):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    program = [sys.executable, "-c", "from veilhead.cli import app; app()", *arguments]
    process = subprocess.Popen([*program, "--file", notes, "--out", out])
    try:
        deadline = time.monotonic() + 60
        while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = out.read_bytes()
    assert 0 < left.count(b"\n") < 3000
    with out.open("ab") as file:
        file.write(b'{"row": ')  # what a kill in the middle of a write leaves
    assert run("--file", notes, "--out", out).exit_code == 0
    assert out.read_bytes().startswith(left[: left.rindex(b"\n") + 1])
    assert run("--file", notes, "--out", whole).exit_code == 0
    assert len(answers(out)) == 3000
    assert same(out, whole)


def test_a_finished_run_is_left_as_it_is(run, few, tmp_path):
    out = tmp_path / "out.jsonl"
    assert run("--file", few, "--out", out).exit_code == 0
    before = out.read_bytes()
    assert run("--file", few, "--out", out).exit_code == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 1, 25, 60, 400])
def test_csv_is_continued_from_any_byte(run, few, tmp_path, kept):
    out, whole = tmp_path / "out.csv", tmp_path / "whole.csv"
    assert run("--file", few, "--out", whole, "--top-k", 2).exit_code == 0
    assert run("--file", few, "--out", out, "--top-k", 2).exit_code == 0
    out.write_bytes(out.read_bytes()[:kept])
    assert run("--file", few, "--out", out, "--top-k", 2).exit_code == 0
    with out.open(newline="") as found, whole.open(newline="") as expected:
        rows = list(zip(csv.DictReader(found), csv.DictReader(expected), strict=True))
    assert [row["row"] for row, _ in rows] == [str(number) for number in range(40)]
    assert list(rows[0][0]) == ["row", "label", "score", "label_2", "score_2", "error"]
    for row, other in rows:
        assert row["label"] == other["label"]
        assert float(row["score"]) == pytest.approx(float(other["score"]), abs=NOISE)


def test_beside_it_are_digests_and_options_only(run, few, tmp_path, texts):
    out = tmp_path / "out.jsonl"
    run("--file", few, "--out", out)
    beside = json.loads((tmp_path / "out.jsonl.run.json").read_text())
    assert beside.keys() == {
        "format", "model", "digest", "input", "column", "top_k", "function_to_apply",
        "deidentify",
    }  # fmt: skip
    assert not any(text in json.dumps(beside) for text in texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda few, out: ["--top-k", 3], "another top_k"),
        (lambda few, out: ["--function-to-apply", "none"], "another function_to_apply"),
        (lambda few, out: ["--deidentify"], "another deidentify"),
        (lambda few, out: few.write_text(few.read_text() + "40,pain\n"), "another input"),
        (lambda few, out: out.write_text("mine\n"), "did not write"),
        (lambda few, out: out.write_text('{"row": 1}\n{"row": 2}\n'), "did not write"),
        (lambda few, out: out.with_name("out.jsonl.run.json").unlink(), "no out.jsonl.run.json"),
        (lambda few, out: out.with_name("out.jsonl.run.json").write_text("["), "no out.jsonl"),
    ],
)
def test_another_run_is_not_continued(run, few, tmp_path, change, message):
    out = tmp_path / "out.jsonl"
    run("--file", few, "--out", out)
    more = change(few, out)
    before = out.read_bytes()
    result = run("--file", few, "--out", out, *(more if isinstance(more, list) else []))
    assert result.exit_code == 1
    assert message in result.stderr
    assert out.read_bytes() == before


def test_another_version_of_the_model_is_not_continued(run, few, tmp_path):
    out, beside = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run.json"
    run("--file", few, "--out", out)
    found = json.loads(beside.read_text())
    beside.write_text(json.dumps(found | {"digest": "0" * 64}))
    result = run("--file", few, "--out", out)
    assert result.exit_code == 1
    assert "another digest" in result.stderr


def test_two_processes_do_not_write_one_file(run, few, tmp_path):
    out = tmp_path / "out.jsonl"
    with out.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run("--file", few, "--out", out)
    assert result.exit_code == 1
    assert "another process" in result.stderr


def test_a_row_that_fails_has_its_error_and_the_status_says_so(run, tmp_path):
    rows = ['{"note": "pain"}', '{"note": 7}', "zanzibar", '{"note": "fever"}']
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    for name in ("out.jsonl", "out.csv"):
        result = run("--file", tmp_path / "bad.jsonl", "--out", tmp_path / name)
        assert result.exit_code == 1
        assert "2 of 4 rows failed" in result.stderr
        again = run("--file", tmp_path / "bad.jsonl", "--out", tmp_path / name)
        assert (again.exit_code, again.stderr) == (1, result.stderr)
        assert "zanzibar" not in (tmp_path / name).read_text()
    found = answers(tmp_path / "out.jsonl")
    assert ["error" in row for row in found] == [False, True, True, False]
    assert found[1]["error"] == {
        "code": "input", "message": "row 1: expected a string, got int"
    }  # fmt: skip


@pytest.mark.parametrize("to_file", [True, False])
def test_a_service_that_goes_away_stops_the_run_and_not_its_rows(
    run, notes, tmp_path, monkeypatch, to_file
):
    out = tmp_path / "out.jsonl"
    infer, asked = Transport.infer, []

    async def fails_later(self, *arguments, **options):
        asked.append(1)
        if len(asked) > 3:
            raise TransportError("no answer")
        return await infer(self, *arguments, **options)

    monkeypatch.setattr(Transport, "infer", fails_later)
    result = run("--file", notes, *(["--out", out] if to_file else ["--json"]))
    assert result.exit_code == 1
    assert "no answer" in result.stderr
    if not to_file:
        assert 0 < len(result.stdout.splitlines()) < 3000
        return
    found = answers(out)
    assert 0 < len(found) < 3000
    assert all("predictions" in row for row in found)
    assert f"holds {len(found)} of 3000 rows" in result.stderr
    monkeypatch.undo()
    assert run("--file", notes, "--out", out).exit_code == 0
    assert len(answers(out)) == 3000


def test_a_service_that_is_too_late_stops_the_run_and_not_its_rows(
    run, arguments, notes, served, tmp_path
):
    out, queries = tmp_path / "out.jsonl", []

    def relay_once(visit):
        queries.append(visit)
        if len(queries) > 1:
            silence(visit)
        server.relay(visit)

    with HostileServer(served, infer=relay_once) as server:
        at = [server.url if part == served else part for part in arguments]
        more = ["--file", str(notes), "--out", str(out), "--call-timeout", "3"]
        result = in_time(lambda: CliRunner().invoke(app, [*at, *more]), seconds=60)
    assert result.exit_code == 1
    assert "call_timeout" in result.stderr
    assert "the same command goes on" in result.stderr
    assert 0 < len(answers(out)) < 3000
    assert run("--file", notes, "--out", out).exit_code == 0
    assert len(answers(out)) == 3000


@pytest.mark.parametrize("name", ["--timeout", "--call-timeout"])
def test_time_limits_are_checked(run, name):
    result = run(name, "-1", "pain")
    assert result.exit_code == 1
    assert "above 0" in result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "out.jsonl", "pain"], "--out needs --file"),
        (["--file", "notes.csv", "--out", "out.xlsx"], ".jsonl, .ndjson or .csv"),
        (["--file", "notes.csv", "--out", "absent/out.jsonl"], "cannot be written"),
        (["--file", "notes.csv", "--function-to-apply", "relu"], "softmax, sigmoid, none"),
    ],
)
def test_what_cannot_be_is_said(run, few, monkeypatch, more, message):
    monkeypatch.chdir(few.parent)
    result = run(*more)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_a_terminal_shows_how_far_it_is(run, few, tmp_path, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("veilhead.cli._errors", Console(file=shown, force_terminal=True, width=99))
    out = tmp_path / "out.jsonl"
    run("--file", few, "--out", out)
    assert "40/40" in shown.getvalue()


class TestTables:
    @pytest.fixture
    def table(self, tmp_path):
        rows = {"note": ["pain", None, "fever\nand cough", "x" * 200_000], "n": [1, 2, 3, 4]}
        parquet.write_table(pa.table(rows), tmp_path / "t.parquet")
        lines = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with (tmp_path / "t.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows))
            writer.writeheader()
            writer.writerows(lines)
        return tmp_path

    @pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.csv"])
    def test_every_format_has_the_same_rows(self, table, name):
        opened = TableFile.open(table / name, ["note"])
        assert opened.rows == 4
        found = [values for (values,) in opened.values()]
        assert found[0] == "pain"
        assert not found[1]
        assert found[2:] == ["fever\nand cough", "x" * 200_000]
        assert [values for (values,) in opened.values(2)] == found[2:]

    @pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.csv"])
    def test_an_absent_column_is_named(self, table, name):
        with pytest.raises(InputError, match="'absent'"):
            TableFile.open(table / name, ["note", "absent"])
        with pytest.raises(InputError, match="'absent'"):
            TableFile.open(table / name, ["absent"])

    def test_what_is_no_parquet_file_is_refused(self, table):
        (table / "bad.parquet").write_bytes(b"PAR1 no PAR1")
        with pytest.raises(InputError, match="not a Parquet"):
            TableFile.open(table / "bad.parquet", ["note"])

    def test_without_pyarrow_it_says_what_to_install(self, table, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ClientError, match=r"veilhead\[tables\]"):
            TableFile.open(table / "t.parquet", ["note"])

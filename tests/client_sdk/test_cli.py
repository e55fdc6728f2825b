"""`veilhead` against a service in a process of its own."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
from support.services import running
from typer.testing import CliRunner

from veilhead import Client
from veilhead.cli import app
from veilhead_service.model_store import publish


@pytest.fixture(scope="module")
def url(text_artifact, tmp_path_factory):
    store = tmp_path_factory.mktemp("served") / "store"
    publish(text_artifact, store)
    with running(store, "--workers", "1") as found:
        yield found


@pytest.fixture
def run(url):
    runner = CliRunner()

    def invoke(command, *arguments, **options):
        at = ("--url", url, "--model", "colours")
        return runner.invoke(app, [command, *at, *map(str, arguments)], **options)

    return invoke


def test_texts_give_a_line_each(run, url):
    result = run("classify", "acute pain", "mild fever")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    with Client(url, "colours") as client:
        expected = client.classify(["acute pain", "mild fever"])
    assert [line.split(" ", 1)[1] for line in lines] == [row[0].label for row in expected]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(
        [row[0].score for row in expected], abs=2e-3
    )


def test_top_k_puts_several_labels_on_a_line(run):
    result = run("classify", "acute pain", "--top-k", "3")
    assert len(result.stdout.strip().split("\t")) == 3


def test_json_gives_an_object_a_text(run):
    result = run("classify", "acute pain", "mild fever", "--json", "--top-k", 2)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["row"] for row in rows] == [0, 1]
    assert all(set(item) == {"label", "score"} for row in rows for item in row["predictions"])
    assert [len(row["predictions"]) for row in rows] == [2, 2]


def test_standard_input_is_read_line_by_line(run):
    result = run("classify", input="acute pain\nmild fever\n")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2


@pytest.fixture
def table(tmp_path, texts):
    """The same labelled texts as CSV and JSONL; labels are what the model answers, but one."""
    rows = [{"note": text, "colour": "red"} for text in texts[:40]]
    with (tmp_path / "notes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["colour", "note"])
        writer.writeheader()
        writer.writerows(rows)
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "notes.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize("name", ["notes.csv", "notes.jsonl"])
def test_files_are_classified_by_column(run, table, name, texts, url):
    result = run("classify", "--file", table / name, "--column", "note", "--json")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 40


def test_a_bad_row_of_a_file_keeps_the_others(run, tmp_path):
    rows = ['{"note": "pain"}', '{"note": 7}', "not json", '{"note": "fever"}']
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    result = run("classify", "--file", tmp_path / "bad.jsonl", "--column", "note", "--json")
    assert result.exit_code == 1
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["predictions" in row for row in found] == [True, False, False, True]
    assert found[1]["error"]["code"] == "input"
    plain = run("classify", "--file", tmp_path / "bad.jsonl", "--column", "note")
    assert [bool(line) for line in plain.stdout.split("\n")[:4]] == [True, False, False, True]
    assert "row 1" in plain.stderr


def test_evaluate_scores_the_encrypted_path(run, table, url, texts):
    result = run(
        "evaluate", "--file", table / "notes.csv", "--text", "note", "--label", "colour", "--json"
    )
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    with Client(url, "colours") as client:
        red = [row[0].label == "red" for row in client.classify(texts[:40])]
    assert found["accuracy"] == pytest.approx(sum(red) / 40, abs=0.03)
    assert (found["answered"], found["failed"]) == (40, 0)
    shown = run("evaluate", "--file", table / "notes.csv", "--text", "note", "--label", "colour")
    assert f"accuracy {found['accuracy']:.4f}" in shown.stdout
    assert "precision" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "absent.csv", "--column", "x"], "absent.csv"),
        (["--file", "notes.txt", "--column", "x"], ".jsonl"),
        (["--file", "notes.csv"], "--column"),
        (["text", "--file", "notes.csv", "--column", "x"], "not both"),
        (["text", "--digest", "0" * 64], "model-not-found"),
        (["text", "--minimum-parameters", "weak"], "unknown parameter set"),
    ],
)
def test_errors_are_one_line_and_status_one(run, arguments, message):
    result = run("classify", *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_an_absent_column_is_named(run, table):
    result = run("classify", "--file", table / "notes.csv", "--column", "absent")
    assert result.exit_code == 1
    assert "'absent'" in result.stderr


def test_help_teaches(url):
    runner = CliRunner()
    assert "encrypted embedding" in " ".join(runner.invoke(app, ["--help"]).stdout.split())
    for command in ("classify", "evaluate"):
        assert "--model" in runner.invoke(app, [command, "--help"]).stdout


def test_progress_is_not_shown_without_a_terminal(url):
    command = [sys.executable, "-c", "from veilhead.cli import app; app()", "classify"]
    done = subprocess.run(
        [*command, "--url", url, "--model", "colours", "acute pain"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1

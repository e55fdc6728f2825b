"""The whole product as a vendor and a data owner run it: commands, processes, HTTP."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.services import running

from veilhead import Client
from veilhead_models.artifact import HeadArtifact

SUBJECTS = {
    "cardiology": ["chest pain", "irregular heartbeat", "heart failure", "blocked artery"],
    "dermatology": ["itchy skin", "red rash", "dry eczema", "painful acne"],
    "dentistry": ["toothache", "bleeding gums", "cracked molar", "loose filling"],
}
WHEN = ["since Monday", "for two weeks", "again", "at night", "after lunch", "for years"]


def server(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "veilhead_service", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    rows = [
        {"note": f"{complaint} {when}", "clinic": clinic}
        for clinic, complaints in SUBJECTS.items()
        for complaint in complaints
        for when in WHEN
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_train_publish_run_classify_evaluate(notes, tmp_path, monkeypatch):
    monkeypatch.setenv("VEILHEAD_CACHE", str(tmp_path / "cache"))
    made, store = tmp_path / "artifacts" / "clinics", tmp_path / "store"
    trained = server("train", notes, "--text", "note", "--label", "clinic", "--out", made)
    assert "accuracy" in trained.stdout
    report = json.loads((made / "report.json").read_text())
    assert report["accuracy"] > 0.9

    store.mkdir()
    with running(store, "--workers", "1") as url:
        server("publish", made, "--store", store)  # noticed while the service runs
        command = [sys.executable, "-c", "from veilhead.cli import app; app()"]
        at = ["--url", url, "--model", "clinics"]
        classified = subprocess.run(
            [*command, "classify", *at, "my chest hurts", "my gums bleed"],
            capture_output=True,
            text=True,
            check=True,
        )
        labels = [line.split(" ", 1)[1] for line in classified.stdout.splitlines()]
        assert labels == ["cardiology", "dentistry"]
        table = ["--file", str(notes), "--text", "note", "--label", "clinic"]
        evaluated = subprocess.run(
            [*command, "evaluate", *at, *table, "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(evaluated.stdout)["accuracy"] > 0.95

        # The encrypted path and the plaintext one, on the same embeddings.
        head = HeadArtifact.load(made)
        with Client(url, "clinics") as client:
            embeddings = client.embed(["a rash that itches", "", "palpitations"])
            encrypted = client.logits(embeddings)
        error = abs(encrypted - head.logits(embeddings)).max()
        assert error <= head.manifest.head.error_bound


def test_a_subcommand_says_what_is_wrong(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "veilhead_service", "publish", str(tmp_path), "--store", "x"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "manifest.json" in done.stderr
    assert "Traceback" not in done.stderr

"""Every file in examples/ is run as a user runs it, and what it prints is checked."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def output(name: str) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown_by(name: str) -> dict[str, str]:
    """What an example prints, by the name that begins each line."""
    lines = (re.split(r" {2,}", line, maxsplit=1) for line in output(name).splitlines())
    return {line[0]: line[1] for line in lines if len(line) == 2}


def test_every_example_is_run() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert names <= tested


def test_digits() -> None:
    shown = shown_by("digits")
    encrypted, plaintext = (float(shown[f"accuracy, {how}"]) for how in ("encrypted", "plaintext"))
    assert encrypted == pytest.approx(plaintext, abs=0.003)
    assert encrypted > 0.95
    assert float(shown["largest logit error"]) <= float(shown["its bound"])


def test_medical_coding() -> None:
    shown = shown_by("medical_coding")
    assert shown["right chapter first"] == shown["the same head, plaintext"]
    first, among = float(shown["right chapter first"]), float(shown["right chapter among three"])
    assert 0.4 < first < among
    assert float(shown["of these right"]) > first


def test_financial_complaints() -> None:
    shown = shown_by("financial_complaints")
    assert float(shown["as written"]) > 0.4
    assert shown["as written"] == shown["the same head, plaintext"]
    assert float(shown["de-identified"]) > float(shown["as written"]) - 0.1


def test_social_media() -> None:
    shown = shown_by("social_media")
    assert "row 7" in shown["not classified"]
    assert shown["posts"] == "200"
    assert "'to a person': 1" in shown["queues"]
    assert float(shown["right"]) == pytest.approx(
        float(shown["the same head, plaintext"]), abs=0.006
    )


@pytest.mark.skipif(shutil.which("npm") is None, reason="the corpus comes through npm")
def test_phishing_mail() -> None:
    shown = shown_by("phishing_mail")
    assert shown["accuracy at one half"] == shown["the same head, plaintext"]
    assert float(shown["accuracy at one half"]) > 0.85
    assert float(shown["spam that is blocked"]) > 0.3
    assert float(shown["letters that are blocked"]) < 0.1


def test_fault_reports() -> None:
    shown = shown_by("fault_reports")
    assert shown["right assembly"] == shown["the same head, plaintext"]
    assert float(shown["right assembly"]) > 0.9
    assert shown["a report of another form"].startswith("bearing")


def test_pii_tags() -> None:
    printed = output("pii_tags")
    assert "('EMAIL', '" in printed
    scores = re.findall(r"^micro +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)", printed, re.M)
    assert len(scores) == 3
    plain, looser, tighter = (float(score[2]) for score in scores)
    assert plain > 0.3
    assert looser > 0.1
    assert plain > tighter
    assert all(float(score[3]) >= float(score[2]) for score in scores)


def test_what_the_server_sees() -> None:
    printed = output("what_the_server_sees")
    assert "texts or embeddings found in what passed: 0" in printed
    queries = re.findall(r"POST .*?up +([\d,]+) bytes.*?down +([\d,]+) bytes", printed, re.S)
    assert len(queries) == 2
    assert queries[0] == queries[1]

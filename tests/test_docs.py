"""The examples on the pages in docs/ are run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from support.services import running
from typer.testing import CliRunner

from veilhead.cli import app
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import describe
from veilhead_service.model_store import publish

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}

#: Pages whose examples have a test of their own, which prepares what they need.
ELSEWHERE = {
    "deidentify": "tests/client_sdk/test_deidentify.py",
    "light-client": "tests/end_to_end/test_light_client.py",
    "models": "tests/test_models_page.py",
}

MARKED = re.compile(r"<!-- example: (\w+) -->\n```python\n(.*?)```", re.DOTALL)
EXAMPLES = {
    (page, name): source
    for page, text in PAGES.items()
    if page not in ELSEWHERE
    for name, source in MARKED.findall(text)
}

#: What an example prints, as a pattern, where it says so.
PRINTED = {
    ("client", "shapes"): r"",
    ("client", "many"): r"(\d00 \w+\n|0 \w+\n){5}",
    ("client", "tasks"): r"\w+ \w+\n\w+\n\w+\n",
    ("client", "errors"): r"expected a string, got NoneType\n\[True, False, True\]\n",
    ("client", "judge"): r"[01]\.\d+\n\d+\.\d+\n",
    ("client", "frame"): r" +note +label +score +label_2[^\n]* error\n(.|\n)*string(.|\n)*",
    ("client", "local"): r"\[Prediction\(label='\w+', score=0\.\d+\)\]\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_directory):
    """A directory with an artefact of the name that the pages use, and the URL of its service."""
    directory = tmp_path_factory.mktemp("docs")
    head = HeadArtifact.from_weights(np.eye(16)[:4], None, ["red", "green", "blue", "grey"])
    made = directory / "artifacts" / "icd10-chapters"
    head.with_backbone(tiny_directory, describe(tiny_directory)).save(made)
    publish(made, directory / "store")
    with running(directory / "store", "--workers", "1") as url:
        yield directory, url


@pytest.mark.parametrize("page", sorted(PAGES.keys() - ELSEWHERE.keys()))
def test_every_example_is_marked(page):
    assert PAGES[page].count("```python") == sum(of == page for of, _ in EXAMPLES)


def test_the_others_are_run_where_it_says():
    for page, path in ELSEWHERE.items():
        assert page in PAGES
        assert f"{page}.md" in (ROOT / path).read_text("utf-8")


def test_the_patterns_are_of_examples():
    assert PRINTED.keys() <= EXAMPLES.keys()


@pytest.mark.parametrize("example", EXAMPLES, ids="-".join)
def test_an_example_runs(example, place, monkeypatch, capsys):
    directory, url = place
    monkeypatch.chdir(directory)
    monkeypatch.setenv("VEILHEAD_CACHE", str(directory / "cache"))
    source = EXAMPLES[example].replace("http://127.0.0.1:8000", url)
    exec(compile(source, "-".join(example), "exec"), {"__name__": "__main__"})  # noqa: S102
    assert re.fullmatch(PRINTED.get(example, r"(.|\n)*"), capsys.readouterr().out)


COMMANDS = re.findall(
    r"^\$ veilhead (\w+)(.*)$", PAGES["client"].replace("\\\n", " "), re.MULTILINE
)


@pytest.mark.parametrize(("command", "arguments"), COMMANDS)
def test_a_command_has_its_options(command, arguments):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for option in re.findall(r"--[a-z-]+", arguments):
        assert option in shown.stdout

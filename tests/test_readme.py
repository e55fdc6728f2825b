"""The README's examples are run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.services import running
from typer.testing import CliRunner

from veilhead.api_key import API_KEY_VARIABLE
from veilhead.cli import app as client_app
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import describe
from veilhead_service.cli import app as server_app
from veilhead_service.model_store import publish

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))
COMMANDS = re.findall(r"^\$ (.*)$", README.replace("\\\n", " "), re.MULTILINE)


def run(source, directory, **environment):
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        cwd=directory,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_python_example_is_run():
    assert README.count("```python") == len(EXAMPLES) == 2


def test_the_head_example(tmp_path):
    output = run(EXAMPLES["head"], tmp_path)
    weight = np.random.default_rng(0).normal(size=(3, 64))
    shown = np.array([float(number) for number in re.findall(r"-?\d+\.\d*", output)])
    assert shown.reshape(2, 3) == pytest.approx(weight[:, :2].T, abs=2e-3)


def test_the_classify_example(tmp_path, tiny_directory):
    head = HeadArtifact.from_weights(np.eye(16)[:4], None, ["red", "green", "blue", "grey"])
    made = tmp_path / "icd10-chapters"
    head.with_backbone(tiny_directory, describe(tiny_directory)).save(made)
    publish(made, tmp_path / "store")
    state = ("--state", str(tmp_path / "state"))
    added = CliRunner().invoke(server_app, ["tenants", "add", "clinic", *state])
    with running(tmp_path / "store", "--workers", "1", access=state) as url:
        source = EXAMPLES["classify"].replace("http://127.0.0.1:8000", url)
        output = run(source, tmp_path, VEILHEAD_API_KEY=added.stdout.strip())
    one, *several = output.splitlines()
    assert one.startswith("[Prediction(label=")
    assert [line.count("(") for line in several] == [3, 3]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_with_its_options(command):
    program, subcommand, *rest = command.split("#")[0].split()
    if program == "export":
        assert subcommand.startswith(f"{API_KEY_VARIABLE}=")
        return
    if program == "make":
        assert f"\n{subcommand}:" in (ROOT / "Makefile").read_text("utf-8")
        return
    app = {"veilhead": client_app, "veilhead-server": server_app}[program]
    shown = CliRunner().invoke(app, [subcommand, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for option in (word for word in rest if word.startswith("--")):
        assert option in shown.stdout

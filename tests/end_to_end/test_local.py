"""`Client.local` from everywhere that people run Python: a script, standard input, a notebook."""

from __future__ import annotations

import json
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from support.heads import artifact

from veilhead import Client
from veilhead_protocol.errors import StoreError

# No main guard, and the client is left open: the process must end by itself all the same.
SCRIPT = """\
import numpy as np
from veilhead import Client
client = Client.local({directory!r})
logits = client.logits(np.eye(32)[:3])
print(logits.shape, logits[0].round(2).tolist())
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The artefact's directory, the script for it, and what the script prints."""
    directory = tmp_path_factory.mktemp("local") / "model"
    head = artifact(5, 32)
    head.save(directory)
    with Client.local(directory) as client:
        logits = client.logits(np.eye(32)[:3])
    assert np.abs(logits - head.logits(np.eye(32)[:3])).max() <= head.scales.error_bound
    return directory, SCRIPT.format(directory=str(directory)), logits[0]


def check(output, expected):
    assert output.startswith("(3, 5) [")
    values = [float(value) for value in output.strip().split("[")[1].rstrip("]").split(",")]
    assert values == pytest.approx(expected, abs=0.02)


def run(command, **options):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=60, **options
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_from_a_script_without_a_main_guard(made, tmp_path):
    _, script, expected = made
    path = tmp_path / "script.py"
    path.write_text(script)
    check(run([str(path)]), expected)


def test_from_standard_input(made):
    _, script, expected = made
    check(run(["-"], input=script), expected)


def test_from_the_command_line(made):
    _, script, expected = made
    check(run(["-c", script]), expected)


def test_from_a_script_beside_modules_named_like_folders_of_this_project(made, tmp_path):
    _, script, expected = made
    for name in ("models", "service", "protocol", "benchmarks"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('shadowed')\n")
    path = tmp_path / "script.py"
    path.write_text(script)
    check(run([str(path)], cwd=tmp_path), expected)


@pytest.mark.filterwarnings("ignore")  # the notebook machinery has its own
def test_from_a_notebook(made):
    _, script, expected = made
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(script)])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    check(notebook.cells[0].outputs[0]["text"], expected)


def test_from_a_running_event_loop(made):
    directory, _, expected = made
    script = f"""
import asyncio, numpy as np
from veilhead import Client
async def main():
    with Client.local({str(directory)!r}) as client:
        return client.logits(np.eye(32)[:3])
logits = asyncio.run(main())
print(logits.shape, logits[0].round(2).tolist())
"""
    check(run(["-c", script]), expected)


def test_a_killed_process_leaves_no_worker(made):
    directory, _, _ = made
    script = f"""
import os, signal, subprocess
from veilhead import Client
client = Client.local({str(directory)!r})
children = subprocess.run(["ps", "-o", "pid=,cmd=", "--ppid", str(os.getpid())],
                          capture_output=True, text=True).stdout
print([int(line.split()[0]) for line in children.splitlines() if "veilhead_service.worker" in line])
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    (worker,) = json.loads(done.stdout)
    waited = subprocess.run(["tail", "--pid", str(worker), "-f", "/dev/null"], timeout=30)
    assert waited.returncode == 0


def test_a_directory_that_is_no_artefact_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Client.local(tmp_path)

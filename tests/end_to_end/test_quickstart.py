"""The commands of docs/quickstart.md, run in their order as they stand."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text("utf-8")
COMMANDS = [
    command
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for command in re.split(r"^\$ ", block, flags=re.MULTILINE)
    if command.strip()
]
SERVE = "veilhead-server run --store store"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ready(url: str) -> bool:
    try:
        return httpx2.get(url + "/readyz", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.slow
def test_every_command_does_what_the_page_says(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VEILHEAD_SERVER_WORKERS": "1",
    }
    environment.pop("VEILHEAD_API_KEY", None)
    shown: dict[str, str] = {}
    service: subprocess.Popen[bytes] | None = None
    try:
        for command in COMMANDS:
            command = command.strip().replace("http://127.0.0.1:8000", url)
            if command == SERVE:
                service = subprocess.Popen(
                    [*command.split(), "--port", str(port)],
                    cwd=tmp_path,
                    env=environment,
                    stderr=subprocess.DEVNULL,
                )
                deadline = time.monotonic() + 60
                while not ready(url):
                    assert service.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                continue
            if command.startswith("export "):
                environment["VEILHEAD_API_KEY"] = (tmp_path / "clinic.key").read_text().strip()
                continue
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            shown[command] = done.stdout
    finally:
        if service is not None:
            service.terminate()
            service.wait(60)
    assert service is not None
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 24
    assert all("predictions" in answer for answer in answers)
    (single,) = (out for command, out in shown.items() if command.endswith('not back"'))
    assert "refund" in single
    (listed,) = (out for command, out in shown.items() if "models list" in command)
    assert "2099-01-01" in listed

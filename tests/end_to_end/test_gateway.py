"""`veilhead gateway` as a process of its own, in front of a service in another one."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
from support.services import running
from typer.testing import CliRunner

from veilhead import Client
from veilhead.cli import app
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import describe
from veilhead_service.model_store import publish

TOKEN = "t" * 32
KEY = "vh_0123456789abcdef_" + "S" * 43


@pytest.fixture
def store(tmp_path, tiny_directory):
    weight = np.random.default_rng(5).normal(size=(3, 16))
    head = HeadArtifact.from_weights(weight, None, ["red", "green", "blue"], name="colours")
    artifact = tmp_path / "colours"
    head.with_backbone(tiny_directory, describe(tiny_directory)).save(artifact)
    publish(artifact, tmp_path / "store")
    return tmp_path / "store"


def start(*arguments, environment=None):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from veilhead.cli import app; app()"]
    process = subprocess.Popen(
        [*command, "gateway", "--port", str(port), "--model", "colours", *map(str, arguments)],
        env=os.environ | {"PYTHONWARNINGS": "ignore"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process, f"http://127.0.0.1:{port}"


def test_an_application_switches_by_its_url_alone(store, tmp_path):
    callers = tmp_path / "callers"
    callers.write_text(TOKEN)
    callers.chmod(0o600)
    with running(store, "--workers", "1", log=subprocess.DEVNULL) as upstream:
        process, url = start("--upstream", upstream, "--callers", callers, "--deidentify")
        try:
            for _ in range(600):
                with contextlib.suppress(httpx2.TransportError):
                    if httpx2.get(f"{url}/health", trust_env=False).is_success:
                        break
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.1)
            limits = Path(f"/proc/{process.pid}/limits").read_text()
            health = httpx2.get(f"{url}/health", trust_env=False).json()
            answer = httpx2.post(
                f"{url}/predict",
                json={"inputs": "acute chest pain of canary@example.com"},
                headers={"Authorization": f"Bearer {TOKEN}"},
                trust_env=False,
            )
        finally:
            process.send_signal(signal.SIGTERM)
            log, _ = process.communicate(timeout=60)
        with Client(upstream, "colours") as client:
            (best,) = client.classify("acute chest pain of [EMAIL_1]")
    assert process.returncode == 0, log
    assert re.search(r"core file size +0 +0 ", limits)
    assert health["upstream"]["ready"]
    first = answer.json()[0]
    assert first["label"] == best.label
    assert first["score"] == pytest.approx(best.score, abs=2e-3)
    assert "colours" in log
    assert "canary" not in log
    assert TOKEN not in log


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--upstream", "http://127.0.0.1:9", "--host", "0.0.0.0"], "--callers"),  # noqa: S104
        (["--upstream", "http://vendor.example"], "https://"),
        (["--upstream", "http://127.0.0.1:9", "--max-batch", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(arguments, says, monkeypatch):
    # It ends the handlers of other libraries, and one of them closes what pytest captures with.
    monkeypatch.setattr("veilhead.gateway.logs.configure", lambda: None)
    result = CliRunner().invoke(app, ["gateway", "--model", "colours", *arguments])
    assert result.exit_code == 1
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


class Proxy(socketserver.StreamRequestHandler):
    """Refuses, and repeats what it was sent and more."""

    def handle(self):
        lines = []
        while (line := self.rfile.readline()).strip():
            lines.append(line)
        body = b"".join(lines) + KEY.encode()
        self.wfile.write(
            b"HTTP/1.1 407 who is agent:pa55word, with %s\r\n" % KEY.encode()
            + b"Proxy-Authenticate: Basic\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )


def test_a_proxy_that_repeats_secrets_does_not_have_them_told(tmp_path):
    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    key_file.chmod(0o600)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        port = proxy.server_address[1]
        process, _ = start(
            "--upstream", "https://vendor.example", "--api-key-file", key_file,
            environment={"HTTPS_PROXY": f"http://agent:pa55word@127.0.0.1:{port}"},
        )  # fmt: skip
        log, _ = process.communicate(timeout=120)
        proxy.shutdown()
    assert process.returncode == 1
    assert "407" in log  # it says what is wrong, and
    for secret in ("pa55word", KEY, KEY[-43:], "YWdlbnQ6cGE1NXdvcmQ"):
        assert secret not in log

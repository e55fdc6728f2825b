"""A running service with several published models, and what the tests of it share."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from starlette.testclient import TestClient
from support.heads import artifact, unit_rows
from support.stores import Clock, Vendor

from veilhead.session import EncryptedQuery, Session
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.files import describe_file
from veilhead_protocol.manifest import BackboneSection
from veilhead_service.app import create_app
from veilhead_service.model_store import publish
from veilhead_service.settings import Settings

OCTETS = {"Content-Type": "application/octet-stream"}

#: name: (parameter set, dimensions, classes)
MODELS = {
    "chapters": ("standard", 384, 22),
    "compact": ("compact", 384, 5),
    "long": ("standard", 3000, 4),  # two query polynomials
    "digits": ("standard", 64, 10),
}


def _documented_problems():
    """(code, status, retryable) of every row of the table of docs/http-api.md."""
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\d{3}) \| (yes|no) \|", page, re.MULTILINE)
    return {(code, int(status), retryable == "yes") for code, status, retryable in rows}


DOCUMENTED = _documented_problems()


def check_problem(response, status, code, *, sent=b"", retryable=False):
    """A typed problem of that status, without anything of the request in it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert (code, status, retryable) in DOCUMENTED
    body = response.json()
    assert set(body) == {"type", "title", "status", "detail", "request_id", "retryable"}
    assert body["type"] == f"urn:veilhead:problem:{code}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["retryable"] is retryable
    assert ("retry-after" in response.headers) is retryable
    # The type was compared above; a test that draws from the sources may well send its words.
    shown = response.text.replace(body["request_id"], "").replace(body["type"], "")
    for digits in re.findall(r"[0-9a-fA-F]{16,}", shown):
        assert bytes.fromhex(digits[: len(digits) // 2 * 2]) not in sent
    content = shown.encode()
    assert not any(content[at : at + 8] in sent for at in range(len(content) - 8))
    return body


@dataclass
class Service:
    """A client of the running app, and the artefacts that it serves."""

    client: TestClient
    artifacts: dict[str, HeadArtifact]

    def session(self, name):
        return Session(self.artifacts[name].manifest)

    def register(self, message: bytes) -> str:
        """Register a key message that the service must accept."""
        key_id = hashlib.sha256(message).hexdigest()
        response = self.put(message)
        assert response.status_code in (200, 201), response.text
        return key_id

    def put(self, message, key_id=None, *, headers=OCTETS):
        key_id = key_id or hashlib.sha256(message).hexdigest()
        return self.client.put(f"/v1/keys/{key_id}", content=message, headers=headers)

    def infer(self, name, body, *, headers=OCTETS):
        return self.client.post(f"/v1/models/{name}/infer", content=body, headers=headers)

    def query(self, name, *, row=0, session=None) -> EncryptedQuery:
        """A query under a registered key."""
        session = session or self.session(name)
        dimensions = self.artifacts[name].manifest.head.dimensions
        query = session.encrypt(unit_rows(row + 1, dimensions)[row])
        self.register(query.key.message)
        return query

    def check_answers(self, name="digits") -> None:
        """A good query gets the right logits."""
        session = self.session(name)
        query = self.query(name, session=session)
        response = self.infer(name, query.data)
        assert response.status_code == 200, response.text
        served = self.artifacts[name]
        expected = served.weight @ unit_rows(1, served.weight.shape[1])[0] + served.bias
        found = session.decrypt(query, response.content)
        assert np.abs(found - expected).max() <= served.manifest.head.error_bound


@pytest.fixture(scope="session")
def artifacts() -> dict[str, HeadArtifact]:
    return {
        name: artifact(classes, dimensions, parameters=parameters, name=name)
        for name, (parameters, dimensions, classes) in MODELS.items()
    }


@pytest.fixture(scope="session")
def store(artifacts, tmp_path_factory) -> Path:
    """A store of every model; nobody publishes into it later."""
    root = tmp_path_factory.mktemp("service")
    for name, head in artifacts.items():
        head.save(root / "artifacts" / name)
        publish(root / "artifacts" / name, root / "store")
    return root / "store"


@pytest.fixture(scope="session")
def service(store, artifacts):
    """The app, running with two workers."""
    with TestClient(
        create_app(Settings(store=store, workers=2, insecure_no_tenants=True))
    ) as client:
        yield Service(client, artifacts)


def list_child_workers() -> set[int]:
    """The evaluating processes that this process has started and that have not ended."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        state, parent = status.rpartition(")")[2].split()[:2]
        is_ours = int(parent) == os.getpid()
        # A zombie has no command line: one that nobody waited for counts.
        if is_ours and (b"veilhead_service.worker" in command or state == "Z"):
            found.add(int(entry.name))
    return found


@pytest.fixture(scope="session")
def child_workers():
    return list_child_workers


@pytest.fixture(scope="session")
def problem():
    return check_problem


@pytest.fixture(scope="session")
def make_service():
    return Service


@pytest.fixture(scope="session")
def independent() -> ModuleType:
    """The client that shares no code with the product."""
    path = Path(__file__).parent.parent / "protocol" / "independent_client.py"
    spec = importlib.util.spec_from_file_location("veilhead_service_test_independent", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def backbone_directory(tmp_path_factory) -> Path:
    """Public files, with private ones beside them that no manifest lists."""
    directory = tmp_path_factory.mktemp("backbone")
    random = np.random.default_rng(3)
    for path, content in {
        "config.json": b'{"hidden_size": 8}',
        "model.safetensors": random.bytes(100_000),
        "1_Pooling/config.json": b"{}",
        "vocab.txt": b"one\ntwo\n",
        "empty.txt": b"",
    }.items():
        (directory / path).parent.mkdir(exist_ok=True)
        (directory / path).write_bytes(content)
    return directory


@pytest.fixture(scope="session")
def backbone_section(backbone_directory) -> BackboneSection:
    paths = sorted(
        str(path.relative_to(backbone_directory))
        for path in backbone_directory.rglob("*")
        if path.is_file()
    )
    return BackboneSection(
        kind="transformers",
        name="toy",
        pooling="mean",
        normalise=True,
        max_tokens=16,
        public_parameters=1000,
        files=tuple(describe_file(backbone_directory, path) for path in paths),
    )


Answer = tuple[int, dict[str, str], bytes]


async def _request(app, method, path, *, headers=None, receive=None) -> Answer:
    """One request to an ASGI app as it is: no client rewrites its path or collects its body."""
    status, found, body = 0, {}, b""

    async def nothing():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        nonlocal status, found, body
        if message["type"] == "http.response.start":
            status = message["status"]
            found = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            body += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (name.lower().encode(), value.encode()) for name, value in (headers or {}).items()
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive or nothing, send)
    return status, found, body


@pytest.fixture(scope="session")
def request_raw() -> Callable[..., Answer]:
    """`_request` from a test that is not a coroutine, for routes that need no worker."""
    return lambda *args, **options: asyncio.run(_request(*args, **options))


@pytest.fixture
def vendor(tmp_path) -> Vendor:
    return Vendor(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()

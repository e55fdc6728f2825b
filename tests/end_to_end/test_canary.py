"""Secrets stay where they belong: markers go in everywhere, and are looked for everywhere else.

A text, an API key and the coefficients of secret keys pass through the real SDK, the real command,
workers that are killed, idle and while they evaluate, and every refusal that can be reached. Logs,
metrics, access log, answers, errors, representations and files are then searched.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest
from support.services import running
from support.tenants import add_tenant, bearer

from veilhead import Client, session
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import describe
from veilhead_protocol.errors import VeilheadError
from veilhead_service.access_log_chain import verify
from veilhead_service.model_store import publish
from veilhead_service.tenants import KeyScope

TEXT = "zqxjk quenby marrowfat"
BEARER = "zqxjk-bearer-8f1c0d52aa9e4b77"
NOISE = "zqxjk-noise"

#: Consecutive coefficients that identify a secret key: 3^-40 of all look like them.
_WINDOW = 40


def encodings(coefficients):
    """What part of a secret key would look like, as bytes or as text."""
    window = coefficients[100 : 100 + _WINDOW]
    integers = window.astype(np.int64)
    found = [
        integers.astype(np.int8).tobytes(),
        (integers % 3).astype(np.uint8).tobytes(),
        integers.tobytes(),
        integers.astype(np.int32).tobytes(),
        window.astype(np.float64).tobytes(),
        window.astype(np.float32).tobytes(),
    ]
    texts = [separator.join(map(str, integers)) for separator in ("", " ", ",", ", ", "\n")]
    texts += [separator.join(map(str, window)) for separator in (" ", ",", ", ")]
    return [*found, *(part.hex().encode() for part in found), *(text.encode() for text in texts)]


def leaks(places, markers):
    """(place, marker) of every marker in every place; letter case does not matter for text."""
    return [
        (place, name)
        for place, content in places.items()
        for name, forms in markers.items()
        if any(form in content or form.lower() in content.lower() for form in forms)
    ]


def files_below(directory):
    return {
        str(path): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def workers_of(url):
    """Process ids of the evaluating processes of the service at this URL."""
    port = url.rpartition(":")[2].encode()
    commands, parents = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                commands[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:
                continue
    return [
        pid
        for pid, command in commands.items()
        if b"veilhead_service.worker" in command and port in commands.get(parents[pid], [])
    ]


def cpu_ticks(pid):
    """Processor time of a process so far, in hundredths of a second; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def kill_evaluating(url, client):
    """Classify with a head that takes long, kill the workers within it; the labels, and how many
    workers were killed."""
    with ThreadPoolExecutor(1) as thread:
        workers = {pid: cpu_ticks(pid) for pid in workers_of(url)}
        answers = thread.submit(client.classify, [TEXT] * 24)
        killed = set()
        while len(killed) < len(workers) and not answers.done():
            for pid, before in workers.items():
                if pid not in killed and cpu_ticks(pid) >= before + 3:  # it only ever evaluates
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            time.sleep(0.002)
        return [row[0].label for row in answers.result(120)], len(killed)


def hostile(url, answers, bearer_key):
    """Markers in every part of a request, on every route, right and wrong; answers are kept."""
    headers = {"Authorization": f"Bearer {bearer_key}", "X-Note": NOISE, "User-Agent": NOISE}
    octets = headers | {"Content-Type": "application/octet-stream"}
    body = TEXT.encode() * 40
    paths = ("/v1/models", "/v1/models/colours", f"/v1/models/{NOISE}", f"/{NOISE}", "/readyz")
    with httpx2.Client(base_url=url, trust_env=False) as http:
        for path in (*paths, f"/v1/models/colours/files/{NOISE}", f"/v1/keys/{NOISE}", "/version"):
            for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "PATCH"):
                target = f"{path}?digest={NOISE}&text={NOISE}"
                answers.append(http.request(method, target, headers=octets, content=body))
                answers.append(http.request(method, target, headers=headers, content=body))
        for path in (
            "/v1/models/colours/infer",
            f"/v1/models/{NOISE}/infer",
            "/v1/keys/" + "ab" * 32,
        ):
            for content in (b"", body, body * 2000, b"VHLD" + body):
                for method in ("POST", "PUT"):
                    answers.append(http.request(method, path, headers=octets, content=content))
        answers.append(http.post("/v1/models/colours/infer", headers=headers, content=body))
        answers.append(http.get("/v1/models/colours", headers=headers | {"If-None-Match": NOISE}))
        answers.append(http.get("/v1/models/colours", headers=headers | {"Range": NOISE}))


def failing_calls(client):
    """Errors of the SDK on inputs that hold the marker."""
    odd = [TEXT, 7]
    for call in (
        lambda: client.classify(odd),
        lambda: client.classify([TEXT], top_k=0),
        lambda: client.classify([TEXT.encode()]),
        lambda: client.logits(np.full((2, 16), np.nan)),
        lambda: client.logits(np.ones((2, 3))),
    ):
        try:
            call()
        except (VeilheadError, ValueError, TypeError) as error:
            chain = error
            while chain is not None:
                yield f"{chain!r} {chain}"
                chain = chain.__cause__ or chain.__context__


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_directory):
    """Everything that a run leaves behind: {place: bytes}, and the markers that went in."""
    root = tmp_path_factory.mktemp("canary")
    for name in ("tmp", "cache"):
        (root / name).mkdir()
    weight = np.random.default_rng(5).normal(size=(4, 16))
    head = HeadArtifact.from_weights(weight, np.zeros(4), ["red", "green", "blue", "grey"])
    head.with_backbone(tiny_directory, describe(tiny_directory)).save(root / "colours")
    publish(root / "colours", root / "store")
    wide = HeadArtifact.from_weights(
        np.random.default_rng(6).normal(size=(4096, 16)), None, [f"w{n}" for n in range(4096)]
    )
    wide.with_backbone(tiny_directory, describe(tiny_directory)).save(root / "wide")
    publish(root / "wide", root / "store")

    secrets = []
    records = []
    answers = []
    places = {}
    handler = logging.Handler()
    handler.emit = lambda record: records.append(f"{record.getMessage()} {record.__dict__}")
    real = session.secret_coefficients
    key = add_tenant(root / "state", "clinic", scopes=KeyScope)

    def remembered(*arguments):
        secrets.append(real(*arguments))
        return secrets[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "secret_coefficients", remembered)
        patch.setenv("VEILHEAD_CACHE", str(root / "cache"))
        patch.setenv("TMPDIR", str(root / "tmp"))
        logging.getLogger("veilhead").addHandler(handler)
        logging.getLogger("httpx2").addHandler(handler)
        logging.getLogger("veilhead").setLevel(logging.DEBUG)
        with (root / "service.log").open("wb") as log:
            state = ("--state", str(root / "state"), "--set", "access_log=on")
            with running(
                root / "store", "--workers", "2", "--log-level", "debug", *state, access=(), log=log
            ) as url:
                with Client(url, "colours", api_key=key) as client:
                    assert len(client.classify([TEXT] * 20)) == 20
                    errors = list(failing_calls(client))
                    for pid in workers_of(url):  # each holds heads, keys and queries
                        os.kill(pid, signal.SIGKILL)
                    assert len(client.classify([TEXT] * 20)) == 20
                    with Client(url, "wide", api_key=key) as slow:
                        expected = slow.classify(TEXT)[0].label
                        labels, killed = kill_evaluating(url, slow)
                    assert killed
                    assert set(labels) == {expected}
                    engine = client._engine
                    representations = [
                        repr(item)
                        for item in (
                            client,
                            engine,
                            engine.session,
                            engine.session._key,
                            vars(client),
                        )
                    ]
                hostile(url, answers, BEARER)
                hostile(url, answers, key)
                deadline = time.monotonic() + 30
                while not workers_of(url) and time.monotonic() < deadline:
                    time.sleep(0.1)
                places["metrics"] = httpx2.get(
                    f"{url}/metrics", headers=bearer(key), trust_env=False
                ).content
        logging.getLogger("veilhead").removeHandler(handler)
        logging.getLogger("httpx2").removeHandler(handler)
        logging.getLogger("veilhead").setLevel(logging.NOTSET)
    assert len(errors) >= 4
    assert {answer.status_code for answer in answers} >= {200, 401, 404, 405, 413, 415, 422}
    for number, answer in enumerate(answers):
        places[f"answer {number}"] = answer.content + repr(answer.headers.raw).encode()
    places["errors"] = "\n".join(errors).encode()
    places["representations"] = "\n".join(representations).encode()
    places["SDK log"] = "\n".join(records).encode()
    places |= files_below(root)
    assert secrets
    markers = {
        "text": [TEXT.encode(), *(word.encode() for word in TEXT.split())],
        "API key": [BEARER.encode(), *(part.encode() for part in (key, key.split("_", 2)[2]))],
        "noise": [NOISE.encode()],
        "secret key": [form for secret in secrets for form in encodings(secret)],
    }
    return root, places, markers


def test_no_marker_is_anywhere(run):
    _, places, markers = run
    assert leaks(places, markers) == []


def test_what_is_searched_is_really_there(run):
    """The places are not empty: each kind of trace was made by this very run."""
    root, places, _ = run
    log = [json.loads(line) for line in (root / "service.log").read_text().splitlines()]
    assert any(line["logger"].startswith("uvicorn") for line in log)
    assert b'veilhead_requests_total{code="200"' in places["metrics"]
    assert b"veilhead_rejected_total{" in places["metrics"]
    assert verify(root / "state" / "access.log").records > 100
    assert str(root / "store/colours/current") in places
    assert any("model.safetensors" in name for name in places)  # the cache
    assert b"SecretKey(id=" in places["representations"]
    assert b"rows failed" in places["errors"]


@pytest.mark.parametrize("marker", ["text", "API key", "noise", "secret key"])
@pytest.mark.parametrize(
    "place", ["metrics", "answer 3", "errors", "representations", "SDK log", "service.log"]
)
def test_a_planted_marker_is_found(run, marker, place):
    root, places, markers = run
    name = str(root / place) if place == "service.log" else place
    for form in markers[marker][:20]:
        planted = {name: places[name] + b"x" + form + b"x"}
        assert (name, marker) in leaks(planted, markers)


def test_a_planted_file_is_found(run, tmp_path):
    _, _, markers = run
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"..." + markers["secret key"][0])
    assert leaks(files_below(tmp_path), markers) == [
        (str(tmp_path / "deep" / "file"), "secret key")
    ]

"""The public side of models over HTTP, and that the private side is not there."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from starlette.testclient import TestClient
from support.heads import artifact

from veilhead_models.artifact import (
    BACKBONE_DIRECTORY,
    FORMAT_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    HeadArtifact,
)
from veilhead_protocol.errors import ArtifactError, StoreError
from veilhead_service.app import create_app
from veilhead_service.model_store import ModelStore, publish
from veilhead_service.settings import Settings


def etag_of(content):
    return f'"{hashlib.sha256(content).hexdigest()}"'


def published(store, name):
    """The directory of a model's current version."""
    return store / name / (store / name / "current").read_text().strip()


@pytest.fixture
def own_store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def put_out(tmp_path, own_store):
    """Save an artefact and publish it into a store of the test's own."""

    def put_out(head: HeadArtifact):
        directory = tmp_path / "artifacts" / f"{head.name}-{head.salt.hex()[:8]}"
        head.save(directory)
        return publish(directory, own_store)

    return put_out


@pytest.fixture
def client(own_store):
    """A client of an app without workers: these routes need none."""
    return TestClient(create_app(Settings(store=own_store, insecure_no_tenants=True)))


@pytest.fixture(scope="module")
def with_backbone(backbone_directory, backbone_section, tmp_path_factory):
    """A store of one model with public files, its directory, and a client."""
    root = tmp_path_factory.mktemp("files")
    head = artifact(3, 8, name="files").with_backbone(backbone_directory, backbone_section)
    head.save(root / "artifact", report={"accuracy": 0.5})
    publish(root / "artifact", root / "store")
    client = TestClient(create_app(Settings(store=root / "store", insecure_no_tenants=True)))
    return client, published(root / "store", "files")


# --- list and manifest --------------------------------------------------------------------------


def test_the_list_names_every_model_and_its_digest(service):
    response = service.client.get("/v1/models")
    assert response.status_code == 200
    assert response.json() == {
        "models": [
            {"name": name, "digest": service.artifacts[name].manifest.digest.hex()}
            for name in sorted(service.artifacts)
        ]
    }


def test_an_empty_and_a_missing_store_list_nothing(client, own_store):
    assert client.get("/v1/models").json() == {"models": []}
    own_store.mkdir()
    assert client.get("/v1/models").json() == {"models": []}


@pytest.mark.parametrize("name", ["chapters", "compact", "long", "digits"])
def test_a_manifest_is_served_byte_for_byte(service, store, name):
    response = service.client.get(f"/v1/models/{name}")
    on_disk = (published(store, name) / MANIFEST_FILE).read_bytes()
    assert response.status_code == 200
    assert response.content == on_disk
    assert response.headers["content-type"] == "application/json"
    assert response.headers["etag"] == etag_of(on_disk)
    assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "tags",
    ["{}", "W/{}", '"other", {}', '"a",{},"b"', "*"],
)
def test_a_known_manifest_is_not_sent_again(service, tags):
    etag = service.client.get("/v1/models/digits").headers["etag"]
    response = service.client.get("/v1/models/digits", headers={"If-None-Match": tags.format(etag)})
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == etag


@pytest.mark.parametrize("tags", ['"other"', "", '"' + "0" * 64 + '"', "{}x"])
def test_another_manifest_is_sent(service, tags):
    etag = service.client.get("/v1/models/digits").headers["etag"]
    response = service.client.get("/v1/models/digits", headers={"If-None-Match": tags.format(etag)})
    assert response.status_code == 200
    assert etag_of(response.content) == etag


def test_a_version_is_found_by_its_digest_and_asked_for_again(service):
    """Its bytes never change; who signed it and when it ends may."""
    digest = service.artifacts["digits"].manifest.digest.hex()
    response = service.client.get(f"/v1/models/digits?digest={digest}")
    assert response.status_code == 200
    assert hashlib.sha256(response.content).hexdigest() == digest
    assert response.headers["cache-control"] == "no-cache"
    headers = {"If-None-Match": f'"{digest}"'}
    again = service.client.get(f"/v1/models/digits?digest={digest}", headers=headers)
    assert again.status_code == 304


def test_a_version_that_is_not_there_is_not_found(service, problem):
    other = service.artifacts["chapters"].manifest.digest.hex()
    for digest in ("0" * 64, other):
        problem(service.client.get(f"/v1/models/digits?digest={digest}"), 404, "model-not-found")


@pytest.mark.parametrize("digest", ["", "0", "0" * 63, "0" * 65, "A" * 64, "../current", "g" * 64])
def test_a_malformed_digest_is_refused(service, problem, digest):
    for path in ("/v1/models/digits", "/v1/models/digits/files/config.json"):
        response = service.client.get(path, params={"digest": digest})
        problem(response, 422, "malformed-digest")


@pytest.mark.parametrize(
    "name", ["nothing", "DIGITS", "digits.", ".digits", "current", "a%00b", "x" * 65, "x" * 2000]
)
def test_an_unknown_model_is_not_found(service, problem, name):
    for path in ("", "?digest=" + "0" * 64, "/files/config.json"):
        problem(service.client.get(f"/v1/models/{name}{path}"), 404, "model-not-found")


@pytest.mark.parametrize(
    "name", ["..", ".", "../store", "digits/../compact", "%2e%2e", "..%2fstore"]
)
def test_names_do_not_walk(store, request_raw, name):
    """Paths as a hostile client writes them, and as a server decodes them."""
    app = create_app(Settings(store=store, insecure_no_tenants=True))
    for path in (f"/v1/models/{name}", f"/v1/models/{name}/files/manifest.json"):
        status, headers, body = request_raw(app, "GET", path)
        assert status == 404
        assert headers["content-type"] == "application/problem+json"
        assert b"digits" not in body


# --- files --------------------------------------------------------------------------------------


def test_files_are_served_byte_for_byte(with_backbone, backbone_directory, backbone_section):
    client, _ = with_backbone
    assert len(backbone_section.files) == 5
    for entry in backbone_section.files:
        response = client.get(f"/v1/models/files/files/{entry.path}")
        content = (backbone_directory / entry.path).read_bytes()
        assert response.status_code == 200
        assert response.content == content
        assert response.headers["etag"] == etag_of(content)
        assert response.headers["content-length"] == str(len(content))
        assert response.headers["content-type"] == "application/octet-stream"
        assert response.headers["cache-control"] == "no-cache"


def test_files_of_a_version_may_be_kept_by_who_has_a_key(with_backbone):
    """`public` would let a shared cache answer those who have none."""
    client, directory = with_backbone
    response = client.get(f"/v1/models/files/files/config.json?digest={directory.name}")
    assert response.status_code == 200
    assert response.headers["cache-control"] == "private, max-age=31536000, immutable"


def test_a_known_file_is_not_sent_again(with_backbone):
    client, _ = with_backbone
    path = "/v1/models/files/files/model.safetensors"
    etag = client.get(path).headers["etag"]
    response = client.get(path, headers={"If-None-Match": etag})
    assert (response.status_code, response.content) == (304, b"")
    assert client.get(path, headers={"If-None-Match": '"x"'}).status_code == 200


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=99990-", 99_990, 100_000),
        ("bytes=-5", 99_995, 100_000),
        ("bytes=50000-200000", 50_000, 100_000),
        ("bytes=0-99999", 0, 100_000),
    ],
)
def test_a_part_of_a_file(with_backbone, backbone_directory, asked, start, stop):
    client, _ = with_backbone
    response = client.get("/v1/models/files/files/model.safetensors", headers={"Range": asked})
    content = (backbone_directory / "model.safetensors").read_bytes()
    assert response.status_code == 206
    assert response.content == content[start:stop]
    assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/100000"
    assert response.headers["etag"] == etag_of(content)


def test_a_transfer_goes_on_only_in_the_same_file(with_backbone):
    """If-Range: a part when the tag is the file's, and else the whole."""
    client, _ = with_backbone
    path = "/v1/models/files/files/model.safetensors"
    etag = client.get(path).headers["etag"]
    for tag, status, size in ((etag, 206, 100), ('"other"', 200, 100_000)):
        response = client.get(path, headers={"Range": "bytes=0-99", "If-Range": tag})
        assert (response.status_code, len(response.content)) == (status, size)


def test_a_range_beyond_the_file_is_a_problem(with_backbone, problem):
    client, _ = with_backbone
    path = "/v1/models/files/files/model.safetensors"
    response = client.get(path, headers={"Range": "bytes=100000-"})
    problem(response, 416, "range-not-satisfiable")
    assert response.headers["content-range"] == "bytes */100000"


@pytest.mark.parametrize("asked", ["bytes", "rows=0-9", "bytes=", "bytes=9-5", "bytes=a-b"])
def test_a_malformed_range_is_a_problem(with_backbone, problem, asked):
    client, _ = with_backbone
    path = "/v1/models/files/files/model.safetensors"
    problem(client.get(path, headers={"Range": asked}), 400, "malformed-range")


HOSTILE_PATHS = [
    HEAD_FILE,
    MANIFEST_FILE,
    "report.json",
    "../" + HEAD_FILE,
    "../" + MANIFEST_FILE,
    "../../current",
    "../current",
    "./config.json",
    "config.json/",
    "/config.json",
    "//config.json",
    "1_Pooling",
    "1_Pooling/",
    "1_Pooling/../config.json",
    "1_Pooling/../../" + HEAD_FILE,
    "backbone/config.json",
    "CONFIG.JSON",
    "config.json\0",
    "config.json%00",
    "config%2ejson",
    "..\\" + HEAD_FILE,
    "..%2f" + HEAD_FILE,
    "..%5c" + HEAD_FILE,
    "%2e%2e/" + HEAD_FILE,
    "%2e%2e%2f" + HEAD_FILE,
    "%252e%252e%252f" + HEAD_FILE,
    "..;/" + HEAD_FILE,
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "",
    ".",
    "..",
    "*",
    "config.json?x",
    "\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/" + HEAD_FILE,
]


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_only_files_of_the_manifest_exist(with_backbone, request_raw, path):
    """As an ASGI server hands them over: decoded, and not normalised."""
    client, directory = with_backbone
    absolute = str(directory / HEAD_FILE)
    for written in (path, absolute, absolute.lstrip("/")):
        status, headers, body = request_raw(client.app, "GET", f"/v1/models/files/files/{written}")
        assert status == 404
        assert headers["content-type"] == "application/problem+json"
        assert json.loads(body)["type"] == "urn:veilhead:problem:file-not-found"


@pytest.mark.parametrize(
    "path",
    ["..%2f" + HEAD_FILE, "%2e%2e%2f%2e%2e%2fcurrent", "..%252f" + HEAD_FILE, "%2fetc%2fpasswd"],
)
def test_encoded_paths_do_not_walk(with_backbone, problem, path):
    client, _ = with_backbone
    problem(client.get(f"/v1/models/files/files/{path}"), 404, "file-not-found")


def test_a_model_without_backbone_has_no_files(service, problem):
    assert service.client.get("/v1/models/digits").json()["backbone"] is None
    for path in ("config.json", HEAD_FILE, MANIFEST_FILE):
        problem(service.client.get(f"/v1/models/digits/files/{path}"), 404, "file-not-found")


def test_no_route_sends_anything_of_the_private_head(with_backbone):
    """Every route, with every file's name in every place that takes one."""
    client, directory = with_backbone
    head = HeadArtifact.load(directory)
    private = {bytes(row.tobytes()) for row in (*head.weight, head.bias)}
    private |= {np.float64(value).tobytes() for value in (*head.weight.ravel(), *head.bias)}
    private |= {repr(float(value)).encode() for value in (*head.weight.ravel(), *head.bias)}
    private |= {head.salt, head.salt.hex().encode(), (directory / HEAD_FILE).read_bytes()}
    assert any(secret in (directory / HEAD_FILE).read_bytes() for secret in private)
    values = {
        "name": ["files", directory.name, HEAD_FILE],
        "path": [HEAD_FILE, "config.json", "model.safetensors", "../" + HEAD_FILE],
        "id": [directory.name, HEAD_FILE],
    }
    seen = 0
    for template, operations in client.get("/openapi.json").json()["paths"].items():
        paths = [template]
        for field in re.findall(r"{(\w+)}", template):
            paths = [
                path.replace(f"{{{field}}}", value) for path in paths for value in values[field]
            ]
        for path in paths:
            for method in operations:
                for query in ("", f"?digest={directory.name}"):
                    content = client.request(method, path + query).content
                    assert not any(secret in content for secret in private)
                    seen += 1
    assert seen > 30
    # The probe finds what is there.
    assert any(secret in (directory / HEAD_FILE).read_bytes()[-200:] for secret in private)


def test_a_file_that_vanished_is_the_services_failure(
    put_out, client, own_store, backbone_directory, backbone_section, problem
):
    put_out(artifact(3, 8, name="files").with_backbone(backbone_directory, backbone_section))
    (published(own_store, "files") / BACKBONE_DIRECTORY / "config.json").unlink()
    body = problem(client.get("/v1/models/files/files/config.json"), 500, "internal")
    assert str(own_store) not in json.dumps(body)
    assert client.get("/v1/models/files/files/vocab.txt").status_code == 200


# --- publishing ---------------------------------------------------------------------------------


def test_what_is_published_while_the_app_runs_is_noticed(put_out, own_store, make_service):
    first = artifact(4, 16, name="model", seed=1)
    second = artifact(4, 16, name="model", seed=2)
    other = artifact(2, 16, name="another", seed=3)
    put_out(first)
    with TestClient(
        create_app(Settings(store=own_store, workers=1, insecure_no_tenants=True))
    ) as client:
        old = make_service(client, {"model": first})
        old.check_answers("model")
        session = old.session("model")
        query = old.query("model", session=session)

        put_out(second)
        put_out(other)

        digests = {row["name"]: row["digest"] for row in client.get("/v1/models").json()["models"]}
        assert digests == {
            "model": second.manifest.digest.hex(),
            "another": other.manifest.digest.hex(),
        }
        assert client.get("/v1/models/model").content == second.manifest.serialize()
        new = make_service(client, {"model": second, "another": other})
        new.check_answers("model")
        new.check_answers("another")

        # Whoever pinned the older version goes on with it.
        old.check_answers("model")
        response = old.infer("model", query.data)
        assert response.headers["x-veilhead-model"] == first.manifest.digest.hex()
        session.decrypt(query, response.content)
        pinned = client.get(f"/v1/models/model?digest={first.manifest.digest.hex()}")
        assert pinned.content == first.manifest.serialize()


def test_a_query_for_an_unpublished_version_is_a_conflict(put_out, client, make_service, problem):
    put_out(artifact(4, 16, name="model", seed=1))
    elsewhere = make_service(client, {"model": artifact(4, 16, name="model", seed=2)})
    query = elsewhere.query("model")
    problem(elsewhere.infer("model", query.data), 409, "wrong-model", sent=query.data)


def tree(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_publishing_twice_changes_nothing(put_out, own_store):
    head = artifact(4, 16, name="model")
    manifest = put_out(head)
    before = tree(own_store)
    assert manifest.digest == head.manifest.digest
    assert put_out(head).digest == manifest.digest
    assert tree(own_store) == before
    digest = manifest.digest.hex()
    assert set(before) == {
        ".format",
        ".lock",
        "model/current",
        f"model/{digest}/{FORMAT_FILE}",
        f"model/{digest}/{HEAD_FILE}",
        f"model/{digest}/{MANIFEST_FILE}",
    }


def test_publishing_an_older_version_again_makes_it_current(put_out, client):
    first, second = (artifact(4, 16, name="model", seed=seed) for seed in (1, 2))
    for head in (first, second, first):
        put_out(head)
        assert client.get("/v1/models/model").content == head.manifest.serialize()


def test_the_private_head_is_readable_by_its_owner_only(put_out, own_store):
    put_out(artifact(4, 16, name="model"))
    assert (published(own_store, "model") / HEAD_FILE).stat().st_mode & 0o077 == 0


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    "tamper",
    [
        lambda path: flip_last_byte(path / HEAD_FILE),
        lambda path: (path / HEAD_FILE).unlink(),
        lambda path: (path / HEAD_FILE).write_bytes(b""),
        lambda path: flip_last_byte(path / MANIFEST_FILE),
        lambda path: (path / MANIFEST_FILE).unlink(),
        lambda path: flip_last_byte(path / BACKBONE_DIRECTORY / "model.safetensors"),
        lambda path: (path / BACKBONE_DIRECTORY / "config.json").unlink(),
        shutil.rmtree,
    ],
    ids=[
        "head",
        "no-head",
        "empty-head",
        "manifest",
        "no-manifest",
        "backbone",
        "no-file",
        "nothing",
    ],
)
def test_a_tampered_artefact_is_not_published(
    tmp_path, own_store, backbone_directory, backbone_section, tamper
):
    head = artifact(12, 8, name="model").with_backbone(backbone_directory, backbone_section)
    head.save(tmp_path / "artifact")
    tamper(tmp_path / "artifact")
    with pytest.raises(ArtifactError):
        publish(tmp_path / "artifact", own_store)
    assert ModelStore(own_store).names() == []
    assert not own_store.exists() or tree(own_store) == {}


def test_a_store_that_cannot_be_written(tmp_path):
    artifact(4, 16, name="model").save(tmp_path / "artifact")
    (tmp_path / "store").write_text("a file")
    with pytest.raises((StoreError, ArtifactError)):
        publish(tmp_path / "artifact", tmp_path / "store")
    assert (tmp_path / "store").read_text() == "a file"


# --- stores that are not as they should be ------------------------------------------------------


def test_odd_entries_of_a_store_are_ignored(put_out, own_store, client, problem):
    put_out(artifact(4, 16, name="model"))
    directory = published(own_store, "model")
    for name in (
        ".hidden",
        "with space",
        "_underscore",
        "n\N{LATIN SMALL LETTER O WITH DIAERESIS}",
    ):
        shutil.copytree(own_store / "model", own_store / name)
    (own_store / "file").write_text("no directory")
    (own_store / "empty").mkdir()
    (own_store / "no-current" / directory.name).mkdir(parents=True)
    (own_store / "x" / "current").mkdir(parents=True)
    assert [row["name"] for row in client.get("/v1/models").json()["models"]] == ["model"]
    for name in (
        ".hidden",
        "with space",
        "_underscore",
        "n\N{LATIN SMALL LETTER O WITH DIAERESIS}",
    ):
        problem(client.get(f"/v1/models/{name}"), 404, "model-not-found")
    for name in ("empty", "no-current"):
        problem(client.get(f"/v1/models/{name}"), 404, "model-not-found")


def write(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def swap_manifest(home):
    """The manifest of another head under this head's digest."""
    (directory,) = (path for path in home.iterdir() if path.is_dir())
    write(directory / MANIFEST_FILE, artifact(4, 16, name=home.name, seed=9).manifest.serialize())


CORRUPTIONS = {
    "current not text": lambda home: write(home / "current", b"\xff\xfe\x00"),
    "current empty": lambda home: write(home / "current", b""),
    "current elsewhere": lambda home: write(home / "current", b"../healthy"),
    "current endless": lambda home: write(home / "current", b"a" * 5000),
    "manifest gone": lambda home: next(home.glob(f"*/{MANIFEST_FILE}")).unlink(),
    "manifest not JSON": lambda home: write(next(home.glob(f"*/{MANIFEST_FILE}")), b"{"),
    "manifest not canonical": lambda home: write(
        next(home.glob(f"*/{MANIFEST_FILE}")),
        next(home.glob(f"*/{MANIFEST_FILE}")).read_bytes() + b"\n",
    ),
    "manifest of another": swap_manifest,
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_corrupt_model_fails_alone_and_tells_nothing(
    put_out, own_store, client, problem, corrupt
):
    put_out(artifact(4, 16, name="healthy"))
    put_out(artifact(4, 16, name="sick"))
    corrupt(own_store / "sick")
    for path in ("/v1/models/sick", "/v1/models/sick/files/config.json"):
        body = problem(client.get(path), 503, "model-unavailable", retryable=True)
        assert str(own_store) not in json.dumps(body)
    headers = {"Content-Type": "application/octet-stream"}
    response = client.post("/v1/models/sick/infer", content=b"", headers=headers)
    problem(response, 503, "model-unavailable", retryable=True)
    assert client.get("/v1/models/healthy").status_code == 200
    # The others are still listed.
    response = client.get("/v1/models")
    assert response.status_code == 200
    assert [row["name"] for row in response.json()["models"]] == ["healthy"]


def test_a_current_that_names_no_version_is_not_found(put_out, own_store, client, problem):
    put_out(artifact(4, 16, name="model"))
    write(own_store / "model" / "current", b"0" * 64)
    problem(client.get("/v1/models/model"), 404, "model-not-found")
    assert client.get("/v1/models").json() == {"models": []}


def test_a_head_that_was_changed_in_the_store_is_not_served(
    put_out, own_store, make_service, problem
):
    healthy, sick = artifact(4, 16, name="healthy"), artifact(4, 16, name="sick")
    put_out(healthy)
    put_out(sick)
    flip_last_byte(published(own_store, "sick") / HEAD_FILE)
    with TestClient(
        create_app(Settings(store=own_store, workers=1, insecure_no_tenants=True))
    ) as client:
        service = make_service(client, {"healthy": healthy, "sick": sick})
        query = service.query("sick")
        answer = service.infer("sick", query.data)
        body = problem(answer, 503, "model-unavailable", sent=query.data, retryable=True)
        assert str(own_store) not in body["detail"]
        service.check_answers("healthy")

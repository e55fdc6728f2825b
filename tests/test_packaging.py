"""What is shipped: the wheel, and the server image built from the Dockerfile's own steps.

What the image may install is in `test_locks.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from veilhead import Client
from veilhead_models.artifact import HeadArtifact

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = {
    "veilhead",
    "veilhead_benchmarks",
    "veilhead_models",
    "veilhead_protocol",
    "veilhead_service",
}

LOCK = ROOT / "locks" / "service.txt"
INSTALL = "/opt/veilhead"
PINNED_BASE = "python:3.11-slim@sha256:" + "0" * 64
START_SECONDS = 60.0


# --- the wheel ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    """The paths in the wheel of the whole tree."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return [PurePosixPath(name) for name in archive.namelist()]


def test_the_wheel_holds_the_packages_and_nothing_else(wheel_names):
    tops = {path.parts[0] for path in wheel_names if not path.parts[0].endswith(".dist-info")}
    assert tops == PACKAGES


def test_every_package_says_that_it_is_typed(wheel_names):
    assert {PurePosixPath(package) / "py.typed" for package in PACKAGES} <= set(wheel_names)


def test_the_wheel_holds_code_only(wheel_names):
    """No tests, no data, no weights: they are fetched by name and digest."""
    inside = [path for path in wheel_names if path.parts[0] in PACKAGES]
    assert [path for path in inside if path.suffix != ".py" and path.name != "py.typed"] == []
    assert [path for path in inside if "tests" in path.parts] == []


def test_the_wheel_holds_every_source_file(wheel_names):
    sources = {
        PurePosixPath(*file.relative_to(ROOT).parts[1:])
        for root in ("protocol", "client_sdk", "models", "service", "benchmarks")
        for file in (ROOT / root).glob("veilhead*/**/*.py")
    }
    assert sources == {path for path in wheel_names if path.suffix == ".py"}


# --- the Dockerfile -------------------------------------------------------------------------------


def dockerfile():
    """The instructions as (name, rest), continued lines joined, stage by stage."""
    text = "\n".join(
        line for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines() if line[:1] != "#"
    )
    stages = [[]]
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, rest.strip()))
    return stages


def only(stage, wanted):
    """The one instruction of this name in a stage."""
    (rest,) = [rest for name, rest in stage if name == wanted]
    return rest


def copies(stage):
    """COPY instructions from the build context as (sources, destination)."""
    words = [shlex.split(rest) for name, rest in stage if name == "COPY"]
    return [(line[:-1], line[-1]) for line in words if not line[0].startswith("--")]


@pytest.fixture
def stages():
    return dockerfile()


def test_the_image_is_built_from_what_it_names(stages):
    _, build, final = stages
    sources = [source for names, _ in copies(build) for source in names]
    assert sources == [
        "locks/build.txt",
        "locks/service.txt",
        "pyproject.toml",
        "protocol/veilhead_protocol",
        "models/veilhead_models",
        "service/veilhead_service",
    ]
    assert copies(final) == []  # only from the build stage
    assert not any("pip" in rest for name, rest in final if name == "RUN")
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert [line[1:] for line in ignored if line.startswith("!")] == sources
    assert "*" in ignored


def test_the_image_runs_as_nobody_in_particular(stages):
    arguments, build, final = stages
    base = only(arguments, "ARG").partition("=")[0]
    assert only(build, "FROM") == f"${{{base}}} AS build"
    assert only(final, "FROM") == f"${{{base}}}"
    user, group = only(final, "USER").split(":")
    assert int(user) > 1000
    assert int(group) > 1000
    (users,) = [rest for name, rest in final if name == "RUN"]
    assert f"--uid {user} --gid {group}" in users
    names = [name for name, _ in final]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert names[names.index("USER") :].count("RUN") == 0
    assert only(final, "VOLUME") == "/store /state"
    assert json.loads(only(final, "ENTRYPOINT")) == ["veilhead-server"]


def base_check(build, **given):
    """The build stage's own check of its base, with these arguments."""
    first = next(rest for name, rest in build if name == "RUN")
    return subprocess.run(["/bin/sh", "-ec", first], env=given, capture_output=True, text=True)


def test_a_base_that_is_not_pinned_by_a_digest_is_refused(stages):
    _, build, _ = stages
    arguments = [rest for name, rest in build if name == "ARG"]
    assert arguments == ["PYTHON_IMAGE", "UNPINNED_BASE=no"]  # seen by the steps after them
    assert base_check(build, PYTHON_IMAGE=PINNED_BASE, UNPINNED_BASE="no").returncode == 0
    tagged = only(stages[0], "ARG").partition("=")[2]
    for base in (tagged, "", PINNED_BASE[:-1], "x@sha256:", f"{PINNED_BASE}0", "x@yes"):
        refused = base_check(build, PYTHON_IMAGE=base, UNPINNED_BASE="no")
        assert refused.returncode == 1, base
        assert "make pin-base" in refused.stderr
    assert base_check(build, PYTHON_IMAGE=tagged, UNPINNED_BASE="yes").returncode == 0


def test_the_image_installs_nothing_that_is_not_locked(stages):
    """Every call of pip checks hashes, or sees no index."""
    _, build, _ = stages
    calls = [
        words
        for name, rest in build
        if name == "RUN"
        for words in map(shlex.split, rest.split("&&"))
        if "pip" in words
    ]
    assert len(calls) == 4
    for words in calls:
        assert "--no-deps" in words
        assert "--no-index" in words or {"--require-hashes", "--only-binary"} <= set(words)


def test_two_builds_of_the_wheel_are_the_same(tmp_path):
    digests = set()
    for name in ("first", "second"):
        source = tmp_path / name
        for item in ("protocol", "client_sdk", "models", "service", "benchmarks"):
            copy(ROOT / item, source / item)
        copy(ROOT / "pyproject.toml", source)
        command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (wheel,) = (source / "dist").glob("*.whl")
        digests.add(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert len(digests) == 1


def run_build_stage(build, source, environment):
    """The build stage's COPY and RUN steps, with `environment` in the place of /opt/veilhead."""
    source.mkdir()
    shims = source.parent / "shims"
    shims.mkdir()
    # The base image has `python`; a system that runs these tests may have `python3` only.
    (shims / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (shims / "python").chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PATH"] = f"{shims}{os.pathsep}{os.environ['PATH']}"
    variables |= {"PYTHON_IMAGE": PINNED_BASE, "UNPINNED_BASE": "no"}
    assert only(build, "WORKDIR") == "/src"
    ran = 0
    for name, rest in build:
        if name == "COPY":
            ((names, destination),) = copies([(name, rest)])
            assert destination.endswith("/")
            for item in names:
                copy(ROOT / item, source / destination)
        elif name == "RUN":
            assert "/src" not in rest
            command = rest.replace(INSTALL, shlex.quote(str(environment)))
            done = subprocess.run(
                ["/bin/sh", "-e", "-c", command],
                cwd=source,
                env=variables,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{rest}\n{done.stdout}\n{done.stderr}"
            ran += 1
        else:
            assert name in ("ARG", "FROM", "WORKDIR")
    assert ran


def copy(origin, destination):
    """As COPY does it: a file into the directory, a directory's content into it."""
    if origin.is_dir():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(origin, destination, ignore=ignore, dirs_exist_ok=True)
    else:
        destination.mkdir(parents=True, exist_ok=True)
        shutil.copy(origin, destination)


def installed(environment, names):
    """Which of these modules can be imported in the environment."""
    script = f"import importlib.util as u; print([n for n in {names!r} if u.find_spec(n)])"
    found = inside(environment, "python", "-I", "-c", script)
    assert found.returncode == 0, found.stderr
    return set(json.loads(found.stdout.replace("'", '"')))


def versions(environment):
    """The installed version of every distribution in the environment."""
    script = (
        "import importlib.metadata, json\n"
        "found = {d.name: d.version for d in importlib.metadata.distributions()}\n"
        "print(json.dumps(found))"
    )
    found = json.loads(inside(environment, "python", "-I", "-c", script).stdout)
    return {name.lower().replace("_", "-"): version for name, version in found.items()}


def inside(environment, *command):
    """A command of the environment, with nothing of the tests' own around it."""
    return subprocess.run(
        [environment / "bin" / command[0], *command[1:]],
        cwd=environment.parent,
        env={"PATH": f"{environment}/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def check_bill_of_materials(environment, file, expected):
    """As `make sbom` makes it: every distribution with its version, and who needs what."""
    command = [Path(sys.executable).with_name("cyclonedx-py"), "environment"]
    options = ["--pyproject", ROOT / "pyproject.toml", "--mc-type", "application"]
    options += ["--output-reproducible", "--output-format", "JSON", "--output-file", file]
    done = subprocess.run(
        [*command, environment / "bin" / "python", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    bill = json.loads(file.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    root = bill["metadata"]["component"]
    listed = {item["name"].lower(): item["version"] for item in (root, *bill["components"])}
    assert {name.replace("_", "-"): version for name, version in listed.items()} == expected
    needed = {item["ref"]: set(item.get("dependsOn", ())) for item in bill["dependencies"]}
    assert len(needed[root["bom-ref"]]) > 10
    assert str(ROOT) not in file.read_text()


@contextmanager
def running(environment, final, store, state, port):
    """The image's ENTRYPOINT and CMD, on these places and port of loopback; gives the process."""
    replaced = {"/store": str(store), "/state": str(state), "8000": str(port)}
    replaced |= {"0.0.0.0": "127.0.0.1"}  # noqa: S104
    entry, *arguments = json.loads(only(final, "ENTRYPOINT")) + json.loads(only(final, "CMD"))
    assert replaced.keys() <= set(arguments)
    command = [environment / "bin" / entry, *(replaced.get(word, word) for word in arguments)]
    log = environment.parent / "service.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, "--workers", "1"],
            cwd=environment.parent,
            env={"PATH": f"{environment}/bin"},
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=30)


def health_command(final, port):
    """HEALTHCHECK's command, at this port."""
    exec_form = only(final, "HEALTHCHECK").partition(" CMD ")[2]
    command = json.loads(exec_form)
    assert command[0] == "python"
    assert "127.0.0.1:8000/readyz" in command[-1]
    return [*command[:-1], command[-1].replace(":8000/", f":{port}/")]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_the_image_serves_a_head_and_has_no_client(stages, tmp_path):
    """One environment, since installing it is what takes long."""
    _, build, final = stages
    environment = tmp_path / "veilhead"
    run_build_stage(build, tmp_path / "src", environment)

    # What is in it.
    ours = installed(environment, sorted(PACKAGES))
    assert ours == {"veilhead_models", "veilhead_protocol", "veilhead_service"}
    heavy = ["torch", "transformers", "sklearn", "pytest", "numpy"]
    assert installed(environment, heavy) == {"numpy"}
    failed = inside(environment, "python", "-I", "-c", "import veilhead")
    assert failed.returncode != 0
    assert "No module named 'veilhead'" in failed.stderr
    commands = {path.name for path in (environment / "bin").glob("veilhead*")}
    assert commands == {"veilhead-server"}
    found = versions(environment)
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK.read_text(), re.M))
    assert {name: version for name, version in found.items() if name != "veilhead"} == locked
    assert {"fastapi", "numpy", "tenseal"} <= locked.keys()
    build_tools = environment.with_name(f"{environment.name}-build")
    complete = inside(build_tools, "python", "-m", "pip", "--python", environment, "check")
    assert complete.returncode == 0, complete.stdout
    check_bill_of_materials(environment, tmp_path / "sbom.json", found)

    # What it says.
    helped = inside(environment, "veilhead-server", "--help")
    assert helped.returncode == 0, helped.stderr
    for subcommand in ("train", "publish", "run"):
        assert subcommand in helped.stdout

    # What it does.
    generator = np.random.default_rng(7)
    artifact = HeadArtifact.from_weights(
        generator.normal(scale=0.5, size=(3, 32)), generator.normal(size=3), ["a", "b", "c"]
    )
    artifact.save(tmp_path / "artefacts" / "small")
    store = tmp_path / "store"
    published = inside(
        environment,
        "veilhead-server",
        "publish",
        tmp_path / "artefacts" / "small",
        "--store",
        store,
    )
    assert published.returncode == 0, published.stderr
    state = tmp_path / "state"
    added = inside(environment, "veilhead-server", "tenants", "add", "clinic", "--state", state)
    assert added.returncode == 0, added.stderr
    port = free_port()
    health = health_command(final, port)
    assert inside(environment, *health).returncode != 0  # it can fail
    with running(environment, final, store, state, port) as process:
        deadline = time.monotonic() + START_SECONDS
        while inside(environment, *health).returncode != 0:
            log = (tmp_path / "service.log").read_text()
            assert process.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.1)
        embeddings = generator.normal(size=(4, 32)) / 8
        url = f"http://127.0.0.1:{port}"
        with Client(url, model="small", api_key=added.stdout.strip()) as client:
            logits = client.logits(embeddings)
            bound = client.manifest.head.error_bound
    assert np.abs(logits - artifact.logits(embeddings)).max() <= bound
    # The service ends in order, and then by the signal itself.
    assert process.returncode in (0, -signal.SIGTERM)
    log = (tmp_path / "service.log").read_text()
    assert "Application shutdown complete" in log
    assert "Traceback" not in log

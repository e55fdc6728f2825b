"""A model that costs workers, or cannot be read, costs the others nothing: real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
from support.heads import artifact, unit_rows
from support.tenants import add_tenant, bearer
from typer.testing import CliRunner

from veilhead import BatchError, Client, ServiceResponseError
from veilhead_benchmarks.processes import ServiceProcess
from veilhead_service import frames, worker
from veilhead_service.cli import app
from veilhead_service.tenants import KeyScope

#: A worker that loads the model `deadly` ends while a file is there, as by a fault in a library.
DEADLY = """
import os, signal
from pathlib import Path
import veilhead_service.head_loading as loading

load_artifact = loading.load_artifact

def load(directory, head_key):
    if "/deadly/" in str(directory) and Path({trigger!r}).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return load_artifact(directory, head_key)

loading.load_artifact = load
"""

#: Root may read everything; without these privileges it is a user like others.
UNPRIVILEGED = (
    [
        "setpriv",
        *(f"--{kind}=-dac_override,-dac_read_search" for kind in ("bounding-set", "inh-caps")),
    ]
    if os.geteuid() == 0
    else []
)


class Case:
    """A store with a good model and a bad one, and a service on it with one tenant."""

    def __init__(self, vendor):
        self.vendor = vendor
        self.root = vendor.root
        self.good = artifact(4, 32, name="good")
        vendor.publish(self.good)
        self.state = self.root / "state"
        self.trigger = self.root / "trigger"
        self.key = add_tenant(self.state, "clinic", scopes=frozenset(KeyScope))
        (self.root / "site").mkdir()
        (self.root / "site" / "sitecustomize.py").write_text(
            DEADLY.format(trigger=str(self.trigger))
        )

    @contextmanager
    def running(self, workers=2, prefix=(), **settings):
        paths = [str(self.root / "site"), os.environ.get("PYTHONPATH", "")]
        service = ServiceProcess(
            self.vendor.store,
            self.root / "log",
            workers=workers,
            settings={"insecure_no_tenants": False, "state_directory": self.state} | settings,
            environment={"PYTHONPATH": os.pathsep.join(paths)},
            prefix=prefix,
        )
        with service:
            self.service = service
            yield service

    def client(self, name):
        return Client(self.service.url, name, api_key=self.key)

    def check(self, head=None):
        """A model answers rightly."""
        head = head or self.good
        rows = unit_rows(2, head.weight.shape[1])
        with self.client(head.name) as client:
            error = np.abs(client.logits(rows) - head.logits(rows)).max()
        assert error <= head.manifest.head.error_bound

    def refusal(self, name, dimensions=32):
        """The problem that a query for a model gets, and how long that took."""
        with self.client(name) as client:
            began = time.monotonic()
            with pytest.raises(BatchError) as caught:
                client.logits(unit_rows(1, dimensions))
        (error,) = caught.value.errors.values()
        assert isinstance(error, ServiceResponseError)
        return error.problem, error.status, time.monotonic() - began

    def get(self, path):
        return httpx2.get(
            self.service.url + path, headers=bearer(self.key), trust_env=False, timeout=20
        )

    @property
    def unavailable(self):
        """What /readyz says, to whoever asks."""
        answer = httpx2.get(f"{self.service.url}/readyz", trust_env=False, timeout=20)
        assert answer.status_code == 200
        rows = answer.json().get("unavailable_models", [])
        return {row["name"]: row["why"] for row in rows}

    def log(self):
        return (self.root / "log").read_text()

    def listed(self):
        arguments = ["models", "list", "--json", "--store", str(self.vendor.store)]
        result = CliRunner().invoke(app, [*arguments, "--state", str(self.state)])
        assert result.exit_code == 0, result.output
        return {row["name"]: row for row in json.loads(result.stdout)["models"]}


def wait_for(condition, seconds=30):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def case(vendor):
    return Case(vendor)


def test_a_service_starts_and_runs_without_a_model_that_kills_its_loaders(case):
    """It is named everywhere, refused at once, and served again when it is well."""
    deadly = artifact(5, 32, name="deadly")
    case.vendor.publish(deadly)
    case.trigger.touch()
    with case.running() as service:
        case.check()
        wait_for(lambda: case.unavailable == {"deadly": "quarantined"})
        wait_for(lambda: len(service.workers()) == 2)
        workers = service.workers()
        assert case.refusal("deadly")[:2] == ("model-unavailable", 503)
        assert 'veilhead_model_unavailable{model="deadly",reason="quarantined"} 1.0' in (
            case.get("/metrics").text
        )
        assert "the model deadly, version " in case.log()
        assert "it was ended by SIGKILL" in case.log()
        wait_for(lambda: case.listed()["deadly"]["state"] == "quarantined")
        assert "SIGKILL" in case.listed()["deadly"]["error"]
        assert case.listed()["good"]["state"] == "served"
        time.sleep(3)  # more than one look at the store
        case.check()
        assert service.workers() == workers  # nobody else has died of it

        case.trigger.unlink()
        retry = ["models", "retry", "deadly", "--state", str(case.state)]
        assert CliRunner().invoke(app, retry).exit_code == 0
        wait_for(lambda: case.unavailable == {})
        case.check(deadly)
        wait_for(lambda: case.listed()["deadly"]["state"] == "served")


def test_a_model_that_kills_its_loaders_is_published_under_load(case):
    """Somebody who asks for another model all the time sees nothing of it."""
    case.trigger.touch()
    with case.running() as service:
        case.check()
        stop, failures, answers = threading.Event(), [], []

        def ask():
            with case.client("good") as client:
                rows = unit_rows(1, 32)
                while not stop.is_set():
                    try:
                        client.logits(rows)
                    except Exception as error:
                        failures.append(error)
                    answers.append(time.monotonic())

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            wait_for(lambda: len(answers) > 10)
            case.vendor.publish(artifact(5, 32, name="deadly"))
            wait_for(lambda: case.unavailable == {"deadly": "quarantined"})
            wait_for(lambda: len(service.workers()) == 2)
            seen = len(answers)
            wait_for(lambda: len(answers) > seen + 10)
        finally:
            stop.set()
            asking.join()
        assert failures == []
        restarts = case.get("/metrics").text.partition('restarts_total{reason="died"} ')[2]
        assert float(restarts.splitlines()[0]) <= 2


def test_queries_at_once_for_a_deadly_model_cost_one_worker_and_not_all(case):
    """Whoever asks first loads it; the others wait for what becomes of that."""
    for name in ("a", "b", "deadly"):  # two fit ahead, and not the third
        case.vendor.publish(artifact(60, 384, name=name))
    with case.running(workers=4, worker_head_bytes=2**20) as service:
        wait_for(lambda: len(service.workers()) == 4)
        case.check()
        before = set(service.workers())
        case.trigger.touch()
        problems = []
        threads = [
            threading.Thread(target=lambda: problems.append(case.refusal("deadly", 384)))
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {problem for problem, *_ in problems} <= {"model-unavailable", "worker-unavailable"}
        wait_for(lambda: case.unavailable == {"deadly": "quarantined"})
        assert len(before - set(service.workers())) == 1
        case.check()


def test_workers_that_die_while_they_load_nothing_count_against_no_model(case):
    """As when the kernel kills one for the memory that somebody else took."""
    with case.running(workers=1) as service:
        for _ in range(4):
            wait_for(lambda: len(service.workers()) == 1 and service.status("/readyz") == 200)
            case.check()
            (pid,) = service.workers()
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda gone=pid: gone not in service.workers())
        wait_for(lambda: service.status("/readyz") == 200)
        case.check()
        assert case.unavailable == {}
        assert "quarantined" not in case.log()


def test_a_load_that_never_ends_is_ended(case):
    """A head that is a pipe: whoever opens it waits for ever."""
    case.vendor.publish(artifact(5, 32, name="endless"))
    (head,) = (case.vendor.store / "endless").glob("*/head.safetensors")
    head.unlink()
    os.mkfifo(head)
    with case.running(load_seconds=0.5):
        case.check()
        wait_for(lambda: case.unavailable == {"endless": "quarantined"})
        assert case.refusal("endless")[0] == "model-unavailable"
        assert "it took longer than 0.5" in case.log()
        case.check()


def test_one_worker_alone_tries_what_is_published_apart(case):
    """A head that ends its loader does not cost the only worker."""
    healthy = artifact(5, 32, name="healthy")
    with case.running(workers=1) as service:
        case.check()
        before = service.workers()
        case.trigger.touch()
        case.vendor.publish(healthy)
        case.vendor.publish(artifact(5, 32, name="deadly"))
        wait_for(lambda: "deadly" in case.unavailable)
        case.check()
        case.check(healthy)
        assert before[0] in service.workers()  # it was not touched by any of that


def test_a_head_that_no_worker_may_hold_is_not_loaded(case):
    case.vendor.publish(artifact(4096, 1100, name="huge"))
    with case.running(worker_memory_bytes=2**26) as service:
        case.check()
        assert case.refusal("huge", 1100)[:2] == ("model-unavailable", 503)
        assert case.unavailable == {"huge": "refused"}
        assert "raise worker_memory_bytes" in case.log()
        assert len(service.workers()) == 2
        assert "quarantined" not in case.log()


def test_a_load_that_takes_too_much_memory_fails_alone(store, tmp_path):
    """The worker says so and goes on."""
    artifact(3000, 384, name="large").save(tmp_path / "large")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(60)
        number = str(theirs.fileno())
        command = [sys.executable, "-m", "veilhead_service.worker", number, str(2**30), str(2**23)]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        try:
            assert worker._read(ours) == [frames.READY]
            score = Path(f"/proc/{process.pid}/oom_score_adj").read_text()
            ours.sendall(frames.write([frames.LOAD, b"1" * 32, os.fsencode(tmp_path / "large")]))
            assert worker._read(ours) == [frames.LOADING]
            assert worker._read(ours) == [frames.LOADED]
            kind, refusal = worker._read(ours)
            assert kind == frames.REFUSED
            assert "takes more memory" in refusal.decode()
            (digits,) = (store / "digits").glob("*/manifest.json")
            ours.sendall(frames.write([frames.LOAD, b"2" * 32, os.fsencode(digits.parent)]))
            answers = [worker._read(ours)[0] for _ in range(3)]
            assert answers == [frames.LOADING, frames.LOADED, frames.READY]
            own = Path("/proc/self/oom_score_adj").read_text()
            assert int(score) > int(own)  # it goes before the service
        finally:
            process.kill()
            process.wait()


# --- what cannot be read ------------------------------------------------------------------------


def _version(home):
    (version,) = (path for path in home.iterdir() if path.is_dir())
    return version


def _closed(home):
    home.chmod(0)


def _closed_version(home):
    _version(home).chmod(0)


def _closed_head(home):
    (_version(home) / "head.safetensors").chmod(0)


def _loop(home):
    shutil.rmtree(home)
    home.symlink_to(home.name)


def _version_loop(home):
    version = _version(home)
    shutil.rmtree(version)
    version.symlink_to(version.name)


def _pipe(home):
    (home / "current").unlink()
    os.mkfifo(home / "current")


def _manifest_pipe(home):
    (_version(home) / "manifest.json").unlink()
    os.mkfifo(_version(home) / "manifest.json")


def _nonsense(home):
    (_version(home) / "manifest.json").write_text("{")


def _directory(home):
    (_version(home) / "manifest.json").unlink()
    (_version(home) / "manifest.json").mkdir()


def _record(home):
    version = _version(home)
    version.with_name(f"{version.name}.retired").symlink_to("loop")
    version.with_name("loop").symlink_to("loop")


DAMAGES = {
    f"bad{damage.__name__.replace('_', '-')}": damage
    for damage in (
        *(_closed, _closed_version, _closed_head, _loop, _version_loop),
        *(_pipe, _manifest_pipe, _nonsense, _directory, _record),
    )
}


@pytest.fixture
def opened_again(vendor):
    yield
    for path in vendor.store.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o700)
    for path in vendor.store.glob("*"):
        if not path.is_symlink():
            path.chmod(0o700)


@pytest.mark.usefixtures("opened_again")
def test_what_cannot_be_read_leaves_the_others(case):
    """All kinds at once, before the start, and one more while it runs."""
    for name, damage in DAMAGES.items():
        case.vendor.publish(artifact(3, 32, name=name))
        damage(case.vendor.store / name)
    late = artifact(3, 32, name="late")
    case.vendor.publish(late)
    with case.running(prefix=UNPRIVILEGED) as service:
        case.check()
        case.check(late)
        wait_for(lambda: set(case.unavailable) == set(DAMAGES))
        assert case.unavailable == {
            name: "refused" if name == "bad-closed-head" else "unreadable" for name in DAMAGES
        }
        assert case.refusal("bad-closed-head")[:2] == ("model-unavailable", 503)
        names = [row["name"] for row in case.get("/v1/models").json()["models"]]
        assert {"good", "late"} <= set(names)
        for name in DAMAGES.keys() - {"bad-closed-head"}:  # that one's manifest can be read
            answer = case.get(f"/v1/models/{name}")
            assert answer.status_code == 503, name
            assert answer.json()["type"] == "urn:veilhead:problem:model-unavailable"
            assert str(case.vendor.store) not in answer.text
        (case.vendor.store / "late").chmod(0)
        wait_for(lambda: case.unavailable.get("late") == "unreadable")
        assert "the model late cannot be read: " in case.log()
        case.check()
        (case.vendor.store / "late").chmod(0o700)
        wait_for(lambda: "late" not in case.unavailable)
        case.check(late)
        assert len(service.workers()) == 2
        descriptors = len(list(Path(f"/proc/{service.pid}/fd").iterdir()))
        time.sleep(5)  # looks at the store
        assert len(list(Path(f"/proc/{service.pid}/fd").iterdir())) <= descriptors + 1
        assert case.get("/metrics").status_code == case.get("/v1/usage").status_code == 200
    assert case.log().count("the model bad-closed cannot be read") == 1  # and not at every look


@pytest.mark.usefixtures("opened_again")
def test_a_store_that_cannot_be_read_is_told_and_looked_at_again(case):
    with case.running(prefix=UNPRIVILEGED):
        case.check()
        case.vendor.store.chmod(0)
        wait_for(lambda: "loading heads failed (StoreError)" in case.log())
        assert f"{case.vendor.store} cannot be read: Permission denied" in case.log()
        assert case.get("/v1/models").status_code == 503
        assert case.get("/v1/models/good").status_code == 503
        assert case.get("/metrics").status_code == case.get("/v1/usage").status_code == 200
        case.vendor.store.chmod(0o700)
        case.check()
        case.vendor.publish(artifact(3, 32, name="later"))
        wait_for(lambda: "later" in case.get("/v1/models").text)


# --- the start ----------------------------------------------------------------------------------


def start(*arguments, environment=None, prefix=()):
    command = [*prefix, sys.executable, "-m", "veilhead_service", "run", "--port", "0"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_start_that_fails_says_why_in_one_line(vendor, tmp_path):
    """Whatever the reason is: no traceback, and an exit status of its own."""
    store, state = tmp_path / "store", tmp_path / "state"
    store.mkdir()
    state.write_text("not a directory")
    no_workers = tmp_path / "site"
    no_workers.mkdir()
    (no_workers / "sitecustomize.py").write_text(
        "import os, sys\nif 'veilhead_service.worker' in sys.orig_argv: os._exit(7)\n"
    )
    path = os.pathsep.join([str(no_workers), os.environ.get("PYTHONPATH", "")])
    log = tmp_path / "held"
    log.mkdir()
    add_tenant(log, "clinic")
    (log / "access.log").mkdir()
    insecure = ("--store", store, "--insecure-no-tenants")
    for failed, reason in (
        (start("--store", store, "--state", state), "state"),
        (start("--store", store, "--state", log), "access.log cannot be read"),
        (start(*insecure, environment={"PYTHONPATH": path}), "it ended with status 7"),
        (start(*insecure, "--host", "192.0.2.1"), "loopback"),
    ):
        assert failed.returncode != 0, failed.stderr
        assert "Traceback" not in failed.stderr
        last = failed.stderr.strip().splitlines()[-1]
        assert last.startswith("veilhead-server: "), failed.stderr
        assert reason in last


def test_a_port_that_is_taken_ends_the_start_without_a_traceback(vendor, tmp_path):
    (tmp_path / "store").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ["--store", tmp_path / "store", "--insecure-no-tenants", "--port", port]
        failed = start(*command)
    assert failed.returncode != 0
    assert "Traceback" not in failed.stderr
    assert "address already in use" in failed.stderr

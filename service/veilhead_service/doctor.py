"""`veilhead-server doctor`: whether this machine is fit to run the service."""

from __future__ import annotations

import errno
import http.client
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from veilhead_protocol.checks import (
    Check,
    Outcome,
    check_not_writable_by_others,
    check_packages,
    check_parameters,
    check_private,
    check_python,
    healthy,
    installed,
    passed,
    render,
)
from veilhead_protocol.errors import (
    ConfigurationError,
    SecretFileError,
    StateError,
    StoreError,
    VeilheadError,
)
from veilhead_service.background import reason_of
from veilhead_service.machine import available_bytes
from veilhead_service.settings_cli import Assignments, ConfigFile, from_flags

if TYPE_CHECKING:
    from veilhead_service.settings import Settings

_PACKAGES: Final = (
    *("veilhead", "tenseal", "numpy", "safetensors", "fastapi", "starlette", "uvicorn"),
    *("pydantic-settings", "prometheus-client", "zstandard"),
)

#: No clock that is right is before this: the year of this version.
_EARLIEST: Final = datetime(2026, 1, 1, tzinfo=UTC)

#: Below so many connections a busy address is in the way of others.
_FEW_CONNECTIONS: Final = 512

#: How long a service that runs already may take to say that it is ready.
_PROBE_SECONDS: Final = 2.0

#: Not getrusage's maximum: that begins with what the parent had when it forked.
_MEASURE: Final = """\
from veilhead_protocol import seal_io
from veilhead_protocol.parameters import PARAMETER_SETS
import veilhead_service.worker
for parameters in PARAMETER_SETS.values():
    seal_io.runtime(parameters)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM:"):
        print(int(line.split()[1]) * 1024)
"""


def doctor(
    store: Annotated[Path | None, typer.Option(help="The store that `run` serves.")] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Check this machine, the store and the settings before `run`.

    A line for each check: ok, warn or fail, with what to do about it. Nothing is changed. Exit
    status 1 when a check fails.

    Example: veilhead-server doctor --store store
    """
    checks = [check_python(), *check_packages(_PACKAGES, "veilhead[service]")]
    if healthy(checks):
        try:
            settings, _ = from_flags(config, assignments, store=store)
        except VeilheadError as error:
            advice = "correct it; `veilhead-server settings` prints all"
            checks.append(Check("settings", Outcome.FAIL, str(error), advice))
        else:
            checks += examine(settings)
    typer.echo(render(checks, as_json=as_json))
    raise typer.Exit(0 if healthy(checks) else 1)


def examine(settings: Settings) -> list[Check]:
    """Every check of these settings on this machine."""
    return [
        *check_parameters(),
        *check_store(settings),
        *check_state(settings.state_directory),
        check_tenants(settings),
        check_port(settings.host, settings.port),
        check_descriptors(settings),
        check_disk(settings),
        check_core_dumps(),
        check_swap(Path("/proc/swaps")),
        check_memory(settings.workers, settings.key_memory_bytes, available_bytes()),
        check_clock(datetime.now(UTC)),
        *([check_tracing()] if settings.tracing else []),
    ]


def check_store(settings: Settings) -> list[Check]:
    """Whether the store can be read, only its owner writes to it, and heads are private."""
    from veilhead_service.model_store import ModelStore
    from veilhead_service.store_versions import check_store_format

    store = settings.store
    if not store.is_dir():
        return [
            Check(
                "store",
                Outcome.FAIL,
                f"there is no directory {store}",
                "`veilhead-server publish ARTEFACT --store STORE` makes it",
            )
        ]
    checks = [
        check_not_writable_by_others(
            "store directory", store, advice=f"chmod o-w {store}: whoever writes there, publishes"
        )
    ]
    try:
        head_key = settings.open_head_key()
    except SecretFileError as error:
        advice = "give the service the head key that `veilhead-server head-key new` made"
        return [*checks, Check("head key", Outcome.FAIL, str(error), advice)]
    if head_key is not None:
        checks.append(passed("head key", f"id {head_key.id.hex()}"))
    source = ModelStore(
        store,
        head_key_id=None if head_key is None else head_key.id,
        require_encrypted_heads=settings.require_encrypted_heads,
    )
    try:
        check_store_format(store)
        names = source.names()
    except StoreError as error:
        return [*checks, Check("store", Outcome.FAIL, str(error), "let the service's user read it")]
    for name in names:
        try:
            model = source.current(name)
        except (StoreError, OSError) as error:
            advice = "let the service's user read it, or publish the model again"
            checks.append(Check(f"model {name}", Outcome.FAIL, reason_of(error), advice))
        else:
            found = "nothing" if model is None else model.manifest.digest.hex()[:12]
            checks.append(passed(f"model {name}", f"stands for {found}"))
    if not names:
        advice = "`veilhead-server publish`; a running service notices"
        checks.append(Check("models", Outcome.WARN, "none is published", advice))
    for head in sorted(store.glob("*/*/head*")):
        checks.append(check_private("private head", head, advice=f"chmod 600 {head}"))
    return checks


def check_state(directory: Path) -> list[Check]:
    """Whether the state directory is the service's alone, or can be made."""
    name = "state directory"
    if not directory.exists():
        parent = next(found for found in directory.absolute().parents if found.exists())
        if os.access(parent, os.W_OK):
            return [passed(name, f"{directory} is not there yet and can be made")]
        advice = f"let the service's user write to {parent}, or set state_directory"
        return [Check(name, Outcome.FAIL, f"{directory} cannot be made", advice)]
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        advice = "give it to the service's user"
        return [Check(name, Outcome.FAIL, f"{directory} cannot be written", advice)]
    return [check_private(name, directory, advice=f"chmod 700 {directory}")]


def check_tenants(settings: Settings) -> Check:
    """Whether anybody may ask the service."""
    from veilhead_service.state import has_tenants

    name = "tenants"
    if settings.insecure_no_tenants:
        advice = "make tenants before anybody else reaches the port, through a proxy too"
        return Check(name, Outcome.WARN, "insecure_no_tenants: everybody may ask", advice)
    try:
        found = has_tenants(settings.state_directory)
    except StateError as error:
        return Check(name, Outcome.FAIL, str(error), "put a backup in its place")
    if not found:
        advice = "`veilhead-server tenants add NAME`; a running service notices"
        return Check(name, Outcome.WARN, "none yet: every request gets 401", advice)
    return passed(name, "there are some")


def check_port(host: str, port: int) -> Check:
    """Whether the service could listen there, or already answers there."""
    where = f"{host} port {port}"
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE and _is_ready(host, port):
            return passed("port", f"{where}: a service answers there, and is ready")
        advice = "stop what listens there, or set host and port"
        return Check("port", Outcome.FAIL, f"{where}: {error.strerror}", advice)
    return passed("port", f"{where} is free")


def _is_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", "/readyz")
        return bool(json.loads(connection.getresponse().read())["status"] == "ready")
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return False
    finally:
        connection.close()


def check_descriptors(settings: Settings) -> Check:
    """Whether the limit of open files leaves enough for connections; `run` raises the soft one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    name = "open files"
    try:
        most = settings.connections(hard)
    except ConfigurationError as error:
        advice = "raise it where the service is started: systemd, the container, limits.conf"
        return Check(name, Outcome.FAIL, str(error), advice)
    found = f"limit {hard}, at most {most} connections"
    if settings.max_connections is None and most < _FEW_CONNECTIONS:
        return Check(name, Outcome.WARN, found, "raise it: `ulimit -n`, LimitNOFILE=, --ulimit")
    return passed(name, found)


def check_disk(settings: Settings) -> Check:
    """Whether the access log's disk has more free than the reserve that the log leaves."""
    name = "disk of the state"
    parents = (settings.state_directory.absolute(), *settings.state_directory.absolute().parents)
    free = shutil.disk_usage(next(found for found in parents if found.exists())).free
    found = f"{free / 2**20:.0f} MiB free, reserve {settings.disk_reserve_bytes / 2**20:.0f} MiB"
    if free <= settings.disk_reserve_bytes * 2:
        return Check(name, Outcome.WARN, found, "the access log stops at the reserve: make room")
    return passed(name, found)


def check_core_dumps() -> Check:
    """Whether a crash could write this process's memory to a file."""
    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    if soft == 0:
        return passed("core dumps", "off")
    return Check(
        "core dumps",
        Outcome.WARN,
        "a crash may write memory to a file: heads and requests",
        "start the service with `ulimit -c 0`, LimitCORE=0 or --ulimit core=0",
    )


def check_swap(table: Path) -> Check:
    """Whether memory can reach a disk; `table` is /proc/swaps."""
    try:
        areas = table.read_text().splitlines()[1:]
    except OSError:
        return Check("swap", Outcome.WARN, f"{table} cannot be read", "see that swap is off")
    if not areas:
        return passed("swap", "off")
    advice = "swapoff -a, or encrypt it: heads in memory may reach the disk"
    return Check("swap", Outcome.WARN, f"on, {len(areas)} area(s)", advice)


def worker_bytes() -> int | None:
    """Memory of a worker that has loaded its libraries, measured; None when it does not start."""
    command = [sys.executable, "-c", _MEASURE]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, timeout=120, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return int(done.stdout)


def check_memory(workers: int, key_bytes: int, available: int | None) -> Check:
    """Whether the workers fit into the memory that is available, `machine.available_bytes`."""
    each = worker_bytes()
    if each is None:
        advice = "run `python -m veilhead_service.worker 0` and read its message"
        return Check("memory", Outcome.FAIL, "a worker does not start", advice)
    needed = workers * each + key_bytes
    text = f"{workers} workers of {each / 2**20:.0f} MiB, keys {key_bytes / 2**20:.0f} MiB"
    if available is None:
        return Check(
            "memory", Outcome.WARN, f"{text}; nobody says what is free", "see that it fits"
        )
    text += f", {available / 2**20:.0f} MiB available to this machine and control group"
    if needed > available:
        return Check("memory", Outcome.FAIL, text, "fewer workers, less for keys, or more memory")
    if needed > available * 0.75:
        return Check("memory", Outcome.WARN, text, "heads and requests need some too")
    return passed("memory", text)


def check_clock(now: datetime) -> Check:
    """Whether the clock can be right: keys, tenants and retirements expire by it."""
    shown = now.isoformat(timespec="seconds")
    if now < _EARLIEST:
        return Check("clock", Outcome.FAIL, f"it says {shown}", "set it, and keep it by NTP")
    return passed("clock", shown)


def check_tracing() -> Check:
    """Whether the packages that tracing needs are there."""
    found = installed("opentelemetry-exporter-otlp-proto-http")
    if found is None:
        return Check("tracing", Outcome.FAIL, "not installed", "pip install 'veilhead[otel]'")
    return passed("tracing", f"opentelemetry-exporter-otlp-proto-http {found}")

"""A run: requests and shapes by their numbers, good queries in between, and what is level after it.

Every number stands for a request or a shape, which follows from the seed and the number alone and
leaves the service as it found it, so that it can be sent again by itself.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np
from rich.table import Table

from veilhead_benchmarks.console import wide_console
from veilhead_benchmarks.hostile import shapes
from veilhead_benchmarks.hostile.promises import caller_of
from veilhead_benchmarks.hostile.requests import make_request
from veilhead_benchmarks.hostile.shapes import Sent
from veilhead_benchmarks.hostile.wire import (
    Answer,
    Connection,
    NoAnswerError,
    Request,
    UnreadableError,
)
from veilhead_benchmarks.hostile.world import Held, World, put, register, running
from veilhead_benchmarks.processes import unit_rows
from veilhead_service.routes import MESSAGE_TYPE

#: A good query is asked after so many numbers.
_CHECK_EVERY: Final = 500

#: Violations that are described; the others are counted.
_DESCRIBED: Final = 50

#: What the service holds is measured after this part of a run, and again at its end.
_WARM: Final = 0.1

#: What may be more at the end: of memory, also a part; of open files; and of the disk, some for
#: each request of a tenant, which is a line of the access log.
_MORE_BYTES: Final = 48 * 2**20
_MORE_MEMORY: Final = 0.05
_MORE_FILES: Final = 6
_LINE_BYTES: Final = 800
_MORE_DISK: Final = 2**20

#: How often each shape comes, in a thousand numbers; the rest are single requests.
_SHAPES: Final = (
    ("stream", 14), ("flood", 2), ("deaf", 1), ("unfinished", 3), ("slow", 1), ("crowd", 1),
    ("ambiguous", 40), ("trailers", 10), ("garbled", 60),
)  # fmt: skip

#: What stands between the service's answers and the judge; nothing, but in tests of this.
Around = Callable[[Request, Answer], None]


@dataclass(frozen=True)
class Violation:
    """A promise that was broken."""

    number: int
    request: str
    promise: str


@dataclass
class HostileReport:
    """What came of a run.

    Attributes:
        seed: what the requests follow from.
        requests: how many were sent, those of shapes included.
        numbers: how many numbers that took.
        tenants_requests: those of the requests that carried a good API key.
        seconds: how long it took.
        answers: how often each route answered with each status and code.
        sent: how many requests each shape sent.
        checks: good queries in between that got the right logits.
        evaluations: queries that a worker evaluated.
        warm: what the service held after the first part.
        end: what it held at the end.
        lives: answers to /livez, which was asked for all the while.
        slowest_live_seconds: the slowest of them.
        broken: violations, those that are not described included.
        violations: the first of them.
    """

    seed: int
    requests: int = 0
    numbers: int = 0
    tenants_requests: int = 0
    seconds: float = 0.0
    answers: Counter[tuple[str, int, str]] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    checks: int = 0
    evaluations: int = 0
    warm: Held | None = None
    end: Held | None = None
    lives: int = 0
    slowest_live_seconds: float = 0.0
    broken: int = 0
    violations: list[Violation] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every promise was kept, and there was something to keep."""
        return self.requests > 0 and self.checks > 0 and not self.broken

    def add(self, violation: Violation) -> None:
        """Count a violation, and describe it when it is one of the first."""
        self.broken += 1
        if len(self.violations) < _DESCRIBED:
            self.violations.append(violation)

    def judge_level(self, number: int, tenants_requests: int) -> None:
        """Compare what was held at the end with what was held warm, so many requests before."""
        if self.warm is None or self.end is None:
            return
        more = self.end.resident_bytes - self.warm.resident_bytes
        if more > _MORE_BYTES + _MORE_MEMORY * self.warm.resident_bytes:
            self.add(Violation(number, "(all before)", f"memory grew by {more / 2**20:.0f} MiB"))
        files = self.end.descriptors - self.warm.descriptors
        if files > _MORE_FILES:
            self.add(Violation(number, "(all before)", f"{files} more files are open"))
        disk = self.end.disk_bytes - self.warm.disk_bytes
        if disk > _MORE_DISK + _LINE_BYTES * tenants_requests:
            told = f"{disk} bytes were written for {tenants_requests} requests of tenants"
            self.add(Violation(number, "(all before)", told))


class _Run:
    """A run that is under way."""

    def __init__(self, report: HostileReport, world: World, around: Around) -> None:
        self._report = report
        self._world = world
        self._around = around

    def judge(self, request: Request, answer: Answer) -> str | None:
        """What is wrong with an answer; counts it, and leaves the tenants' keys as they were."""
        self._around(request, answer)
        self._report.tenants_requests += caller_of(self._world, request) is not None
        wrong = shapes.judge_of(self._world, self._count)(request, answer)
        self._restore(request, answer)
        return wrong

    def _count(self, route: str, status: int, code: str) -> None:
        self._report.answers[route, status, code] += 1

    def _restore(self, request: Request, answer: Answer) -> None:
        caller = caller_of(self._world, request)
        if caller is None:
            return
        if request.method == "DELETE" and answer.status == 204:
            register(self._world, caller)
        if request.method == "PUT" and answer.status == 201:
            self._world.ask(Request("DELETE", request.target, b"", (caller.authorization,)))

    def send(self, number: int) -> None:
        """Send what this number stands for."""
        report, world = self._report, self._world
        generator = random.Random(f"{report.seed}:{number}")  # noqa: S311
        draw = generator.randrange(1000)
        shape = "request"
        for name, often in _SHAPES:
            if 0 <= draw < often:
                shape = name
            draw -= often
        request: Request | None = None
        if shape == "request":
            request = make_request(world, report.seed, number)
            sent = self._request(request)
        elif shape in ("deaf", "unfinished"):
            sent = getattr(shapes, shape)(generator, world, number)
        else:
            sent = getattr(shapes, shape)(generator, world, self.judge)
        report.numbers += 1
        report.requests += sent.requests
        report.sent[shape] += sent.requests
        if sent.broken is not None:
            report.add(Violation(number, str(request or f"({shape})"), sent.broken))

    def _request(self, request: Request) -> Sent:
        if not request.is_plain or request.ending != "complete":
            return shapes.one(request, self._world, self.judge)
        sent = Sent(1)
        try:
            answer = self._world.ask(request)
        except (NoAnswerError, UnreadableError) as error:
            sent.fail(str(error))
            return sent
        wrong = self.judge(request, answer)
        if wrong is not None:
            sent.fail(wrong)
        return sent

    def check(self, number: int) -> None:
        """Ask a good query, and look at what was left to the service and at its workers."""
        wrong = _check_query(self._world, number // _CHECK_EVERY)
        self._report.checks += wrong is None
        if wrong is not None:
            self._report.add(Violation(number, "(a good query)", wrong))
        self.collect()

    def collect(self, *, last: bool = False) -> None:
        """See whether the service has ended the connections that were left to it."""
        waiting: list[tuple[int, str, float, Connection]] = []
        for number, what, deadline, connection in self._world.lingering:
            while last and not connection.is_ended() and time.monotonic() < deadline:
                time.sleep(0.1)
            if connection.is_ended():
                connection.close()
            elif time.monotonic() > deadline:
                self._report.add(Violation(number, what, "the service did not end it"))
                connection.close()
            else:
                waiting.append((number, what, deadline, connection))
        self._world.lingering[:] = waiting


def _check_query(world: World, number: int) -> str | None:
    """Ask a good query; what is wrong with the answer, if anything."""
    caller = world.tenants[number % len(world.tenants)]
    name = list(world.artifacts)[number // len(world.tenants) % len(world.artifacts)]
    artifact = world.artifacts[name]
    row = unit_rows(1, artifact.weight.shape[1], 2 + number)
    query = caller.sessions[name].encrypt(row[0])
    world.ask(put(caller, query.key.message))
    headers = (caller.authorization, (b"content-type", MESSAGE_TYPE.encode()))
    answer = world.ask(Request("POST", f"/v1/models/{name}/infer", b"", headers, (query.data,)))
    if answer.status != 200:
        return f"a good query to {name} was answered with {answer.status}"
    logits = caller.sessions[name].decrypt(query, answer.body)
    if np.abs(logits - artifact.logits(row)[0]).max() > artifact.manifest.head.error_bound:
        return f"a good query to {name} was answered wrongly"
    return None


def _go(run: _Run, report: HostileReport, world: World, requests: int, only: int | None) -> None:
    """Send everything, and judge what can only be judged at the end."""
    restarts = world.metric("veilhead_worker_restarts_total")
    evaluations = world.metric("veilhead_evaluation_seconds_count")
    known = 0
    number = 0
    for number in count() if only is None else (only,):
        run.send(number)
        if (number + 1) % _CHECK_EVERY == 0:
            run.check(number)
        if report.warm is None and report.requests >= requests * _WARM:
            run.collect(last=True)
            report.warm, known = world.held(), report.tenants_requests
        if report.requests >= requests:
            break
    run.collect(last=True)
    run.check(number)
    report.evaluations = int(world.metric("veilhead_evaluation_seconds_count") - evaluations)
    if world.metric("veilhead_worker_restarts_total") > restarts:
        report.add(Violation(number, "(all before)", "a worker was restarted"))
    report.end = world.held() if report.warm is None else world.settle(report.warm)
    report.judge_level(number, report.tenants_requests - known)


def run_hostile(
    *,
    requests: int,
    seed: int,
    only: int | None = None,
    around: Around = lambda request, answer: None,  # noqa: ARG005
    environment: Mapping[str, str] | None = None,
) -> HostileReport:
    """Send so many requests to a real service, or what `only` stands for, and judge every answer.

    Args:
        requests: how many.
        seed: what they follow from.
        only: the number of one request or shape, to send it alone.
        around: what is done to every answer before it is judged.
        environment: further variables of the service's process.
    """
    report = HostileReport(seed)
    with (
        tempfile.TemporaryDirectory(prefix="veilhead-hostile-") as work,
        running(Path(work), environment or {}) as world,
    ):
        started = time.monotonic()
        _go(_Run(report, world, around), report, world, requests, only)
        report.seconds = time.monotonic() - started
        world.probe.stop()
        report.lives = world.probe.answered
        report.slowest_live_seconds = world.probe.slowest_seconds
        for failure in world.probe.failures:
            report.add(Violation(report.numbers, "(/livez, all the while)", failure))
    return report


def _table(report: HostileReport) -> Table:
    table = Table("route", "status", "answers", "codes")
    rows: dict[tuple[str, int], Counter[str]] = {}
    for (route, status, code), number in report.answers.items():
        rows.setdefault((route, status), Counter())[code] += number
    for (route, status), codes in sorted(rows.items()):
        named = ", ".join(f"{code} {number}" for code, number in codes.most_common() if code)
        table.add_row(route, str(status), str(codes.total()), named)
    return table


def _held(held: Held | None) -> str:
    if held is None:
        return "not measured"
    return (
        f"{held.resident_bytes / 2**20:.0f} MiB resident, {held.descriptors} open files, "
        f"{held.disk_bytes / 2**20:.1f} MiB on disk"
    )


def show(report: HostileReport, out: Path | None) -> None:
    """Print a report, and write its summary when there is a file for it."""
    console = wide_console()
    console.print(_table(report), markup=False)
    rate = report.requests / report.seconds if report.seconds else 0.0
    shares = ", ".join(f"{name} {number}" for name, number in report.sent.most_common())
    for line in (
        f"{report.requests} requests ({shares})",
        f"in {report.seconds:.0f} s ({rate:.0f} a second), seed {report.seed}",
        f"{report.evaluations} evaluated, {report.checks} checked, {report.broken} violations",
        f"warm: {_held(report.warm)}; at the end: {_held(report.end)}",
        f"/livez: {report.lives} answers, the slowest after {report.slowest_live_seconds:.2f} s",
    ):
        console.print(line, highlight=False, markup=False)
    for violation in report.violations:
        console.print(
            f"FAILED: request {violation.number}: {violation.promise}; {violation.request}; again: "
            f"veilhead-bench hostile --seed {report.seed} --only {violation.number}",
            highlight=False,
            markup=False,
        )
    if out is not None:
        summary = {
            "seed": report.seed,
            "requests": report.requests,
            "seconds": report.seconds,
            "evaluations": report.evaluations,
            "checks": report.checks,
            "violations": report.broken,
            "warm": None if report.warm is None else asdict(report.warm),
            "end": None if report.end is None else asdict(report.end),
            "livez": {"answers": report.lives, "slowest_seconds": report.slowest_live_seconds},
            "sent": dict(report.sent),
            "answers": [
                {"route": route, "status": status, "code": code or None, "count": number}
                for (route, status, code), number in sorted(report.answers.items())
            ],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "utf-8")

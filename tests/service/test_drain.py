"""How a service ends: on a signal, with what it has begun, and at once when told twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support.heads import unit_rows
from support.processes import freeze, workers_of

from veilhead import BatchError, Client, ServiceResponseError, TransportError
from veilhead_benchmarks.processes import ServiceProcess


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def start(store, tmp_path):
    services = []

    def start(**settings):
        service = ServiceProcess(store, tmp_path / "log", workers=1, settings=settings)
        service.start()
        services.append(service)
        return service

    yield start
    for service in services:
        service.kill()


class Asking(threading.Thread):
    """One query that is held by a stopped worker."""

    def __init__(self, service, artifact):
        super().__init__()
        self.rows = unit_rows(1, 64)
        self.artifact = artifact
        self.client = Client(service.url, "digits")
        self.client.logits(self.rows)  # the key is registered
        (self.worker,) = service.workers()
        freeze(self.worker)
        self.result = None
        self.start()
        time.sleep(0.3)  # the query is at the worker

    def run(self):
        try:
            self.result = self.client.logits(self.rows)
        except Exception as error:
            self.result = error

    def go_on(self):
        os.kill(self.worker, signal.SIGCONT)
        self.join(30)
        return self.result

    def is_right(self):
        expected = self.artifact.logits(self.rows)
        return np.abs(self.result - expected).max() <= self.artifact.manifest.head.error_bound


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_queries_end_and_exits_with_zero(start, artifacts, number):
    service = start()
    asking = Asking(service, artifacts["digits"])
    os.kill(service.pid, number)
    wait_for(lambda: service.status("/livez") is None)  # the listener has closed
    assert asking.is_alive()
    asking.go_on()
    assert asking.is_right()
    assert service.wait() == 0
    assert workers_of(service.pid) == set()


def test_an_idle_service_ends_at_once(start):
    service = start()
    started = time.monotonic()
    assert service.terminate() == 0
    assert time.monotonic() - started < 5


def test_readiness_ends_before_the_listener_closes(start, artifacts):
    service = start(drain_delay_seconds=3)
    with Client(service.url, "digits") as client:
        client.logits(unit_rows(1, 64))
        os.kill(service.pid, signal.SIGTERM)
        wait_for(lambda: service.status("/readyz") == 503, seconds=2)
        assert service.status("/livez") == 200
        assert service.status("/v1/models") == 200
        with pytest.raises(BatchError) as caught:
            client.logits(unit_rows(1, 64))
        error = caught.value.errors[0]
        # The SDK tries for longer than the delay: it sees the refusal, then nobody.
        assert isinstance(error, TransportError) or (
            isinstance(error, ServiceResponseError) and error.problem == "draining"
        )
    assert service.wait() == 0


def test_draining_is_bounded(start, artifacts):
    service = start(drain_seconds=1)
    asking = Asking(service, artifacts["digits"])
    started = time.monotonic()
    assert service.terminate() == 0
    assert time.monotonic() - started < 10
    asking.join(60)
    assert isinstance(asking.result, BatchError)
    assert not Path(f"/proc/{asking.worker}").exists()


def test_a_second_signal_ends_it_at_once(start, artifacts):
    service = start(drain_seconds=60)
    asking = Asking(service, artifacts["digits"])
    os.kill(service.pid, signal.SIGTERM)
    wait_for(lambda: service.status("/livez") is None)
    os.kill(service.pid, signal.SIGTERM)
    assert service.wait() == 128 + signal.SIGTERM
    os.kill(asking.worker, signal.SIGCONT)  # it sees that its socket has closed
    wait_for(lambda: not Path(f"/proc/{asking.worker}").exists())
    asking.join(60)
    assert isinstance(asking.result, BatchError)

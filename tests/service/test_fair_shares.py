"""A tenant that asks without end does not keep the others waiting: real sockets, real workers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter

import httpx2
import numpy as np
import pytest
from support.heads import unit_rows
from support.processes import freeze
from support.tenants import add_tenant, bearer

from veilhead.session import Session
from veilhead_benchmarks.processes import ServiceProcess

OCTETS = {"Content-Type": "application/octet-stream"}

#: Queries that may wait in all, and so half as many of one tenant alone.
WAITING = 16


class Tenant:
    """A tenant with a key of its own at the service, and one good query."""

    def __init__(self, service, state, name, head):
        self.name = name
        self.url = service.url
        self.headers = bearer(add_tenant(state, name))
        self.session = Session(head.manifest)
        self.head = head
        self.row = unit_rows(1, head.weight.shape[1])[0]
        self.query = self.session.encrypt(self.row)

    async def register(self, client):
        path = f"{self.url}/v1/keys/{self.query.key.id.hex()}"
        message = self.query.key.message
        answer = await client.put(path, content=message, headers=self.headers | OCTETS)
        assert answer.status_code in (200, 201)

    async def ask(self, client, order=None):
        answer = await client.post(
            f"{self.url}/v1/models/{self.head.name}/infer",
            content=self.query.data,
            headers=self.headers | OCTETS,
        )
        if order is not None:
            order.append((self.name, answer.status_code))
        return answer

    def check(self, answer):
        assert answer.status_code == 200, answer.text
        found = self.session.decrypt(self.query, answer.content)
        expected = self.head.weight @ self.row + self.head.bias
        assert np.abs(found - expected).max() <= self.head.manifest.head.error_bound


async def until(condition):
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.02)


@pytest.fixture
def service(store, tmp_path):
    settings = {
        "insecure_no_tenants": False,
        "waiting_per_worker": WAITING,
        "state_directory": tmp_path / "state",
    }
    with ServiceProcess(store, tmp_path / "log", workers=1, settings=settings) as service:
        yield service
        for pid in service.workers():  # one that a failed test left frozen would never end
            os.kill(pid, signal.SIGCONT)


def test_a_heavy_tenant_does_not_starve_the_others(service, artifacts, tmp_path):
    """The worker stands still while the line fills, so that the order is the line's and not luck.

    The heavy tenant gets half of the line and no more, the others come in, and each of them is
    answered after at most a turn of the others.
    """
    state, head = tmp_path / "state", artifacts["digits"]
    tenants = [Tenant(service, state, name, head) for name in ("heavy", "light", "other")]
    heavy, *light = tenants
    order = []

    async def waiting(client):
        text = (await client.get(f"{service.url}/metrics", headers=metrics)).text
        return int(float(text.partition("\nveilhead_queries_waiting ")[2].split("\n")[0]))

    metrics = bearer(add_tenant(state, "watcher", scopes={"metrics"}))

    async def run():
        limits = httpx2.Limits(max_connections=200)
        async with httpx2.AsyncClient(trust_env=False, timeout=60, limits=limits) as client:
            for tenant in tenants:
                await until(lambda one=tenant: known(client, one))
                await tenant.register(client)
                tenant.check(await tenant.ask(client))
            (worker,) = service.workers()
            freeze(worker)
            running = [asyncio.create_task(heavy.ask(client, order)) for _ in range(60)]
            await until(lambda: refused(60 - 1 - WAITING // 2))
            assert await waiting(client) == WAITING // 2
            for tenant in light:
                running.append(asyncio.create_task(tenant.ask(client, order)))
            await until(lambda: equals(client, WAITING // 2 + 2))
            os.kill(worker, signal.SIGCONT)
            for answer in await asyncio.gather(*running[-2:]):
                assert answer.status_code == 200
            await asyncio.gather(*running)

    async def known(client, tenant):
        return (await client.get(f"{service.url}/version", headers=tenant.headers)).is_success

    async def refused(count):
        return sum(status == 503 for _, status in order) == count

    async def equals(client, count):
        return await waiting(client) == count

    asyncio.run(run())
    assert Counter(order) == {
        ("heavy", 200): 1 + WAITING // 2,
        ("heavy", 503): 60 - 1 - WAITING // 2,
        ("light", 200): 1,
        ("other", 200): 1,
    }
    answered = [name for name, status in order if status == 200]
    # One of the heavy tenant's was with the worker; then turns, with some room for the sockets.
    assert max(answered.index("light"), answered.index("other")) <= 5

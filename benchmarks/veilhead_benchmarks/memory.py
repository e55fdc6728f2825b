"""What a registered key and a published class cost the service in memory, and what bounds it.

The real service is filled, and its processes' resident memory is read before and after.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx2
import numpy as np

from veilhead.session import Session
from veilhead_benchmarks.processes import (
    ServiceProcess,
    publish_random,
    resident_bytes,
    unit_rows,
)
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.parameters import ParameterSet, parameter_set
from veilhead_protocol.wire import SEED_BYTES, Domain, KeyMessage, Prng, key_id
from veilhead_service.encrypted_head import EncryptedHead
from veilhead_service.settings import Settings
from veilhead_service.worker import KEYS

_DIMENSIONS: Final = 384
_BYTES: Final = {"Content-Type": "application/octet-stream"}


@dataclass(frozen=True)
class Memory:
    """One kind of thing that the service holds.

    Attributes:
        what: the thing, and the process that holds it.
        parameters: parameter set.
        count: how many were added between two looks.
        bytes_each: resident memory for each of them.
        expected_bytes: what each holds by design, without overhead.
        bound_bytes: what all of them take at most in one process, by `bounded_by`.
        bounded_by: the setting or constant.
    """

    what: str
    parameters: str
    count: int
    bytes_each: float
    expected_bytes: float
    bound_bytes: float
    bounded_by: str


def measure_memory(parameters: str, *, keys: int, worker_keys: int, classes: int) -> list[Memory]:
    """Fill a service with keys, its worker with keys in use, and with heads of so many classes.

    Args:
        parameters: the parameter set.
        keys: keys to register; the service holds them only.
        worker_keys: keys to ask under, at most as many as a worker keeps.
        classes: of two heads that are asked for last.
    """
    chosen = parameter_set(parameters)
    with tempfile.TemporaryDirectory(prefix="veilhead-memory-") as name:
        work = Path(name)
        store = work / "store"
        small = publish_random(store, work, "small", 2, _DIMENSIONS, parameters)
        with (
            ServiceProcess(store, work / "service.log", workers=1) as service,
            httpx2.Client(base_url=service.url, trust_env=False, timeout=60) as http,
        ):
            (worker,) = service.workers()
            _register(http, _forged(chosen, 50))  # buffers that any request leaves behind
            _ask(http, small, 10)
            before = resident_bytes(service.pid)
            _register(http, _forged(chosen, keys))
            registered = (resident_bytes(service.pid) - before) / keys
            before = resident_bytes(worker)
            _ask(http, small, worker_keys)
            in_use = (resident_bytes(worker) - before) / worker_keys
            # The first leaves behind the buffers that so many classes need, the second only itself.
            first, second = (
                publish_random(store, work, name, classes, _DIMENSIONS, parameters)
                for name in ("first", "second")
            )
            _ask(http, first, 3)
            before = resident_bytes(worker)
            _ask(http, second, 3)
            published = (resident_bytes(worker) - before) / classes
    settings = Settings()
    head = EncryptedHead(second.manifest, second.weight, second.bias)
    designed = head.held_bytes / classes
    public_key = 2 * 8 * chosen.poly_modulus_degree
    message = float(KeyMessage.size(chosen))
    return [
        Memory(
            "registered key, in the service",
            parameters,
            keys,
            registered,
            message,
            float(settings.key_memory_bytes) * max(1.0, registered / message),
            "key_memory_bytes",
        ),
        Memory(
            "key in use, in each worker",
            parameters,
            worker_keys,
            in_use,
            public_key,
            KEYS * max(in_use, public_key),
            f"{KEYS} keys a worker",
        ),
        Memory(
            f"class of {_DIMENSIONS} values, in each worker",
            parameters,
            classes,
            published,
            designed,
            # The service counts what it holds by design.
            settings.worker_head_bytes * max(1.0, published / designed),
            "worker_head_bytes",
        ),
    ]


def _forged(parameters: ParameterSet, count: int) -> Iterable[bytes]:
    """Key messages that hold no encryption of anything: the service cannot tell."""
    generator = np.random.default_rng(parameters.poly_modulus_degree)
    for _ in range(count):
        degree = parameters.poly_modulus_degree
        b = generator.integers(0, parameters.prime, degree, dtype=np.uint64)
        seed = generator.bytes(SEED_BYTES)
        yield KeyMessage(parameters, Prng.BLAKE2XB, Domain.NTT, b, seed).serialize()


def _register(http: httpx2.Client, messages: Iterable[bytes]) -> None:
    for message in messages:
        path = f"/v1/keys/{key_id(message).hex()}"
        http.put(path, content=message, headers=_BYTES).raise_for_status()


def _ask(http: httpx2.Client, artifact: HeadArtifact, keys: int) -> None:
    """One query under each of so many fresh keys."""
    manifest = artifact.manifest
    (row,) = unit_rows(1, manifest.head.dimensions, 1)
    for _ in range(keys):
        query = Session(manifest).encrypt(row)
        _register(http, [query.key.message])
        path = f"/v1/models/{manifest.name}/infer"
        http.post(path, content=query.data, headers=_BYTES).raise_for_status()

"""Settings of the service, from VEILHEAD_SERVER_* variables or given by the caller."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """What an operator can set.

    Attributes:
        store: directory of published models.
        workers: evaluating processes.
        waiting_per_worker: queries that may wait for each worker before new ones are refused.
        evaluation_seconds: an evaluation that takes longer ends with its worker.
        key_memory_bytes: memory for registered keys; the least recently used go first.
        key_idle_seconds: a key that was not used for so long is dropped.
        key_lifetime_seconds: a key is dropped after so long, used or not.
        queue_seconds: a query that waits longer for a worker is answered as retryable.
        worker_memory_bytes: a worker that holds more after an answer is replaced (resident memory).
        worker_head_bytes: encoded heads that a worker keeps; the least recently used go first.
        worker_max_evaluations: a worker is replaced after so many; never when None.
        body_seconds: a request's header must arrive within so long, and then its body.
        max_bodies: bodies that may be on their way at once; further requests are refused.
        drain_delay_seconds: how long a stopping service still accepts connections, so that a load
            balancer sees `/readyz` fail first.
        drain_seconds: how long queries that run when the listener closes may take to end.
    """

    model_config = SettingsConfigDict(env_prefix="VEILHEAD_SERVER_", frozen=True)

    store: Path = Path("store")
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, le=256)
    waiting_per_worker: int = Field(default=64, ge=1)
    evaluation_seconds: float = Field(default=30.0, gt=0)
    key_memory_bytes: int = Field(default=64 * 2**20, ge=2**16)
    key_idle_seconds: float = Field(default=1800.0, gt=0)
    key_lifetime_seconds: float = Field(default=7200.0, gt=0)
    queue_seconds: float = Field(default=20.0, gt=0)
    worker_memory_bytes: int = Field(default=2 * 2**30, ge=2**26)
    worker_head_bytes: int = Field(default=2**30, ge=2**20)
    worker_max_evaluations: int | None = Field(default=None, ge=1)
    body_seconds: float = Field(default=10.0, gt=0)
    max_bodies: int = Field(default=1024, ge=1)
    drain_delay_seconds: float = Field(default=0.0, ge=0)
    drain_seconds: float = Field(default=30.0, gt=0)

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
    """

    model_config = SettingsConfigDict(env_prefix="VEILHEAD_SERVER_", frozen=True)

    store: Path = Path("store")
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, le=256)
    waiting_per_worker: int = Field(default=64, ge=1)
    evaluation_seconds: float = Field(default=30.0, gt=0)
    key_memory_bytes: int = Field(default=64 * 2**20, ge=2**16)
    key_idle_seconds: float = Field(default=1800.0, gt=0)
    key_lifetime_seconds: float = Field(default=7200.0, gt=0)

"""Settings of the service, from VEILHEAD_SERVER_* variables or given by the caller."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from veilhead_service.head_encryption import HeadKey, find_head_key


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
        head_key_file: file of the key that encrypted heads are under.
        head_key: that key itself, for places where secrets come as variables; a file is better.
        require_encrypted_heads: whether versions with a plaintext head are refused.
        host: address to listen on.
        port: port to listen on.
        state_directory: directory of tenants, API keys and budgets.
        insecure_no_tenants: let everybody do everything, uncounted; on a loopback host only.
        tenant_key_memory_bytes: memory for the registered keys of one tenant.
        rate_per_second: requests a second of a tenant without a rate of its own.
        rate_burst: requests at once of such a tenant.
        query_budget: queries of a tenant and model without a budget of their own, in a period;
            None for no limit.
        query_budget_period: the calendar day or month, UTC, that budget is for.
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
    head_key_file: Path | None = None
    head_key: SecretStr | None = None
    require_encrypted_heads: bool = False
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    state_directory: Path = Path("state")
    insecure_no_tenants: bool = False
    tenant_key_memory_bytes: int = Field(default=16 * 2**20, ge=2**16)
    rate_per_second: float = Field(default=1000.0, gt=0, allow_inf_nan=False)
    rate_burst: int = Field(default=2000, ge=1)
    query_budget: int | None = Field(default=None, ge=0)
    query_budget_period: Literal["day", "month"] = "day"

    @model_validator(mode="after")
    def _insecure_only_on_loopback(self) -> Self:
        if self.insecure_no_tenants and not _is_loopback(self.host):
            raise ValueError(
                "insecure_no_tenants is for a loopback host such as 127.0.0.1: to listen "
                "elsewhere, make tenants (`veilhead-server tenants add`)"
            )
        return self

    def open_head_key(self) -> HeadKey | None:
        """The key that encrypted heads are under, or None when none was given.

        Raises:
            SecretFileError: when it was given twice, or is not one.
        """
        return find_head_key(
            self.head_key_file, None if self.head_key is None else self.head_key.get_secret_value()
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Settings of the service, from VEILHEAD_SERVER_* variables or given by the caller."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
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


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

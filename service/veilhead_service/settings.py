"""Settings of the service: given by the caller, from VEILHEAD_SERVER_* variables, or from a file.

What the caller gives (the flags of `veilhead-server run`) comes before the environment, and the
environment before the file. An unknown name in any of them is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from veilhead_protocol.errors import ConfigurationError
from veilhead_protocol.loopback import is_loopback
from veilhead_service.head_encryption import HeadKey, find_head_key
from veilhead_service.machine import available_bytes, usable_cores

ENVIRONMENT_PREFIX: Final = "VEILHEAD_SERVER_"

#: Names the settings file, unless `--config` does.
CONFIG_VARIABLE: Final = "VEILHEAD_SERVER_CONFIG"


#: Memory that a worker takes at least: its libraries, 56 MB, and some heads and keys.
WORKER_BYTES: Final = 96 * 2**20

#: Most workers of one service.
_MOST_WORKERS: Final = 1024


def default_workers() -> int:
    """One for each core that this process may use, as far as half of the free memory goes."""
    cores, free = usable_cores(), available_bytes()
    fit = cores if free is None else free // (2 * WORKER_BYTES)
    return max(1, min(cores, fit, _MOST_WORKERS))


#: Open files of the service that are no connections: connections that were accepted at once and
#: not yet counted, state, logs, models that are read; and for each worker.
_OTHER_FILES: Final = 256
_WORKER_FILES: Final = 8

#: Without `max_connections`. Each connection may hold some 100 KB here, and as much in the kernel.
_MOST_CONNECTIONS: Final = 4096
_FEWEST_CONNECTIONS: Final = 64


class Settings(BaseSettings):
    """What an operator can set.

    Attributes:
        store: directory of published models.
        workers: evaluating processes; when absent one a core, by affinity and the quota of its
            control group, and no more than fit into half of the free memory.
        waiting_per_worker: queries that may wait for each worker before new ones are refused.
        evaluation_seconds: an evaluation that takes longer ends with its worker.
        load_seconds: likewise the loading of a head.
        key_memory_bytes: memory for registered keys; the least recently used go first.
        key_idle_seconds: a key that was not used for so long is dropped.
        key_lifetime_seconds: a key is dropped after so long, used or not.
        queue_seconds: a query that waits longer for a worker is answered as retryable.
        worker_memory_bytes: a worker that holds more after an answer is replaced (resident memory),
            and a head that needs more is not loaded.
        worker_head_bytes: encoded heads that a worker keeps; the least recently used go first.
            Current versions that fit are loaded ahead, others with their first query.
        worker_zeros_ahead: encryptions of zero that an idle worker makes ahead for each of the keys
            that asked last; 0 where a worker may be resumed twice from one snapshot.
        worker_max_evaluations: a worker is replaced after so many; never when None.
        body_seconds: a request's header must arrive within so long, and then its body.
        max_bodies: bodies that may be on their way at once; further requests are refused.
        max_downloads: files of backbones that may be on their way out at once.
        max_connections: open connections that there may be; as many as the limit of open files
            allows, and no more than 4,096, when None.
        peer_connections: connections from one address; half of all when None.
        unread_seconds: a connection ends when its peer takes nothing of an answer for so long.
        refusals_per_second: refusals of one tenant, or of one address without a good API key, that
            are answered at once; others wait, up to five seconds.
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
        tenant_max_bodies: bodies of one tenant that may be on their way at once.
        rate_per_second: requests a second of a tenant without a rate of its own.
        rate_burst: requests at once of such a tenant.
        query_budget: queries of a tenant and model without a budget of their own, in a period;
            None for no limit.
        query_budget_period: the calendar day or month, UTC, that budget is for.
        log_format: `json` (one object a line) or `text`.
        log_level: the least severe level that is logged.
        access_log: whether requests are recorded in `<state_directory>/access.log`. `required`
            answers 503 to what cannot be recorded; with `on`, answers do not wait for their lines
            and leave unrecorded when there is no other way; `off`; `auto` is `on`, or `off` for a
            service without tenants.
        access_log_sync_seconds: force lines to the disk after so long; 0 forces each batch of
            lines before their answers leave.
        disk_reserve_bytes: what the access log leaves free of its disk, for the state; a tenth of
            the disk where that is less.
        access_log_file_bytes: a file of the access log that reaches this size is closed, and the
            chain goes on in a new one.
        tracing: send OpenTelemetry spans of requests; needs the extra `otel`.
        tracing_endpoint: the URL of an OTLP collector over HTTP; OpenTelemetry's own variables
            when it is None.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        frozen=True,
        extra="forbid",
        # A refused value may be a secret.
        hide_input_in_errors=True,
    )

    store: Path = Path("store")
    workers: int = Field(default_factory=default_workers, ge=1, le=_MOST_WORKERS)
    waiting_per_worker: int = Field(default=64, ge=1)
    evaluation_seconds: float = Field(default=30.0, gt=0)
    load_seconds: float = Field(default=60.0, gt=0)
    key_memory_bytes: int = Field(default=64 * 2**20, ge=2**16)
    key_idle_seconds: float = Field(default=1800.0, gt=0)
    key_lifetime_seconds: float = Field(default=7200.0, gt=0)
    queue_seconds: float = Field(default=20.0, gt=0)
    worker_memory_bytes: int = Field(default=2 * 2**30, ge=2**26)
    worker_head_bytes: int = Field(default=2**30, ge=2**20)
    worker_zeros_ahead: int = Field(default=16, ge=0, le=256)
    worker_max_evaluations: int | None = Field(default=None, ge=1)
    body_seconds: float = Field(default=10.0, gt=0)
    max_bodies: int = Field(default=1024, ge=1)
    max_downloads: int = Field(default=64, ge=1)
    max_connections: int | None = Field(default=None, ge=1)
    peer_connections: int | None = Field(default=None, ge=1)
    unread_seconds: float = Field(default=30.0, ge=0.1)
    refusals_per_second: float = Field(default=100.0, gt=0, allow_inf_nan=False)
    drain_delay_seconds: float = Field(default=0.0, ge=0)
    drain_seconds: float = Field(default=30.0, gt=0)
    head_key_file: Path | None = None
    head_key: SecretStr | None = None
    require_encrypted_heads: bool = False
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    state_directory: Path = Path("state")
    insecure_no_tenants: bool = False
    tenant_key_memory_bytes: int = Field(default=16 * 2**20, ge=2**16)
    tenant_max_bodies: int = Field(default=256, ge=1)
    rate_per_second: float = Field(default=1000.0, gt=0, allow_inf_nan=False)
    rate_burst: int = Field(default=2000, ge=1)
    query_budget: int | None = Field(default=None, ge=0)
    query_budget_period: Literal["day", "month"] = "day"
    log_format: Literal["json", "text"] = "json"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: Literal["auto", "off", "on", "required"] = "auto"
    access_log_sync_seconds: float = Field(default=1.0, ge=0)
    access_log_file_bytes: int = Field(default=64 * 2**20, ge=2**12)
    disk_reserve_bytes: int = Field(default=64 * 2**20, ge=0)
    tracing: bool = False
    tracing_endpoint: str | None = None

    @model_validator(mode="after")
    def _insecure_only_on_loopback(self) -> Self:
        if self.insecure_no_tenants and not is_loopback(self.host):
            raise ValueError(
                "insecure_no_tenants is for a loopback host such as 127.0.0.1: to listen "
                "elsewhere, make tenants (`veilhead-server tenants add`)"
            )
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.tracing_endpoint and not self.tracing:
            raise ValueError("tracing_endpoint needs tracing")
        state, store = self.state_directory.absolute(), self.store.absolute()
        if state == store or state.is_relative_to(store) or store.is_relative_to(state):
            raise ValueError(
                "state_directory and store must not lie within each other: "
                "the store can then be read-only"
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

    def connections(self, descriptors: int) -> int:
        """Open connections that there may be with so many open files.

        Raises:
            ConfigurationError: when they are too few, or fewer than `max_connections`.
        """
        spare = descriptors - _OTHER_FILES - _WORKER_FILES * self.workers - self.max_downloads
        wanted = self.max_connections or _FEWEST_CONNECTIONS
        if spare < wanted:
            raise ConfigurationError(
                f"the limit of open files is {descriptors}, which leaves {max(0, spare)} for "
                f"connections, expected {wanted}: raise it to {wanted + descriptors - spare} "
                "(`ulimit -n`, LimitNOFILE=, --ulimit nofile=), or set max_connections"
            )
        return self.max_connections or min(spare, _MOST_CONNECTIONS)

    @property
    def access_log_mode(self) -> Literal["off", "on", "required"]:
        """`access_log`, with `auto` resolved."""
        if self.access_log != "auto":
            return self.access_log
        return "off" if self.insecure_no_tenants else "on"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources, the first of which wins."""
        sources = (init_settings, env_settings)
        path = settings_cls.model_config.get("toml_file") or os.environ.get(CONFIG_VARIABLE)
        return (*sources, _file_source(settings_cls, Path(str(path)))) if path else sources


def _file_source(settings_cls: type[BaseSettings], path: Path) -> TomlConfigSettingsSource:
    """The settings of a TOML file.

    Raises:
        ConfigurationError: when it cannot be read.
    """
    try:
        path.stat()  # an absent file would otherwise be an empty one
        return TomlConfigSettingsSource(settings_cls, path)
    except OSError as error:
        reason = error.strerror
    except ValueError:  # its message would quote the file, which may hold secrets
        reason = "it is not TOML"
    raise ConfigurationError(f"the settings file {path} cannot be read: {reason}")


def load_settings(
    given: Mapping[str, Any] | None = None,
    *,
    config: Path | None = None,
    kind: type[Settings] = Settings,
) -> Settings:
    """Settings from everywhere.

    Args:
        given: by name, what comes before everything else; values may be text, as in a variable.
        config: the settings file; that of `VEILHEAD_SERVER_CONFIG` when it is None.
        kind: `Settings`, or a class with more of them.

    Raises:
        ConfigurationError: naming every setting that is unknown or not valid, without its value.
    """
    source = kind
    if config is not None:

        class FromFile(kind):  # type: ignore[valid-type, misc]
            model_config = SettingsConfigDict(toml_file=config)

        source = FromFile
    try:
        return source(**(given or {}))
    except ValidationError as error:
        raise ConfigurationError(_explained(error)) from None
    except SettingsError:
        raise ConfigurationError(
            f"a {ENVIRONMENT_PREFIX}* variable is not valid; docs/http-api.md lists them"
        ) from None


def _explained(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_input=False, include_url=False, include_context=False):
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"there is no setting {name!r}")
        else:
            lines.append(": ".join(part for part in (name, item["msg"]) if part))
    return "; ".join(lines) + "; `veilhead-server settings` prints all of them"


def printed(
    settings: Settings, given: Mapping[str, Any] | None = None
) -> list[tuple[str, str, str]]:
    """Every setting as (name, value, origin), secrets masked.

    The origin is `flag`, `environment`, `file` or `default`; `given` are the flags.
    """
    flags = set(given or {})
    variables = {name.lower() for name in os.environ}
    rows = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name in flags:
            origin = "flag"
        elif f"{ENVIRONMENT_PREFIX}{name}".lower() in variables:
            origin = "environment"
        else:
            origin = "file" if name in settings.model_fields_set else "default"
        shown = "**********" if isinstance(value, SecretStr) else str(value)
        rows.append((name, shown, origin))
    return rows

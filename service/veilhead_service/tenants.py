"""Tenants and their API keys.

A key is `vh_<key id>_<secret>`. The id says which row to look at and is no secret; it may stand in
logs. The secret is 32 random bytes, shown once, and kept as its SHA-256 only. A slow hash guards
secrets that can be guessed; 256 random bits cannot, whatever a guess costs, and a slow hash would
give anybody a way to keep the service busy.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from veilhead_protocol.errors import TenantError

#: The name under which requests run where there are no tenants.
INSECURE_TENANT: Final = "insecure-local"

_TENANT_PATTERN: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_KEY_PATTERN: Final = re.compile(r"vh_([0-9a-f]{16})_([A-Za-z0-9_-]{43})")
_ID_BYTES: Final = 8
_SECRET_BYTES: Final = 32

#: Compared with when there is no such key, so that an unknown id costs the same work.
_NO_DIGEST: Final = bytes(32)


class KeyScope(StrEnum):
    """What an API key may do."""

    INFER = "infer"  # register encryption keys, send queries
    MODELS = "models"  # read manifests and public files
    USAGE = "usage"  # read the tenant's own budgets
    METRICS = "metrics"  # read the metrics of the whole service


#: What a client needs. Metrics are the operator's: they tell of all tenants.
DEFAULT_SCOPES: Final = frozenset({KeyScope.INFER, KeyScope.MODELS, KeyScope.USAGE})


#: What stands for no tenant in records, or for everybody.
_RESERVED: Final = frozenset({INSECURE_TENANT, "none"})


def check_tenant_name(name: str) -> str:
    """The name, when a tenant may have it.

    Raises:
        TenantError: when not.
    """
    if not _TENANT_PATTERN.fullmatch(name) or name in _RESERVED:
        raise TenantError(
            "a tenant's name has 1 to 63 lower-case letters, digits and hyphens, neither first "
            f"nor last a hyphen, and is none of {', '.join(sorted(_RESERVED))}"
        )
    return name


@dataclass(frozen=True)
class ApiKey:
    """What is known of an API key. Times are seconds since 1970, UTC.

    Attributes:
        id: 16 hexadecimal digits, not secret.
        tenant: whose it is.
        secret_digest: SHA-256 of the secret's ASCII characters.
        scopes: what it may do.
        created: when it was made.
        expires: when it ends, or None.
        revoked: when it was revoked, or None.
    """

    id: str
    tenant: str
    secret_digest: bytes
    scopes: frozenset[KeyScope]
    created: float
    expires: float | None
    revoked: float | None

    def __repr__(self) -> str:
        return f"ApiKey({self.id!r}, {self.tenant!r})"

    def status(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"


@dataclass(frozen=True)
class Tenant:
    """A tenant, and its rate limit where it differs from the service's.

    Attributes:
        name: a slug.
        created: seconds since 1970, UTC.
        rate_per_second: requests a second in the long run, or None for the service's default.
        burst: requests at once, or None for the service's default.
    """

    name: str
    created: float
    rate_per_second: float | None
    burst: int | None


def new_api_key(
    tenant: str, scopes: frozenset[KeyScope], *, now: float, expires: float | None
) -> tuple[ApiKey, str]:
    """A key and its written form, which holds the secret and exists nowhere else.

    Raises:
        TenantError: when the name is not a tenant's, or there is no scope.
    """
    check_tenant_name(tenant)
    if not scopes:
        raise TenantError("an API key needs at least one scope")
    key_id = secrets.token_hex(_ID_BYTES)
    secret = secrets.token_urlsafe(_SECRET_BYTES)
    key = ApiKey(key_id, tenant, _digest(secret), scopes, now, expires, None)
    return key, f"vh_{key_id}_{secret}"


def key_id_of(written: str) -> str | None:
    """The id in a key's written form; None when it is not one."""
    match = _KEY_PATTERN.fullmatch(written)
    return None if match is None else match[1]


def opens(key: ApiKey | None, written: str, *, now: float) -> bool:
    """Whether a key's written form is that of `key`, and `key` is active.

    Hashes and compares whether there is a key or not.
    """
    match = _KEY_PATTERN.fullmatch(written)
    digest = _digest("" if match is None else match[2])
    same = hmac.compare_digest(digest, _NO_DIGEST if key is None else key.secret_digest)
    return same and key is not None and key.status(now) == "active"


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()

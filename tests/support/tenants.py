"""Tenants in a state, made as the command makes them."""

from __future__ import annotations

import time

from veilhead_service.state import State
from veilhead_service.tenants import DEFAULT_SCOPES, new_api_key


def add_tenant(directory, name, *, scopes=DEFAULT_SCOPES, expires=None):
    """The written form of the new tenant's API key."""
    key, written = new_api_key(name, frozenset(scopes), now=time.time(), expires=expires)
    with State(directory) as state:
        state.add_tenant(key)
    return written


def bearer(written):
    return {"Authorization": f"Bearer {written}"}

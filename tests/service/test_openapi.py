"""Requests that are made from the OpenAPI document, to a service in a process of its own."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.services import running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

#: What a service without tenants has; `/metrics` answers with text.
OPERATIONS = 12


@pytest.fixture(scope="module")
def schema(store, tmp_path_factory):
    log = tmp_path_factory.mktemp("openapi") / "service.log"
    with log.open("wb") as output, running(store, "--workers", "1", log=output) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@settings(
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(chosen=st.data())
def test_answers_are_what_the_document_declares(schema, chosen):
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= OPERATIONS
    case = chosen.draw(st.sampled_from(operations).flatmap(lambda found: found.as_strategy()))
    case.call_and_validate(checks=CHECKS)

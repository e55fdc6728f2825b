"""docs/wire-format.md states the numbers that the code has."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from veilhead_protocol import errors, wire
from veilhead_protocol.layout import Layout
from veilhead_protocol.parameters import PARAMETER_SETS

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "wire-format.md").read_text()
VECTORS = ROOT / "tests" / "vectors"


def test_parameter_sets_are_stated() -> None:
    blocks = re.findall(r"```\n(veilhead-parameters.*?)```", PAGE, re.DOTALL)
    assert [block.encode() for block in blocks] == [
        parameters.canonical_form for parameters in PARAMETER_SETS.values()
    ]
    for parameters in PARAMETER_SETS.values():
        assert f"| `{parameters.name}` | `{parameters.id.hex()}` |" in PAGE
        layout = Layout.canonical(parameters, texts=1, dimensions=384, classes=2, exponent=0)
        for size in (
            wire.KeyMessage.size(parameters),
            wire.QueryMessage.size(parameters, layout),
            wire.KeyMessage.size(parameters) - wire.KEY_HEADER_BYTES - 64,
            wire.QueryMessage.size(parameters, layout) - wire.QUERY_HEADER_BYTES - 64,
        ):
            assert f"{size:,}" in PAGE


def test_roots_are_stated(generator) -> None:
    for parameters in PARAMETER_SETS.values():
        for prime in parameters.key_primes:
            assert hex(generator.smallest_root(parameters.poly_modulus_degree, prime)) in PAGE


def test_every_code_is_stated() -> None:
    for error in (*errors.WireError.__subclasses__(), errors.WorkerError):
        assert f"| `{error.code}` |" in PAGE


@pytest.mark.parametrize("kind", ["key", "query", "reply"])
def test_the_worked_example_is_the_vector(kind: str) -> None:
    data = (VECTORS / f"compact-384.{kind}.bin").read_bytes()
    assert f"{len(data):,} bytes" in PAGE
    if kind != "reply":
        assert hashlib.sha256(data).hexdigest() in PAGE
    stated = re.findall(r"^([0-9a-f ]+?)(?:\.\.\.)?   ", PAGE, re.MULTILINE)
    joined = "".join(stated).replace(" ", "")
    key_part, query_part = joined[:96], joined[96:]
    if kind == "key":
        assert data.hex().startswith(key_part)
        assert (data.hex()[-128:-120], data.hex()[-8:]) == ("2f00f564", "712dcd72")
    elif kind == "query":
        assert len(query_part) == 2 * (136 + 8)
        assert data.hex().startswith(query_part)
    else:
        assert data[172:183].hex() in PAGE


def test_links_lead_somewhere() -> None:
    for page in ("wire-format.md", "protocol.md"):
        text = (ROOT / "docs" / page).read_text()
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (ROOT / "docs" / target).exists(), target

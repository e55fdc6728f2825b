"""docs/wire-format.md states the numbers that the code has."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from veilhead_protocol import errors, wire
from veilhead_protocol.layout import MAX_BLOCK_PRODUCTS, MAX_PIECES, HeadShape, Layout
from veilhead_protocol.manifest import FORMAT, HeadSection
from veilhead_protocol.parameters import MAX_SERVED_EXPONENT, PARAMETER_SETS
from veilhead_protocol.scales import MAX_EXPONENT

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
        layout = Layout.canonical(HeadShape(parameters, 384, 2, 0, 1), 1)
        assert layout.pieces == 1
        for size in (
            wire.KeyMessage.size(parameters),
            wire.QueryMessage.size(parameters, layout),
            wire.KeyMessage.size(parameters) - wire.KEY_HEADER_BYTES - 64,
            wire.QueryMessage.size(parameters, layout) - wire.QUERY_HEADER_BYTES - 64,
        ):
            assert f"{size:,}" in PAGE


def test_roots_are_stated(generator) -> None:
    for parameters in PARAMETER_SETS.values():
        root = generator.smallest_root(parameters.poly_modulus_degree, parameters.prime)
        assert f"{root:#x} for `{parameters.name}`" in PAGE
        assert f"{parameters.prime:#x} ({parameters.residue_bits} bits)" in PAGE


def test_limits_are_stated() -> None:
    assert f"over {wire.MAX_KEY_BYTES:,} bytes of key or {wire.MAX_QUERY_BYTES:,} of query" in PAGE
    hints = " | ".join(str(parameters.hint_bits) for parameters in PARAMETER_SETS.values())
    assert f"| hints H (section 4) | {hints} |" in PAGE
    assert f"`left = {MAX_BLOCK_PRODUCTS}`" in PAGE
    assert f"left - p < {MAX_BLOCK_PRODUCTS // 2}," in PAGE
    assert f"G is skipped when P > {MAX_PIECES:,}." in PAGE
    assert f"e, 0 to {MAX_EXPONENT}:" in PAGE
    assert f"0 <= e - k <= {MAX_SERVED_EXPONENT}:" in PAGE
    assert f"Format version {wire.FORMAT_VERSION}." in PAGE
    assert f"`{FORMAT}`; refuse any other" in PAGE


def test_fields_of_the_head_are_stated() -> None:
    assert set(re.findall(r"^\| `head\.(\w+)` \|", PAGE, re.MULTILINE)) == set(
        HeadSection.model_fields
    )


def test_every_code_is_stated() -> None:
    for error in (*errors.WireError.__subclasses__(), errors.WorkerError):
        assert f"| `{error.code}` |" in PAGE


@pytest.mark.parametrize("kind", ["manifest", "key", "query", "query-with-key", "reply"])
def test_the_worked_example_is_the_vector(kind: str) -> None:
    ending = "json" if kind == "manifest" else "bin"
    data = (VECTORS / f"compact-384.{kind}.{ending}").read_bytes()
    assert f"{len(data):,} bytes" in PAGE
    if kind in ("manifest", "key", "query"):
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
    elif kind == "reply":
        assert data[172:183].hex() in PAGE


@pytest.mark.parametrize("name", ["compact-384", "compact-3000"])
def test_the_worked_logits_are_the_vectors(name: str, cases) -> None:
    case = cases[name]
    for value in (
        case["decrypted"][0],
        case["rounded_logits"][0],
        case["plaintext_logits"][0],
        round(case["rounded_logits"][0] * 4096 / 2 ** case["scales"]["downscale_bits"]),
    ):
        assert str(value) in PAGE


def test_links_lead_somewhere() -> None:
    for page in ("wire-format.md", "protocol.md"):
        text = (ROOT / "docs" / page).read_text()
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (ROOT / "docs" / target).exists(), target

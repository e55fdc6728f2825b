"""A client written from docs/wire-format.md, against the real evaluation, through bytes only."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilhead_protocol.errors import LayoutError
from veilhead_protocol.layout import HeadShape, Layout, block_sizes
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.parameters import PARAMETER_SETS, ParameterSet
from veilhead_protocol.wire import QueryHeader, carried_key
from veilhead_service.encrypted_head import ClientKey, EncryptedHead


@pytest.mark.parametrize(
    ("parameters", "dimensions", "classes"),
    [
        ("compact", 384, 22),
        ("compact", 3000, 3),  # two query polynomials
        ("compact", 64, 40),  # more than the limit of hints lets into one polynomial
        ("standard", 384, 77),
        ("standard", 64, 200),  # one group of many
        ("standard", 4096, 2),
    ],
)
def test_its_logits_are_the_heads(
    independent, make_artifact, unit_rows, parameters: str, dimensions: int, classes: int
) -> None:
    artifact = make_artifact(classes, dimensions, parameters)
    head = EncryptedHead(artifact.manifest, artifact.weight, artifact.bias)

    model = independent.Model.from_manifest(artifact.manifest.serialize())
    client = independent.Client(model)
    key = ClientKey.from_message(client.key_message)
    assert key.id == client.key_id
    rows = 1.5 * unit_rows(2, dimensions)  # the projection onto the unit ball shortens them
    expected = artifact.logits(rows)
    for row, plaintext in zip(rows, expected, strict=True):
        query = client.query(row)
        logits = client.logits(query, head.evaluate(query, key))
        assert logits.shape == (classes,)
        assert np.abs(logits - plaintext).max() <= model.error_bound
        assert np.array_equal(logits, np.rint(logits * 4096) / 4096)


@pytest.mark.parametrize("parameters", ["standard", "compact"])
def test_heads_of_large_logits(independent, make_artifact, unit_rows, parameters: str) -> None:
    artifact = make_artifact(5, 384, parameters, norm=900.0)
    head = EncryptedHead(artifact.manifest, artifact.weight, artifact.bias)
    model = independent.Model.from_manifest(artifact.manifest.serialize())
    assert artifact.manifest.head.exponent == 10
    assert model.downscale_bits >= 4
    client = independent.Client(model)
    row = unit_rows(1, 384)[0]
    query = client.query(row)
    logits = client.logits(query, head.evaluate(query, ClientKey.from_message(client.key_message)))
    assert np.abs(logits - artifact.logits(row[np.newaxis])[0]).max() <= model.error_bound
    steps = logits * 4096 / 2**model.downscale_bits
    assert np.array_equal(steps, np.rint(steps))


def test_blocks_and_bulk(independent, unit_rows, make_artifact) -> None:
    artifact = make_artifact(3, 24, "compact")
    document = artifact.manifest.model_dump()
    document["policy"]["bulk"] = True
    manifest = Manifest.build(document)
    head = EncryptedHead(manifest, artifact.weight, artifact.bias)
    for texts in (*block_sizes(manifest.shape), manifest.shape.max_wanted + 1):
        model = independent.Model.from_manifest(manifest.serialize(), texts)
        client = independent.Client(model)
        rows = unit_rows(texts, 24)
        query = client.query(rows)
        reply = head.evaluate(query, ClientKey.from_message(client.key_message))
        logits = client.logits(query, reply).reshape(texts, 3)
        assert np.abs(logits - artifact.logits(rows)).max() <= model.error_bound


def test_a_query_that_carries_its_key(independent, make_artifact, unit_rows) -> None:
    artifact = make_artifact(4, 384, "standard")
    head = EncryptedHead(artifact.manifest, artifact.weight, artifact.bias)
    model = independent.Model.from_manifest(artifact.manifest.serialize())
    client = independent.Client(model)
    row = unit_rows(1, 384)[0]
    query = client.query(row, with_key=True)
    carried = carried_key(query, QueryHeader.deserialize(query))
    logits = client.logits(query, head.evaluate(query, ClientKey.from_message(carried)))
    assert np.abs(logits - artifact.logits(row[np.newaxis])[0]).max() <= model.error_bound


@given(
    st.sampled_from(list(PARAMETER_SETS.values())),
    st.integers(1, 4096),
    st.integers(1, 100) | st.integers(1, 4096),
    st.integers(0, 6),
    st.integers(0, 8),
    st.booleans(),
)
def test_its_layouts_are_the_services(
    independent,
    parameters: ParameterSet,
    dimensions: int,
    classes: int,
    exponent: int,
    limit_bits: int,
    bulk: bool,
) -> None:
    shape = HeadShape(parameters, dimensions, classes, exponent, 1 << limit_bits, bulk)
    head = (parameters.name, dimensions, classes, exponent, 1 << limit_bits)
    assert independent.block_sizes(head) == list(block_sizes(shape))
    for texts in {1, 3, *block_sizes(shape), shape.max_wanted, shape.max_wanted + 1, 2048, 4096}:
        try:
            layout = Layout.canonical(shape, texts)
        except LayoutError:
            with pytest.raises(ValueError, match="no request"):
                independent.choose_layout(head, texts, bulk=bulk)
        else:
            found = (layout.kind, layout.block_length, layout.pieces, layout.group)
            assert independent.choose_layout(head, texts, bulk=bulk) == found


def test_it_understands_recorded_replies(independent, vectors: Path, cases) -> None:
    for name, case in cases.items():
        model = independent.Model.from_manifest(
            (vectors / f"{name}.manifest.json").read_bytes(), case["layout"]["texts"]
        )
        secret = np.array([int(digit) - 1 for digit in case["secret_plus_one"]])
        client = independent.Client(model, secret)
        client.key_id = bytes.fromhex(case["key"]["sha256"])
        reply = (vectors / f"{name}.reply.bin").read_bytes()
        assert client.decrypt(reply[172:]) == case["decrypted"]
        query = (vectors / f"{name}.query.bin").read_bytes()
        logits = client.logits(query, reply)
        assert logits.tolist() == case["rounded_logits"]
        assert np.abs(logits - case["plaintext_logits"]).max() <= model.error_bound


def test_recorded_keys_and_queries_are_encryptions(
    independent, generator, vectors: Path, cases
) -> None:
    """c0 + c1 s is the message up to an error of at most 21."""
    for case in cases.values():
        if case["prng"] != 2 or case["domain"] != 0:
            continue
        name = case["name"]
        model = independent.Model.from_manifest(
            (vectors / f"{name}.manifest.json").read_bytes(), case["layout"]["texts"]
        )
        secret = np.array([int(digit) - 1 for digit in case["secret_plus_one"]])
        prime = model.prime
        expected = np.zeros(model.degree, dtype=np.int64)
        for kind, header in (("key", 40), ("query", 136)):
            data = (vectors / f"{name}.{kind}.bin").read_bytes()
            c0 = np.array(independent.unpack(data[header:-64], model.degree, 50))
            mask = independent.expand(data[-64:], model.degree, prime)
            if kind == "query":
                (expected,) = model.place(np.array(case["embeddings_times_2_20"]) / 2**20)
            difference = c0 + independent.times_ternary(mask, secret, prime) - expected
            difference = (difference + prime // 2) % prime - prime // 2
            assert np.abs(difference).max() <= 21
            assert 2.5 < difference.std() < 4.0  # sqrt(10.5) = 3.24


def test_its_products_are_the_generators(independent, generator) -> None:
    prime = 0x1FFFFFFFFB4001
    first = generator.fixed_integers("product", 256, prime)
    second = generator.fixed_ternary("ternary", 256)
    product = independent.times_ternary(np.array(first), np.array(second), prime)
    assert product.tolist() == generator.multiply(first, second, prime)
    # and X^255 * X = -1
    top, one = [0] * 255 + [1], [0, 1] + [0] * 254
    assert generator.multiply(top, one, prime) == [prime - 1] + [0] * 255


def test_it_imports_nothing_of_ours(independent) -> None:
    source = Path(independent.__file__).read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported == {
        "__future__",
        "collections",
        "dataclasses",
        "hashlib",
        "json",
        "numpy",
        "secrets",
        "struct",
        "typing",
    }


def test_two_queries_share_nothing(independent, make_artifact, unit_rows) -> None:
    model = independent.Model.from_manifest(make_artifact(2, 64, "compact").manifest.serialize())
    client = independent.Client(model)
    row = unit_rows(1, 64)[0]
    first, second = client.query(row), client.query(row)
    assert first[:136] == second[:136]
    assert first[-64:] != second[-64:]
    assert hashlib.sha256(first[136:]).digest() != hashlib.sha256(second[136:]).digest()

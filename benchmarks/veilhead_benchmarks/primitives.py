"""What a query is made of, operation by operation, and the floor that follows from it.

The floor of a query is what no implementation of this protocol on SEAL can go below: for every
reply polynomial a fresh encryption of zero and an inverse transform, for every weight polynomial a
product. Reading the query, cutting residues and packing bytes come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from veilhead.session import SecretKey, Session
from veilhead_benchmarks.heads import Head
from veilhead_benchmarks.rows import Row, timed
from veilhead_protocol import seal_io
from veilhead_protocol.encoding import encode
from veilhead_protocol.layout import Layout, LayoutKind
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.wire import Domain, KeyMessage, pack_bits, unpack_bits
from veilhead_service.encrypted_head import ClientKey, truncate

_SUBJECT = "primitives"
_COLUMNS = 512
_MATRIX_CALLS = 5

#: What the floor counts: one of each for a reply polynomial, but products for each weight one.
_ZERO, _PRODUCT, _TRANSFORM = "encrypt zero", "product", "inverse transform"


def measure_primitives(parameters: str, calls: int) -> list[Row]:
    """The median of each operation on one polynomial, in milliseconds, as `server_ms`."""
    return [
        Row(
            subject=f"{_SUBJECT}/{name}",
            system="veilhead",
            parameters=parameters,
            d=None,
            classes=None,
            batch=None,
            server_ms=timed(call, calls, warm_up=3)[0],
            note="on one polynomial",
        )
        for name, call in _operations(parameters).items()
    ]


def _operations(parameters: str) -> Mapping[str, Callable[[], Any]]:
    artifact = Head.random(2, 384).artifact(parameters)
    manifest = artifact.manifest
    scales, chosen = manifest.scales, manifest.parameter_set
    seal = seal_io.runtime(chosen)
    secret = SecretKey(chosen)
    key = ClientKey.from_message(secret.message)
    message = KeyMessage.deserialize(secret.message)
    query = np.zeros(chosen.poly_modulus_degree)
    query[:384] = 1 / 384
    polynomial = secret.encrypt(query, scales.query_scale_bits)
    weight = encode(seal, query, scales.weight_scale_bits)

    def load() -> Any:
        return seal_io.load_seeded_ciphertext(
            seal,
            polynomial.c0,
            polynomial.seed,
            prng=message.prng,
            ntt_form=message.domain is Domain.NTT,
            scale_bits=scales.query_scale_bits,
        )

    loaded = load()
    product, zero = seal.new_ciphertext(), seal.new_ciphertext()

    def multiply() -> None:
        seal.evaluator.multiply_plain(loaded, weight, product)

    def encrypt_zero() -> None:
        key.encryptor.encrypt_zero(seal.parms_id, zero)

    multiply()
    # In place it would transform its own result again: it is timed with a copy to another object.
    coefficients = seal.new_ciphertext()

    def transform() -> None:
        seal.evaluator.transform_from_ntt(product, coefficients)

    transform()
    residues = seal_io.save_ciphertext(seal, coefficients)
    cut = truncate(residues[1], chosen, scales.reply_bits)
    packed = pack_bits(cut, scales.reply_bits)
    return {
        "expand and load": load,
        _PRODUCT: multiply,
        _ZERO: encrypt_zero,
        _TRANSFORM: transform,
        "read": lambda: seal_io.save_ciphertext(seal, coefficients),
        "truncate": lambda: truncate(residues[1], chosen, scales.reply_bits),
        "pack": lambda: pack_bits(cut, scales.reply_bits),
        "unpack": lambda: unpack_bits(packed, len(cut), scales.reply_bits),
    }


def floor_of(head: Head, parameters: str, batch: int, primitives: list[Row]) -> Row:
    """The floor of so many texts, in the requests that the SDK would choose, of a run's primitives.

    The products of bulk requests are one matrix product, whose bare multiplications in float64 are
    timed here.
    """
    manifest = head.artifact(parameters, bulk=batch > 1).manifest
    layouts = [manifest.layout_of(texts) for texts in Session(manifest).plan(batch)]
    cost = {
        row.subject.partition("/")[2]: row.server_ms or 0.0
        for row in primitives
        if row.parameters == parameters
    }
    replies = sum(layout.replies for layout in layouts)
    single = [layout for layout in layouts if layout.kind is not LayoutKind.BULK]
    products = sum(layout.products for layout in single)
    bulk = [layout for layout in layouts if layout.kind is LayoutKind.BULK]
    matrix_ms = {layout: _matrix_ms(layout, manifest) for layout in set(bulk)}
    note = f"encryptions of zero and transforms: {replies}"
    if products:
        note += f", products: {products}"
    if bulk:
        note += f", matrix products: {len(bulk)}"
    return Row(
        subject="floor",
        system="veilhead",
        parameters=parameters,
        d=head.dimensions,
        classes=head.classes,
        batch=batch,
        server_ms=replies * (cost[_ZERO] + cost[_TRANSFORM])
        + products * cost[_PRODUCT]
        + sum(matrix_ms[layout] for layout in bulk),
        note=note,
    )


def _matrix_ms(layout: Layout, manifest: Manifest) -> float:
    """Integer weights times the limbs of residues, as float64: [C, P t] times [P t, columns]."""
    bits = manifest.scales.weight_scale_bits
    # A sum of magnitudes below 2^(bits + e) leaves so many bits of a float64 to each limb.
    limb = 53 - (bits + manifest.scales.served_exponent + 5)
    chosen = manifest.parameter_set
    limbs = -(-chosen.residue_bits // limb)
    inner = layout.pieces * layout.block_length
    weights = np.ones((layout.classes, inner))
    residues = np.ones((inner, _COLUMNS))
    part_ms, _ = timed(lambda: weights @ residues, _MATRIX_CALLS)
    return part_ms * limbs * 2 * layout.degree / _COLUMNS

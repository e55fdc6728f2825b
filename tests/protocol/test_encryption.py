"""Encryption, evaluation and decryption, held against SEAL's own decryption."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tenseal import sealapi

from veilhead import session as session_module
from veilhead.session import SecretKey, Session
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol import seal_io
from veilhead_protocol.decryption import secret_coefficients
from veilhead_protocol.encoding import decode, encode
from veilhead_protocol.parameters import COMPACT, PARAMETER_SETS, STANDARD, ParameterSet
from veilhead_protocol.scales import project
from veilhead_protocol.wire import KeyMessage, QueryMessage, ReplyMessage
from veilhead_service.encrypted_head import ClientKey, EncryptedHead

SHAPES = [
    ("compact", 384, 7),
    ("compact", 3000, 2),
    ("standard", 384, 77),
    ("standard", 4096, 2),
]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """SEAL's secret keys, as sessions make them: only a test may look at one."""
    found: list[Any] = []
    seal_io._reads_seeded()  # makes a key of its own, once
    original = sealapi.KeyGenerator

    class Capturing:
        def __init__(self, context: Any) -> None:
            self._generator = original(context)

        def secret_key(self) -> Any:
            found.append(self._generator.secret_key())
            return found[-1]

    monkeypatch.setattr(session_module.sealapi, "KeyGenerator", Capturing)
    return found


class Watched(EncryptedHead):
    """The real evaluation, whose uncut ciphertexts can be seen, without flood."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.ciphertexts: list[Any] = []

    def _masked(self, query: QueryMessage, key: ClientKey) -> Iterator[Any]:
        for residues in super()._masked(query, key):
            self.ciphertexts.append(residues)
            yield residues

    def _flood(self, count: int) -> Any:
        return np.zeros(count, dtype=np.int64)


def decrypted_by_seal(parameters: ParameterSet, secret: Any, residues: Any, scale_bits: int) -> Any:
    """All coefficients [N] of a ciphertext's coefficients [2, N], by SEAL's decryption."""
    seal = seal_io.runtime(parameters)
    ciphertext = seal_io.load_ciphertext(seal, residues, scale_bits=scale_bits, ntt_form=False)
    seal.evaluator.transform_to_ntt_inplace(ciphertext)
    plaintext = seal.new_plaintext()
    sealapi.Decryptor(seal.context, secret).decrypt(ciphertext, plaintext)
    return decode(seal, plaintext)


@pytest.mark.parametrize(("name", "dimensions", "classes"), SHAPES)
def test_decryption_agrees_with_seals(
    make_artifact, unit_rows, captured, name: str, dimensions: int, classes: int
) -> None:
    artifact = make_artifact(classes, dimensions, name)
    manifest, parameters = artifact.manifest, artifact.parameters
    head = Watched(manifest, artifact.weight, artifact.bias)
    session = Session(manifest)
    row = unit_rows(1, dimensions)[0]
    query = session.encrypt(row)
    reply = head.evaluate(query.data, ClientKey.from_message(query.key.message))

    (secret,) = captured
    by_seal: list[float] = []
    for number, residues in enumerate(head.ciphertexts):
        coefficients = decrypted_by_seal(parameters, secret, residues, manifest.scales.scale_bits)
        by_seal += coefficients[manifest.layout.wanted(number)].tolist()
    message = ReplyMessage.deserialize(
        reply,
        parameters,
        manifest.layout,
        manifest.scales.reply_bits,
        model_digest=manifest.digest,
        key_id=query.key.id,
        query_digest=query.digest,
    )
    scales = manifest.scales
    assert scales.downscale_bits == 0
    unit = parameters.prime / 2 ** (scales.reply_bits + scales.scale_bits)
    ours = query.key.decrypt(message).reshape(-1)[:classes] * unit
    # Truncation is all that lies between them: one deviation, eight of which the bound allows.
    spread = np.sqrt((2 * parameters.poly_modulus_degree / 3 + 1) / 12) * unit
    difference = ours - (np.array(by_seal) + artifact.bias)
    assert np.abs(difference).max() <= 8 * spread
    assert np.abs(difference).max() > 0  # it is not the same computation twice

    # SEAL's own answer is the plaintext's, up to quantised weights and encryption noise.
    exact = project(row[np.newaxis], 1.0) @ artifact.weight.T
    assert np.abs(np.array(by_seal) - exact[0]).max() <= 3.7e-4 + 2.0**-17


@pytest.mark.parametrize(("name", "dimensions", "classes"), SHAPES)
@pytest.mark.parametrize("norm", [6.0, 20.0, 2.0**10, 2.0**20])
def test_logits_keep_the_published_bound(
    make_artifact, unit_rows, name: str, dimensions: int, classes: int, norm: float
) -> None:
    """Also of heads of large logits, which are served divided."""
    artifact = make_artifact(classes, dimensions, name, seed=3, norm=norm)
    scales = artifact.manifest.scales
    assert (scales.downscale_bits > 0) is (norm > 64)
    head = EncryptedHead(artifact.manifest, artifact.weight, artifact.bias)
    session = Session(artifact.manifest)
    for row, exact in zip(
        unit_rows(8, dimensions), artifact.logits(unit_rows(8, dimensions)), strict=True
    ):
        query = session.encrypt(row)
        reply = head.evaluate(query.data, ClientKey.from_message(query.key.message))
        logits = session.decrypt(query, reply)
        assert np.abs(logits - exact).max() <= artifact.manifest.head.error_bound
        steps = logits / scales.logit_step
        assert np.array_equal(steps, np.rint(steps))


def test_the_flood_is_added_and_bounded(make_artifact, unit_rows) -> None:
    """Over many answers it reaches both ends of [-Delta / 2^11, Delta / 2^11], and no further."""
    artifact = make_artifact(5, 384, "compact")
    manifest = artifact.manifest
    head = EncryptedHead(manifest, artifact.weight, artifact.bias)
    bound = 2**manifest.scales.flood_bits
    flood = np.array(head._flood(4000), dtype=np.float64) / bound
    assert np.abs(flood).max() <= 1
    assert flood.min() < -0.99
    assert flood.max() > 0.99
    assert abs(flood.mean()) < 0.1
    assert abs(flood.var() - 1 / 3) < 0.04
    # and it reaches the answers: they differ by far more than noise and rounding do
    session = Session(manifest)
    query = session.encrypt(unit_rows(1, 384)[0])
    key = ClientKey.from_message(query.key.message)
    answers = np.array([session.decrypt(query, head.evaluate(query.data, key)) for _ in range(20)])
    assert answers.std(axis=0).min() > 2.0**-13


def test_the_largest_logits_do_not_wrap(unit_rows) -> None:
    row = unit_rows(1, 384)[0]
    for name in PARAMETER_SETS:
        weight = 60.0 * np.stack([row, -row])
        artifact = HeadArtifact.from_weights(
            weight, [3.9, -3.9], ["a", "b"], name="head", parameters=name
        )
        assert artifact.scales.served_exponent == 6
        head = EncryptedHead(artifact.manifest, artifact.weight, artifact.bias)
        session = Session(artifact.manifest)
        query = session.encrypt(row * 100)  # shortened to norm one
        reply = head.evaluate(query.data, ClientKey.from_message(query.key.message))
        logits = session.decrypt(query, reply)
        assert np.abs(logits - [63.9, -63.9]).max() <= artifact.manifest.head.error_bound


@pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=lambda p: p.name)
def test_the_secret_is_read_right(
    make_artifact, captured, generator, parameters: ParameterSet
) -> None:
    """(b, a) of the key message is an encryption of zero under the coefficients that decrypt."""
    key = SecretKey(parameters)
    seal = seal_io.runtime(parameters)
    coefficients = secret_coefficients(seal, captured[0])
    assert set(coefficients.tolist()) == {-1.0, 0.0, 1.0}
    counts = np.unique(coefficients, return_counts=True)[1] / len(coefficients)
    assert np.abs(counts - 1 / 3).max() < 0.06
    message = KeyMessage.deserialize(key.message)
    secret = coefficients.astype(int).tolist()
    prime = parameters.prime
    a, _ = generator.expand(message.prng, message.seed, parameters.poly_modulus_degree, prime)
    transformed = generator.to_ntt(secret, prime)
    sums = [(x + y * s) % prime for x, y, s in zip(message.b.tolist(), a, transformed, strict=True)]
    # The mean of the values is the constant coefficient: here, of the error.
    constant = sum(sums) * pow(parameters.poly_modulus_degree, -1, prime) % prime
    assert min(constant, prime - constant) <= 21


def test_keys_are_fresh(make_artifact) -> None:
    keys = [SecretKey(COMPACT) for _ in range(4)]
    assert len({key.id for key in keys}) == 4
    assert len({key.message[-64:] for key in keys}) == 4


# --- what double precision leaves in other coefficients ------------------------------------------


def encoded_exactly(parameters: ParameterSet, coefficients: Any, scale_bits: int) -> list[int]:
    """The integers [N] that SEAL's plaintext really holds."""
    seal, prime = seal_io.runtime(parameters), parameters.prime
    residues = np.zeros((2, parameters.poly_modulus_degree), dtype=np.uint64)
    residues[1] = 1  # SEAL refuses a ciphertext whose second polynomial is zero
    ciphertext = seal_io.load_ciphertext(seal, residues, scale_bits=scale_bits)
    seal.evaluator.add_plain_inplace(ciphertext, encode(seal, coefficients, scale_bits))
    seal.evaluator.transform_from_ntt_inplace(ciphertext)
    found: list[int] = seal_io.save_ciphertext(seal, ciphertext)[0].tolist()
    return [value - prime if value > prime // 2 else value for value in found]


@pytest.mark.parametrize("dimensions", [384, 2048])
@pytest.mark.parametrize(
    ("parameters", "scale_bits"),
    [(COMPACT, 28), (COMPACT, 36), (COMPACT, 46), (STANDARD, 36), (STANDARD, 46), (STANDARD, 50)],
    ids=lambda value: getattr(value, "name", value),
)
def test_junk_from_the_fourier_transform_is_bounded(
    unit_rows, parameters: ParameterSet, scale_bits: int, dimensions: int
) -> None:
    """A rare tie below 2^47; above, off by 2^-53 of the largest coefficient at most."""
    degree = parameters.poly_modulus_degree
    spike = np.zeros(degree)
    spike[5] = 1.0
    spread = np.zeros(degree)
    spread[:dimensions] = unit_rows(1, dimensions)[0]
    for coefficients in (spike, spread):
        found = encoded_exactly(parameters, coefficients, scale_bits)
        exact = [int(value) for value in np.rint(coefficients * 2.0**scale_bits)]
        junk = [abs(a - b) for a, b in zip(found, exact, strict=True)]
        assert max(junk) <= max(1, 2 ** (scale_bits - 53))
        if scale_bits < 47:
            assert sum(junk) <= 2


@pytest.mark.parametrize("parameters", PARAMETER_SETS.values(), ids=lambda p: p.name)
def test_junk_is_far_below_the_bound_of_a_logit(parameters: ParameterSet) -> None:
    """At the largest scale that a query can have, beside a coefficient of one."""
    largest = parameters.residue_bits - 2
    coefficients = np.zeros(parameters.poly_modulus_degree)
    coefficients[5] = 1.0
    found = encoded_exactly(parameters, coefficients, largest)
    junk = np.array([value for at, value in enumerate(found) if at != 5], dtype=np.float64)
    assert found[5] == 2**largest
    assert np.abs(junk).sum() / 2.0**largest < 2.0**-40

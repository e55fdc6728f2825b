"""The self-test: a version answers known embeddings before it answers anybody.

Random embeddings are encrypted, the head evaluates them as it would a client's, and the decrypted
logits must be those of the plaintext head within the bound that the manifest promises. What it
finds is a broken build, another library, or files that fit together but not with this version.

This is the only module of the service that holds a secret key. The key is made here, in the
vendor's own process, and is forgotten with the test; it has encrypted nothing but random numbers of
the vendor's, and no client ever sees it or a message under it. So it protects nothing, and nobody's
secret can be lost with it. Requests cannot reach this module: no secret key, and nothing to decrypt
with one, is ever accepted over HTTP.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

from veilhead_models.artifact import HeadArtifact
from veilhead_protocol import seal_io
from veilhead_protocol.decryption import (
    DecryptionKey,
    rounded_logits,
    secret_coefficients,
    wanted_values,
)
from veilhead_protocol.encoding import encode
from veilhead_protocol.errors import SelfTestError, WireError
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.wire import (
    Domain,
    KeyMessage,
    Prng,
    QueryMessage,
    ReplyMessage,
    SeededPolynomial,
)
from veilhead_service.card import Fidelity
from veilhead_service.encrypted_head import ClientKey, EncryptedHead

#: Every class and every dimension takes part in each; each has a key of its own.
EMBEDDINGS: Final = 2


def measured_fidelity(head: EncryptedHead, artifact: HeadArtifact, rows: int) -> Fidelity:
    """How near the answers to so many random embeddings come to those of the plaintext head.

    Raises:
        WireError: when the head refuses one.
    """
    worst, same = 0.0, 0
    for row in _random_rows(rows, artifact.manifest.head.dimensions):
        expected = artifact.weight @ row + artifact.bias  # [C]
        found = _ask(head, artifact.manifest, row)
        worst = max(worst, float(np.abs(found - expected).max()))
        same += int(found.argmax() == expected.argmax())
    return Fidelity(rows, worst, same)


def self_test(head: EncryptedHead, artifact: HeadArtifact) -> None:
    """Raise `SelfTestError` unless the head answers as the artefact's plaintext weights do."""
    bound = artifact.manifest.head.error_bound
    for row in _random_rows(EMBEDDINGS, artifact.manifest.head.dimensions):
        expected = artifact.weight @ row + artifact.bias  # [C]
        try:
            found = _ask(head, artifact.manifest, row)
        except WireError as error:
            raise SelfTestError(
                f"the version {artifact.manifest.digest.hex()} refused its own self-test: {error}"
            ) from error
        worst = float(np.abs(found - expected).max())
        if not worst <= bound:  # a NaN is wrong too
            raise SelfTestError(
                f"the version {artifact.manifest.digest.hex()} failed its self-test: a logit is "
                f"off by {worst:.2g}, expected at most {bound:.2g}; it is not served"
            )


def _random_rows(count: int, dimensions: int) -> NDArray[np.float64]:
    """Rows [count, d] of norm one. They need not be secret."""
    rows = np.random.default_rng().normal(size=(count, dimensions))
    unit: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _ask(head: EncryptedHead, manifest: Manifest, row: NDArray[np.float64]) -> NDArray[np.float64]:
    """The decrypted logits [C] of an embedding [d], under a key that lives no longer than this."""
    parameters, layout = manifest.parameter_set, manifest.layout
    seal = seal_io.runtime(parameters)
    secret = sealapi.KeyGenerator(seal.context).secret_key()
    encryptor = sealapi.Encryptor(seal.context, secret)
    b, prng, seed = seal_io.save_seeded(seal, encryptor.encrypt_zero_symmetric(seal.parms_id))
    key = ClientKey.from_message(
        KeyMessage(parameters, Prng(prng), Domain.NTT, b, seed).serialize()
    )

    def encrypt(piece: NDArray[np.float64]) -> SeededPolynomial:
        plaintext = encode(seal, piece, manifest.scales.query_scale_bits)
        c0, _, seed = seal_io.save_seeded(seal, encryptor.encrypt_symmetric(plaintext))
        return SeededPolynomial(c0, seed)

    query = QueryMessage(
        parameters=parameters,
        model_digest=manifest.digest,
        key_id=key.id,
        layout=layout,
        prng=Prng(prng),
        domain=Domain.NTT,
        polynomials=tuple(encrypt(piece) for piece in layout.pack_embeddings(row[np.newaxis])),
    ).serialize()
    reply = ReplyMessage.deserialize(
        head.evaluate(query, key),
        parameters,
        layout,
        manifest.scales.reply_bits,
        model_digest=manifest.digest,
        key_id=key.id,
        query_digest=hashlib.sha256(query).digest(),
    )
    decryption = DecryptionKey(secret_coefficients(seal, secret))
    return rounded_logits(wanted_values(reply, decryption), manifest).reshape(-1)

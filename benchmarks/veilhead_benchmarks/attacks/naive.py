"""A naive service built on TenSEAL: what is on its wire, and what its messages can be made to say.

The messages are those of the peers in `peers/`, as TenSEAL writes them: protocol buffers around
SEAL's own ciphertexts. Nothing of the product takes part.
"""

from __future__ import annotations

import math
from functools import cache
from tempfile import NamedTemporaryFile
from typing import Any, Final

import numpy as np
import tenseal
from numpy.typing import NDArray
from tenseal import sealapi

from veilhead_benchmarks.peers.tenseal_mm import DEGREE, PRIME_BITS, SCALE
from veilhead_protocol.seal_memory import read_array

_Array = NDArray[np.float64]

#: Of CKKSVectorProto: field 1, packed; the number of values, which says nothing about the slots.
_SIZES_TAG: Final = 0x0A

#: Of CKKSTensorProto: field 4, the number of rows in the slots, which are always there.
_BATCH_TAG: Final = 0x20


def relabelled(message: bytes, size: int) -> bytes:
    """The message of an encrypted vector, with another number of values written into it.

    Raises:
        ValueError: when the message does not begin with its sizes, as TenSEAL writes it.
    """
    if len(message) < 2 or message[0] != _SIZES_TAG or message[1] > 10:
        raise ValueError("not an encrypted vector of one chunk")
    packed = _varint(size)
    return bytes([_SIZES_TAG, len(packed)]) + packed + message[2 + message[1] :]


def relabelled_batch(message: bytes, old: int, new: int) -> bytes:
    """The message of an encrypted tensor, with another number of rows written into it.

    Raises:
        ValueError: when the message does not end with `old`, as TenSEAL writes it.
    """
    ending = bytes([_BATCH_TAG]) + _varint(old)
    if not message.endswith(ending):
        raise ValueError(f"not an encrypted tensor of {old} rows")
    return message[: -len(ending)] + bytes([_BATCH_TAG]) + _varint(new)


def _varint(value: int) -> bytes:
    digits = [value >> 7 * place & 0x7F for place in range(max(1, (value.bit_length() + 6) // 7))]
    return bytes([digit | 0x80 for digit in digits[:-1]] + digits[-1:])


def coefficients(context: Any, ciphertext: Any) -> NDArray[np.uint64]:
    """Residues [2, L, N] by coefficient of a ciphertext of a TenSEAL context."""
    seal_context = context.seal_context().data
    sealapi.Evaluator(seal_context).transform_from_ntt_inplace(ciphertext)
    # TenSEAL's vectors hold ciphertexts of a type of their own.
    copied = sealapi.Ciphertext()
    with NamedTemporaryFile(prefix="veilhead-attack-") as file:
        ciphertext.save(file.name)
        copied.load(seal_context, file.name)
    shape = (2, copied.coeff_modulus_size(), copied.poly_modulus_degree())
    return read_array(copied, math.prod(shape)).reshape(shape)


def moduli(context: Any) -> list[int]:
    """The primes of a fresh ciphertext of a TenSEAL context; the first one stays to the end."""
    first = context.seal_context().data.first_context_data()
    return [prime.value() for prime in first.parms().coeff_modulus()]


@cache
def _client_context() -> Any:
    """The context of a client of `CKKSVector.mm`; Galois keys are no part of a query."""
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        poly_modulus_degree=DEGREE,
        coeff_mod_bit_sizes=list(PRIME_BITS),
        n_threads=1,
    )
    context.global_scale = SCALE
    return context


def query(embedding: _Array) -> bytes:
    """What a client of `CKKSVector.mm` sends for an embedding [d]."""
    message: bytes = tenseal.ckks_vector(_client_context(), embedding.tolist()).serialize()
    return message


def query_features(embeddings: _Array) -> _Array:
    """What crosses the wire for each embedding, as numbers from -1 to 1: [texts, N].

    The coefficients of the first half of the ciphertext, modulo the largest prime.
    """
    context = _client_context()
    prime = moduli(context)[0]
    features = np.empty((len(embeddings), DEGREE))
    for row, embedding in zip(features, embeddings, strict=True):
        vector = tenseal.ckks_vector_from(context, query(embedding))
        values = coefficients(context, vector.ciphertext()[0])[0, 0] / prime
        row[:] = 2 * np.where(values > 0.5, values - 1, values)
    return features

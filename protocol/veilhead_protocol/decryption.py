"""What decryption is made of: the secret's coefficients, and what to do with them.

The client decrypts its replies with this, under keys that never leave it. The service uses it once
for every version that it loads, under a key of its own making, to see that the version answers a
known embedding rightly: its `self_test.py` says why that protects and endangers nothing.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

from veilhead_protocol import seal_io
from veilhead_protocol.encoding import decode
from veilhead_protocol.layout import Layout
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.scales import round_logits
from veilhead_protocol.wire import ReplyMessage

_PROBE_BITS: Final = 30


def secret_coefficients(seal: seal_io.Runtime, secret: Any) -> NDArray[np.float64]:
    """The secret's coefficients in {-1, 0, 1}, [N]: the decryption of the ciphertext (0, 2^30).

    SEAL would have to write the key to a file to show it otherwise.
    """
    degree = seal.parameters.poly_modulus_degree
    residues = np.zeros((2, len(seal.parameters.data_primes), degree), dtype=np.uint64)
    residues[1] = 1 << _PROBE_BITS
    probe = seal_io.load_ciphertext(seal, residues, scale_bits=_PROBE_BITS)
    plaintext = seal.new_plaintext()
    sealapi.Decryptor(seal.context, secret).decrypt(probe, plaintext)
    return np.rint(decode(seal, plaintext))


def decryption_rows(secret: NDArray[np.float64], layout: Layout) -> NDArray[np.float64]:
    """Rows [G, N] whose product with c1 is a wanted coefficient of c1 times the secret.

    The wanted coefficients of every reply polynomial begin those of the first.
    """
    distance = layout.wanted(0)[:, np.newaxis] - np.arange(layout.degree)  # [G, N]
    sign = np.where(distance < 0, -1.0, 1.0)
    rows: NDArray[np.float64] = sign * secret[distance % layout.degree]
    return rows


def wanted_values(reply: ReplyMessage, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Wanted coefficients of c0 + c1 s modulo 2^kappa, centred: [replies, G]. Never published.

    Every sum is an integer below 2^46, so float64 is exact. An unrounded value is an exact linear
    equation in the secret: `rounded_logits` is the only form in which anything may leave.
    """
    c1 = np.stack([polynomial.c1 for polynomial in reply.polynomials]).astype(np.float64)
    values: NDArray[np.float64] = c1 @ rows.T
    for row, polynomial in zip(values, reply.polynomials, strict=True):
        row[: len(polynomial.c0)] += polynomial.c0
    modulus = 2.0**reply.reply_bits
    centred: NDArray[np.float64] = values - modulus * np.rint(values / modulus)
    return centred


def rounded_logits(values: NDArray[np.float64], manifest: Manifest) -> NDArray[np.float64]:
    """Logits [C] of wanted values [replies, G], rounded to multiples of 2^-12."""
    scales = manifest.scales
    # 2^kappa Delta / Q units make a logit of one.
    unit = manifest.parameter_set.data_modulus / 2 ** (scales.reply_bits + scales.scale_bits)
    return round_logits(values.reshape(-1)[: manifest.layout.classes] * unit)

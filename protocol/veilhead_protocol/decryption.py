"""What decryption is made of: the secret's coefficients, and what to do with them.

The client decrypts its replies with this, under keys that never leave it. The service uses it once
for every version that it loads, under a key of its own making, to see that the version answers a
known embedding rightly: its `self_test.py` says why that protects and endangers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

from veilhead_protocol import seal_io
from veilhead_protocol.encoding import decode
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.scales import round_logits
from veilhead_protocol.wire import ReplyMessage, Residues

_PROBE_BITS: Final = 30

#: Reply polynomials that are decrypted together: what bounds the memory of a large head's reply.
_ROWS_AT_ONCE: Final = 64

#: Coefficients of a product that are found sooner one by one than all together.
_FEW: Final = 16


def secret_coefficients(seal: seal_io.Runtime, secret: Any) -> NDArray[np.float64]:
    """The secret's coefficients in {-1, 0, 1}, [N]: the decryption of the ciphertext (0, 2^30).

    SEAL would have to write the key to a file to show it otherwise.
    """
    degree = seal.parameters.poly_modulus_degree
    residues = np.zeros((2, degree), dtype=np.uint64)
    residues[1] = 1 << _PROBE_BITS
    probe = seal_io.load_ciphertext(seal, residues, scale_bits=_PROBE_BITS)
    plaintext = seal.new_plaintext()
    sealapi.Decryptor(seal.context, secret).decrypt(probe, plaintext)
    return np.rint(decode(seal, plaintext))


class DecryptionKey:
    """A secret's coefficients, ready for products with the masks of replies.

    The products are negacyclic convolutions of integers. A few of their coefficients are as many
    inner products; many come together by FFT: two masks are the real and the imaginary part of one
    complex polynomial. With masks below 2^27 and a ternary secret, double precision is off by less
    than 2^-6 (docs/protocol.md), so rounding gives the exact integers.
    """

    def __init__(self, coefficients: NDArray[np.float64]) -> None:
        """Prepare the secret's coefficients in {-1, 0, 1}, [N]."""
        degree = len(coefficients)
        # X -> X exp(i pi / N) turns X^N + 1 into X^N - 1, whose products are cyclic.
        self._twist = np.exp(1j * np.pi * np.arange(degree) / degree)
        self._back = np.conj(self._twist)
        self._spectrum = np.fft.fft(coefficients * self._twist)
        # s_(N-1), ..., s_0, -s_(N-1), ..., -s_1: coefficient i takes N of them from N - 1 - i on.
        self._reversed = np.concatenate([-coefficients[1:], coefficients])[::-1].copy()

    def __repr__(self) -> str:
        return "DecryptionKey(...)"

    def __reduce__(self) -> Any:
        raise TypeError("a decryption key cannot be pickled or copied")

    def products(
        self, masks: Residues, wanted: Sequence[NDArray[np.intp]]
    ) -> list[NDArray[np.float64]]:
        """Masks [m, N], below 2^27, times the secret: of each product the wanted coefficients."""
        if max(map(len, wanted)) <= _FEW:
            return list(map(self._inner_products, masks.astype(np.float64), wanted))
        pairs = masks[::2] + 0j  # [ceil(m / 2), N]
        pairs[: len(masks) // 2] += 1j * masks[1::2]
        values = np.fft.ifft(np.fft.fft(pairs * self._twist, axis=-1) * self._spectrum, axis=-1)
        values *= self._back
        found = []
        for number, places in enumerate(wanted):
            row = values[number // 2, places]
            found.append(np.rint(row.imag if number % 2 else row.real))
        return found

    def _inner_products(
        self, mask: NDArray[np.float64], places: NDArray[np.intp]
    ) -> NDArray[np.float64]:
        degree = len(mask)
        starts = (degree - 1 - places).tolist()
        return np.array([self._reversed[start : start + degree] @ mask for start in starts])


def wanted_values(reply: ReplyMessage, key: DecryptionKey) -> NDArray[np.float64]:
    """Wanted coefficients of c0 + c1 s modulo 2^kappa, centred: [b, C]. Never published.

    Every sum is an integer below 2^40, so float64 is exact. An unrounded value is an exact linear
    equation in the secret: `rounded_logits` is the only form in which anything may leave.
    """
    layout, modulus = reply.layout, 2.0**reply.reply_bits
    found = []
    for start in range(0, layout.replies, _ROWS_AT_ONCE):
        polynomials = reply.polynomials[start : start + _ROWS_AT_ONCE]
        masks = np.stack([polynomial.c1 for polynomial in polynomials])
        wanted = [layout.wanted(start + number) for number in range(len(polynomials))]
        found += [
            values + polynomial.c0
            for values, polynomial in zip(key.products(masks, wanted), polynomials, strict=True)
        ]
    sums = layout.logits(found)
    centred: NDArray[np.float64] = sums - modulus * np.rint(sums / modulus)
    return centred


def rounded_logits(values: NDArray[np.float64], manifest: Manifest) -> NDArray[np.float64]:
    """Logits of wanted values, same shape, rounded as `round_logits` does."""
    scales = manifest.scales
    # 2^kappa Delta / Q units make a served logit of one.
    unit = manifest.parameter_set.prime / 2 ** (scales.reply_bits + scales.scale_bits)
    return round_logits(values * unit, scales)

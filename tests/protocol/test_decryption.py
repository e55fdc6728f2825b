"""Products with the secret are exact integers, whatever the mask is."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veilhead_protocol.decryption import DecryptionKey


def exact(mask: list[int], secret: list[int]) -> list[int]:
    """The negacyclic product by one multiplication of long integers."""
    degree = len(mask)

    def joined(values: object) -> int:
        return int.from_bytes(np.asarray(values, dtype="<u8").tobytes(), "little")

    limbs = []
    for sign in (1, -1):
        part = joined([bit == sign for bit in secret])
        data = (joined(mask) * part).to_bytes(2 * degree * 8, "little")
        limbs.append(np.frombuffer(data, dtype="<u8").astype(np.int64))
    product = limbs[0] - limbs[1]
    found: list[int] = (product[:degree] - product[degree:]).tolist()
    return found


@pytest.mark.parametrize("degree", [2048, 4096])
@given(
    st.sampled_from(["random", "largest", "alternating"]),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_products_are_exact(degree: int, kind: str, count: int, seed: int) -> None:
    """Masks go in pairs; the last may be alone."""
    rng = np.random.default_rng(seed)
    bits = 27  # the most that a reply's residues have
    secret = rng.integers(-1, 2, size=degree)
    masks = rng.integers(0, 2**bits, size=(count, degree), dtype=np.uint64)
    if kind != "random":
        masks[:] = 2**bits - 1
        secret = (
            np.ones(degree, dtype=int) if kind == "largest" else 1 - 2 * (np.arange(degree) % 2)
        )
    key = DecryptionKey(secret.astype(np.float64))
    expected = [exact(mask.tolist(), secret.tolist()) for mask in masks]
    for found, whole in zip(
        key.products(masks, [np.arange(degree)] * count), expected, strict=True
    ):
        assert found.astype(int).tolist() == whole
    # A few of them are computed in another way, the first and the last of all among them.
    few = np.array([0, degree - 1, *rng.integers(0, degree, size=6)])
    for found, whole in zip(key.products(masks, [few] * count), expected, strict=True):
        assert found.astype(int).tolist() == [whole[place] for place in few]


@pytest.mark.parametrize("degree", [2048, 4096])
def test_the_transforms_are_far_from_a_wrong_rounding(degree: int) -> None:
    """Off by less than 2^-6 before rounding, for the largest masks and secrets."""
    rng = np.random.default_rng(degree)
    for secret in (np.ones(degree), rng.integers(-1, 2, size=degree).astype(np.float64)):
        key = DecryptionKey(secret)
        pair = np.full(degree, 2**27 - 1) * (1 + 1j)
        values = np.fft.ifft(np.fft.fft(pair * key._twist) * key._spectrum) * key._back
        for part in (values.real, values.imag):
            assert np.abs(part - np.rint(part)).max() < 2.0**-6


def test_a_decryption_key_stays_where_it_is() -> None:
    key = DecryptionKey(np.ones(2048))
    with pytest.raises(TypeError, match="decryption key"):
        pickle.dumps(key)
    assert repr(key) == "DecryptionKey(...)"

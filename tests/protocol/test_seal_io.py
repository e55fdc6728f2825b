"""SEAL's bytes: what is laid out here is what SEAL would have made itself."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.copies import WAYS, in_copy, in_every_way
from tenseal import sealapi

from veilhead_protocol import seal_io
from veilhead_protocol.encoding import decode, encode
from veilhead_protocol.parameters import COMPACT, PARAMETER_SETS, STRONG, ParameterSet

SETS = [COMPACT, STRONG]
NAMES = [parameters.name for parameters in SETS]


def residues(seed: int, primes: tuple[int, ...], degree: int) -> Any:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, prime, size=degree, dtype=np.uint64) for prime in primes])


def to_ntt(generator: Any, rows: Any, primes: tuple[int, ...]) -> Any:
    return np.array(
        [generator.to_ntt(row.tolist(), p) for row, p in zip(rows, primes, strict=True)],
        dtype=np.uint64,
    )


@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
@pytest.mark.parametrize("prng", [1, 2])
def test_a_seed_is_its_residues(generator, parameters: ParameterSet, prng: int) -> None:
    """A ciphertext of (c0, seed) is the one of (c0, expanded residues)."""
    seal, degree = seal_io.runtime(parameters), parameters.poly_modulus_degree
    c0 = residues(1, parameters.data_primes, degree)
    seed = bytes(reversed(range(64)))
    rows, _ = generator.expand(prng, seed, degree, parameters.data_primes)
    c1 = np.array(rows, dtype=np.uint64)
    seeded = seal_io.load_seeded_ciphertext(seal, c0, seed, prng=prng, ntt_form=True, scale_bits=9)
    explicit = seal_io.load_ciphertext(seal, np.stack([c0, c1]), scale_bits=9)
    assert np.array_equal(seal_io.save_ciphertext(seeded), np.stack([c0, c1]))
    assert np.array_equal(seal_io.save_ciphertext(explicit), np.stack([c0, c1]))
    assert seeded.scale == explicit.scale == 2.0**9


@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
@pytest.mark.parametrize("prng", [1, 2])
def test_coefficients_are_transformed(generator, parameters: ParameterSet, prng: int) -> None:
    """Domain 0 of (c0, seed) is domain 1 of both transformed: bit-reversed, smallest root."""
    seal, degree, primes = (
        seal_io.runtime(parameters),
        parameters.poly_modulus_degree,
        parameters.data_primes,
    )
    c0 = residues(2, primes, degree)
    seed = bytes(range(64, 128))
    rows, _ = generator.expand(prng, seed, degree, primes)
    expected = np.stack(
        [to_ntt(generator, c0, primes), to_ntt(generator, np.array(rows, dtype=np.uint64), primes)]
    )
    loaded = seal_io.load_seeded_ciphertext(seal, c0, seed, prng=prng, ntt_form=False, scale_bits=9)
    assert np.array_equal(seal_io.save_ciphertext(loaded), expected)


@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
@pytest.mark.parametrize("prng", [1, 2])
@pytest.mark.parametrize("domain", [0, 1])
def test_keys_in_both_domains(generator, parameters: ParameterSet, prng: int, domain: int) -> None:
    """At the key level, where the special prime counts too."""
    seal, degree, primes = (
        seal_io.runtime(parameters),
        parameters.poly_modulus_degree,
        parameters.key_primes,
    )
    b, seed = residues(3, primes, degree), bytes(range(32)) * 2
    rows, _ = generator.expand(prng, seed, degree, primes)
    expected = np.stack([b, np.array(rows, dtype=np.uint64)])
    if domain == 0:
        expected = np.stack([to_ntt(generator, polynomial, primes) for polynomial in expected])
    key = seal_io.load_public_key(seal, b, seed, prng=prng, ntt_form=domain == 1)
    assert np.array_equal(seal_io.save_ciphertext(key.data()), expected)
    # and SEAL can encrypt under it
    zero = seal.new_ciphertext()
    sealapi.Encryptor(seal.context, key).encrypt_zero(seal.data_parms_id, zero)
    assert seal_io.save_ciphertext(zero).shape == (2, len(parameters.data_primes), degree)


@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
def test_what_seal_saves_is_read(parameters: ParameterSet) -> None:
    """A seeded encryption of SEAL's own, rebuilt from (c0, seed), decrypts to its message."""
    seal, degree = seal_io.runtime(parameters), parameters.poly_modulus_degree
    secret = sealapi.KeyGenerator(seal.context).secret_key()
    encryptor = sealapi.Encryptor(seal.context, secret)
    message = np.zeros(degree)
    message[:3] = [0.5, -0.25, 1.0]
    saved = encryptor.encrypt_symmetric(encode(seal, message, 30))
    c0, prng, seed = seal_io.save_seeded(saved)
    assert prng == 1
    assert len(seed) == 64
    ciphertext = seal_io.load_seeded_ciphertext(
        seal, c0, seed, prng=prng, ntt_form=True, scale_bits=30
    )
    plaintext = seal.new_plaintext()
    sealapi.Decryptor(seal.context, secret).decrypt(ciphertext, plaintext)
    assert np.abs(decode(seal, plaintext) - message).max() < 1e-6


@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
def test_seeds_are_fresh(parameters: ParameterSet) -> None:
    seal = seal_io.runtime(parameters)
    secret = sealapi.KeyGenerator(seal.context).secret_key()
    encryptor = sealapi.Encryptor(seal.context, secret)
    seeds = {seal_io.save_seeded(encryptor.encrypt_zero_symmetric())[2] for _ in range(20)}
    assert len(seeds) == 20


@given(st.sampled_from(list(PARAMETER_SETS.values())), st.integers(0, 2**32))
def test_explicit_residues_round_trip(parameters: ParameterSet, seed: int) -> None:
    seal, degree = seal_io.runtime(parameters), parameters.poly_modulus_degree
    both = np.stack([residues(seed + i, parameters.data_primes, degree) for i in (0, 1)])
    loaded = seal_io.load_ciphertext(seal, both, scale_bits=20)
    assert np.array_equal(seal_io.save_ciphertext(loaded), both)


def test_one_runtime_a_process() -> None:
    assert seal_io.runtime(COMPACT) is seal_io.runtime(COMPACT)
    assert seal_io.runtime(COMPACT) is not seal_io.runtime(STRONG)


def test_threads_do_not_mix() -> None:
    """Each thread has a file of its own: a shared one would give another thread's residues."""

    def trip(number: int) -> bool:
        parameters = SETS[number % 2]
        seal, degree = seal_io.runtime(parameters), parameters.poly_modulus_degree
        both = np.stack([residues(number + i, parameters.data_primes, degree) for i in (0, 1)])
        return all(
            np.array_equal(
                seal_io.save_ciphertext(seal_io.load_ciphertext(seal, both, scale_bits=20)), both
            )
            for _ in range(20)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(trip, range(16)))


_FORK = """
import os
import numpy as np
from veilhead_protocol import seal_io
from veilhead_protocol.parameters import COMPACT

seal = seal_io.runtime(COMPACT)

def trip(number):
    both = np.full((2, 1, 2048), number + 1, dtype=np.uint64)
    return all(
        (seal_io.save_ciphertext(seal_io.load_ciphertext(seal, both, scale_bits=20)) == both).all()
        for _ in range(200)
    )

assert trip(0)
children = []
for number in range(1, 4):
    child = os.fork()
    if child == 0:
        os._exit(0 if trip(number) else 1)
    children.append(child)
assert trip(9)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_forked_processes_do_not_mix() -> None:
    """A child inherits the descriptor of its parent's file, and must not use it."""
    run = subprocess.run(
        [sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.strip() == "[0, 0, 0]"


@pytest.mark.parametrize("way", [*WAYS, "same-id"])
def test_a_copied_process_writes_to_files_of_its_own(way: str) -> None:
    """However it was copied, and whatever its process id is."""
    seal = seal_io.runtime(COMPACT)
    ours, theirs = (np.full((2, 1, 2048), number, dtype=np.uint64) for number in (1, 2))

    def write(both: Any) -> None:
        seal_io.load_ciphertext(seal, both, scale_bits=20)
        seal_io.expand_residues(
            seal, both[0], bytes([int(both[0, 0, 0])]) * 64, prng=1, ntt_form=True, into=both.copy()
        )

    def held() -> list[bytes]:
        files = (seal_io._SCRATCH._descriptor, seal_io._EXPANSIONS._descriptor)
        return [os.pread(file, os.fstat(file).st_size, 0) for file in files]

    def work(way: str) -> bool:
        write(ours)
        before = held()
        in_copy(way, lambda: write(theirs))
        return held() == before

    assert in_every_way(way, work)

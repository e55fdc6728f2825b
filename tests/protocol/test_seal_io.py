"""SEAL's bytes: what is laid out here is what SEAL would have made itself."""

from __future__ import annotations

import ctypes
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

from veilhead_protocol import seal_io, seal_memory
from veilhead_protocol.encoding import decode, encode
from veilhead_protocol.parameters import COMPACT, PARAMETER_SETS, STANDARD, ParameterSet
from veilhead_protocol.wire import pack_bits, unpack_bits

SETS = [COMPACT, STANDARD]
NAMES = [parameters.name for parameters in SETS]


def residues(seed: int, parameters: ParameterSet) -> Any:
    rng = np.random.default_rng(seed)
    return rng.integers(0, parameters.prime, size=parameters.poly_modulus_degree, dtype=np.uint64)


def to_ntt(generator: Any, polynomial: Any, parameters: ParameterSet) -> Any:
    return np.array(generator.to_ntt(polynomial.tolist(), parameters.prime), dtype=np.uint64)


def expanded(generator: Any, prng: int, seed: bytes, parameters: ParameterSet) -> Any:
    row, _ = generator.expand(prng, seed, parameters.poly_modulus_degree, parameters.prime)
    return np.array(row, dtype=np.uint64)


@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
@pytest.mark.parametrize("prng", [1, 2])
def test_a_seed_is_its_residues(generator, parameters: ParameterSet, prng: int) -> None:
    """A ciphertext of (c0, seed) is the one of (c0, expanded residues)."""
    seal, c0 = seal_io.runtime(parameters), residues(1, parameters)
    seed = bytes(reversed(range(64)))
    both = np.stack([c0, expanded(generator, prng, seed, parameters)])
    seeded = seal_io.load_seeded_ciphertext(seal, c0, seed, prng=prng, ntt_form=True, scale_bits=9)
    explicit = seal_io.load_ciphertext(seal, both, scale_bits=9)
    assert np.array_equal(seal_io.save_ciphertext(seal, seeded), both)
    assert np.array_equal(seal_io.save_ciphertext(seal, explicit), both)
    assert seeded.scale == explicit.scale == 2.0**9


@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
@pytest.mark.parametrize("prng", [1, 2])
def test_coefficients_are_transformed(generator, parameters: ParameterSet, prng: int) -> None:
    """Domain 0 of (c0, seed) is domain 1 of both transformed: bit-reversed, smallest root."""
    seal, c0 = seal_io.runtime(parameters), residues(2, parameters)
    seed = bytes(range(64, 128))
    c1 = expanded(generator, prng, seed, parameters)
    expected = np.stack([to_ntt(generator, one, parameters) for one in (c0, c1)])
    loaded = seal_io.load_seeded_ciphertext(seal, c0, seed, prng=prng, ntt_form=False, scale_bits=9)
    assert np.array_equal(seal_io.save_ciphertext(seal, loaded), expected)


@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
@pytest.mark.parametrize("prng", [1, 2])
@pytest.mark.parametrize("domain", [0, 1])
def test_keys_in_both_domains(generator, parameters: ParameterSet, prng: int, domain: int) -> None:
    seal, b, seed = seal_io.runtime(parameters), residues(3, parameters), bytes(range(32)) * 2
    expected = np.stack([b, expanded(generator, prng, seed, parameters)])
    if domain == 0:
        expected = np.stack([to_ntt(generator, one, parameters) for one in expected])
    key = seal_io.load_public_key(seal, b, seed, prng=prng, ntt_form=domain == 1)
    assert np.array_equal(seal_io.save_ciphertext(seal, key.data()), expected)
    # and SEAL can encrypt under it
    zero = seal.new_ciphertext()
    sealapi.Encryptor(seal.context, key).encrypt_zero(seal.parms_id, zero)
    assert seal_io.save_ciphertext(seal, zero).shape == (2, parameters.poly_modulus_degree)


@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
def test_what_seal_saves_is_read(parameters: ParameterSet) -> None:
    """A seeded encryption of SEAL's own, rebuilt from (c0, seed), decrypts to its message."""
    seal, degree = seal_io.runtime(parameters), parameters.poly_modulus_degree
    secret = sealapi.KeyGenerator(seal.context).secret_key()
    encryptor = sealapi.Encryptor(seal.context, secret)
    message = np.zeros(degree)
    message[:3] = [0.5, -0.25, 1.0]
    saved = encryptor.encrypt_symmetric(encode(seal, message, 30))
    c0, prng, seed = seal_io.save_seeded(seal, saved)
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
    seeds = {seal_io.save_seeded(seal, encryptor.encrypt_zero_symmetric())[2] for _ in range(20)}
    assert len(seeds) == 20


@given(st.sampled_from(list(PARAMETER_SETS.values())), st.integers(0, 2**32))
def test_explicit_residues_round_trip(parameters: ParameterSet, seed: int) -> None:
    seal = seal_io.runtime(parameters)
    both = np.stack([residues(seed + i, parameters) for i in (0, 1)])
    for ntt_form in (True, False):
        loaded = seal_io.load_ciphertext(seal, both, scale_bits=20, ntt_form=ntt_form)
        assert np.array_equal(seal_io.save_ciphertext(seal, loaded), both)


# --- residues that are none -----------------------------------------------------------------------


def words_of(owner: Any) -> int:
    """Where the words of a SEAL ciphertext or plaintext begin."""
    array = owner.dyn_array()
    value = ctypes.c_uint64.from_address(id(array) + seal_memory._HEAD_BYTES).value
    _, first = seal_memory._ARRAY.unpack(ctypes.string_at(value, seal_memory._ARRAY.size))
    return int(first)


def words_of_seeded(serializable: Any) -> int:
    value = ctypes.c_uint64.from_address(id(serializable) + seal_memory._HEAD_BYTES).value
    members = ctypes.string_at(value, seal_memory._CIPHERTEXT.size)
    return int(seal_memory._CIPHERTEXT.unpack(members)[-1])


def spoil(first: int, place: int, value: int) -> None:
    """Write over a word of SEAL's own memory, as an error of SEAL's or ours might."""
    ctypes.c_uint64.from_address(first + 8 * place).value = value


@pytest.fixture(params=["in place", "one at a time"])
def in_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal_memory, "_IN_PLACE", request.param == "in place")


def spoilt_ciphertext(parameters: ParameterSet, place: int, value: int) -> Any:
    both = np.stack([residues(7 + i, parameters) for i in (0, 1)])
    ciphertext = seal_io.load_ciphertext(seal_io.runtime(parameters), both, scale_bits=20)
    spoil(words_of(ciphertext), place, value)
    return ciphertext


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
def test_residues_of_ciphertexts_are_below_the_prime(parameters: ParameterSet) -> None:
    seal, last = seal_io.runtime(parameters), 2 * parameters.poly_modulus_degree - 1
    for place in (0, last):
        good = spoilt_ciphertext(parameters, place, parameters.prime - 1)
        assert seal_io.save_ciphertext(seal, good).reshape(-1)[place] == parameters.prime - 1
        for value in (parameters.prime, 2**63, 2**64 - 1):
            with pytest.raises(AssertionError, match="not below the prime"):
                seal_io.save_ciphertext(seal, spoilt_ciphertext(parameters, place, value))


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
def test_residues_of_plaintexts_are_below_the_prime(parameters: ParameterSet) -> None:
    seal, c0 = seal_io.runtime(parameters), residues(9, parameters)
    plaintext = encode(seal, np.ones(parameters.poly_modulus_degree), 20)
    assert seal_io.add_plaintext(seal, c0, plaintext).max() < parameters.prime
    spoil(words_of(plaintext), 5, parameters.prime)
    with pytest.raises(AssertionError, match="not below the prime"):
        seal_io.add_plaintext(seal, c0, plaintext)


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize("parameters", SETS, ids=NAMES)
def test_residues_of_seeded_ciphertexts_are_below_the_prime(
    monkeypatch: pytest.MonkeyPatch, parameters: ParameterSet, by_file: bool
) -> None:
    seal = seal_io.runtime(parameters)
    secret = sealapi.KeyGenerator(seal.context).secret_key()
    zero = sealapi.Encryptor(seal.context, secret).encrypt_zero_symmetric(seal.parms_id)
    if by_file:
        monkeypatch.setattr(seal_io, "_reads_seeded", lambda: False)
    seal_io.save_seeded(seal, zero)
    spoil(words_of_seeded(zero), 3, parameters.prime)
    with pytest.raises(AssertionError, match="not below the prime"):
        seal_io.save_seeded(seal, zero)


def test_without_the_check_other_residues_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is packed with more bits than it has reaches into what is beside it."""
    seal, width = seal_io.runtime(COMPACT), COMPACT.residue_bits
    monkeypatch.setattr(seal_io, "_checked", lambda _, found: found)
    (row, _) = seal_io.save_ciphertext(seal, spoilt_ciphertext(COMPACT, 8, 2**64 - 1))
    found = unpack_bits(pack_bits(row, width), len(row), width)
    (changed,) = np.nonzero(found != row)
    assert 9 in changed.tolist()


def test_one_runtime_a_process() -> None:
    assert seal_io.runtime(COMPACT) is seal_io.runtime(COMPACT)
    assert seal_io.runtime(COMPACT) is not seal_io.runtime(STANDARD)


def test_threads_do_not_mix() -> None:
    """Each thread has a file of its own: a shared one would give another thread's residues."""

    def trip(number: int) -> bool:
        parameters = SETS[number % 2]
        seal = seal_io.runtime(parameters)
        both = np.stack([residues(number + i, parameters) for i in (0, 1)])
        return all(
            np.array_equal(
                seal_io.save_ciphertext(seal, seal_io.load_ciphertext(seal, both, scale_bits=20)),
                both,
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
    both = np.full((2, 2048), number + 1, dtype=np.uint64)
    return all(
        np.array_equal(
            seal_io.save_ciphertext(seal, seal_io.load_ciphertext(seal, both, scale_bits=20)), both
        )
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

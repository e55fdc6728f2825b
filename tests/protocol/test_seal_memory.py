"""Residues read where they lie are those that SEAL writes, and a wrong address is no crash."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tenseal import sealapi

from veilhead_protocol import seal_io, seal_memory
from veilhead_protocol.parameters import COMPACT, STANDARD, ParameterSet

both_sets = pytest.mark.parametrize("parameters", [COMPACT, STANDARD], ids=lambda one: one.name)


def fresh_ciphertext(parameters: ParameterSet) -> Any:
    seal = seal_io.runtime(parameters)
    ciphertext = seal.new_ciphertext()
    secret = sealapi.KeyGenerator(seal.context).secret_key()
    sealapi.Encryptor(seal.context, secret).encrypt_zero_symmetric(seal.parms_id, ciphertext)
    return ciphertext


def test_arrays_are_readable_here() -> None:
    """With the versions that this project is tested with; without, everything takes longer."""
    assert seal_memory.is_readable()


@both_sets
def test_words_are_those_that_the_binding_gives(
    monkeypatch: pytest.MonkeyPatch, parameters: ParameterSet
) -> None:
    seal = seal_io.runtime(parameters)
    for _ in range(3):
        ciphertext = fresh_ciphertext(parameters)
        read = seal_io.save_ciphertext(seal, ciphertext)
        with monkeypatch.context() as patch:
            patch.setattr(seal_memory, "_IN_PLACE", False)
            one_by_one = seal_io.save_ciphertext(seal, ciphertext)
        assert read.shape == (2, parameters.poly_modulus_degree)
        assert np.array_equal(read, one_by_one)


def test_what_was_read_is_a_copy() -> None:
    seal, ciphertext = seal_io.runtime(COMPACT), fresh_ciphertext(COMPACT)
    before = seal_io.save_ciphertext(seal, ciphertext)
    kept = before.copy()
    seal.evaluator.negate_inplace(ciphertext)
    assert not np.array_equal(seal_io.save_ciphertext(seal, ciphertext), kept)
    del ciphertext
    assert np.array_equal(before, kept)


def seeded_zero(parameters: ParameterSet) -> Any:
    seal = seal_io.runtime(parameters)
    secret = sealapi.KeyGenerator(seal.context).secret_key()
    return sealapi.Encryptor(seal.context, secret).encrypt_zero_symmetric(seal.parms_id)


@both_sets
def test_seeded_ciphertexts_are_those_that_seal_writes(parameters: ParameterSet) -> None:
    for _ in range(3):
        zero = seeded_zero(parameters)
        c0, info = seal_memory.read_seeded(zero, seal_io._INFO_BYTES)
        saved, saved_info = seal_io._saved_seeded(zero)
        assert np.array_equal(c0, saved)
        assert info == saved_info


def test_seeded_ciphertexts_are_read_in_place_here() -> None:
    assert seal_io._reads_seeded()


def test_another_seeded_ciphertext_is_noticed() -> None:
    expected = seal_io._saved_seeded(seeded_zero(COMPACT))
    assert not seal_memory.seeded_is_readable(seeded_zero(COMPACT), *expected)


@pytest.mark.parametrize(
    "layout", ["<24x?7xQQQ16x24xQQ", "<32x?7xQQQ16x16xQQ", "<4096x?7xQQQ16x24xQQ"]
)
def test_other_seeded_ciphertexts_are_noticed(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """As if SEAL laid them out in another way."""
    zero = seeded_zero(COMPACT)
    monkeypatch.setattr(seal_memory, "_CIPHERTEXT", struct.Struct(layout))
    assert not seal_memory.seeded_is_readable(zero, *seal_io._saved_seeded(zero))


def test_a_ciphertext_without_a_seed_is_refused() -> None:
    with pytest.raises(AssertionError, match="no seed"):
        seal_memory.read_seeded(fresh_ciphertext(COMPACT), seal_io._INFO_BYTES)


@pytest.mark.parametrize("changed", [0, 2, 5, 8], ids=["magic", "header", "mode", "size"])
def test_seed_information_of_another_form_is_refused(
    monkeypatch: pytest.MonkeyPatch, changed: int
) -> None:
    zero = seeded_zero(COMPACT)
    c0, info = seal_io._saved_seeded(zero)
    other = bytearray(info)
    other[changed] ^= 1
    monkeypatch.setattr(seal_io, "read_seeded", lambda *_: (c0, bytes(other)))
    with pytest.raises(AssertionError, match="seed information"):
        seal_io.save_seeded(seal_io.runtime(COMPACT), zero)


def test_a_seeded_ciphertext_is_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = seeded_zero(COMPACT)
    found = []
    for readable in (True, False):
        monkeypatch.setattr(seal_io, "_reads_seeded", lambda readable=readable: readable)
        c0, prng, seed = seal_io.save_seeded(seal_io.runtime(COMPACT), zero)
        found.append((c0.tolist(), prng, seed))
    assert found[0] == found[1]
    assert (found[0][1], len(found[0][2])) == (1, 64)


@pytest.mark.parametrize("in_place", [True, False])
def test_an_array_of_another_length_is_refused(
    monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    monkeypatch.setattr(seal_memory, "_IN_PLACE", in_place)
    with pytest.raises(AssertionError, match="holds 3 words, expected 4"):
        seal_memory.read_array(sealapi.Plaintext("1x^2"), 4)


@pytest.mark.parametrize("head_bytes", [0, 8, 24])
def test_other_objects_are_noticed(monkeypatch: pytest.MonkeyPatch, head_bytes: int) -> None:
    """As if pybind11 kept its pointer elsewhere."""
    monkeypatch.setattr(seal_memory, "_HEAD_BYTES", head_bytes)
    assert not seal_memory.is_readable()


@pytest.mark.parametrize("fields", ["<QQ", "<8xQQ", "<16xQQ", "<32xQQ", "<4096xQQ"])
def test_other_arrays_are_noticed(monkeypatch: pytest.MonkeyPatch, fields: str) -> None:
    """As if SEAL laid its arrays out in another way."""
    monkeypatch.setattr(seal_memory, "_ARRAY", struct.Struct(fields))
    assert not seal_memory.is_readable()


def test_memory_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(path)

    monkeypatch.setattr(os, "open", refuse)
    assert not seal_memory.is_readable()


def test_a_worker_that_forbids_core_dumps_reads_all_the_same() -> None:
    """Another user than root may not open its own memory then: it was looked at on import."""
    program = (
        "import os\n"
        "import veilhead_service.worker\n"
        "from veilhead_protocol import seal_memory\n"
        "from veilhead_protocol.hardening import forbid_core_dumps\n"
        "forbid_core_dumps()\n"
        "os.getuid() or os.setuid(65534)\n"
        "try:\n"
        "    open('/proc/self/mem', 'rb').close()\n"
        "except PermissionError:\n"
        "    print(seal_memory._IN_PLACE)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "True"

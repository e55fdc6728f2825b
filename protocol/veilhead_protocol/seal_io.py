"""Residues <-> SEAL objects: the one file that knows SEAL's serialisation.

TenSEAL's binding reads and writes SEAL objects through file paths only, so they go through an
anonymous file in memory, one for every thread; what `seal_memory` can read does not. Only public
objects (ciphertexts, key messages) pass through the file: a secret key never does.

Every byte that SEAL parses was laid out here, from residues that `wire` has checked: SEAL's own
loader accepts a size field of 3 over half the data, and trailing bytes.
"""

from __future__ import annotations

import os
import struct
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import zstandard
from numpy.typing import NDArray
from tenseal import sealapi

from veilhead_protocol.copies import process_mark
from veilhead_protocol.parameters import STANDARD, ParameterSet
from veilhead_protocol.seal_memory import read_array, read_seeded, seeded_is_readable

Residues = NDArray[np.uint64]

_HEADER: Final = struct.Struct("<HBBBBHQ")  # magic, header size, version, compression, 0, size
_MAGIC: Final = 0xA15E
_UNCOMPRESSED: Final = 0
_ZSTANDARD: Final = 2
_MEMBERS: Final = struct.Struct("<4QBQQQdQ")  # parms_id, NTT form, size, N, L, scale, correction
_COUNT: Final = struct.Struct("<Q")
SEED_BYTES: Final = 64
_INFO_BYTES: Final = _HEADER.size + 1 + SEED_BYTES  # of a seed: header, PRNG, seed


@dataclass(frozen=True)
class Runtime:
    """SEAL's objects for one parameter set: immutable, one a process, free of keys."""

    parameters: ParameterSet
    context: Any
    encoder: Any
    evaluator: Any
    version: tuple[int, int]

    @property
    def parms_id(self) -> list[int]:
        """SEAL's id of the one level that keys, queries and replies have."""
        parms_id: list[int] = self.context.first_parms_id()
        return parms_id

    @staticmethod
    def new_plaintext() -> Any:
        """An empty SEAL plaintext."""
        return sealapi.Plaintext()

    @staticmethod
    def new_ciphertext() -> Any:
        """An empty SEAL ciphertext."""
        return sealapi.Ciphertext()


@lru_cache(maxsize=4)
def runtime(parameters: ParameterSet) -> Runtime:
    """The process's SEAL objects for this set."""
    parms = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    parms.set_poly_modulus_degree(parameters.poly_modulus_degree)
    parms.set_coeff_modulus([sealapi.Modulus(parameters.prime)])
    context = sealapi.SEALContext(parms, True, sealapi.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        raise AssertionError(f"SEAL refuses {parameters.name}: {context.parameters_error_name()}")
    saved = _scratch().save(parms)
    version = (saved[3], saved[4])
    return Runtime(
        parameters, context, sealapi.CKKSEncoder(context), sealapi.Evaluator(context), version
    )


class _Scratch(threading.local):
    """An anonymous file for each thread (and process) that SEAL writes to and reads from."""

    def __init__(self) -> None:
        self._process = 0
        self._descriptor = -1
        self._path = ""
        self._template: bytes | None = None
        self.decompressor = zstandard.ZstdDecompressor()

    def _open(self) -> None:
        # A descriptor of a copied process shares its file with the other one: make a new one.
        process = process_mark()
        if self._process == process:
            return
        if hasattr(os, "memfd_create"):
            self._descriptor = os.memfd_create("veilhead", os.MFD_CLOEXEC)
            self._path = f"/proc/self/fd/{self._descriptor}"
        else:
            self._descriptor, self._path = tempfile.mkstemp(prefix="veilhead-public-")
        self._process = process
        self._template = None

    def save(self, seal_object: Any) -> bytes:
        """What SEAL writes of this object."""
        self._open()
        seal_object.save(self._path)
        return os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)

    def load(self, seal_object: Any, context: Any, data: bytes) -> None:
        """Let SEAL read bytes that this module laid out."""
        self._open()
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))
        seal_object.load(context, self._path)

    def load_ending(self, seal_object: Any, context: Any, template: bytes, ending: bytes) -> None:
        """As `load` of the template with another ending; the file keeps the rest of it.

        A file that is used like this is used for nothing else.
        """
        self._open()
        if self._template is not template:
            os.pwrite(self._descriptor, template, 0)
            os.ftruncate(self._descriptor, len(template))
            self._template = template
        os.pwrite(self._descriptor, ending, len(template) - len(ending))
        seal_object.load(context, self._path)


_SCRATCH: Final = _Scratch()
_EXPANSIONS: Final = _Scratch()


def _scratch() -> _Scratch:
    return _SCRATCH


def _inflate(saved: bytes) -> bytes:
    """The members of a saved SEAL object, without its outer header."""
    magic, header_size, _major, _minor, mode, _, size = _HEADER.unpack_from(saved)
    if magic != _MAGIC or header_size != _HEADER.size or size != len(saved):
        raise AssertionError("SEAL wrote a header that this version does not know")
    body = saved[_HEADER.size :]
    if mode == _UNCOMPRESSED:
        return body
    if mode == _ZSTANDARD:
        return _scratch().decompressor.decompressobj().decompress(body)
    raise AssertionError(f"SEAL wrote compression mode {mode}, expected none or zstandard")


def _header(version: tuple[int, int], size: int) -> bytes:
    return _HEADER.pack(_MAGIC, _HEADER.size, *version, _UNCOMPRESSED, 0, _HEADER.size + size)


def _lay_out(
    seal: Runtime,
    residues: Residues,
    *,
    seed: tuple[int, bytes] | None,
    ntt_form: bool,
    scale: float,
) -> bytes:
    """SEAL's bytes of a ciphertext: c0 [N] with (prng, seed), or both halves [2, N] without."""
    data = np.ascontiguousarray(residues, dtype="<u8").tobytes()
    array = _COUNT.pack(residues.size) + data
    degree = residues.shape[-1]
    parts = [
        _MEMBERS.pack(*seal.parms_id, ntt_form, 2, degree, 1, scale, 1),
        _header(seal.version, len(array)),
        array,
    ]
    if seed is not None:
        prng, seed_bytes = seed
        info = bytes([prng]) + seed_bytes
        parts += [_header(seal.version, len(info)), info]
    body = b"".join(parts)
    return _header(seal.version, len(body)) + body


def load_seeded_ciphertext(
    seal: Runtime,
    c0: Residues,
    seed: bytes,
    *,
    prng: int,
    ntt_form: bool,
    scale_bits: int,
) -> Any:
    """A SEAL ciphertext in NTT form: c0 [N], and c1 that SEAL expands from the seed.

    `ntt_form` says what c0 and the expansion are in; coefficients are transformed here.
    """
    ciphertext = sealapi.Ciphertext()
    data = _lay_out(seal, c0, seed=(prng, seed), ntt_form=ntt_form, scale=2.0**scale_bits)
    _scratch().load(ciphertext, seal.context, data)
    if not ntt_form:
        seal.evaluator.transform_to_ntt_inplace(ciphertext)
    return ciphertext


def load_public_key(seal: Runtime, b: Residues, seed: bytes, *, prng: int, ntt_form: bool) -> Any:
    """A SEAL public key (b, a): b [N], and a that SEAL expands from the seed.

    That a is expanded here, and never taken from the client, is what keeps replies masked.
    """
    if ntt_form:
        data = _lay_out(seal, b, seed=(prng, seed), ntt_form=True, scale=1.0)
    else:
        transformed = load_seeded_ciphertext(seal, b, seed, prng=prng, ntt_form=False, scale_bits=0)
        both = save_ciphertext(seal, transformed)
        data = _lay_out(seal, both, seed=None, ntt_form=True, scale=1.0)
    public_key = sealapi.PublicKey()
    _scratch().load(public_key, seal.context, data)
    return public_key


def load_ciphertext(
    seal: Runtime, residues: Residues, *, scale_bits: int, ntt_form: bool = True
) -> Any:
    """A SEAL ciphertext of the residues [2, N], which are in this form."""
    ciphertext = sealapi.Ciphertext()
    data = _lay_out(seal, residues, seed=None, ntt_form=ntt_form, scale=2.0**scale_bits)
    _scratch().load(ciphertext, seal.context, data)
    return ciphertext


def save_ciphertext(seal: Runtime, ciphertext: Any) -> Residues:
    """The residues [2, N] of a SEAL ciphertext, in the form that it is in."""
    degree = seal.parameters.poly_modulus_degree
    return _checked(seal, read_array(ciphertext, 2 * degree)).reshape(2, degree)


def add_plaintext(seal: Runtime, residues: Residues, plaintext: Any) -> Residues:
    """Residues [N] of a ciphertext's c0, in NTT form, plus a SEAL plaintext."""
    added = residues + _checked(seal, read_array(plaintext, residues.size))
    # A difference below zero wraps around.
    reduced: Residues = np.minimum(added, added - np.uint64(seal.parameters.prime))
    return reduced


def _checked(seal: Runtime, residues: Residues) -> Residues:
    """Residues as SEAL gave them, which are below the prime: what is not would be packed wrongly.

    Raises:
        AssertionError: when one is not.
    """
    if residues.max() >= seal.parameters.prime:
        raise AssertionError("SEAL gave a residue that is not below the prime")
    return residues


def expand_residues(
    seal: Runtime, c0: Residues, seed: bytes, *, prng: int, ntt_form: bool, into: Residues
) -> None:
    """Write (c0, c1) in NTT form into `into` [2, N]: c0 [N], and c1 expanded from the seed.

    `ntt_form` says what c0 and the expansion are in, as in `load_seeded_ciphertext`.
    """
    if not ntt_form:
        into[:] = save_ciphertext(
            seal, load_seeded_ciphertext(seal, c0, seed, prng=prng, ntt_form=False, scale_bits=0)
        )
        return
    # SEAL is given zeros in the place of the c0 that is known: it need not read them again.
    ciphertext = sealapi.Ciphertext()
    template = _expansion_template(seal.parameters)
    _EXPANSIONS.load_ending(ciphertext, seal.context, template, bytes([prng]) + seed)
    into[0] = c0
    into[1] = save_ciphertext(seal, ciphertext)[1]


@lru_cache(maxsize=4)
def _expansion_template(parameters: ParameterSet) -> bytes:
    """SEAL's bytes of a ciphertext of zeros in NTT form, up to the generator and the seed."""
    zeros = np.zeros(parameters.poly_modulus_degree, np.uint64)
    seed = (0, bytes(SEED_BYTES))
    return _lay_out(runtime(parameters), zeros, seed=seed, ntt_form=True, scale=1.0)


def shift_residues(parameters: ParameterSet, residues: Residues) -> None:
    """Fill residues [m, shifts, 2, N]: row k is row 0 times X^k, all in NTT form.

    There X^k is a product with the k-th powers of the roots.
    """
    for shift in range(1, residues.shape[1]):
        residues[:, shift] = _multiply(residues[:, shift - 1], _roots(parameters), parameters.prime)


@lru_cache(maxsize=4)
def _roots(parameters: ParameterSet) -> Residues:
    """The polynomial X in NTT form: [N]."""
    seal = runtime(parameters)
    monomial = np.zeros((2, parameters.poly_modulus_degree), dtype=np.uint64)
    monomial[:, 1] = 1
    ciphertext = load_ciphertext(seal, monomial, scale_bits=0, ntt_form=False)
    seal.evaluator.transform_to_ntt_inplace(ciphertext)
    (root, _) = save_ciphertext(seal, ciphertext)
    return np.asarray(root)


def _multiply(first: Residues, second: Residues, prime: int) -> Residues:
    """Products of residues modulo a prime below 2^54.

    The quotient is off by a unit or two in double precision; the difference is exact modulo 2^64
    and small.
    """
    quotient = (first.astype(np.float64) * (second.astype(np.float64) / prime)).astype(np.uint64)
    difference = (first * second - quotient * np.uint64(prime)).view(np.int64)
    product: Residues = np.mod(difference, prime).astype(np.uint64)
    return product


def save_seeded(seal: Runtime, serializable: Any) -> tuple[Residues, int, bytes]:
    """c0 [N], the PRNG's type byte and the seed of a seeded SEAL ciphertext, in NTT form."""
    if _reads_seeded():
        c0, info = read_seeded(serializable, _INFO_BYTES)
    else:
        c0, info = _saved_seeded(serializable)
    magic, header_size, *_, mode, _, size = _HEADER.unpack_from(info)
    expected = (_MAGIC, _HEADER.size, _UNCOMPRESSED, _INFO_BYTES)
    if (magic, header_size, mode, size) != expected or len(info) != _INFO_BYTES:
        raise AssertionError("SEAL wrote seed information that this version does not know")
    return _checked(seal, c0), info[_HEADER.size], info[_HEADER.size + 1 :]


@lru_cache(maxsize=1)
def _reads_seeded() -> bool:
    """Whether seeded ciphertexts are where `seal_memory` expects them: tried on one of zero."""
    seal = runtime(STANDARD)
    secret = sealapi.KeyGenerator(seal.context).secret_key()
    zero = sealapi.Encryptor(seal.context, secret).encrypt_zero_symmetric(seal.parms_id)
    return seeded_is_readable(zero, *_saved_seeded(zero))


def _saved_seeded(serializable: Any) -> tuple[Residues, bytes]:
    """c0 [N] and the seed information, by SEAL's compressed file."""
    members = _inflate(_scratch().save(serializable))
    *_, ntt_form, size, degree, primes, _scale, _correction = _MEMBERS.unpack_from(members)
    (count,) = _COUNT.unpack_from(members, _MEMBERS.size + _HEADER.size)
    if not ntt_form or size != 2 or primes != 1 or count != degree:
        raise AssertionError("SEAL wrote a ciphertext of another shape or form than expected")
    start = _MEMBERS.size + _HEADER.size + _COUNT.size
    c0 = np.frombuffer(members, dtype="<u8", count=count, offset=start)
    return c0, members[start + 8 * count :]

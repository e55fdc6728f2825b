"""The secret key from answers that are shared.

A client that publishes its logits, in a table, say, publishes equations in its secret key: with
the recorded reply, every unrounded logit is an integer combination of the key's coefficients. As
many of them as there are coefficients give the whole key, and with it every query under it. What
the client returns is rounded to multiples of 2^-12 before anybody sees it.

A client of a naive service on TenSEAL is worse off (Li and Micciancio, EUROCRYPT 2021). What it
decrypts are the real parts of 4,096 slots, with all digits: half of the equations of a key of 8,192
coefficients. Two tables of 4,096 logits, of one class each, give the whole key.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import tenseal
from numpy.typing import NDArray

from veilhead.session import EncryptedQuery, SecretKey
from veilhead_benchmarks.attacks import naive, ring
from veilhead_benchmarks.attacks.pair import Pair, random_head, relative_error
from veilhead_benchmarks.attacks.results import AttackResult, above, at_chance, at_most
from veilhead_benchmarks.heads import Head
from veilhead_benchmarks.peers.tenseal_batched import DEGREE, MAX_BATCH, TensealBatchedExchange
from veilhead_benchmarks.processes import unit_rows
from veilhead_protocol.wire import ReplyMessage

#: What our client's logits are multiples of.
_STEP: Final = 2.0**-12


def solve_binary(matrix: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.uint8] | None:
    """One solution of matrix x = values modulo 2, by elimination on packed rows; None if rank < N.

    matrix: [equations, N] of 0 and 1, values: [equations].
    """
    rows = np.packbits(np.concatenate([matrix, values[:, None]], axis=1).astype(np.uint8), axis=1)
    unknowns = matrix.shape[1]
    for column in range(unknowns):
        byte, bit = column // 8, 7 - column % 8
        ones = np.flatnonzero(rows[:, byte] >> bit & 1)
        below = ones[ones >= column]
        if not len(below):
            return None
        rows[[column, below[0]]] = rows[[below[0], column]]
        ones = np.flatnonzero(rows[:, byte] >> bit & 1)
        rows[ones[ones != column]] ^= rows[column]
    solution: NDArray[np.uint8] = np.unpackbits(rows[:unknowns], axis=1)[:, unknowns]
    return solution


def _shared(
    pair: Pair, query: EncryptedQuery, reply: ReplyMessage, *, rounded: bool
) -> NDArray[np.int64]:
    """The logits [C] that a client shares, in units of the reply."""
    scales = pair.artifact.manifest.scales
    if rounded:
        units = 2.0 ** (scales.reply_bits + scales.scale_bits) / pair.artifact.parameters.prime
        logits = pair.session.decrypt(query, reply.serialize())
        served = np.ldexp(logits, -scales.downscale_bits)
        return np.rint(served * units).astype(np.int64)
    return query.key.decrypt(reply).reshape(-1).astype(np.int64)


def recover_secret(pair: Pair, queries: int, *, rounded: bool) -> NDArray[np.int64] | None:
    """The secret [N] from shared logits and recorded replies; None when these are too few.

    Solved modulo 2 for which coefficients are not zero, and modulo 4 for their signs.
    """
    manifest, layout = pair.artifact.manifest, pair.head.layout
    degree = layout.degree
    equations, answers = [], []
    for row in np.random.default_rng(8).normal(size=(queries, manifest.head.dimensions)):
        query = pair.session.encrypt(row / np.linalg.norm(row))
        reply = ReplyMessage.deserialize(
            pair.answer(query),
            pair.artifact.parameters,
            layout,
            manifest.scales.reply_bits,
            model_digest=manifest.digest,
            key_id=query.key.id,
            query_digest=query.digest,
        )
        logits = iter(_shared(pair, query, reply, rounded=rounded))
        for index, polynomial in enumerate(reply.polynomials):
            for place, wanted in enumerate(layout.wanted(index)):
                distance = (wanted - np.arange(degree)) % degree
                signs = np.where(np.arange(degree) > wanted, -1, 1)
                c1 = np.empty(degree, dtype=np.int64)  # as a combination of s_0 .. s_(N-1)
                c1[distance] = signs * polynomial.c1.astype(np.int64)
                equations.append(c1)
                answers.append(int(next(logits)) - int(polynomial.c0[place]))
    matrix, values = np.array(equations), np.array(answers)
    odd = solve_binary(matrix % 2, values % 2)
    if odd is None:
        return None
    halves = (values - matrix @ odd.astype(np.int64)) // 2 % 2
    negative = solve_binary(matrix % 2, halves)
    if negative is None:
        return None
    found: NDArray[np.int64] = odd.astype(np.int64) - 2 * (odd & negative).astype(np.int64)
    return found


def secret_of(key: SecretKey) -> NDArray[np.int64]:
    """The secret [N], from where the key object keeps it: what the attacker wants."""
    kept = key._decryption
    coefficients: NDArray[np.float64] = (np.fft.ifft(kept._spectrum) * kept._back).real
    return np.rint(coefficients).astype(np.int64)


def _real_part(logits: NDArray[np.float64], scale: float) -> ring.Residues:
    """m(X) + m(1/X) [N] of the plaintext m that a table [N/2] of logits was decoded from."""
    # Slot j is the value at the power 3^j of a 2N-th root, and its conjugate that at -3^j.
    powers = np.array([pow(3, slot, 2 * DEGREE) for slot in range(DEGREE // 2)])
    values = np.empty(DEGREE)  # at the odd powers
    values[(powers - 1) // 2] = values[(2 * DEGREE - powers - 1) // 2] = 2 * scale * logits
    twist = np.exp(-1j * np.pi * np.arange(DEGREE) / DEGREE)
    found = np.rint((twist * np.fft.fft(values)).real / DEGREE)
    return np.array([int(value) for value in found], dtype=object)


def _flipped(polynomial: ring.Residues) -> ring.Residues:
    """p(1/X) of p(X), [N]."""
    return np.concatenate([polynomial[:1], -polynomial[:0:-1]])


def recover_tenseal_secret(
    exchange: TensealBatchedExchange, shared: list[tuple[bytes, NDArray[np.float64]]]
) -> ring.Residues:
    """The secret [N] of a client of TenSEAL: from two recorded replies and their tables [N/2].

    The tables hold the logits of the first class. Where they are not exact, neither is the secret.
    """
    context: Any = exchange.public
    prime = naive.moduli(context)[0]
    own, mirrored, known = [], [], []
    for reply, logits in shared:
        tensor = tenseal.ckks_tensor_from(context, reply)
        c0, c1 = naive.coefficients(context, tensor.ciphertext()[0])[:, 0].astype(object)
        # p = m + m', and m = c0 + c1 s: all but s and its mirror image is known.
        own.append(ring.evaluate(c1, prime))
        mirrored.append(ring.evaluate(_flipped(c1), prime))
        rest = _real_part(logits, tensor.scale()) - c0 - _flipped(c0)
        known.append(ring.evaluate(rest, prime))
    above_line = (known[0] * mirrored[1] - known[1] * mirrored[0]) % prime
    below_line = (own[0] * mirrored[1] - own[1] * mirrored[0]) % prime
    inverses = np.array([pow(int(value), -1, prime) for value in below_line], dtype=object)
    return ring.centred(ring.interpolate(above_line * inverses % prime, prime), prime)


def read_with(
    exchange: TensealBatchedExchange, secret: ring.Residues, query: bytes
) -> NDArray[np.float64]:
    """The first of the texts of a query that nobody shared, its embedding [d], by a secret [N]."""
    context: Any = exchange.public
    prime = naive.moduli(context)[0]
    tensor = tenseal.ckks_tensor_from(context, query)
    twist = np.exp(1j * np.pi * np.arange(DEGREE) / DEGREE)
    transformed = ring.evaluate(secret, prime)
    features = []
    for ciphertext in tensor.ciphertext():
        c0, c1 = naive.coefficients(context, ciphertext)[:, 0].astype(object)
        masked = ring.interpolate(ring.evaluate(c1, prime) * transformed % prime, prime)
        plain = ring.centred(c0 + masked, prime).astype(np.float64)
        features.append((plain * twist).sum().real / tensor.scale())  # slot 0: at the root itself
    return np.array(features)


def attack_naive_service(dimensions: int) -> list[AttackResult]:
    """Two tables of logits that a client of TenSEAL shares, with all digits and rounded."""
    exchange = TensealBatchedExchange(Head.random(2, dimensions))
    shared = []
    for seed in (1, 2):
        (reply,) = exchange.evaluate(exchange.encrypt(unit_rows(MAX_BATCH, dimensions, seed)))
        shared.append((reply, exchange.decrypt((reply,))[:, 0]))
    private = unit_rows(1, dimensions, seed=3)
    (query,) = exchange.encrypt(private)
    results = []
    for kind, step in (("as TenSEAL returns them", 0.0), ("rounded as our SDK does", _STEP)):
        tables = [
            (reply, np.rint(logits / step) * step if step else logits) for reply, logits in shared
        ]
        read = read_with(exchange, recover_tenseal_secret(exchange, tables), query)
        result = AttackResult(
            attack="key-recovery",
            system="tenseal-batched",
            target=f"secret key from two tables of {MAX_BATCH:,} shared logits, {kind}",
            metric="relative error of another query's embedding",
            value=relative_error(read, private[0]),
            samples=DEGREE,
        )
        results.append(above(result, 0.99) if step else at_most(result, 1e-3))
    return results


def run(*, short: bool) -> list[AttackResult]:
    """Queries of 77 classes under one key, which has no shorter form; and a naive service."""
    found = attack_naive_service(4 if short else 16)
    for returned, rounded in (("unrounded", False), ("as the SDK returns them", True)):
        # Twice as many coefficients take twice as many answers, and eight times as long.
        parameters, queries = ("compact", 30) if short else ("standard", 60)
        pair = Pair.of(random_head(77, 384, parameters=parameters))
        recovered = recover_secret(pair, queries, rounded=rounded)
        degree = pair.head.layout.degree
        secret = secret_of(pair.session._fresh_enough_key())
        share = 0.0
        if recovered is not None:
            # Of which coefficients are zero, a guess is right for about half.
            share = float(np.mean((recovered != 0) == (secret != 0)))
        result = AttackResult(
            attack="key-recovery",
            system="veilhead",
            target=f"secret key from {77 * queries:,} shared logits, {returned}",
            metric="share of zeros and others told apart",
            value=share,
            samples=degree,
            chance=0.5,
        )
        # The right answer to a question about a coefficient, with nothing known, is a coin.
        found.append(at_chance(result, 0.5 / degree**0.5) if rounded else above(result, 0.9999))
    return found

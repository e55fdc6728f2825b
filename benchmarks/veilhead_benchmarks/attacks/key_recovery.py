"""The secret key from answers that are shared.

A client that publishes its logits, in a table, say, publishes equations in its secret key: with
the recorded reply, every unrounded logit is an integer combination of the key's coefficients. As
many of them as there are coefficients give the whole key, and with it every query under it. What
the client returns is rounded to multiples of 2^-12 before anybody sees it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from veilhead.session import EncryptedQuery, SecretKey
from veilhead_benchmarks.attacks.pair import Pair, random_head
from veilhead_benchmarks.attacks.results import AttackResult, above, at_chance
from veilhead_protocol.parameters import COMPACT
from veilhead_protocol.wire import ReplyMessage

_DEGREE = COMPACT.poly_modulus_degree


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
        units = 2.0 ** (scales.reply_bits + scales.scale_bits) / COMPACT.data_modulus
        logits = pair.session.decrypt(query, reply.serialize())
        return np.rint(logits * units).astype(np.int64)
    return query.key.decrypt(reply).reshape(-1).astype(np.int64)


def recover_secret(pair: Pair, queries: int, *, rounded: bool) -> NDArray[np.int64] | None:
    """The secret [N] from shared logits and recorded replies; None when these are too few.

    Solved modulo 2 for which coefficients are not zero, and modulo 4 for their signs.
    """
    manifest, layout = pair.artifact.manifest, pair.head.layout
    equations, answers = [], []
    for row in np.random.default_rng(8).normal(size=(queries, manifest.head.dimensions)):
        query = pair.session.encrypt(row / np.linalg.norm(row))
        reply = ReplyMessage.deserialize(
            pair.answer(query),
            COMPACT,
            layout,
            manifest.scales.reply_bits,
            model_digest=manifest.digest,
            key_id=query.key.id,
            query_digest=query.digest,
        )
        logits = iter(_shared(pair, query, reply, rounded=rounded))
        for index, polynomial in enumerate(reply.polynomials):
            for place, wanted in enumerate(layout.wanted(index)):
                distance = (wanted - np.arange(_DEGREE)) % _DEGREE
                signs = np.where(np.arange(_DEGREE) > wanted, -1, 1)
                c1 = np.empty(_DEGREE, dtype=np.int64)  # as a combination of s_0 .. s_(N-1)
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


def run(*, short: bool) -> list[AttackResult]:
    """30 queries of 77 classes under one key; the attack has no shorter form."""
    del short
    found = []
    for returned, rounded in (("unrounded", False), ("as the SDK returns them", True)):
        pair = Pair.of(random_head(77, 384))
        recovered = recover_secret(pair, 30, rounded=rounded)
        secret = secret_of(pair.session._fresh_enough_key())
        share = 0.0
        if recovered is not None:
            # Of which coefficients are zero, a guess is right for about half.
            share = float(np.mean((recovered != 0) == (secret != 0)))
        result = AttackResult(
            attack="key-recovery",
            system="veilhead",
            target=f"secret key from 2,310 shared logits, {returned}",
            metric="share of zeros and others told apart",
            value=share,
            samples=_DEGREE,
            chance=0.5,
        )
        # The right answer to a question about a coefficient, with nothing known, is a coin.
        found.append(at_chance(result, 0.5 / _DEGREE**0.5) if rounded else above(result, 0.9999))
    return found

"""One crafted ciphertext against naive services on TenSEAL, and the same idea against ours.

TenSEAL's `CKKSVector.mm` rotates the whole ciphertext and assumes that the client wrote the
embedding into its slots again and again, as the library does. The service cannot look into it.
The attacker encrypts signs of its own in all 4,096 slots, writes another length into the
message's `sizes` field so that the service takes it for an embedding, and writes the full length
into that of the reply: every slot is then a known linear combination of weights. For a head of d
weights and C classes 4,096 / C equations for each class meet d unknowns, and a bias in the open.

Its batched tensor has a ciphertext for every feature, with a text in every slot, however many the
message says there are. The attacker encrypts the unit vectors and zero, and writes that there is
one text: the reply to this one text holds the head.

Against ours the attacker fills every coefficient that a query has. What it decrypts are its C
logits: C equations, as of any query.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from veilhead_benchmarks.attacks.naive import relabelled, relabelled_batch
from veilhead_benchmarks.attacks.pair import Pair, random_head, relative_error
from veilhead_benchmarks.attacks.results import AttackResult, above, at_most
from veilhead_benchmarks.heads import Head
from veilhead_benchmarks.peers.tenseal_batched import TensealBatchedExchange
from veilhead_benchmarks.peers.tenseal_mm import DEGREE, TensealMmExchange
from veilhead_models.artifact import HeadArtifact
from veilhead_protocol.errors import WireError
from veilhead_protocol.wire import QUERY_HEADER_BYTES
from veilhead_service.encrypted_head import ClientKey

_Array = NDArray[np.float64]

_SLOTS: Final = DEGREE // 2

#: The head comes out of a naive service at least so exactly, the largest error of any weight.
_RECOVERED: Final = 1e-5


def recover_from_tenseal(
    exchange: TensealMmExchange, classes: int, dimensions: int
) -> tuple[_Array, _Array]:
    """Weight [C, d] and bias [C] of a TenSEAL service, from one reply."""
    generator = np.random.default_rng(5)
    # The larger the numbers, the less noise there is beside them; the primes leave room for these.
    slots = 64 * generator.choice([-1.0, 1.0], _SLOTS)
    (message,) = exchange.encrypt(slots[np.newaxis])
    (answer,) = exchange.evaluate((relabelled(message, dimensions),))
    reply = exchange.decrypt((relabelled(answer, _SLOTS),))[0]  # [slots]
    # Slot k holds sum_i v[k + i] W[k mod C, (k + i) mod d], i < d, and in the first C the bias.
    k = np.arange(_SLOTS)
    equations = np.zeros((_SLOTS, dimensions))
    for shift in range(dimensions):
        equations[k, (k + shift) % dimensions] += slots[(k + shift) % _SLOTS]
    weight = np.empty((classes, dimensions))
    for label in range(classes):
        rows = k[(k % classes == label) & (k >= classes)]
        weight[label] = np.linalg.lstsq(equations[rows], reply[rows], rcond=None)[0]
    bias = reply[:classes] - (equations[:classes] * weight).sum(axis=1)
    return weight, bias


def recover_from_one_text(exchange: TensealBatchedExchange, dimensions: int) -> _Array:
    """The head [C, d + 1] (bias last) of a TenSEAL service, from the reply to "one text"."""
    rows = np.vstack([np.zeros(dimensions), np.eye(dimensions)])
    (message,) = exchange.encrypt(rows)
    (answer,) = exchange.evaluate((relabelled_batch(message, len(rows), 1),))
    logits = exchange.decrypt((relabelled_batch(answer, 1, len(rows)),))  # [d + 1, C]
    return np.column_stack([(logits[1:] - logits[0]).T, logits[0]])


def best_guess(pair: Pair) -> _Array:
    """The head [C, d + 1] (bias last) as well as one crafted query of ours tells it.

    The attacker knows the layout, so it knows which combination of weights each logit is: the
    guess is the smallest head that gives these logits.
    """
    artifact, layout = pair.artifact, pair.head.layout
    classes, dimensions = artifact.weight.shape
    generator = np.random.default_rng(5)
    signs = generator.choice([-1.0, 1.0], (layout.pieces, layout.degree))
    polynomials = signs / np.sqrt(signs.size)
    query = pair.crafted(polynomials)
    logits = pair.session.decrypt(query, pair.answer(query))  # [C]
    # Which weight stands where, from a head whose weights are their own numbers.
    numbers = np.arange(1, classes * dimensions + 1, dtype=float).reshape(classes, dimensions)
    packed = np.rint(layout.pack_weight(numbers)).astype(int)  # [R, P, up to N]
    equations = np.zeros((classes, classes * dimensions + classes))
    for label in range(classes):
        reply, place = divmod(label, layout.group)
        wanted = int(layout.wanted(reply)[place])
        for piece, row in enumerate(packed[reply]):
            for position in np.flatnonzero(row):
                sign = -1.0 if position > wanted else 1.0
                value = sign * polynomials[piece, (wanted - position) % layout.degree]
                equations[label, row[position] - 1] += value
        equations[label, classes * dimensions + label] = 1
    found = np.linalg.lstsq(equations, logits, rcond=None)[0]
    weight = found[: classes * dimensions].reshape(classes, dimensions)
    return np.column_stack([weight, found[classes * dimensions :]])


def one_plaintext_answer(artifact: HeadArtifact) -> _Array:
    """The same guess after one answer of an interface that returns plaintext logits."""
    dimensions = artifact.weight.shape[1]
    row = np.random.default_rng(5).choice([-1.0, 1.0], dimensions) / np.sqrt(dimensions)
    logits = artifact.weight @ row + artifact.bias  # [C]
    known = np.append(row, 1.0)  # [d + 1]
    guess: _Array = np.outer(logits, known) / (known @ known)
    return guess


def relabelled_queries_answered(pair: Pair) -> int:
    """How many of our queries are answered that state other counts than they have."""
    query = pair.session.encrypt(np.zeros(pair.artifact.manifest.head.dimensions))
    key = ClientKey.from_message(query.key.message)
    answered = 0
    # Dimensions, classes, block length, pieces, group and polynomials: all counts but the texts.
    for offset in range(QUERY_HEADER_BYTES - 24, QUERY_HEADER_BYTES, 4):
        (count,) = struct.unpack_from("<I", query.data, offset)
        for other in (count - 1, count + 1, 2 * count):
            data = bytearray(query.data)
            struct.pack_into("<I", data, offset, other)
            try:
                pair.head.evaluate(bytes(data), key)
            except WireError:
                continue
            answered += 1
    return answered


def run(*, short: bool) -> list[AttackResult]:
    """A head of 384 values and 4 classes, or of 64 values in the short form."""
    classes, dimensions = 4, 64 if short else 384
    artifact = random_head(classes, dimensions)
    head = np.column_stack([artifact.weight, artifact.bias])  # [C, d + 1]
    exchange = TensealMmExchange(Head(artifact.weight, artifact.bias))
    stolen = np.column_stack(recover_from_tenseal(exchange, classes, dimensions))
    batched = TensealBatchedExchange(Head(artifact.weight, artifact.bias))
    at_once = recover_from_one_text(batched, dimensions)
    pair = Pair.of(artifact)
    ours, plaintext = best_guess(pair), one_plaintext_answer(artifact)
    unknowns = head.size

    def result(system: str, metric: str, value: float) -> AttackResult:
        return AttackResult(
            attack="crafted-ciphertext",
            system=system,
            target=f"head of {dimensions} values, {classes} classes, one query",
            metric=metric,
            value=value,
            samples=unknowns,
        )

    relative, largest = "relative error of the head", "largest error of any weight"
    chance = 1 - 2 * classes / unknowns  # of C equations, with room for luck
    return [
        at_most(result("tenseal-mm", largest, float(np.abs(stolen - head).max())), _RECOVERED),
        result("tenseal-mm", relative, relative_error(stolen, head)),
        at_most(
            result("tenseal-batched", largest, float(np.abs(at_once - head).max())), _RECOVERED
        ),
        result("tenseal-batched", relative, relative_error(at_once, head)),
        result("plaintext", relative, relative_error(plaintext, head)),
        above(result("veilhead", relative, relative_error(ours, head)), chance),
        at_most(
            result("veilhead", "relabelled queries answered", relabelled_queries_answered(pair)), 0
        ),
    ]

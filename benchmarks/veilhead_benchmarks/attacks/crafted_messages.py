"""Reply over query, and keys and queries that the client chose: the head from one reply.

Each attack is made on a service with one protection taken out, where it takes the head, and on the
service as it is.

    division          the second half of the reply over that of the query is the weights, unless a
                      fresh encryption of zero was added
    chosen messages   a key whose a is 1 and a query whose c1 is a constant: the second half of the
                      reply is the weights, unless the service makes both halves from seeds
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tenseal import sealapi

from veilhead_benchmarks.attacks import ring
from veilhead_benchmarks.attacks.pair import Pair, random_head
from veilhead_benchmarks.attacks.results import AttackResult, above, at_most
from veilhead_protocol import seal_io
from veilhead_protocol.parameters import STANDARD
from veilhead_protocol.wire import (
    Domain,
    KeyMessage,
    Prng,
    QueryMessage,
    ReplyMessage,
    SeededPolynomial,
    key_id,
)
from veilhead_service.encrypted_head import ClientKey, EncryptedHead

_Residues = NDArray[np.uint64]

PRIME = STANDARD.prime
DEGREE = STANDARD.poly_modulus_degree

#: The constant that the chosen c1 is.
_CHOSEN_BITS: Final = 28

#: By chance no weight is found; a thousandth of the largest is the tolerance.
_TOLERANCE: Final = 1e-3


class Watched(EncryptedHead):
    """The product's head; the attacker also sees what is cut off of each reply's second half.

    That is more than the wire carries: only re-randomisation stands in the way of division.
    """

    def __init__(self, *arguments: Any) -> None:
        """As `EncryptedHead`."""
        super().__init__(*arguments)
        self.seen: list[_Residues] = []

    def _truncate(self, residues: _Residues) -> _Residues:
        self.seen.append(residues)
        return super()._truncate(residues)


class WithoutZero(Watched):
    """Adds no encryption of zero."""

    def _mask(self, key: ClientKey) -> Any:  # noqa: ARG002
        nothing = np.zeros((2, DEGREE), dtype=np.uint64)
        return seal_io.load_ciphertext(self._seal, nothing, scale_bits=self._scales.scale_bits)


class TrustingC1(EncryptedHead):
    """Takes the second half of a query from the client: the constant of this attack."""

    def _pieces(self, query: QueryMessage) -> list[Any]:
        return [
            seal_io.load_ciphertext(
                self._seal,
                np.stack([polynomial.c0, _constant(1 << _CHOSEN_BITS)]),
                scale_bits=self._scales.query_scale_bits,
            )
            for polynomial in query.polynomials
        ]


def trusted_key(message: bytes) -> ClientKey:
    """The key of a service that takes its second half from the client: the constant 1."""
    honest = KeyMessage.deserialize(message)
    seal = seal_io.runtime(STANDARD)
    # A public key's bytes are those of a ciphertext of its level.
    data = seal_io._lay_out(
        seal,
        np.stack([honest.b, _constant(1)]),
        seed=None,
        ntt_form=True,
        scale=1.0,
    )
    public_key = sealapi.PublicKey()
    seal_io._scratch().load(public_key, seal.context, data)
    encryptor = sealapi.Encryptor(seal.context, public_key)
    return ClientKey(STANDARD, key_id(message), honest.seed, encryptor)


def _constant(value: int) -> _Residues:
    """A constant polynomial in NTT form, [N]."""
    return np.full(DEGREE, value, dtype=np.uint64)


def integer_weights(pair: Pair) -> NDArray[np.int64]:
    """What the attacker wants: the integers of the first weight polynomial, [N]."""
    bits = pair.artifact.manifest.scales.weight_scale_bits
    packed = np.rint(pair.head.layout.pack_weight(pair.artifact.weight)[0, 0] * 2.0**bits)
    return np.pad(packed, (0, DEGREE - len(packed))).astype(np.int64)


def share_recovered(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The share of the head's weights that the attacker has within a thousandth."""
    expected = np.asarray(wanted, dtype=np.float64)
    close = np.abs(np.asarray(found, dtype=np.float64) - expected) <= (
        _TOLERANCE * np.abs(expected).max()
    )
    return float(close[expected != 0].mean())


def divide_reply_by_query(pair: Pair) -> NDArray[Any]:
    """The weights [N] as the second half of the reply over that of the query."""
    if not isinstance(pair.head, Watched):
        raise TypeError("the attacker must see the whole second half of a reply")
    query = pair.session.encrypt(np.eye(pair.artifact.weight.shape[1])[0])
    message = QueryMessage.deserialize(query.data, STANDARD, pair.head.layout)
    (polynomial,) = message.polynomials
    ciphertext = seal_io.load_seeded_ciphertext(
        seal_io.runtime(STANDARD),
        polynomial.c0,
        polynomial.seed,  # which the attacker chose
        prng=message.prng,
        ntt_form=True,
        scale_bits=pair.artifact.manifest.scales.query_scale_bits,
    )
    seal_io.runtime(STANDARD).evaluator.transform_from_ntt_inplace(ciphertext)
    query_c1 = seal_io.save_ciphertext(seal_io.runtime(STANDARD), ciphertext)[1]
    pair.answer(query)
    reply_c1 = pair.head.seen[-1][0]
    return ring.centred(ring.divide(reply_c1, query_c1, PRIME), PRIME)


def send_chosen_messages(pair: Pair, *, trusted: bool) -> NDArray[np.float64]:
    """The weights [N] from the second half of the reply to a chosen key and a chosen query."""
    seed, other = bytes(64), bytes([1]) * 64
    key = KeyMessage(STANDARD, Prng.BLAKE2XB, Domain.NTT, _constant(1), seed).serialize()
    query = QueryMessage(
        parameters=STANDARD,
        model_digest=pair.artifact.manifest.digest,
        key_id=key_id(key),
        layout=pair.head.layout,
        prng=Prng.BLAKE2XB,
        domain=Domain.NTT,
        polynomials=(SeededPolynomial(_constant(1), other),),
    )
    sent = query.serialize()
    client_key = trusted_key(key) if trusted else ClientKey.from_message(key)
    reply = ReplyMessage.deserialize(
        pair.head.evaluate(sent, client_key),
        STANDARD,
        pair.head.layout,
        pair.artifact.manifest.head.reply_bits,
        model_digest=pair.artifact.manifest.digest,
        key_id=query.key_id,
        query_digest=hashlib.sha256(sent).digest(),
    )
    c1 = ring.centred(reply.polynomials[0].c1, 1 << reply.reply_bits)
    scaled: NDArray[np.float64] = np.rint(
        np.array(c1, dtype=np.float64) * PRIME / 2.0 ** (reply.reply_bits + _CHOSEN_BITS)
    )
    return scaled


def run(*, short: bool) -> list[AttackResult]:
    """A head of 384 values and five classes; the short form has fewer values."""
    artifact = random_head(5, 64 if short else 384)
    found = []

    def result(service: str, target: str, pair: Pair, weights: NDArray[Any]) -> AttackResult:
        wanted = integer_weights(pair)
        return AttackResult(
            attack="crafted-messages",
            system="veilhead",
            target=f"{target}, service {service}",
            metric="share of weights recovered",
            value=share_recovered(weights, wanted),
            samples=int(np.count_nonzero(wanted)),
            chance=0.0,
        )

    watched: tuple[tuple[str, type[Watched]], ...] = (
        ("without re-randomisation", WithoutZero),
        ("as it is", Watched),
    )
    for service, watching in watched:
        pair = Pair.of(artifact, watching)
        found.append(result(service, "reply over query", pair, divide_reply_by_query(pair)))
    trusting: tuple[tuple[str, type[EncryptedHead], bool], ...] = (
        ("trusting both halves", TrustingC1, True),
        ("trusting the query", TrustingC1, False),
        ("trusting the key", EncryptedHead, True),
        ("as it is", EncryptedHead, False),
    )
    for service, head, trusted in trusting:
        pair = Pair.of(artifact, head)
        weights = send_chosen_messages(pair, trusted=trusted)
        found.append(result(service, "chosen key and query", pair, weights))
    broken = ("without re-randomisation", "trusting both halves")
    return [
        above(one, 0.99) if one.target.endswith(broken) else at_most(one, 0.01) for one in found
    ]

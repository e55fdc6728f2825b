"""Attacks of a gateway's caller, together with the vendor's service, on another caller's texts.

An answer that a caller sees tells of the key that it was under. Each attack succeeds where callers
share a key, by session or by block, and fails against the gateway as it is.
"""

from __future__ import annotations

import asyncio
import hashlib

import httpx2
import numpy as np
import pytest

from veilhead import AsyncClient
from veilhead.gateway.app import Gateway, Limits, create_app
from veilhead.gateway.callers import Callers
from veilhead.gateway.metrics import Metrics
from veilhead_benchmarks.attacks import ring
from veilhead_models.artifact import HeadArtifact
from veilhead_models.backbone import describe
from veilhead_protocol import seal_io
from veilhead_protocol.parameters import STANDARD
from veilhead_protocol.scales import LOGIT_STEP
from veilhead_protocol.wire import QueryHeader, QueryMessage, ReplyMessage, ReplyPolynomial

DEGREE, PRIME = STANDARD.poly_modulus_degree, STANDARD.prime
ATTACKER, VICTIM = "a" * 32, "b" * 32
CLASSES = 77

#: Coefficients of the secret in one logit, a digit in base 3 each: as many as kappa has room for.
DIGITS = 9


@pytest.fixture(scope="module")
def wide_artifact(tmp_path_factory, tiny_directory):
    """A model for texts with many classes."""
    weight = np.random.default_rng(5).normal(size=(CLASSES, 16))
    head = HeadArtifact.from_weights(weight, np.zeros(CLASSES), [f"c{n}" for n in range(CLASSES)])
    directory = tmp_path_factory.mktemp("artifacts") / "wide"
    head.with_backbone(tiny_directory, describe(tiny_directory)).save(directory)
    return directory


class Colluding(httpx2.AsyncBaseTransport):
    """A service that answers what lets a colluding caller read coefficients of the secret.

    Attributes:
        queries: the bodies of all queries.
        equations: for each query the secret's place [b, C, DIGITS] that each digit of each logit
            is, and its sign.
    """

    def __init__(self, manifest):
        self.manifest = manifest
        self.queries, self.equations = [], []
        self._asked = np.zeros(DEGREE, dtype=int)

    async def handle_async_request(self, request):
        if request.method == "GET":
            return httpx2.Response(200, content=self.manifest.serialize())
        body = await request.aread()
        if request.method != "POST":
            return httpx2.Response(201)
        return httpx2.Response(200, content=self.reply(body))

    def reply(self, query):
        header = QueryHeader.deserialize(query)
        layout = self.manifest.layout_of(header.counts.texts)
        polynomials, places, signs = [], [], []
        for number in range(layout.replies):
            wanted = layout.wanted(number)
            offset = self._best_offset(wanted.reshape(layout.texts, -1))
            c1 = np.zeros(DEGREE, dtype=np.uint64)
            for digit in range(DIGITS):  # in units of twice what the rounding leaves
                c1[(offset + digit) % DEGREE] = (1 << 9) * 3**digit
            polynomials.append(ReplyPolynomial(np.zeros(len(wanted), dtype=np.uint64), c1))
            at, sign = self._meets(wanted.reshape(layout.texts, -1), offset)
            places.append(at)
            signs.append(sign)
            self._asked[np.unique(at[: max(1, layout.texts - 1)])] += 1  # of the attacker's texts
        self.queries.append(query)
        self.equations.append((np.concatenate(places, axis=1), np.concatenate(signs, axis=1)))
        return ReplyMessage(
            parameters=STANDARD,
            model_digest=header.model_digest,
            key_id=header.key_id,
            layout=layout,
            reply_bits=self.manifest.head.reply_bits,
            query_digest=hashlib.sha256(query).digest(),
            polynomials=tuple(polynomials),
        ).serialize()

    @staticmethod
    def _meets(wanted, offset):
        """Which coefficient of the secret each digit at a wanted place [b, G] meets, and how."""
        index = (offset + np.arange(DIGITS)) % DEGREE
        at = wanted[..., np.newaxis] - index
        return at % DEGREE, np.where(at < 0, -1, 1)

    def _best_offset(self, wanted):
        def gain(offset):
            at, _ = self._meets(wanted[: max(1, len(wanted) - 1)], offset)
            return int((self._asked[np.unique(at)] == self._asked.min()).sum())

        return max(range(0, DEGREE, 2), key=gain)


async def predictions(http, token, texts):
    answer = await http.post(
        "/predict",
        json={"inputs": texts, "raw_scores": True},
        headers={"Authorization": f"Bearer {token}"},
    )
    assert answer.status_code == 200, answer.text
    rows = answer.json()
    scores = [{item["label"]: item["score"] for item in row} for row in rows]
    return np.array([[row[f"c{n}"] for n in range(CLASSES)] for row in scores])  # [b, C]


def run(directory, *, fresh_keys, work):
    """Drives a gateway of two callers in front of the colluding service."""
    manifest = HeadArtifact.load(directory).manifest
    service = Colluding(manifest)

    async def drive():
        client = AsyncClient(
            "http://127.0.0.1",
            manifest.name,
            transport=service,
            backbone=directory / "backbone",
            fresh_keys=fresh_keys,
        )
        limits = Limits(max_wait_seconds=0.2)
        gateway = Gateway(client, Callers([ATTACKER, VICTIM]), limits, Metrics())
        async with (
            gateway.running(),
            httpx2.AsyncClient(
                transport=httpx2.ASGITransport(create_app(gateway)), base_url="http://gateway"
            ) as http,
        ):
            answers = await work(http)
            (embedding,) = await client.embed(["mild fever"])
        return answers, embedding

    answers, embedding = asyncio.run(drive())
    return service, answers, embedding


def read_secret(equations, answers):
    """The secret [N] of logits [b, C], as far as they hold it."""
    secret = np.zeros(DEGREE, dtype=int)
    for (places, signs), logits in zip(equations, answers, strict=True):
        rest = np.rint(logits / LOGIT_STEP / 2).astype(int)
        for digit in range(DIGITS):
            value = (rest + 1) % 3 - 1
            rest = (rest - value) // 3
            at, sign = places[: len(logits), :, digit], signs[: len(logits), :, digit]
            secret[at] = value * sign
    return secret


def decrypted(manifest, query, secret, text):
    """The embedding of one text of a recorded query."""
    seal = seal_io.runtime(STANDARD)
    layout = manifest.layout_of(QueryHeader.deserialize(query).counts.texts)
    message = QueryMessage.deserialize(query, STANDARD, layout)
    (polynomial,) = message.polynomials
    ciphertext = seal_io.load_seeded_ciphertext(
        seal, polynomial.c0, polynomial.seed, prng=message.prng, ntt_form=True, scale_bits=0
    )
    seal.evaluator.transform_from_ntt_inplace(ciphertext)
    c0, c1 = seal_io.save_ciphertext(seal, ciphertext).astype(object)
    plain = (c0 + np.array(ring.multiply(c1, secret, PRIME), dtype=object)) % PRIME
    start = text * layout.group * layout.block_length
    return np.array(ring.centred(plain, PRIME), dtype=float)[start : start + 16]


def cosine(first, second):
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


async def alternating(http):
    """The attacker asks sixteen times, and the victim once in between."""
    answers = []
    for turn in range(16):
        answers.append(await predictions(http, ATTACKER, ["acute chest pain"]))
        if turn == 5:
            await predictions(http, VICTIM, ["mild fever"])
    return answers


@pytest.mark.parametrize("fresh_keys", [False, True])
def test_answers_of_one_caller_open_anothers_query_where_they_share_a_key(
    wide_artifact, fresh_keys
):
    service, answers, embedding = run(wide_artifact, fresh_keys=fresh_keys, work=alternating)
    victim = service.queries.pop(6)
    service.equations.pop(6)
    keys = {QueryHeader.deserialize(query).key_id for query in (*service.queries, victim)}
    assert len(keys) == (17 if fresh_keys else 1)
    secret = read_secret(service.equations, answers)
    found = cosine(decrypted(service.manifest, victim, secret, 0), embedding)
    assert abs(found) < 0.9 if fresh_keys else found > 0.9999


async def together(http):
    """Both ask at once: fifteen long texts of the attacker's, and a short one of the victim's."""
    attacker, _ = await asyncio.gather(
        predictions(http, ATTACKER, ["acute chest pain acute chest pain"] * 15),
        predictions(http, VICTIM, ["mild fever"]),
    )
    return [attacker]


def test_one_answer_opens_anothers_text_where_they_share_a_block(wide_artifact, monkeypatch):
    monkeypatch.setattr(Callers, "find", lambda self, authorization: 0)
    service, answers, embedding = run(wide_artifact, fresh_keys=True, work=together)
    (query,) = service.queries
    secret = read_secret(service.equations, answers)
    assert cosine(decrypted(service.manifest, query, secret, 15), embedding) > 0.9999


def test_no_block_holds_texts_of_two_callers(wide_artifact):
    service, _, _ = run(wide_artifact, fresh_keys=True, work=together)
    texts = [QueryHeader.deserialize(query).counts.texts for query in service.queries]
    assert 1 in texts
    assert sum(texts) == 16

"""What a service, by its manifest, its backbone or its replies, could make the client tell.

Each attack succeeds against the client with its protections taken out, and fails against it as it
is. `test_subnormals.py` and `test_session.py` have those that are a matter of time only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.counting import counting
from support.heads import artifact, unit_rows

from veilhead import AsyncClient, BatchError, Client, ManifestError
from veilhead import predictions as predictions_module
from veilhead.session import Session
from veilhead_models.backbone import Backbone
from veilhead_protocol.manifest import Manifest
from veilhead_protocol.parameters import PARAMETER_SETS
from veilhead_protocol.scales import BOUND_STEP, HeadScales
from veilhead_protocol.wire import QueryMessage

# --- an embedding that overflows, over a real socket ----------------------------------------------


#: The predicate is whether a value of the embedding is above this.
THRESHOLD = 0.25


def hostile_manifest(scale):
    """A manifest as no reader accepts it: its scale is out of bounds."""
    manifest = artifact(5, 32).manifest
    embedding = manifest.embedding.model_copy(update={"scale": scale})
    return manifest.model_copy(update={"embedding": embedding})


def encrypt_unprotected(self, embeddings, key, layout, failures):
    """As it was once: values are looked at before the division, and what fails is raised."""
    finite = np.isfinite(embeddings).all(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        scaled = np.where(finite, embeddings, 0.0) / self._manifest.embedding.scale
        rows = scaled / np.maximum(1.0, np.linalg.norm(scaled, axis=1, keepdims=True))
    if not np.isfinite(rows).all():
        raise ValueError("SEAL refuses to encode NaN")
    return self._encrypted(rows, key, layout)


def rows_of(bits):
    rows = np.full((len(bits), 32), 0.01)
    rows[:, 7] = np.where(bits, 2 * THRESHOLD, THRESHOLD / 2)
    return rows


def counts_of(bits, monkeypatch):
    """The bytes of each query that the service gets, when the client has accepted its manifest."""
    manifest = hostile_manifest(THRESHOLD / sys.float_info.max)
    monkeypatch.setattr(Manifest, "deserialize", lambda data: manifest)
    found = []
    with counting(manifest) as service, Client(service.url, "model") as client:
        for row in rows_of(bits):
            service.counts.clear()
            with contextlib.suppress(BatchError, ValueError):
                client.logits(row[np.newaxis])
            found.append(sorted(service.counts))
    return found


BITS = [False, True, True, False, True, False, False, True, True, True]


def test_an_embedding_that_overflows_tells_of_itself_by_the_bytes_that_reach_the_service(
    monkeypatch,
):
    async def sleep(seconds):
        await asyncio.sleep(0)

    monkeypatch.setattr("veilhead.transport.anyio.sleep", sleep)
    monkeypatch.setattr(Session, "_encrypt", encrypt_unprotected)
    size = QueryMessage.size(
        artifact(5, 32).manifest.parameter_set, artifact(5, 32).manifest.layout
    )
    found = counts_of(BITS, monkeypatch)
    assert [size in counts for counts in found] == [not bit for bit in BITS]


def test_no_embedding_tells_of_itself_by_bytes_whatever_the_scale(monkeypatch):
    size = QueryMessage.size(
        artifact(5, 32).manifest.parameter_set, artifact(5, 32).manifest.layout
    )
    assert counts_of(BITS, monkeypatch) == [[size]] * len(BITS)


def test_a_scale_that_could_overflow_is_refused_before_anything_is_sent():
    with (
        counting(hostile_manifest(THRESHOLD / sys.float_info.max)) as service,
        pytest.raises(ManifestError, match=r"embedding\.scale"),
    ):
        Client(service.url, "model")


def test_in_a_list_every_request_goes_out_whatever_fails(monkeypatch):
    manifest = artifact(5, 32).manifest
    rows = unit_rows(400, 32)
    encrypted = Session._encrypted

    def failing(self, packed, key, layout):
        if np.isclose(packed, rows[3]).all(axis=1).any():
            raise MemoryError
        return encrypted(self, packed, key, layout)

    with counting(manifest) as service, Client(service.url, "model") as client:
        with pytest.raises(BatchError):
            client.logits(rows)
        expected = sorted(service.counts)
        service.counts.clear()
        monkeypatch.setattr(Session, "_encrypted", failing)
        with pytest.raises(BatchError) as caught:
            client.logits(rows)
        assert sorted(service.counts) == expected
    assert len(caught.value.errors) == 400  # of zeros no reply is one


# --- adversarial manifests ------------------------------------------------------------------------

DOCUMENT = json.loads(
    (Path(__file__).parent.parent / "vectors" / "compact-384.manifest.json").read_bytes()
)
EXTREME = st.sampled_from(
    [0.0, -0.0, 5e-324, 1e-310, -1e-154, 1.0, 1e154, 1.7976931348623157e308, math.inf, -math.inf]
) | st.floats(allow_nan=True)
WHOLE = st.integers(-3, 60) | st.sampled_from([2**31, 2**63, -(2**63), 10**400])
REAL = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(
    [5e-324, 1e-308, 1e-9, math.nextafter(1e-9, 0), 1e9, math.nextafter(1e9, 2e9), 1e308]
)


#: Usual values of the numbers that a client computes with, and where they are.
NUMBERS = {
    ("head", "downscale_bits"): st.integers(0, 18),
    ("head", "exponent"): st.integers(0, 6),  # and what the head is divided by
    ("head", "group_limit"): st.sampled_from([1, 2, 16, 64]),
    ("head", "weight_scale_bits"): st.integers(8, 30),
    ("head", "error_bound"): st.integers(1, 2**13).map(lambda steps: steps * BOUND_STEP),
    ("embedding", "scale"): st.floats(1e-9, 1e9),
    ("embedding", "calibration", "rows"): st.integers(1, 99),
    ("embedding", "calibration", "quantile"): st.floats(0.1, 1),
    ("embedding", "calibration", "margin"): st.floats(1, 100),
}


@st.composite
def documents(draw):
    """Manifests of which one number may be anything; those that follow from others do."""
    document = json.loads(json.dumps(DOCUMENT))
    document["embedding"] |= {"scale_origin": "calibrated", "calibration": {}}
    document["policy"]["bulk"] = draw(st.booleans())
    strange = draw(st.none() | st.sampled_from(list(NUMBERS)))
    for path, usual in NUMBERS.items():
        place = document
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = draw(WHOLE | REAL if path == strange else usual)
    head, divided = document["head"], ("head", "downscale_bits")
    if strange not in (("head", "exponent"), divided):
        head["exponent"] += head["downscale_bits"]
    if strange not in (("head", "error_bound"), divided):
        head["error_bound"] *= 2.0 ** head["downscale_bits"]
    classes, dimensions = draw(st.sampled_from([(1, 1), (3, 16), (7, 384), (40, 384), (2, 4096)]))
    head["labels"] = [f"{number}" for number in range(classes)]
    head["dimensions"] = dimensions
    head["private_parameters"] = classes * (dimensions + 1)
    parameters = PARAMETER_SETS[document["parameters"]]
    scales = HeadScales.of_exponent(
        parameters,
        head["exponent"],
        downscale_bits=head["downscale_bits"],
        weight_scale_bits=head["weight_scale_bits"],
        group_limit=head["group_limit"],
        error_bound=head["error_bound"],
    )
    for field in ("scale_bits", "flood_bits", "reply_bits"):
        head[field] = getattr(scales, field)
    return document


def rows_under(manifest, values):
    """An ordinary embedding, one of strange values, and one of both."""
    dimensions = manifest.head.dimensions
    ordinary = unit_rows(1, dimensions)[0]
    strange = np.resize(np.array(values), dimensions)
    return ordinary, strange, np.where(np.arange(dimensions) % 2 == 0, ordinary, strange)


def test_under_any_accepted_manifest_every_embedding_is_sent_in_as_many_bytes():
    accepted = []

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(documents(), st.lists(EXTREME, min_size=1, max_size=4))
    def attempt(document, values):
        try:
            manifest = Manifest.build(document)
        except ManifestError:
            return
        accepted.append(manifest)
        session, size = (
            Session(manifest),
            QueryMessage.size(manifest.parameter_set, manifest.layout),
        )
        for row in rows_under(manifest, values):
            with np.errstate(all="raise"):
                query = session.encrypt(row)
                assert len(b"".join(query.pieces())) == query.size == size
            assert set(query.failures) == (set() if np.isfinite(row).all() else {0})

    attempt()
    assert len(accepted) >= 30  # or nothing was tried


# --- the time until the next request --------------------------------------------------------------


class Gate:
    """Predictions that wait until so many requests have reached the service."""

    def __init__(self, service, seconds):
        self.service, self.seconds = service, seconds
        self.expected = 0
        self.enough = threading.Event()
        self.seen = None

    def wait(self):
        """Note how many requests were there when the first prediction went on."""
        if self.seen is None:
            self.enough.wait(self.seconds)
            self.seen = len(self.service.seen("infer"))

    async def request(self, inner, request):
        if len(self.service.seen("infer")) >= self.expected:
            self.enough.set()
        return await inner.handle_async_request(request)


def requests_before_predictions(connect, text_artifact, monkeypatch, ask, seconds):
    """Requests that had reached the service when the first prediction was made, and all."""
    client, service = connect(text_artifact)
    list(ask(client))
    total = len(service.seen("infer"))
    service.requests.clear()
    gate = Gate(service, seconds)
    gate.expected = total
    made = predictions_module.predictions

    def gated(*arguments):
        gate.wait()
        return made(*arguments)

    monkeypatch.setattr(predictions_module, "predictions", gated)
    service.on("infer", *[gate.request] * total)
    list(ask(client))
    return gate.seen, total


def many(client):
    return client.classify_many(short_texts(4 * chunk(client)), concurrency=2)


def listed(client):
    return client.classify(short_texts(3 * chunk(client)))


def short_texts(count):
    return [f"acute {'pain ' * (number % 5)}" for number in range(count)]


def chunk(client):
    return client._engine.chunk


@pytest.mark.parametrize("ask", [many, listed])
def test_no_request_of_a_call_waits_for_predictions(connect, text_artifact, monkeypatch, ask):
    seen, total = requests_before_predictions(connect, text_artifact, monkeypatch, ask, 60)
    assert seen == total >= 3


def test_predictions_made_on_the_sending_path_hold_requests_back(
    connect, text_artifact, monkeypatch
):
    async def on_the_loop(self, work):
        return work()

    monkeypatch.setattr(AsyncClient, "_on_answers_thread", on_the_loop)
    seen, total = requests_before_predictions(connect, text_artifact, monkeypatch, many, 1)
    assert seen < total


# --- the gaps between the requests of one call ----------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
def test_with_embed_first_nothing_is_sent_before_all_is_embedded(
    connect, text_artifact, monkeypatch, first
):
    embed, done, before = Backbone.embed_batches, [], []
    client, service = connect(text_artifact, embed_first=first)
    sent = threading.Event()

    def recorded(self, texts, **_):
        for rows, embeddings in embed(self, texts):
            if not first and len(done) + len(rows) == len(texts):
                assert sent.wait(60), "nothing was sent before the last batch"
            done.extend(rows)
            yield rows, embeddings

    async def noted(inner, request):
        before.append(len(done))
        sent.set()
        return await inner.handle_async_request(request)

    monkeypatch.setattr(Backbone, "embed_batches", recorded)
    count = 2 * chunk(client)
    service.on("infer", *[noted] * count)
    answers = client.classify(short_texts(count))
    assert len(answers) == count
    assert (min(before) == count) == first

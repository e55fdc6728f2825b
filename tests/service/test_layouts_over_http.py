"""Lists of texts through the SDK and the real service: blocks, and bulk where it is allowed."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from starlette.testclient import TestClient
from support.heads import artifact, unit_rows
from support.stores import Vendor

from veilhead import Client
from veilhead.local import InProcessTransport
from veilhead.session import Session
from veilhead_protocol.errors import LayoutError, MessageLayoutError
from veilhead_protocol.layout import MAX_BLOCK_PRODUCTS, LayoutKind, block_sizes
from veilhead_protocol.manifest import PolicySection
from veilhead_service.app import create_app
from veilhead_service.encrypted_head import ClientKey, EncryptedHead
from veilhead_service.model_store import ModelStore
from veilhead_service.settings import Settings

HEAD = artifact(7, 40, name="model")


@pytest.fixture(params=[False, True], ids=["blocks", "bulk"])
def served(request, tmp_path):
    """A client of a service that allows bulk, or not, and the traces of its queries."""
    Vendor(tmp_path).publish(HEAD, allow_bulk=request.param)
    settings = Settings(store=tmp_path / "store", workers=1, insecure_no_tenants=True)
    transport = InProcessTransport(create_app(settings))
    traces = []
    with Client("http://127.0.0.1", "model", transport=transport, on_query=traces.append) as client:
        assert client.manifest.policy.bulk is request.param
        yield client, traces


def test_lists_of_any_length_are_answered(served):
    client, traces = served
    most = client.manifest.shape.max_wanted
    for rows in (1, 3, 30, 301):
        traces.clear()
        embeddings = unit_rows(rows, 40)
        found = client.logits(embeddings)
        assert np.abs(found - HEAD.logits(embeddings)).max() <= client.manifest.head.error_bound
        sizes = [trace.texts for trace in traces]
        assert sum(sizes) == rows
        assert sorted(sizes) == sorted(Session(client.manifest).plan(rows))
    assert (max(sizes) > most) is client.manifest.policy.bulk


def test_bulk_is_another_version_that_its_policy_tells_apart(tmp_path):
    vendor = Vendor(tmp_path)
    strict, loose = vendor.publish(HEAD), vendor.publish(HEAD, allow_bulk=True)
    assert strict != loose
    assert vendor.publish(HEAD, allow_bulk=True) == loose
    store = ModelStore(vendor.store)
    manifests = [store.version("model", bytes.fromhex(one)).manifest for one in (strict, loose)]
    assert [manifest.policy.bulk for manifest in manifests] == [False, True]
    assert manifests[0].head == manifests[1].head
    rows = unit_rows(HEAD.manifest.shape.max_wanted + 1, 40)
    assert Session(manifests[1]).encrypt_batch(rows).layout.kind is LayoutKind.BULK
    with pytest.raises(LayoutError):
        Session(manifests[0]).encrypt_batch(rows)
    query = Session(manifests[1]).encrypt_batch(rows)
    head = EncryptedHead(manifests[0], HEAD.weight, HEAD.bias)
    with pytest.raises(MessageLayoutError):
        head.evaluate(query.data, ClientKey.from_message(query.key.message))


def test_a_forged_bulk_request_is_refused_and_the_clause_is_named(tmp_path, problem):
    """The client's own rules are no protection: this one ignores them."""
    strict = bytes.fromhex(Vendor(tmp_path).publish(HEAD))
    loose = replace(HEAD, policy=PolicySection(bulk=True)).manifest
    rows = unit_rows(loose.shape.max_wanted + 1, 40)
    query = Session(loose).encrypt_batch(rows)
    assert query.data.count(loose.digest) == 1
    forged = query.data.replace(loose.digest, strict)
    settings = Settings(store=tmp_path / "store", workers=1, insecure_no_tenants=True)
    with TestClient(create_app(settings)) as client:
        sent = {"headers": {"Content-Type": "application/octet-stream"}}
        key = query.key.message
        assert client.put(f"/v1/keys/{query.key.id.hex()}", content=key, **sent).status_code == 201
        refused = client.post("/v1/models/model/infer", content=forged, **sent)
        problem(refused, 422, "wrong-layout", sent=forged)
        assert "policy.bulk" in refused.json()["detail"]
        # Its own version is not published: nothing falls back on another policy.
        unknown = client.post("/v1/models/model/infer", content=query.data, **sent)
        problem(unknown, 409, "wrong-model", sent=query.data)


def test_sending_does_not_wait_for_the_encryption_of_the_next_request(served, monkeypatch):
    """The first request is answered while the second one is still being encrypted."""
    client, _ = served
    events = []
    encrypt, ask = Session.encrypt_batch, type(client._engine)._ask

    def slow(self, embeddings):
        if events:
            for _ in range(200):
                if "answered" in events:
                    break
                time.sleep(0.05)
        events.append("encrypted")
        return encrypt(self, embeddings)

    async def noted(self, query):
        answer = await ask(self, query)
        events.append("answered")
        return answer

    monkeypatch.setattr(Session, "encrypt_batch", slow)
    monkeypatch.setattr(type(client._engine), "_ask", noted)
    rows = 4200 if client.manifest.policy.bulk else 600
    assert len(client._engine.session.plan(rows)) > 1
    client.logits(unit_rows(rows, 40))
    assert events[:2] == ["encrypted", "answered"]


@pytest.mark.parametrize("parameters", ["standard", "compact"])
@pytest.mark.parametrize(
    ("classes", "dimensions", "texts"),
    [(1, 1, 1), (3, 1, 32), (77, 384, 4), (2, 4096, 8), (5, 2500, 64), (9, 33, 300), (3, 7, 2048)],
)
def test_every_layout_gives_the_logits_of_the_plaintext_head(
    parameters, classes, dimensions, texts
):
    head = replace(
        artifact(classes, dimensions, parameters=parameters, scale=1 / np.sqrt(dimensions)),
        policy=PolicySection(bulk=True),
    )
    session = Session(head.manifest)
    rows = unit_rows(texts, dimensions)
    query = session.encrypt_batch(rows)
    served = EncryptedHead(head.manifest, head.weight, head.bias)
    reply = served.evaluate(query.data, ClientKey.from_message(query.key.message))
    assert len(reply) == query.reply_bytes
    found = session.decrypt_batch(query, reply)
    assert np.abs(found - head.logits(rows)).max() <= head.manifest.head.error_bound


def test_a_head_encodes_its_weights_once_for_each_size_and_answers_no_other(monkeypatch):
    """Whoever cycles through sizes costs no more than whoever does not."""
    encoded = []
    encode = EncryptedHead._encoded
    monkeypatch.setattr(
        EncryptedHead,
        "_encoded",
        lambda self, layout: encoded.append(layout.texts) or encode(self, layout),
    )
    head = EncryptedHead(HEAD.manifest, HEAD.weight, HEAD.bias)
    session, sizes = Session(HEAD.manifest), block_sizes(HEAD.manifest.shape)
    assert 1 < len(sizes) <= 10
    for texts in sizes * 3:
        query = session.encrypt_batch(unit_rows(texts, 40))
        head.evaluate(query.data, ClientKey.from_message(query.key.message))
    assert encoded == [1, *sizes]
    products = sum(HEAD.manifest.layout_of(texts).products for texts in sizes)
    assert products <= MAX_BLOCK_PRODUCTS
    assert head.held_bytes <= HEAD.weight.nbytes + (products + head.layout.products) * 4096 * 8
    for texts in set(range(2, HEAD.manifest.shape.max_wanted + 2)) - set(sizes):
        forged = bytearray(query.data)
        forged[108:112] = texts.to_bytes(4, "little")
        with pytest.raises(MessageLayoutError, match="texts in one request"):
            head.evaluate(bytes(forged), ClientKey.from_message(query.key.message))

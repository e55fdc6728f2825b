"""No version answers anybody before it has answered its own test."""

from __future__ import annotations

import numpy as np
import pytest
from support.heads import artifact

from veilhead_protocol.errors import ModelUnavailableError, SelfTestError
from veilhead_service import model_store
from veilhead_service.encrypted_head import EncryptedHead
from veilhead_service.head_loading import HeadLoader
from veilhead_service.self_test import self_test

HEADS = {
    "standard": artifact(7, 384),
    "compact": artifact(7, 384, parameters="compact"),
    "long": artifact(2, 3000),
}


def served(head, weight=None, bias=None):
    return EncryptedHead(
        head.manifest,
        head.weight if weight is None else weight,
        head.bias if bias is None else bias,
    )


@pytest.mark.parametrize("name", HEADS)
def test_a_sound_head_passes(name):
    self_test(served(HEADS[name]), HEADS[name])


def changed(array, place, amount):
    result = array.copy()
    result[place] += amount
    return result


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("row", [0, -1])
def test_a_wrong_bias_of_one_class_is_noticed(name, row):
    head = HEADS[name]
    wrong = served(head, bias=changed(head.bias, row, 0.01))
    with pytest.raises(SelfTestError, match="off by 0"):
        self_test(wrong, head)


@pytest.mark.parametrize("name", HEADS)
def test_a_wrong_weight_is_noticed(name):
    head = HEADS[name]
    wrong = served(head, weight=changed(head.weight, (-1, slice(None)), 1.0))
    with pytest.raises(SelfTestError):
        self_test(wrong, head)


def test_the_head_of_another_model_is_noticed():
    head = HEADS["standard"]
    with pytest.raises(SelfTestError, match="refused"):
        self_test(served(artifact(7, 384, seed=2)), head)


class WithoutBias(EncryptedHead):
    def _add_offsets(self, wanted, classes):
        self._biases = np.zeros_like(self._biases)
        return super()._add_offsets(wanted, classes)


class WithoutProduct(EncryptedHead):
    def _weights_of(self, layout):
        return [[None for _ in row] for row in super()._weights_of(layout)]


class WithMoreFlood(EncryptedHead):
    def _flood(self, count):
        return [64 * value for value in super()._flood(count)]


@pytest.mark.parametrize("broken", [WithoutBias, WithoutProduct, WithMoreFlood])
def test_a_broken_evaluation_is_noticed(broken):
    head = artifact(40, 384)
    with pytest.raises(SelfTestError):
        self_test(broken(head.manifest, head.weight, head.bias), head)


def test_an_answer_that_is_no_number_is_noticed(monkeypatch):
    head = HEADS["standard"]
    monkeypatch.setattr("veilhead_service.self_test.rounded_logits", lambda *_: np.full(7, np.nan))
    with pytest.raises(SelfTestError):
        self_test(served(head), head)


# --- where it stands ------------------------------------------------------------------------------


def test_publish_refuses_what_fails_and_leaves_the_store_alone(vendor, monkeypatch):
    first = vendor.publish(artifact(4, 32, seed=1, name="model"))
    before = sorted(vendor.store.rglob("*"))
    monkeypatch.setattr("veilhead_service.encrypted_head.EncryptedHead", WithoutBias)
    with pytest.raises(SelfTestError):
        vendor.publish(artifact(4, 32, seed=2, name="model"))
    assert sorted(vendor.store.rglob("*")) == before
    assert model_store.ModelStore(vendor.store).current_digest("model") == first


def test_a_worker_loads_nothing_that_fails(vendor, monkeypatch):
    digest = vendor.publish(artifact(4, 32, name="model"))
    version = vendor.version("model", digest)
    assert isinstance(HeadLoader().load(version), EncryptedHead)
    monkeypatch.setattr("veilhead_service.head_loading.EncryptedHead", WithoutProduct)
    with pytest.raises(ModelUnavailableError, match="self-test"):
        HeadLoader().load(version)

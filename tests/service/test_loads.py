"""What becomes of versions that cost workers, with a clock that a test sets."""

from __future__ import annotations

import os

import pytest
from support.heads import artifact

from veilhead_protocol.errors import ModelUnavailableError
from veilhead_service.encrypted_head import EncryptedHead
from veilhead_service.loads import Loads, Why, head_bytes, read_catalogue, that_fit
from veilhead_service.model_store import ModelStore

GIB = 2**30


class Seconds:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def model(vendor):
    vendor.publish(artifact(4, 32, name="model"))
    return ModelStore(vendor.store).current("model")


@pytest.fixture
def seconds():
    return Seconds()


@pytest.fixture
def loads(seconds):
    return Loads(GIB, clock=seconds)


def test_the_second_death_in_a_row_is_a_quarantine(loads, model):
    loads.died(model, "it was ended by SIGKILL")
    with pytest.raises(ModelUnavailableError, match="cost a worker and is tried alone"):
        loads.check(model)
    assert loads.due() == [model]
    assert loads.is_put_off(model)
    assert loads.unavailable() == []
    loads.died(model, "it was ended by SIGKILL")
    assert loads.due() == []
    with pytest.raises(ModelUnavailableError, match="quarantined: it was ended by SIGKILL"):
        loads.check(model)
    (row,) = loads.unavailable()
    assert (row.name, row.why, row.retry_seconds) == ("model", Why.QUARANTINED, 30.0)


def test_a_load_that_went_well_is_forgiven(loads, model):
    loads.died(model, "once")
    loads.loaded(model)
    loads.check(model)
    loads.died(model, "once more, much later")
    loads.check(model)  # other workers hold it
    assert not loads.is_put_off(model)
    assert (loads.due(), loads.unavailable()) == ([], [])
    loads.died(model, "and again")
    with pytest.raises(ModelUnavailableError, match="quarantined"):
        loads.check(model)


def test_it_is_tried_again_ever_more_slowly_up_to_an_hour(loads, model, seconds):
    loads.died(model, "lost")
    pauses = []
    for _ in range(12):
        loads.died(model, "lost")
        assert loads.due() == []
        began = seconds.now
        while not loads.due():
            seconds.now += 15
        pauses.append(seconds.now - began)
    assert pauses[:3] == [30, 60, 120]
    assert set(pauses[7:]) == {3600}
    loads.loaded(model)
    loads.check(model)
    assert (loads.due(), loads.unavailable()) == ([], [])


def test_an_operator_can_ask_for_it_now(loads, model):
    assert not loads.retry("model")
    loads.died(model, "lost")
    loads.died(model, "lost")
    assert not loads.retry("other")
    assert loads.retry("model")
    assert loads.due() == [model]
    with pytest.raises(ModelUnavailableError):
        loads.check(model)  # not before it went well


def test_what_is_published_again_begins_anew(loads, model):
    loads.died(model, "lost")
    loads.died(model, "lost")
    os.utime(model.directory, ns=(1, 1))
    loads.check(model)
    assert not loads.is_put_off(model)
    assert loads.unavailable() == []


def test_what_is_removed_is_forgotten(loads, model, seconds):
    loads.died(model, "lost")
    loads.died(model, "lost")
    model.directory.rename(model.directory.with_name("away"))
    seconds.now = 1e6
    assert loads.due() == []
    assert loads.unavailable() == []


def test_a_head_that_no_worker_may_hold_is_not_tried(model, seconds):
    loads = Loads(head_bytes(model.manifest) - 1, clock=seconds)
    with pytest.raises(ModelUnavailableError, match="raise worker_memory_bytes"):
        loads.check(model)
    (row,) = loads.unavailable()
    assert row.why is Why.REFUSED
    Loads(head_bytes(model.manifest)).check(model)


def test_news_are_told_once(loads, model, caplog):
    for _ in range(3):
        loads.note_unreadable({"model": "Permission denied"})
        loads.refused(model, "it is damaged")
    assert caplog.text.count("Permission denied") == 1
    assert caplog.text.count("it is damaged") == 1
    loads.note_unreadable({})
    assert "can be read again" in caplog.text


@pytest.mark.parametrize("parameters", ["standard", "compact"])
@pytest.mark.parametrize(("classes", "dimensions"), [(2, 32), (22, 384), (300, 500), (5, 4000)])
def test_the_size_of_a_head_follows_from_its_manifest(parameters, classes, dimensions):
    made = artifact(classes, dimensions, parameters=parameters)
    held = EncryptedHead(made.manifest, made.weight, made.bias).held_bytes
    assert held <= head_bytes(made.manifest) <= 1.5 * held


def test_what_fits_is_chosen_by_use(vendor):
    for name in "abcd":
        vendor.publish(artifact(4, 32, name=name))
    models = read_catalogue(ModelStore(vendor.store)).models
    digests = {model.manifest.name: model.manifest.digest for model in models}
    size = head_bytes(models[0].manifest)

    def chosen(limit, **used):
        by_digest = {digests[name]: when for name, when in used.items()}
        return "".join(model.manifest.name for model in that_fit(models, limit, by_digest))

    assert chosen(4 * size) == "abcd"
    assert chosen(2 * size) == "ab"
    assert chosen(2 * size, d=5.0, c=9.0) == "cd"
    assert chosen(size - 1) == ""

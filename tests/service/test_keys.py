"""The key store: bounded memory, least recently used first, idle and hard expiry."""

from __future__ import annotations

import os
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veilhead_service.keys import KeyStore

EXAMPLES = 4000 if os.environ.get("VEILHEAD_PROPERTY_TESTS") == "slow" else 300

IDLE, LIFETIME = 10.0, 35.0


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def new_store(clock, *, max_bytes=1000):
    return KeyStore(max_bytes=max_bytes, idle_seconds=IDLE, lifetime_seconds=LIFETIME, clock=clock)


def key(number):
    return bytes([number]) * 32


def test_what_is_put_is_found(clock):
    store = new_store(clock)
    assert store.put(key(1), b"one")
    assert store.put(key(2), b"three")
    assert store.get(key(1)) == b"one"
    assert store.get(key(2)) == b"three"
    assert store.get(key(3)) is None
    assert (len(store), store.bytes_held) == (2, 8)


def test_a_known_key_is_not_new_and_counts_once(clock):
    store = new_store(clock)
    assert store.put(key(1), b"12345")
    assert not store.put(key(1), b"12345")
    assert (len(store), store.bytes_held) == (1, 5)
    assert store.discard(key(1))
    assert (len(store), store.bytes_held) == (0, 0)


def test_discard_tells_whether_the_key_was_known(clock):
    store = new_store(clock)
    assert not store.discard(key(1))
    store.put(key(1), b"12345")
    assert store.discard(key(1))
    assert not store.discard(key(1))
    assert store.get(key(1)) is None
    assert store.bytes_held == 0


def test_the_first_key_goes_when_memory_is_short(clock):
    store = new_store(clock, max_bytes=300)
    for number in range(4):
        store.put(key(number), bytes(100))
    assert [store.get(key(number)) is not None for number in range(4)] == [False, True, True, True]
    assert store.bytes_held == 300


def test_exactly_as_much_as_allowed_fits(clock):
    store = new_store(clock, max_bytes=300)
    for number in range(3):
        store.put(key(number), bytes(100))
    assert len(store) == 3


@pytest.mark.parametrize("touch", ["get", "put"])
def test_a_used_key_stays_and_the_least_recently_used_goes(clock, touch):
    store = new_store(clock, max_bytes=300)
    for number in range(3):
        store.put(key(number), bytes(100))
    if touch == "get":
        store.get(key(0))
    else:
        store.put(key(0), bytes(100))
    store.put(key(3), bytes(100))
    assert [store.get(key(number)) is not None for number in range(4)] == [True, False, True, True]


def test_one_large_key_displaces_several(clock):
    store = new_store(clock, max_bytes=300)
    for number in range(3):
        store.put(key(number), bytes(100))
    store.put(key(3), bytes(250))
    assert [store.get(key(number)) is not None for number in range(4)] == [
        False,
        False,
        False,
        True,
    ]
    assert store.bytes_held == 250


def test_a_key_larger_than_the_bound_is_alone(clock):
    store = new_store(clock, max_bytes=300)
    store.put(key(0), bytes(100))
    store.put(key(1), bytes(500))
    assert (len(store), store.bytes_held) == (1, 500)
    assert store.get(key(1)) == bytes(500)


def test_an_idle_key_expires(clock):
    store = new_store(clock)
    store.put(key(1), b"12345")
    clock.now += IDLE - 0.001
    assert store.get(key(1)) == b"12345"  # and this was a use
    clock.now += IDLE - 0.001
    assert store.get(key(1)) == b"12345"
    clock.now += IDLE
    assert store.get(key(1)) is None
    assert (len(store), store.bytes_held) == (0, 0)


def test_a_key_in_use_expires_in_the_end_however_it_is_used(clock):
    store = new_store(clock)
    store.put(key(1), b"12345")
    start = clock.now
    while clock.now + IDLE / 2 < start + LIFETIME:
        clock.now += IDLE / 2
        assert store.get(key(1)) is not None
        assert not store.put(key(1), b"12345")
    clock.now = start + LIFETIME
    assert store.get(key(1)) is None


def test_an_expired_key_is_new_again(clock):
    store = new_store(clock)
    store.put(key(1), b"12345")
    clock.now += IDLE
    assert store.put(key(1), b"12345")
    assert (len(store), store.bytes_held) == (1, 5)
    clock.now += IDLE / 2
    assert store.get(key(1)) == b"12345"


def test_an_expired_key_goes_before_living_ones_however_recently_it_was_used(clock):
    store = new_store(clock, max_bytes=300)
    store.put(key(0), bytes(100))
    start = clock.now
    for number, seconds in ((None, 9), (None, 18), (1, 27), (2, 30), (None, 34)):
        clock.now = start + seconds
        if number is not None:
            store.put(key(number), bytes(100))
        assert store.get(key(0)) is not None
    clock.now = start + LIFETIME
    store.put(key(3), bytes(100))
    assert [store.get(key(number)) is not None for number in range(4)] == [False, True, True, True]


class Reference:
    """The same rules, as plainly as possible."""

    def __init__(self, clock, max_bytes):
        self.clock, self.max_bytes = clock, max_bytes
        self.keys = OrderedDict()  # number: [message, registered, used]

    def purge(self):
        for number, (_, registered, used) in list(self.keys.items()):
            if self.clock.now - used >= IDLE or self.clock.now - registered >= LIFETIME:
                del self.keys[number]

    def get(self, number):
        self.purge()
        if number not in self.keys:
            return None
        self.keys[number][2] = self.clock.now
        self.keys.move_to_end(number)
        return self.keys[number][0]

    def put(self, number, message):
        if self.get(number) is not None:
            return False
        self.keys[number] = [message, self.clock.now, self.clock.now]
        while sum(len(entry[0]) for entry in self.keys.values()) > self.max_bytes:
            if len(self.keys) == 1:
                break
            self.keys.popitem(last=False)
        return True

    def discard(self, number):
        return self.keys.pop(number, None) is not None


OPERATIONS = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 9)),
    st.tuples(st.just("put"), st.integers(0, 9)),
    st.tuples(st.just("get"), st.integers(0, 9)),
    st.tuples(st.just("discard"), st.integers(0, 9)),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, IDLE, LIFETIME])),
)


@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
@given(st.lists(OPERATIONS, max_size=40), st.sampled_from([50, 120, 400]))
def test_any_sequence_of_operations_keeps_the_books(operations, max_bytes):
    clock = Clock()
    store, reference = new_store(clock, max_bytes=max_bytes), Reference(clock, max_bytes)
    sizes = {number: 7 + 13 * number for number in range(10)}
    largest = max(sizes.values())
    for operation, argument in operations:
        if operation == "wait":
            clock.now += argument
        elif operation == "put":
            message = bytes(sizes[argument])
            assert store.put(key(argument), message) == reference.put(argument, message)
        elif operation == "get":
            assert store.get(key(argument)) == reference.get(argument)
        else:
            # Whether an expired key that nobody asked for is "known" is the store's own affair.
            known = reference.get(argument) is not None
            found = store.discard(key(argument))
            assert found or not known
            reference.discard(argument)
        assert store.bytes_held >= 0
        assert store.bytes_held < max_bytes + largest
        if store.bytes_held > max_bytes:
            assert len(store) == 1
    alive = [number for number in range(10) if store.get(key(number)) is not None]
    assert alive == [number for number in range(10) if reference.get(number) is not None]
    assert len(store) == len(alive)
    assert store.bytes_held == sum(sizes[number] for number in alive)

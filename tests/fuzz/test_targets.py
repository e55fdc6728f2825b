"""The short form of `make fuzz`: the same parsers, deterministic inputs."""

from __future__ import annotations

import pytest
from fuzz.targets import TARGETS, Target
from hypothesis import given, settings
from hypothesis import strategies as st

PLACES = st.one_of(st.integers(0, 200), st.integers(-100, -1), st.floats(0, 1))
EDITS = st.lists(st.tuples(PLACES, st.integers(0, 40), st.binary(max_size=40)), max_size=3)


def edited(data, edits):
    for place, removed, inserted in edits:
        at = int(place * len(data)) if isinstance(place, float) else place % (len(data) or 1)
        data = data[:at] + inserted + data[at + removed :]
    return data


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(chosen=st.data())
def test_a_parser_raises_nothing_but_what_it_declares(name, chosen):
    target = TARGETS[name]
    if chosen.draw(st.booleans()):
        target(chosen.draw(st.binary(max_size=300)))
    else:
        seed = chosen.draw(st.integers(0, len(target.seeds) - 1))
        target(edited(target.seeds[seed], chosen.draw(EDITS)))


@pytest.mark.parametrize("name", TARGETS)
def test_the_first_seed_is_accepted(name):
    TARGETS[name].parse(TARGETS[name].seeds[0])


def test_an_error_that_is_not_declared_gets_through():
    with pytest.raises(UnicodeDecodeError):
        Target(lambda data: data.decode("ascii"), (KeyError,), ())(b"\xff")

"""A process notices that it was copied, however that happened."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref

import pytest
from support.copies import WAYS, in_copy, in_every_way

from veilhead_protocol import copies
from veilhead_protocol.copies import MadeAhead, keep_for_ever, process_mark

ALL_WAYS = (*WAYS, "same-id")


def test_the_mark_stays_within_a_process():
    found = [process_mark()]
    thread = threading.Thread(target=lambda: found.append(process_mark()))
    thread.start()
    thread.join()
    assert found == [process_mark()] * 2


@pytest.mark.parametrize("way", ALL_WAYS)
def test_every_copy_has_another_mark_and_so_has_its_copy(way):
    def marks(way):
        first = process_mark()
        second, third = in_copy(way, lambda: (process_mark(), in_copy(way, process_mark)))
        return first, second, third, process_mark()

    first, second, third, after = in_every_way(way, marks)
    assert first == after
    assert len({first, second, third}) == 3


@pytest.mark.parametrize("way", ALL_WAYS)
def test_a_copy_of_a_copy_that_never_looked_has_another_mark_too(way):
    def marks(way):
        return process_mark(), in_copy(way, lambda: in_copy(way, process_mark))

    first, third = in_every_way(way, marks)
    assert first != third


def test_a_copy_of_the_same_id_has_the_same_id():
    """What the tests above rest on."""
    assert in_every_way("same-id", lambda way: (os.getpid(), in_copy(way, os.getpid))) == (1, 1)


@pytest.mark.parametrize("way", ALL_WAYS)
def test_where_no_page_is_wiped_the_process_itself_is_looked_at(way):
    def marks(way):
        watch = copies._Watch(copies._ProcessCell())
        first = watch.mark()
        time.sleep(0.05)  # the kernel tells start times in hundredths of a second
        return first, in_copy(way, watch.mark), watch.mark()

    first, second, after = in_every_way(way, marks)
    assert first == after != second


class Page:
    """A page whose kernel knows no advice, or heeds none."""

    def __init__(self, *_, refuses, **__):
        self.refuses = refuses

    def madvise(self, advice):
        if self.refuses:
            raise OSError(22, os.strerror(22))


@pytest.mark.parametrize("refuses", [True, False])
def test_a_page_that_would_not_be_wiped_is_not_relied_on(refuses, monkeypatch):
    assert not isinstance(copies._WATCH._cell, copies._ProcessCell)
    monkeypatch.setattr(copies.mmap, "mmap", lambda *_, **__: Page(refuses=refuses))
    assert isinstance(copies._cell(), copies._ProcessCell)


class Interrupted:
    """A cell just after a copy; another thread looks too, before this one can go on."""

    def __init__(self, *, before):
        self.number = 0
        self.before = before
        self.found = []
        self.watch = None

    def interrupt(self):
        if not self.found:
            self.found.append(None)
            self.found = [self.watch.mark()]

    @property
    def value(self):
        if self.before:
            self.interrupt()
            return self.number
        number = self.number
        self.interrupt()
        return number

    @value.setter
    def value(self, number):
        self.number = number


@pytest.mark.parametrize("before", [True, False])
def test_threads_that_look_at_once_after_a_copy_find_one_mark(before):
    cell = Interrupted(before=before)
    cell.watch = watch = copies._Watch(cell)
    watch._last = 5
    assert [watch.mark()] == cell.found == [6]
    assert watch.mark() == 6


def test_what_is_made_ahead_is_taken_once():
    ahead = MadeAhead()
    ahead.add("first")
    ahead.add("second")
    assert len(ahead) == 2
    assert {ahead.take(lambda: "new") for _ in range(3)} == {"first", "second", "new"}
    ahead.add("third")
    ahead.clear()
    assert ahead.take(lambda: "new") == "new"


@pytest.mark.parametrize("way", ALL_WAYS)
def test_what_was_made_ahead_is_not_there_in_a_copy(way):
    def work(way):
        ahead = MadeAhead()
        ahead.add("ours")

        def in_the_copy():
            found = [len(ahead), ahead.take(lambda: "new")]
            ahead.add("theirs")
            return [*found, ahead.take(lambda: "new"), ahead.take(lambda: "new")]

        return in_copy(way, in_the_copy), ahead.take(lambda: "new")

    theirs, ours = in_every_way(way, work)
    assert theirs == [0, "new", "theirs", "new"]
    assert ours == "ours"


@pytest.mark.parametrize("first", ["take", "add", "len"])
def test_whatever_a_copy_does_first_nothing_old_is_taken(first):
    ahead = MadeAhead()
    ahead.add("ours")

    def work():
        {"take": lambda: None, "add": lambda: ahead.add("theirs"), "len": lambda: len(ahead)}[
            first
        ]()
        return [ahead.take(lambda: "new") for _ in range(2)]

    assert "ours" not in in_copy("fork", work)


def test_what_is_kept_for_ever_has_no_end():
    class Value:
        pass

    ended = []
    values = [Value(), Value()]
    for number, value in enumerate(values):
        weakref.finalize(value, ended.append, number).atexit = False
    keep_for_ever(values[1])
    del value
    values.clear()
    gc.collect()
    assert ended == [0]

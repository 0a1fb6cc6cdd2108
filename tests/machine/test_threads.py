"""Items are processed concurrently, and their results keep the order."""

import threading

import pytest

from sqft_export.machine import threads
from sqft_export.machine.threads import map_in_order


def test_what_is_made_comes_in_the_order_of_the_items(monkeypatch):
    monkeypatch.setattr(threads, "allowed_processors", lambda: 3)
    later = threading.Event()

    def work(item: int) -> int:
        if item == 0:  # the first is done after the second
            assert later.wait(10)
        later.set() if item == 1 else None
        return item * item

    assert list(map_in_order(work, range(8))) == [item * item for item in range(8)]


def test_no_more_items_are_read_than_are_worked_on(monkeypatch):
    monkeypatch.setattr(threads, "allowed_processors", lambda: 2)
    read: list[int] = []

    def items():
        for item in range(10):
            read.append(item)
            yield item

    made = map_in_order(lambda item: item, items())
    assert next(made) == 0
    assert len(read) <= 4


def test_an_error_in_one_of_them_is_raised():
    def work(item: int) -> int:
        return 1 // (item - 3)

    with pytest.raises(ZeroDivisionError):
        list(map_in_order(work, range(8)))

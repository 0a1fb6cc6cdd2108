"""Work on many arrays, several at once: numpy and torch let other threads run meanwhile."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from sqft_export.run.host import allowed_processors

MOST = 8  # at once: each holds its arrays
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def in_order(
    work: Callable[[_Item], _Made],
    items: Iterable[_Item],
    begin: Callable[[], None] = lambda: None,
) -> Iterator[_Made]:
    """What ``work`` makes of every item, in their order; of items, so many are in memory as are
    worked on.

    :param begin: called in every thread first.
    """
    count = min(MOST, allowed_processors())
    with ThreadPoolExecutor(count, initializer=begin) as pool:
        running: deque[Future[_Made]] = deque()
        for item in items:
            if len(running) == count:
                yield running.popleft().result()
            running.append(pool.submit(work, item))
        for future in running:
            yield future.result()

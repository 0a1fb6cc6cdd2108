"""Process many arrays in parallel threads; numpy and torch release the interpreter lock."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from sqft_export.machine.host import allowed_processors

MAX_THREADS = 8  # each thread holds its own arrays in memory
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def map_in_order(
    work: Callable[[_Item], _Made],
    items: Iterable[_Item],
    begin: Callable[[], None] = lambda: None,
) -> Iterator[_Made]:
    """Map ``work`` over ``items`` on a thread pool and yield the results in order.

    As many items are in memory as there are threads, at most ``MAX_THREADS``.

    :param begin: called once in every thread before its first item.
    """
    count = min(MAX_THREADS, allowed_processors())
    with ThreadPoolExecutor(count, initializer=begin) as pool:
        running: deque[Future[_Made]] = deque()
        for item in items:
            if len(running) == count:
                yield running.popleft().result()
            running.append(pool.submit(work, item))
        for future in running:
            yield future.result()

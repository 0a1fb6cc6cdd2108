"""The processes of one pass under a launcher: split items, gather results, stop together.

Items are dealt out in turn: of five items, process 0 of two gets the first, third and fifth.
Every exchange also carries errors. If one process fails, all others raise its error at their next
exchange, so that none waits for it.
"""

import contextlib
import datetime
import functools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from sqft_export.errors import HostError, UserError, one_line
from sqft_export.machine import launcher
from sqft_export.machine.launcher import process_count, process_rank

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

# One process may download a model while the others wait. A process that ends breaks the connection,
# so that nobody waits this long for it.
MAX_WAIT = datetime.timedelta(days=1)
_Value = TypeVar("_Value")
_Item = TypeVar("_Item")


class _Message(NamedTuple, Generic[_Value]):
    """A message of a process to all others: a value, or the text and exit code of its error."""

    value: _Value | None
    error: str = ""
    code: int = 0


class Processes:
    """This process among the processes of a pass.

    number: of this process; process 0 writes. count: of all processes.
    group: torch's group of them; None: the default group.
    """

    def __init__(self, number: int = 0, count: int = 1, group: "ProcessGroup | None" = None):
        self.number, self.count, self.group = number, count, group

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the pass."""
        return self.number == 0

    def share(self, items: Sequence[_Item]) -> list[_Item]:
        """Return the items of this process."""
        return list(items[self.number :: self.count])

    def gather(self, value: _Value) -> list[_Value]:
        """Return the values of all processes, in their order.

        :raises UserError: the error of the first process that failed.
        """
        return [value] if self.count == 1 else _unpack(self._exchange(_Message(value)))

    def gather_items(self, mine: Sequence[_Item]) -> list[_Item]:
        """Return the items of all processes in the order that :meth:`share` took them from."""
        parts = self.gather(list(mine))
        longest = max(map(len, parts))
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def from_first(self, make: Callable[[], _Value]) -> _Value:
        """Return what ``make`` returns in process 0."""
        return self.gather(make() if self.is_first else None)[0]  # type: ignore[return-value]

    def gather_at(self, value: _Value, root: int) -> list[_Value]:
        """Return the values of all processes in process ``root``, and none in the others."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list = [None] * self.count
        with _connection():
            dist.gather_object(
                value, found if self.number == root else None, dst=root, group=self.group
            )
        return found if self.number == root else []

    def assign(self, costs: dict[str, float]) -> dict[str, int]:
        """Return name -> process; the sums of the costs are nearly equal (a greedy choice)."""
        loads = [0.0] * self.count
        chosen = dict[str, int]()
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            chosen[name] = loads.index(min(loads))
            loads[chosen[name]] += costs[name]
        return chosen

    def fail(self, error: Exception) -> None:
        """Send an error of this process to the others."""
        if self.count > 1:
            code = error.code if isinstance(error, UserError) else 1
            text = (
                str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            )
            with contextlib.suppress(Exception):  # the others may have failed too
                self._exchange(_Message(None, one_line(text), code))

    def _exchange(self, message: "_Message[_Value]") -> "list[_Message[_Value]]":
        import torch.distributed as dist

        found: list = [None] * self.count
        with _connection():
            dist.all_gather_object(found, message, group=self.group)
        return found


ALONE = Processes()


class ProcessError(UserError):
    """Another process of the pass failed."""


def _unpack(messages: "list[_Message[_Value]]") -> list[_Value]:
    for number, message in enumerate(messages):
        if message.code:
            error = ProcessError(f"process {number}: {message.error}")
            error.code = message.code
            raise error
    return [message.value for message in messages]  # type: ignore[misc]


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    """Turn a broken connection between processes into an error for the user."""
    try:
        yield
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise HostError(
            f"process {process_rank()}: lost another process of this pass ({one_line(error)}); "
            "its own message, if it printed one, names the cause"
        ) from error


@functools.cache
def _rendezvous() -> "tuple[Store, int, int]":
    """Return the store of the launcher's processes, and this process's rank among how many.

    :raises UserError: if not all of them start.
    """
    import torch.distributed as dist

    wait = datetime.timedelta(seconds=launcher.START_SECONDS)
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=wait))
        present = dist.PrefixStore(f"sqft-export/{_attempt()}/present", store)
        present.set(str(rank), b"1")
        present.wait([str(number) for number in range(count)], wait)
    except RuntimeError as error:
        raise UserError(
            f"RANK={process_rank()}, WORLD_SIZE={process_count()}: this process waits for the "
            f"others, and not all have started within {launcher.START_SECONDS:.0f} s; start all "
            "processes with a launcher, or unset these variables"
        ) from error
    store.set_timeout(MAX_WAIT)
    return store, rank, count


def _attempt() -> str:
    """Return how often the launcher has restarted its processes."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def child_variables() -> dict[str, str]:
    """Return the environment with which a child of this process joins those of other processes.

    Its store is that of the launcher, or of the first process if the launcher has none.
    """
    if process_count() == 1:
        return {}
    return {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": _attempt()}


@contextlib.contextmanager
def join_processes(name: str, together: bool = True) -> Iterator[Processes]:
    """Connect the processes of a launcher for one pass; one process without a launcher.

    The processes talk over gloo, which needs no accelerator.

    :param name: of the pass; unique in a run.
    :param together: whether the pass splits its work; else this process works for itself.
    """
    if process_count() == 1 or not together:
        yield ALONE
        return
    import torch.distributed as dist

    group = None
    if dist.is_initialized():  # by the Trainer, which keeps its group, on accelerators' backend
        group = dist.new_group(backend="gloo", timeout=MAX_WAIT)
    else:
        store, rank, count = _rendezvous()
        store = dist.PrefixStore(f"sqft-export/{_attempt()}/{name}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=MAX_WAIT)
    processes = Processes(dist.get_rank(), dist.get_world_size(), group)
    try:
        yield processes
    except ProcessError:
        raise
    except Exception as error:
        processes.fail(error)
        raise
    finally:
        dist.destroy_process_group(group)

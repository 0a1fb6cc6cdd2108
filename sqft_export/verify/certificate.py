"""The checks of a certificate and their counters.

A certificate has three parts:

fidelity   trained (or compressed) model and merged model: weights that forward uses, logits, tokens
storage    merged model and every file of every deployment: all weights, bit for bit
compute    merged model and each runtime: logits, tokens in exact mode; divergence in default mode
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from sqft_export.errors import CertificateError
from sqft_export.machine.threads import map_in_order
from sqft_export.numerics.codes import QuantizedWeight
from sqft_export.verify.results import CertificateDocument, CheckResult, Part

_Item = TypeVar("_Item")
MAX_NAMED = 4  # differing modules, files or texts that a check names


@dataclass
class Check:
    """One check of a certificate.

    unit: of ``differing`` and ``allowed``.
    compared: number of compared weights, tokens, files or texts.
    differing: number of those that differ, or the largest difference.
    where: the first modules, files or texts that differ; for a largest difference, its place.
    """

    part: Part
    name: str
    unit: str
    allowed: float = 0
    compared: int = 0
    differing: float = 0
    where: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Return whether the check passed. It fails if nothing was compared or a value is NaN."""
        return self.compared > 0 and self.differing <= self.allowed

    def blame(self, where: str, differing: float) -> None:
        """Add a number of differences, and name ``where`` if there are any."""
        self.differing += differing
        if differing and len(self.where) < MAX_NAMED:
            self.where.append(where)

    def without_counts(self) -> "Check":
        """Return the same check with nothing compared."""
        return replace(self, compared=0, differing=0, where=[])

    def add(self, other: "Check") -> None:
        """Add the counts of another copy of this check."""
        self.compared += other.compared
        self.differing += other.differing
        self.where = [*self.where, *other.where][:MAX_NAMED]

    def count(self, differs: Tensor | np.ndarray, where: str) -> None:
        """Add a bool array that is True where something differs."""
        self.compared += int(np.prod(differs.shape))
        self.blame(where, int(np.count_nonzero(np.asarray(differs))))

    def count_zeros(self, dropped: np.ndarray | None, nonzero: np.ndarray, where: str) -> None:
        """Add the pruned positions; those that are not zero differ.

        :param dropped: bool ``[out, in]``, True where a weight is pruned; None: none is.
        :param nonzero: bool ``[out, in]``, True where the weight is not zero.
        """
        if dropped is not None:
            self.compared += int(np.count_nonzero(dropped))
            self.blame(where, int(np.count_nonzero(dropped & nonzero)))

    def compare(
        self, one: QuantizedWeight[np.ndarray], other: QuantizedWeight[np.ndarray], where: str
    ) -> None:
        """Add codes, scales and zero points. If shapes differ, all numbers count as different.

        A file may split a group into several and repeat its scale and zero point.
        """
        groups = max(one.scale.shape[1], other.scale.shape[1])
        one, other = one.in_groups(groups), other.in_groups(groups)
        for part in ("codes", "scale", "zero_point"):
            ours, theirs = getattr(one, part), getattr(other, part)
            # A float16 scale and its float32 copy are compared as float32, which is exact.
            same = ours.shape == theirs.shape
            self.count(ours != theirs if same else np.ones(ours.shape, bool), f"{where} {part}")

    def record_largest(self, value: float, compared: int, where: str) -> None:
        """Record the largest value seen; NaN counts as infinite.

        :param compared: how many numbers ``value`` is the maximum of.
        """
        self.compared += compared
        value = value if np.isfinite(value) else float("inf")
        if value > self.differing:
            self.differing = value
            self.where = [where] if value > self.allowed else []

    def __str__(self) -> str:
        if not self.compared:
            return f"{self.part}: {self.name}: nothing was compared"
        where = f" ({', '.join(self.where)})" if self.where else ""
        return (
            f"{self.part}: {self.name}: {self.differing:g} {self.unit} differ, "
            f"{self.compared} compared{where}"
        )


def count_in_parallel(
    count: Callable[..., None], items: Iterable[_Item], *checks: Check | None
) -> None:
    """Call ``count(item, *checks)`` for every item on a thread pool.

    Each call gets separate copies of the checks. Their counts are added in the order of the items.
    torch uses one thread per item, since the items run in parallel.
    """

    def count_item(item: _Item) -> list[Check | None]:
        copies = [check and check.without_counts() for check in checks]
        count(item, *copies)
        return copies

    threads = torch.get_num_threads()
    try:
        counted = map_in_order(count_item, items, partial(torch.set_num_threads, 1))
        pairs = (pair for copies in counted for pair in zip(checks, copies, strict=True))
        for check, copy in pairs:
            if check and copy:
                check.add(copy)
    finally:
        torch.set_num_threads(threads)  # also for threads that start later


class Certificate:
    """All checks of a run, in the order in which they ran."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def start(self, part: Part, name: str, unit: str, allowed: float = 0) -> Check:
        """Add an empty check and return it."""
        self.checks.append(Check(part, name, unit, allowed))
        return self.checks[-1]

    def results(self) -> list[CheckResult]:
        """Return the result of every check."""
        return [CheckResult(**asdict(check), passed=check.passed) for check in self.checks]

    def document(self) -> CertificateDocument:
        """Return the results, grouped by part."""
        fidelity, storage, compute = (
            [result for result in self.results() if result.part == part] for part in get_args(Part)
        )
        return CertificateDocument(fidelity=fidelity, storage=storage, compute=compute)

    def require(self) -> None:
        """Fail unless every check passed.

        :raises CertificateError: listing every check that failed.
        """
        if failed := [str(check) for check in self.checks if not check.passed]:
            raise CertificateError("verify failed:\n" + "\n".join(failed))

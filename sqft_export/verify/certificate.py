"""The lines of a certificate, and what they are counted from.

fidelity   trained or compressed model -> merged model: weights of its forward, logits, token ids
storage    merged model -> every file of every deployment, bit for bit
compute    what each runtime makes of its file: logits and tokens in its exact mode, the
           divergence of its default mode
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from sqft_export.errors import CertificateError
from sqft_export.numerics.codes import Quantized
from sqft_export.run.threads import map_in_order

_Item = TypeVar("_Item")
Part = Literal["fidelity", "storage", "compute"]
NAMED = 4  # offenders that a line names


@dataclass
class Check:
    """One line: what was compared, of how many things, how many differ or by how much.

    where: the first modules, files or texts that differ.
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
        """A line that compared nothing certifies nothing; a number that is none fails."""
        return self.compared > 0 and self.differing <= self.allowed

    def blame(self, where: str, differing: float) -> None:
        self.differing += differing
        if differing and len(self.where) < NAMED:
            self.where.append(where)

    def empty(self) -> "Check":
        """The same line with nothing compared."""
        return replace(self, compared=0, differing=0, where=[])

    def add(self, other: "Check") -> None:
        """What another one of this line counted."""
        self.compared += other.compared
        self.differing += other.differing
        self.where = [*self.where, *other.where][:NAMED]

    def count(self, differs: Tensor | np.ndarray, where: str) -> None:
        """Add an array that is True where something differs."""
        self.compared += int(np.prod(differs.shape))
        self.blame(where, int(np.count_nonzero(np.asarray(differs))))

    def count_zeros(self, dropped: np.ndarray | None, nonzero: np.ndarray, where: str) -> None:
        """Add what was dropped; what of it is not zero differs.

        :param dropped: bool ``[out, in]``; None: nothing was.
        """
        if dropped is not None:
            self.compared += int(np.count_nonzero(dropped))
            self.blame(where, int(np.count_nonzero(dropped & nonzero)))

    def compare(self, one: Quantized, other: Quantized, where: str) -> None:
        """Add codes, scales and zero points; all of them differ where the shapes do.

        A file may say the numbers of a group again for each of its parts.
        """
        groups = max(one.scale.shape[1], other.scale.shape[1])
        one, other = one.in_groups(groups), other.in_groups(groups)
        for ours, theirs, part in zip(one, other, Quantized._fields, strict=True):
            # A float16 scale and its float32 copy are compared as float32, which is exact.
            same = ours.shape == theirs.shape
            self.count(ours != theirs if same else np.ones(ours.shape, bool), f"{where} {part}")

    def worst(self, value: float, compared: int, where: str) -> None:
        """Add numbers of which the largest counts; one that is none counts as infinite."""
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
            f"{self.part}: {self.name}: {self.differing:g} {self.unit} differ of "
            f"{self.compared}{where}"
        )


def side_by_side(count: Callable[..., None], items: Iterable[_Item], *lines: Check | None) -> None:
    """Call ``count(item, *lines)`` for every item, several at once, each on lines of its own; what
    they counted is added in the order of the items.

    torch works on each in one thread: teams of several would wait for each other's processors.
    """

    def alone(item: _Item) -> list[Check | None]:
        own = [line and line.empty() for line in lines]
        count(item, *own)
        return own

    threads = torch.get_num_threads()
    try:
        counted = map_in_order(alone, items, partial(torch.set_num_threads, 1))
        for line, part in (pair for own in counted for pair in zip(lines, own, strict=True)):
            if line and part:
                line.add(part)
    finally:
        torch.set_num_threads(threads)  # also of threads that come later


class Certificate:
    def __init__(self) -> None:
        self.checks: list[Check] = []

    def start(self, part: Part, name: str, unit: str, allowed: float = 0) -> Check:
        self.checks.append(Check(part, name, unit, allowed))
        return self.checks[-1]

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(check) | {"passed": check.passed} for check in self.checks]

    def document(self) -> dict[str, list[dict[str, Any]]]:
        parts: dict[str, list[dict[str, Any]]] = {"fidelity": [], "storage": [], "compute": []}
        for row in self.rows():
            parts[row["part"]].append(row)
        return parts

    def require(self) -> None:
        """:raises CertificateError: listing every line that failed."""
        if failed := [str(check) for check in self.checks if not check.passed]:
            raise CertificateError("verify failed:\n" + "\n".join(failed))

"""Distribute one overall sparsity over the Linears, by the output error that it costs in each.

Dropping the weights with the lowest ``|W_ij| * ||X_j||_2`` changes the output. The energy of the
change is about the sum of these squares; it is exactly the sum if the inputs are uncorrelated.
Relative to the energy of the output, this error is a convex function of the share dropped. The sum
over all Linears is minimal where dropping one more weight costs the same in every Linear. A greedy
walk along the curves finds this point.
"""

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_DEVIATION = 0.15  # of a Linear's sparsity from the overall sparsity
CURVE_STEPS = 30
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Curve:
    """Relative output error of one Linear as a function of the weights dropped per row.

    rows, columns: shape of the weight.
    counts: numbers of weights dropped per row, ascending.
    errors: relative output error at each count.
    """

    rows: int
    columns: int
    counts: list[int]
    errors: list[float]

    def cost(self, step: int) -> float:
        """Return the error added from point ``step - 1`` to ``step``, per weight dropped."""
        dropped = (self.counts[step] - self.counts[step - 1]) * self.rows
        return (self.errors[step] - self.errors[step - 1]) / dropped


def error_curve(weight: Tensor, norms: Tensor, sparsity: float) -> Curve:
    """Return the curve of one Linear around an overall sparsity.

    :param weight: float32 ``[out, in]``.
    :param norms: float32 ``[in]``, L2 norm of every input channel.
    """
    rows, columns = weight.shape
    low, high = max(0.0, sparsity - MAX_DEVIATION), min(sparsity + MAX_DEVIATION, 1.0)
    counts = (torch.linspace(low, high, CURVE_STEPS + 1, dtype=torch.float64) * columns).round()
    counts = counts.long().clamp_max(columns - 1).unique()
    energy = torch.zeros(
        columns + 1, dtype=torch.float64
    )  # on the CPU: not all devices support float64
    for part in weight.split(_ROWS_AT_ONCE):
        ascending = (part * norms).square().sort(dim=1).values.cpu()
        energy[1:] += ascending.sum(dim=0, dtype=torch.float64)
    dropped = energy.cumsum(0)
    errors = dropped[counts] / dropped[-1].clamp_min(torch.finfo(torch.float32).tiny)
    return Curve(rows, columns, counts.tolist(), errors.tolist())


def allocate(curves: dict[str, Curve], sparsity: float) -> dict[str, float]:
    """Return the sparsity per Linear with the least total error at an overall sparsity.

    Steps that exceed the remaining budget are shortened to whole columns. The number of dropped
    weights therefore differs from the request by less than one column.
    """
    budget = round(sparsity * sum(curve.rows * curve.columns for curve in curves.values()))
    counts = {name: curve.counts[0] for name, curve in curves.items()}
    budget -= sum(counts[name] * curve.rows for name, curve in curves.items())
    steps = [(curve.cost(1), name, 1) for name, curve in curves.items()]
    heapq.heapify(steps)
    while steps and budget > 0:
        _, name, step = heapq.heappop(steps)
        curve = curves[name]
        added = min(curve.counts[step] - counts[name], budget // curve.rows)
        counts[name] += added
        budget -= added * curve.rows
        if step + 1 < len(curve.counts):
            heapq.heappush(steps, (curve.cost(step + 1), name, step + 1))
    return {name: counts[name] / curve.columns for name, curve in curves.items()}

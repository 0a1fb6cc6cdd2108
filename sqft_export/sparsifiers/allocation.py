"""Which Linear bears how much of one overall sparsity, by the output error it costs there.

Dropping the weights of lowest ``|W_ij| * ||X_j||_2`` costs about the sum of their squares in output
energy (exactly, were the inputs uncorrelated). Relative to the energy of the whole output that is
a convex curve over the share dropped, one per Linear; the sum over all Linears is least where the
next weight dropped costs the same everywhere, which a greedy walk along the curves finds.
"""

import heapq
from dataclasses import dataclass

import torch
from torch import Tensor

REACH = 0.15  # a Linear's sparsity stays this near to the overall one
STEPS = 30
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Curve:
    """Relative output error of one Linear at ascending numbers of weights dropped in each row."""

    rows: int
    columns: int
    counts: list[int]
    errors: list[float]

    def cost(self, step: int) -> float:
        """Error of going from point ``step - 1`` to ``step``, per weight dropped."""
        dropped = (self.counts[step] - self.counts[step - 1]) * self.rows
        return (self.errors[step] - self.errors[step - 1]) / dropped


def error_curve(weight: Tensor, norms: Tensor, sparsity: float) -> Curve:
    """The curve around an overall sparsity.

    :param weight: float32 ``[out, in]``.
    :param norms: float32 ``[in]``, the L2 norm of every input channel.
    """
    rows, columns = weight.shape
    low, high = max(0.0, sparsity - REACH), min(sparsity + REACH, 1.0)
    counts = (torch.linspace(low, high, STEPS + 1, dtype=torch.float64) * columns).round().long()
    counts = counts.clamp_max(columns - 1).unique()
    energy = torch.zeros(columns + 1, dtype=torch.float64)  # on the CPU: not all devices have it
    for part in weight.split(_ROWS_AT_ONCE):
        ascending = (part * norms).square().sort(dim=1).values.cpu()
        energy[1:] += ascending.sum(dim=0, dtype=torch.float64)
    dropped = energy.cumsum(0)
    errors = dropped[counts] / dropped[-1].clamp_min(torch.finfo(torch.float32).tiny)
    return Curve(rows, columns, counts.tolist(), errors.tolist())


def allocate(curves: dict[str, Curve], sparsity: float) -> dict[str, float]:
    """Sparsity per Linear, of least summed error at this sparsity over all of them.

    Steps that no longer fit are cut to whole columns, so that the total is met to less than one.
    """
    budget = round(sparsity * sum(curve.rows * curve.columns for curve in curves.values()))
    counts = {name: curve.counts[0] for name, curve in curves.items()}
    budget -= sum(counts[name] * curve.rows for name, curve in curves.items())
    steps = [(curve.cost(1), name, 1) for name, curve in curves.items()]
    heapq.heapify(steps)
    while steps and budget > 0:
        _, name, step = heapq.heappop(steps)
        curve = curves[name]
        more = min(curve.counts[step] - counts[name], budget // curve.rows)
        counts[name] += more
        budget -= more * curve.rows
        if step + 1 < len(curve.counts):
            heapq.heappush(steps, (curve.cost(step + 1), name, step + 1))
    return {name: counts[name] / curve.columns for name, curve in curves.items()}

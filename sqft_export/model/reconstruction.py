"""Reconstruction of compressed weights, a block at a time (arXiv 2312.15230, 2510.14444).

The kept weights of a pruned and rounded decoder block are trained to reproduce the dense block's
outputs on the calibration activations (least mean squared error). Scales are trained too where the
weights are on a grid; the gradient passes rounding straight through, as in adapters/linear.py.
Pruned positions stay zero, norms and biases stay unchanged. The inputs of a block are the outputs
of the reconstructed blocks before it, so that it also corrects their errors.

Example: block 3 of the dense model maps ``x`` to ``y``. Blocks 0 to 2 are reconstructed and turn
the same sample into ``x'``. Block 3 is trained so that it maps ``x'`` to ``y``.

The recipe may give a learning rate. Otherwise the first step of a weight is a share of the root
mean square of its row, which differs tenfold between models and between rows of one Linear.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sqft_export.model.blocks import Block, output_of
from sqft_export.numerics import fused
from sqft_export.numerics.affine import shift_scales, split_groups
from sqft_export.numerics.codes import FLOAT16_BITS, Grid
from sqft_export.recipe.schema import Reconstruct

FIRST_WEIGHT_STEP = 0.01  # share of the root mean square of a row
FIRST_SCALE_STEP = 0.003  # share of a scale
ADAM_EPSILON = 1e-20  # gradients of a mean over many outputs are far below the usual 1e-8


def outputs_of(block: Block) -> Iterator[Tensor]:
    """Yield the output of every call of a block, ``[1, length, hidden]``."""
    for hidden, kwargs in block.calls:
        yield output_of(block.module, hidden, kwargs)


@torch.no_grad()
@parametrize.cached()
def relative_error(block: Block, targets: list[Tensor]) -> float:
    """Return the squared error of a block's outputs divided by the targets' squares.

    The parametrized weights are computed once for all samples.
    """
    error = sum(
        float((ours - theirs).square().sum())
        for ours, theirs in zip(outputs_of(block), targets, strict=True)
    )
    return error / sum(float(target.square().sum()) for target in targets)


def group_batchable(block: Block, chosen: list[int]) -> list[list[int]]:
    """Group calls that can run as one batch: their keyword arguments broadcast over rows."""
    batch = [i for i in chosen if all(map(_broadcasts, block.calls[i][1].values()))]
    single = [[index] for index in chosen if index not in batch]
    return [batch, *single] if batch else single


def run_batched(block: Block, group: list[int]) -> list[Tensor]:
    """Run some calls of a block as one batch and return ``[length, hidden]`` for each.

    Samples are padded on the right, which earlier tokens of a causal model do not attend to.
    """
    hidden = [block.calls[index][0][0] for index in group]
    longest = max(group, key=lambda index: block.calls[index][0].shape[1])
    rows = nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    output = output_of(block.module, rows, block.calls[longest][1])
    return [row[: len(states)] for row, states in zip(output, hidden, strict=True)]


def _broadcasts(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_broadcasts, value))
    return not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] == 1


def _draw_samples(count: int, config: Reconstruct, seed: int) -> Iterator[list[int]]:
    """Yield the sample indices of every step; all samples are drawn equally often."""
    order = torch.Generator().manual_seed(seed)
    size, left = min(config.batch, count), list[int]()
    for _ in range(config.steps):
        if len(left) < size:
            left = torch.randperm(count, generator=order).tolist()
        yield left[:size]
        left = left[size:]


def _backward(block: Block, targets: list[Tensor], chosen: list[int]) -> None:
    """Accumulate gradients of the mean squared error over some samples."""
    numbers = sum(targets[index].numel() for index in chosen)
    for group in group_batchable(block, chosen):
        outputs = zip(run_batched(block, group), group, strict=True)
        errors = [(ours - targets[index][0]).square().sum() for ours, index in outputs]
        (torch.stack(errors).sum() / numbers).backward()


class _RoundToGrid(torch.autograd.Function):
    """Round a weight ``[out, in]`` to its grid, with a straight-through gradient.

    shift: float32 ``[out, groups]``, logarithm of the factor on the grid's scales.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, shift: Tensor, grid: Grid):
        ctx.save_for_backward(weight)
        ctx.grid = grid
        return fused.effective_weight(fused.Frozen(weight, None, grid), None, 0.0)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (weight,) = ctx.saved_tensors
        base, nothing = fused.Frozen(weight, None, ctx.grid), torch.zeros_like(weight)
        back = fused.backward(base, nothing, 0.0, gradient.clone(), True)
        shifts = split_groups(back.scale_gradient, ctx.grid.group_size).sum(dim=2)
        return back.update_gradient, shifts, None


class _TrainedWeight(nn.Module):
    """Parametrization of a Linear's weight in units of the first step; pruned positions stay zero.

    unit: float32, the first step, scalar or ``[out, 1]``. mask: bool ``[out, in]``, True = kept.
    grid: the grid that the weight is rounded to, or None.
    """

    def __init__(self, unit: Tensor, mask: Tensor, grid: Grid | None, scale_bits: int):
        super().__init__()
        self.unit, self.mask, self.grid, self.scale_bits = unit, mask, grid, scale_bits
        if grid:
            self.shift = nn.Parameter(torch.zeros_like(grid.scale, dtype=torch.float32))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.unit

    def latent(self, relative: Tensor) -> Tensor:
        return relative * self.unit * self.mask

    def forward(self, relative: Tensor) -> Tensor:
        weight = self.latent(relative)
        if self.grid is None:
            return weight
        return _RoundToGrid.apply(weight, self.shift, self.current_grid())

    def current_grid(self) -> Grid | None:
        """Return the grid with its scales as they would be stored now."""
        return shift_scales(self.grid, self.shift.detach(), self.scale_bits) if self.grid else None


def _first_step(weight: Tensor, mask: Tensor, rate: float | None) -> Tensor:
    """Return the first step: the given learning rate, or one per row ``[out, 1]``."""
    if rate is not None:
        return torch.tensor(rate, device=weight.device)
    square = weight.square().sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
    return torch.where(
        square > 0, FIRST_WEIGHT_STEP * square.sqrt(), 1
    )  # 0 / 0 where nothing is kept


class Reconstructed(NamedTuple):
    """Trained weights of one block.

    weights: Linear -> float32 ``[out, in]``.
    grids: Linear -> the grid of its codes; empty if nothing is rounded.
    errors: relative errors of the block's outputs before and after the training.
    """

    weights: dict[str, Tensor]
    grids: dict[str, Grid]
    errors: tuple[float, float]


def reconstruct(
    theirs: Block,
    ours: Block,
    masks: dict[str, Tensor],
    config: Reconstruct,
    seed: int,
    grids: dict[str, Grid] | None = None,
    scale_bits: int = FLOAT16_BITS,
) -> Reconstructed:
    """Train a block's kept weights; afterwards its Linears hold the weights it computes with.

    :param theirs: the dense block, with its own inputs.
    :param ours: the compressed block, with the outputs of the reconstructed blocks as inputs.
    :param masks: Linear -> bool ``[out, in]``, True = kept.
    :param seed: seed of the order in which samples are drawn.
    :param grids: Linear -> grid that its weight is rounded to; None rounds nothing.
    :param scale_bits: significant bits of the scales.
    """
    with torch.no_grad():
        targets = list(outputs_of(theirs))
    linears = {name: ours.linears[name] for name in masks}
    for name, linear in linears.items():
        unit = _first_step(linear.weight, masks[name], config.learning_rate)
        trained = _TrainedWeight(unit, masks[name], grids[name] if grids else None, scale_bits)
        parametrize.register_parametrization(linear, "weight", trained)
    before = relative_error(ours, targets)
    _train(ours, targets, list(linears.values()), config, seed)
    after = relative_error(ours, targets)
    trained_pairs = {name: _unparametrize(linear) for name, linear in linears.items()}
    weights = {name: weight for name, (weight, _) in trained_pairs.items()}
    final_grids = {name: grid for name, (_, grid) in trained_pairs.items() if grid}
    return Reconstructed(weights, final_grids, (before, after))


@torch.enable_grad()
def _train(
    block: Block, targets: list[Tensor], linears: list[nn.Linear], config: Reconstruct, seed: int
) -> None:
    """Run the optimizer steps.

    :param targets: outputs of the dense block, ``[1, length, hidden]`` each.
    """
    held = [linear.parametrizations["weight"] for linear in linears]
    weights = [one.original.requires_grad_() for one in held]
    scales = [scale for one in held for scale in one[0].parameters()]
    rates = [{"params": weights}, {"params": scales, "lr": FIRST_SCALE_STEP}]
    adam = torch.optim.Adam(rates, 1.0, eps=ADAM_EPSILON)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, config.steps)
    for chosen in _draw_samples(len(targets), config, seed):
        adam.zero_grad()
        _backward(block, targets, chosen)
        adam.step()
        schedule.step()


@torch.no_grad()
def _unparametrize(linear: nn.Linear) -> tuple[Tensor, Grid | None]:
    """Return the trained weight and grid; the Linear becomes plain and keeps its last weight."""
    held = linear.parametrizations["weight"]
    result = held[0].latent(held.original), held[0].current_grid()
    parametrize.remove_parametrizations(linear, "weight")
    linear.weight.requires_grad_(False).grad = None
    return result

"""Reconstruction of compressed weights, a block at a time (arXiv 2312.15230, 2510.14444).

What pruning and rounding left of a decoder block is trained until the block gives the dense
block's output on the calibration activations again: least mean squared error over the kept weights
of its Linears, and over their scales where they are on a grid (the gradient passes rounding
straight through, as in adapters/linear.py). Pruned positions stay zero. Each block is given what
the reconstructed ones before it give, so that it makes up for their errors too. Norms and biases
stay as they are.

Unless the recipe gives a learning rate, a step is a share of the root mean square of its row's
weights: that differs tenfold from one model to the next, and by as much between rows of one Linear.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sqft_export.model.blocks import Block, output_of
from sqft_export.numerics import fused
from sqft_export.numerics.affine import Grid, grouped
from sqft_export.numerics.codes import FLOAT16_BITS
from sqft_export.recipe.schema import Reconstruct

STEP, SCALE_STEP = 0.01, 0.003  # at first, as a share of a row's weights and of a scale
SMALL = 1e-20  # of Adam: gradients are per step, and small


def outputs_of(block: Block) -> Iterator[Tensor]:
    """What a block gives for each of its calls, ``[1, length, hidden]``."""
    for hidden, kwargs in block.calls:
        yield output_of(block.module, hidden, kwargs)


@torch.no_grad()
@parametrize.cached()
def relative_error(block: Block, targets: list[Tensor]) -> float:
    """Squared error of a block's outputs over the targets' square.

    Weights are made once, and not for every sample.
    """
    error = sum(
        float((ours - theirs).square().sum())
        for ours, theirs in zip(outputs_of(block), targets, strict=True)
    )
    return error / sum(float(target.square().sum()) for target in targets)


def together(block: Block, chosen: list[int]) -> list[list[int]]:
    """Calls that can be one: those whose keywords hold for any number of rows."""
    joined = [i for i in chosen if all(map(_broadcasts, block.calls[i][1].values()))]
    alone = [[index] for index in chosen if index not in joined]
    return [joined, *alone] if joined else alone


def joined_outputs(block: Block, group: list[int]) -> list[Tensor]:
    """What a block gives for some of its calls, run as one: ``[length, hidden]`` each.

    Short ones are filled up on the right, where a causal model's tokens before do not look.
    """
    hidden = [block.calls[index][0][0] for index in group]
    longest = max(group, key=lambda index: block.calls[index][0].shape[1])
    rows = nn.utils.rnn.pad_sequence(hidden, batch_first=True)
    output = output_of(block.module, rows, block.calls[longest][1])
    return [row[: len(states)] for row, states in zip(output, hidden, strict=True)]


def _broadcasts(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_broadcasts, value))
    return not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] == 1


def _drawn(count: int, config: Reconstruct, seed: int) -> Iterator[list[int]]:
    """Samples of every step, each as often as any other."""
    order = torch.Generator().manual_seed(seed)
    size, left = min(config.batch, count), list[int]()
    for _ in range(config.steps):
        if len(left) < size:
            left = torch.randperm(count, generator=order).tolist()
        yield left[:size]
        left = left[size:]


def _backward(block: Block, targets: list[Tensor], chosen: list[int]) -> None:
    """Gradients of the mean squared error over some samples."""
    numbers = sum(targets[index].numel() for index in chosen)
    for group in together(block, chosen):
        outputs = zip(joined_outputs(block, group), group, strict=True)
        errors = [(ours - targets[index][0]).square().sum() for ours, index in outputs]
        (torch.stack(errors).sum() / numbers).backward()


class _Rounded(torch.autograd.Function):
    """Grid points of a weight ``[out, in]``.

    shift: float32 ``[out, groups]``, logarithm of what the grid's scales were moved by.
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
        return back.passed, grouped(back.moved, ctx.grid.group_size).sum(dim=2), None


class _Trained(nn.Module):
    """A Linear's weight as it is trained: in units of a first step, pruned positions held at zero.

    unit: float32, that step. mask: bool ``[out, in]``, True = kept. grid: or None.
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
        return _Rounded.apply(weight, self.shift, self.moved())

    def moved(self) -> Grid | None:
        """The grid, its scales as they would be stored now."""
        return self.grid.moved(self.shift.detach(), self.scale_bits) if self.grid else None


def _first_step(weight: Tensor, mask: Tensor, rate: float | None) -> Tensor:
    """A learning rate, or what it is for each row, ``[out, 1]``."""
    if rate is not None:
        return torch.tensor(rate, device=weight.device)
    square = weight.square().sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
    return torch.where(square > 0, STEP * square.sqrt(), 1)  # 0 / 0 where nothing is kept


class Reconstructed(NamedTuple):
    """weights: Linear -> float32 ``[out, in]``. grids: Linear -> what its codes are on; empty where
    nothing is rounded. errors: relative ones, before and after."""

    weights: dict[str, Tensor]
    grids: dict[str, Grid]
    errors: tuple[float, float]

    def keep(self, file: Path, dtypes: dict[str, torch.dtype] | None = None) -> None:
        """A file that is there is whole.

        :param dtypes: Linear -> what its weight is stored in; None: float32.
        """
        tensors = {}
        for name, weight in self.weights.items():
            dtype = dtypes[name] if dtypes else weight.dtype
            tensors[f"{name}.weight"] = weight.to("cpu", dtype).contiguous()
        for name, grid in self.grids.items():
            tensors |= {f"{name}.scale": grid.scale.cpu(), f"{name}.zero": grid.zero_point.cpu()}
        sizes = {name: (grid.bits, grid.group_size) for name, grid in self.grids.items()}
        partial = file.with_suffix(".partial")
        facts = {"errors": json.dumps(self.errors), "sizes": json.dumps(sizes)}
        save_file(tensors, partial, metadata=facts)
        partial.rename(file)

    @classmethod
    def kept(cls, file: Path) -> "Reconstructed":
        with safe_open(file, framework="pt") as tensors:
            take, facts = tensors.get_tensor, tensors.metadata()
            ends = (key.rpartition(".") for key in tensors.keys())  # noqa: SIM118
            weights = {n: take(f"{n}.weight") for n, _, end in ends if end == "weight"}
            grids = {
                name: Grid(take(f"{name}.scale"), take(f"{name}.zero"), *size)
                for name, size in json.loads(facts["sizes"]).items()
            }
            return cls(weights, grids, tuple(json.loads(facts["errors"])))


def reconstruct(
    theirs: Block,
    ours: Block,
    masks: dict[str, Tensor],
    config: Reconstruct,
    seed: int,
    grids: dict[str, Grid] | None = None,
    scale_bits: int = FLOAT16_BITS,
) -> Reconstructed:
    """Train a block's kept weights; its Linears then have what it computes with.

    :param theirs: the dense block, with inputs of its own.
    :param masks: Linear -> bool ``[out, in]``, True = kept.
    :param seed: of the order in which samples are drawn.
    :param grids: Linear -> what its weight is rounded to; None: nothing is.
    :param scale_bits: significant bits of the scales.
    """
    with torch.no_grad():
        targets = list(outputs_of(theirs))
    linears = {name: ours.linears[name] for name in masks}
    for name, linear in linears.items():
        unit = _first_step(linear.weight, masks[name], config.learning_rate)
        trained = _Trained(unit, masks[name], grids[name] if grids else None, scale_bits)
        parametrize.register_parametrization(linear, "weight", trained)
    before = relative_error(ours, targets)
    _train(ours, targets, list(linears.values()), config, seed)
    after = relative_error(ours, targets)
    settled = {name: _settled(linear) for name, linear in linears.items()}
    weights = {name: weight for name, (weight, _) in settled.items()}
    moved = {name: grid for name, (_, grid) in settled.items() if grid}
    return Reconstructed(weights, moved, (before, after))


@torch.enable_grad()
def _train(
    block: Block, targets: list[Tensor], linears: list[nn.Linear], config: Reconstruct, seed: int
) -> None:
    """:param targets: the dense block's outputs, ``[1, length, hidden]``."""
    held = [linear.parametrizations["weight"] for linear in linears]
    weights = [one.original.requires_grad_() for one in held]
    scales = [scale for one in held for scale in one[0].parameters()]
    rates = [{"params": weights}, {"params": scales, "lr": SCALE_STEP}]
    adam = torch.optim.Adam(rates, 1.0, eps=SMALL)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, config.steps)
    for chosen in _drawn(len(targets), config, seed):
        adam.zero_grad()
        _backward(block, targets, chosen)
        adam.step()
        schedule.step()


@torch.no_grad()
def _settled(linear: nn.Linear) -> tuple[Tensor, Grid | None]:
    """What was trained; the Linear is a plain one again, with what it computed with last."""
    held = linear.parametrizations["weight"]
    result = held[0].latent(held.original), held[0].moved()
    parametrize.remove_parametrizations(linear, "weight")
    linear.weight.requires_grad_(False).grad = None
    return result

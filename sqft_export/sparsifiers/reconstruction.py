"""Reconstruction of the kept weights, a block at a time (arXiv 2312.15230, 2510.14444).

What pruning left of a decoder block is trained until the block gives the dense block's output on
the calibration activations again: least mean squared error over the kept weights of its Linears,
pruned positions stay zero. Each block is given what the reconstructed ones before it give, so
that it makes up for their errors too. Norms and biases stay as they are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sqft_export.model.blocks import Block, output_of
from sqft_export.recipe.schema import Reconstruct


def outputs_of(block: Block) -> Iterator[Tensor]:
    """What a block gives for each of its calls, ``[1, length, hidden]``."""
    for hidden, kwargs in block.calls:
        yield output_of(block.module, hidden, kwargs)


@torch.no_grad()
def relative_error(block: Block, targets: list[Tensor]) -> float:
    """Squared error of a block's outputs over the targets' square."""
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


def _held(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * mask


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


@torch.enable_grad()
def reconstruct(
    block: Block,
    targets: list[Tensor],
    masks: dict[str, Tensor],
    config: Reconstruct,
    seed: int,
) -> None:
    """Train a block's kept weights in place.

    :param targets: the dense block's output for every call of ``block``, ``[1, length, hidden]``.
    :param masks: Linear -> bool ``[out, in]``, True = kept.
    :param seed: of the order in which samples are drawn.
    """
    weights = {name: block.linears[name].weight.requires_grad_() for name in masks}
    # A weight of zero whose gradient is zero stays: Adam divides zero by its epsilon.
    hooks = [weights[name].register_hook(_held(mask)) for name, mask in masks.items()]
    adam = torch.optim.Adam(weights.values(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, config.steps)
    for chosen in _drawn(len(targets), config, seed):
        adam.zero_grad()
        _backward(block, targets, chosen)
        adam.step()
        schedule.step()
    for hook, weight in zip(hooks, weights.values(), strict=True):
        hook.remove()
        weight.grad = None
        weight.requires_grad_(False)

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

from sqft_export.model.blocks import Block
from sqft_export.recipe.schema import Reconstruct


def outputs_of(block: Block) -> Iterator[Tensor]:
    """What a block gives for each of its calls, ``[1, length, hidden]``."""
    for hidden, kwargs in block.calls:
        yield _output(block.module, hidden, kwargs)


def _output(module: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    output = module(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def relative_error(block: Block, targets: list[Tensor]) -> float:
    """Squared error of a block's outputs over the targets' square."""
    error = sum(
        float((ours - theirs).square().sum())
        for ours, theirs in zip(outputs_of(block), targets, strict=True)
    )
    return error / sum(float(target.square().sum()) for target in targets)


def _together(block: Block, chosen: list[int]) -> list[list[int]]:
    """Calls that can be one: of one length, with keywords that hold for any number of rows."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index in chosen:
        hidden, kwargs = block.calls[index]
        alone = 0 if all(map(_broadcasts, kwargs.values())) else index + 1
        groups.setdefault((hidden.shape[1], alone), []).append(index)
    return list(groups.values())


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
    for group in _together(block, chosen):
        hidden = torch.cat([block.calls[index][0] for index in group])
        output = _output(block.module, hidden, block.calls[group[0]][1])
        loss = nn.functional.mse_loss(output, torch.cat([targets[index] for index in group]))
        (loss * len(group) / len(chosen)).backward()


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

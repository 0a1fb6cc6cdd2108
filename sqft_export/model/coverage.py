"""Counts of the calibration tokens that every Linear sees, and checks of its inputs."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sqft_export.errors import UserError

FEWEST_TOKENS = 128  # for a method that needs no Hessian
OTHER_SAMPLES = (
    "look at calibration.source and calibration.samples, or use methods that need no data "
    "(magnitude, rtn)"
)


@contextlib.contextmanager
def count_tokens(linears: dict[str, nn.Linear]) -> Iterator[dict[str, int]]:
    """Count the tokens that each Linear multiplies while the context is open."""
    counts = dict.fromkeys(linears, 0)

    def hook_of(name: str) -> Any:
        def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[name] += inputs[0].numel() // inputs[0].shape[-1]

        return count

    hooks = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def no_tokens(name: str) -> UserError:
    """The error for a Linear that saw no calibration token."""
    return UserError(f"{name}: saw no calibration token; {OTHER_SAMPLES}")


def check_sum(name: str, squares: Tensor) -> None:
    """Refuse calibration inputs that say nothing about a Linear.

    :param squares: float32 ``[in]``, the sum over all tokens of every input's square: the diagonal
        of the Hessian.
    :raises UserError: naming the Linear, if they are NaN, infinite, or all zero.
    """
    if not bool(torch.isfinite(squares).all()):
        raise UserError(f"{name}: its calibration inputs are NaN or infinite; {OTHER_SAMPLES}")
    if not bool(squares.any()):
        raise UserError(f"{name}: its calibration inputs are all zero; {OTHER_SAMPLES}")


def check_finite(where: str, hidden: list[Tensor]) -> None:
    """Refuse hidden states ``[1, length, width]`` of the samples that are not finite.

    :raises UserError: naming the place and the first sample.
    """
    if not hidden:
        return
    finite = torch.stack([torch.isfinite(one).all() for one in hidden]).tolist()
    if not all(finite):
        raise UserError(
            f"{where}: NaN or infinite on {finite.count(False)} of {len(finite)} calibration "
            f"samples, first on number {finite.index(False)}; {OTHER_SAMPLES}"
        )


def coverage_warnings(
    tokens: dict[str, int], shapes: dict[str, tuple[int, int]], has_hessian: bool
) -> list[str]:
    """A warning where Linears saw few tokens; one for all of them.

    :param tokens: Linear -> calibration tokens.
    :param shapes: Linear -> ``(out, in)``.
    :param has_hessian: whether a Hessian is factored, which takes as many tokens as inputs.
    """
    wanted = {name: shapes[name][1] if has_hessian else FEWEST_TOKENS for name in tokens}
    few = [name for name, count in tokens.items() if count < wanted[name]]
    if not few:
        return []
    worst = min(few, key=lambda name: tokens[name] / wanted[name])
    reason = "one per input, so that its Hessian has full rank" if has_hessian else "the fewest"
    return [
        f"calibration: {len(few)} of {len(tokens)} Linears saw few tokens; {worst} saw "
        f"{tokens[worst]}, {wanted[worst]} are wanted ({reason}); raise calibration.samples or "
        "calibration.sequence_length"
    ]

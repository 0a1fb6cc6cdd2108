"""Count the calibration tokens that every Linear sees, and check the Linears' inputs."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from sqft_export.errors import UserError

# Per Linear, for a method that needs no Hessian. An expert with fewer tokens is not calibrated.
MIN_TOKENS = 128
CALIBRATION_ADVICE = (
    "look at calibration.source and calibration.samples, or use methods that need no data "
    "(magnitude, rtn)"
)


@contextlib.contextmanager
def count_tokens(linears: dict[str, nn.Linear]) -> Iterator[dict[str, int]]:
    """Count the tokens that pass through each Linear while the context is open."""
    counts = dict.fromkeys(linears, 0)

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[name] += inputs[0].numel() // inputs[0].shape[-1]

        return count

    hooks = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def no_tokens_error(name: str) -> UserError:
    """Return the error for a Linear that saw no calibration token."""
    return UserError(f"{name}: saw no calibration token; {CALIBRATION_ADVICE}")


def check_sum(name: str, squares: Tensor) -> None:
    """Check that the calibration inputs of a Linear are usable.

    :param squares: float32 ``[in]``, the sum of squares of every input over all tokens, which is
        the diagonal of the Hessian.
    :raises UserError: naming the Linear, if its inputs are NaN, infinite or all zero.
    """
    if not bool(torch.isfinite(squares).all()):
        raise UserError(f"{name}: its calibration inputs are NaN or infinite; {CALIBRATION_ADVICE}")
    if not bool(squares.any()):
        raise UserError(f"{name}: its calibration inputs are all zero; {CALIBRATION_ADVICE}")


def check_finite(where: str, hidden: list[Tensor]) -> None:
    """Check that the hidden states of all samples are finite.

    :param where: name of the hidden states in the message.
    :param hidden: ``[1, length, width]`` per sample.
    :raises UserError: naming the first sample with NaN or infinite values.
    """
    if not hidden:
        return
    finite = torch.stack([torch.isfinite(one).all() for one in hidden]).tolist()
    if not all(finite):
        raise UserError(
            f"{where}: NaN or infinite on {finite.count(False)} of {len(finite)} calibration "
            f"samples, first on number {finite.index(False)}; {CALIBRATION_ADVICE}"
        )


def coverage_warnings(
    tokens: dict[str, int], shapes: dict[str, tuple[int, int]], has_hessian: bool
) -> list[str]:
    """Return at most one warning about all Linears that saw too few tokens.

    :param tokens: Linear -> number of calibration tokens.
    :param shapes: Linear -> ``(out, in)``.
    :param has_hessian: a Hessian is factored, which needs at least one token per input.
    """
    calibrated = (n for n in tokens if ".experts." not in n or tokens[n] >= MIN_TOKENS)
    wanted = {name: shapes[name][1] if has_hessian else MIN_TOKENS for name in calibrated}
    few = [name for name in wanted if tokens[name] < wanted[name]]
    if not few:
        return []
    worst = min(few, key=lambda name: tokens[name] / wanted[name])
    reason = "one per input, so that its Hessian has full rank" if has_hessian else "the minimum"
    return [
        f"calibration: {len(few)} of {len(tokens)} Linears saw few tokens; {worst} saw "
        f"{tokens[worst]}, {wanted[worst]} are needed ({reason}); raise calibration.samples or "
        "calibration.sequence_length"
    ]


def expert_warnings(names: list[str], tokens: dict[str, int], remedy: str) -> list[str]:
    """Return at most one warning about experts that saw too few tokens to be calibrated.

    :param names: their Linears. tokens: Linear -> number of calibration tokens.
    :param remedy: what was done in place of the recipe's method.
    """
    if not names:
        return []
    experts = {name.rpartition(".")[0] for name in names}
    all_experts = {name.rpartition(".")[0] for name in tokens if ".experts." in name} | experts
    worst = min(names, key=lambda name: tokens.get(name, 0))
    return [
        f"calibration: {len(experts)} of {len(all_experts)} experts saw fewer than {MIN_TOKENS} "
        f"tokens and were {remedy}; {worst.rpartition('.')[0]} saw {tokens.get(worst, 0)}; raise "
        "calibration.samples or calibration.sequence_length"
    ]

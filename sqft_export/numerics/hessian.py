"""The second-order view that GPTQ and SparseGPT share."""

import math
import warnings

import torch
from scipy.linalg.lapack import spotrf, strtri
from torch import Tensor

_ROWS_AT_ONCE = 256


def _reverse(square: Tensor) -> None:
    """Reverse both axes in place, a few rows at a time."""
    size = len(square)
    for start in range(0, (size + 1) // 2, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, (size + 1) // 2)
        top, bottom = square[start:stop], square[size - stop : size - start]
        turned = bottom.flip(0, 1)
        bottom.copy_(top.flip(0, 1))
        top.copy_(turned)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper ``U`` with ``U^T U = (H + damping * mean(diag H) * I)^-1``, in the memory of ``H``.

    ``H`` is not inverted: with ``R R^T = H``, ``R`` upper (a Cholesky factor from the last column
    on), ``U = R^-1``. That is half the arithmetic of inverting and factoring again, and loses
    fewer digits. A Hessian that is not positive definite in float32 gets more damping, with a
    warning.

    :param hessian: ``X^T X`` over calibration tokens, float32 ``[in, in]``, overwritten. An input
        that was never active constrains nothing and gets a diagonal of its own.
    :return: ``hessian``.
    :raises ValueError: if it is not finite, or no damping that float32 holds makes it positive
        definite.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):  # |H_ij|^2 <= H_ii H_jj: the diagonal tells
        raise ValueError("its Hessian has NaN or infinite entries")
    diagonal.add_(diagonal == 0)
    step = float(damping * diagonal.mean())
    _reverse(hessian)
    original = diagonal.clone()
    solve = _solve_with_lapack if hessian.device.type == "cpu" else _solve_with_torch
    diagonal.add_(step)
    while not solve(hessian):
        step *= 10
        if not math.isfinite(float(diagonal.new_tensor(step))):
            raise ValueError("its Hessian is not positive definite at any damping")
        warnings.warn(f"Hessian not positive definite: damping raised to {step:.3g}", stacklevel=2)
        diagonal.copy_(original + step)
    _reverse(hessian)
    return hessian


def _solve_with_lapack(matrix: Tensor) -> bool:
    """Put the inverse of the lower Cholesky factor in the place of a matrix.

    :return: False, and all but the diagonal as it was, if it is not positive definite.
    """
    array = matrix.numpy().T  # as LAPACK sees it, column by column
    # Only one triangle is written, the other one still has H.
    _, failed = spotrf(array, lower=0, clean=0, overwrite_a=1)
    if failed:
        matrix.triu_(1)
        matrix += matrix.T.clone()
        return False
    matrix.tril_()
    strtri(array, lower=0, overwrite_c=1)
    return True


def _solve_with_torch(matrix: Tensor) -> bool:
    """The same on any device, in the memory of two more matrices."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return False
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    matrix.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))
    return True

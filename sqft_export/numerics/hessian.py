"""The inverse Hessian that GPTQ and SparseGPT share."""

import math
import warnings

import torch
from scipy.linalg.lapack import spotrf, strtri
from torch import Tensor

_ROWS_AT_ONCE = 256


def _reverse(square: Tensor) -> None:
    """Reverse both axes in place, in chunks of rows."""
    size = len(square)
    for start in range(0, (size + 1) // 2, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, (size + 1) // 2)
        top, bottom = square[start:stop], square[size - stop : size - start]
        reversed_bottom = bottom.flip(0, 1)
        bottom.copy_(top.flip(0, 1))
        top.copy_(reversed_bottom)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return upper triangular ``U`` with ``U^T U = (H + damping * mean(diag H) * I)^-1``.

    The function does not invert ``H``. It computes the upper triangular ``R`` with ``R R^T = H``, a
    Cholesky factor that starts at the last column; then ``U = R^-1``. This needs half the
    arithmetic of inverting ``H`` and factoring the inverse, and loses fewer digits.

    If the Hessian is not positive definite in float32, the damping is raised, with a warning.

    :param hessian: ``X^T X`` over calibration tokens, float32 ``[in, in]``, overwritten. The
        diagonal entry of an input that is always zero is set to 1.
    :return: ``U``, in the memory of ``hessian``.
    :raises ValueError: if the Hessian is not finite, or no damping in the range of float32 makes it
        positive definite.
    """
    diagonal = hessian.diagonal()
    if not bool(
        torch.isfinite(diagonal).all()
    ):  # |H_ij|^2 <= H_ii H_jj: checking the diagonal suffices
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
    """Replace a matrix by the inverse of its lower Cholesky factor.

    :return: False if the matrix is not positive definite. Its elements outside the diagonal are
        then unchanged.
    """
    array = matrix.numpy().T  # LAPACK reads matrices column by column
    # LAPACK writes one triangle; the other still contains H.
    _, failed = spotrf(array, lower=0, clean=0, overwrite_a=1)
    if failed:
        matrix.triu_(1)
        matrix += matrix.T.clone()
        return False
    matrix.tril_()
    strtri(array, lower=0, overwrite_c=1)
    return True


def _solve_with_torch(matrix: Tensor) -> bool:
    """Do the same as :func:`_solve_with_lapack` on any device; needs two more matrices."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return False
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    matrix.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))
    return True

"""The second-order view that GPTQ and SparseGPT share."""

import warnings

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
    """
    diagonal = hessian.diagonal()
    diagonal.add_(diagonal == 0)
    step = float(damping * diagonal.mean())
    _reverse(hessian)
    original = diagonal.clone()
    array = hessian.numpy().T  # as LAPACK sees it, column by column
    while True:
        diagonal.copy_(original + step)
        # Only one triangle is written, the other one still has H.
        _, failed = spotrf(array, lower=0, clean=0, overwrite_a=1)
        if not failed:
            break
        step *= 10
        warnings.warn(f"Hessian not positive definite: damping raised to {step:.3g}", stacklevel=2)
        hessian.triu_(1)
        hessian += hessian.T.clone()
    hessian.tril_()
    strtri(array, lower=0, overwrite_c=1)
    _reverse(hessian)
    return hessian

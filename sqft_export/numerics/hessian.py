"""The second-order view that GPTQ and SparseGPT share."""

import torch
from torch import Tensor


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper ``U`` with ``U^T U = (H + damping * mean(diag H) * I)^-1``, float32 ``[in, in]``.

    :param hessian: ``X^T X`` over calibration tokens, ``[in, in]``. An input that was never
        active constrains nothing and gets a diagonal of its own.
    """
    hessian = hessian.double()
    hessian = hessian + torch.diag((hessian.diagonal() == 0).double())
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).float()

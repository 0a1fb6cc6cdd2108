"""Quantizers, one file a method; the file name is the word in the recipe.

Each offers ``compress(weight, mask, grid_options, hessian, damping) -> (weight, Grid)``: a float32
weight ``[out, in]`` whose codes on the grid are the result, pruned positions exactly zero, and
``NEEDS_INPUTS``, whether the Hessian of calibration inputs is wanted.
"""

import importlib
from types import ModuleType


def quantizer(method: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{method}")

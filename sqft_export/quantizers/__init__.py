"""Quantizers, one file a method; the file name is the word in the recipe.

Each offers

    NEEDS       what it is given of the calibration inputs (``calibration.Inputs``)
    compress    ``(weight, mask, bits, group_size, symmetric, inputs) -> (weight, Grid)``: a float32
                weight ``[out, in]`` whose codes on the grid are the result, pruned positions
                exactly zero
"""

import importlib
from types import ModuleType


def quantizer(method: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{method}")

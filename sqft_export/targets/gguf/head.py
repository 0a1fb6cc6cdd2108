"""Round a float output head to Q8_0, which llama.cpp multiplies faster than BF16.

The head of a tied model is its embedding too; then both are rounded.
"""

from typing import TYPE_CHECKING

import numpy as np

from sqft_export.packed.blocks import BLOCK
from sqft_export.targets.gguf.blocks import Q8_0

if TYPE_CHECKING:
    from gguf import GGUFReader

    from sqft_export.model.checkpoint import Checkpoint

HEAD_BYTES_PER_BLOCK = Q8_0.bytes
ROUNDED_KEY = "sqft_export_head.tensors"  # names of the rounded tensors, with commas


def float_head(checkpoint: "Checkpoint") -> str | None:
    """Return the name of the matrix that computes the logits.

    :return: None if it is quantized already, or if its inputs do not fill blocks.
    """
    from sqft_export.model.storage import quantized_names

    module = checkpoint.stored_name(checkpoint.family.head)
    shape = checkpoint.shapes.get(f"{module}.weight", (0, 1))
    is_float = module not in quantized_names(checkpoint)
    return f"{module}.weight" if is_float and shape[1] % BLOCK == 0 else None


def quantize_head(values: np.ndarray) -> np.ndarray:
    """Return the Q8_0 blocks of a float matrix, uint8 ``[rows, blocks * 34]``."""
    import gguf

    return gguf.quantize(values.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)


def dequantize_head(blocks: np.ndarray) -> np.ndarray:
    """Return the values of Q8_0 blocks, float32."""
    import gguf

    return gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)


def rounded_tensors(reader: "GGUFReader") -> frozenset[str]:
    """Return the names of the tensors of a file that are a rounded head."""
    field = reader.fields.get(ROUNDED_KEY)
    return frozenset() if field is None else frozenset(str(field.contents()).split(","))

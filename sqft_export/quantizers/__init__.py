"""Quantizers, one file a method; the file name is the word in the recipe.

Most compress a Linear at a time; what looks at a whole block has ``NEEDS = "block"``.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor

from sqft_export.model.blocks import Block
from sqft_export.numerics.affine import Grid
from sqft_export.recipe.schema import Quantize


class Quantizer(Protocol):
    """NEEDS: what it is given of the calibration inputs; see ``model.blocks.Inputs``."""

    NEEDS: str

    def compress(
        self,
        weight: Tensor,
        mask: Tensor,
        bits: int,
        group_size: int,
        symmetric: bool,
        inputs: Any,
        scale_bits: int = ...,
        /,
    ) -> tuple[Tensor, Grid]:
        """A float32 weight ``[out, in]`` whose codes on the grid are the result, pruned positions
        exactly zero.

        :param mask: bool ``[out, in]``, True = kept.
        :param scale_bits: significant bits of the scales.
        """


class BlockQuantizer(Protocol):
    NEEDS: str

    def compress_block(
        self, block: Block, mask_of: Callable[[str], Tensor], config: Quantize, /
    ) -> Iterator[tuple[str, Tensor, Grid]]:
        """The same by name for every Linear of a block."""


def quantizer(method: str) -> Quantizer | BlockQuantizer:
    module: Any = importlib.import_module(f"{__name__}.{method}")
    return cast(BlockQuantizer, module) if module.NEEDS == "block" else cast(Quantizer, module)


if TYPE_CHECKING:  # mypy holds every module to its protocol
    from sqft_export.quantizers import gptq, nncf, rtn

    _QUANTIZERS: tuple[Quantizer, ...] = (gptq, rtn)
    _BLOCK_QUANTIZERS: tuple[BlockQuantizer, ...] = (nncf,)

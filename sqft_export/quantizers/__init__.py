"""Quantizers, one module per method; its name is the value of ``quantize.method``.

A :class:`Quantizer` compresses single Linears. A :class:`BlockQuantizer` compresses a complete
decoder block; its ``NEEDS`` is ``"block"``.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from sqft_export.model.blocks import Block
from sqft_export.numerics.affine import Grid
from sqft_export.recipe.schema import Quantize


class Quantizer(Protocol):
    """The interface of a quantizer of single Linears.

    NEEDS: the statistic of the calibration inputs that it needs; see ``model.blocks.Inputs``.
    """

    NEEDS: str

    def compress(
        self,
        weight: Tensor,
        mask: Tensor,
        bits: int,
        group_size: int,
        symmetric: bool,
        inputs: Tensor | None,
        scale_bits: int = ...,
        /,
    ) -> tuple[Tensor, Grid]:
        """Return a compensated weight and the grid whose codes of it are the result.

        :param weight: float32 ``[out, in]``.
        :param mask: bool ``[out, in]``, True = kept.
        :param inputs: the statistic that ``NEEDS`` names.
        :param scale_bits: significant bits of the scales.
        :return: float32 ``[out, in]`` with exact zeros at pruned positions; and its grid.
        """


class BlockQuantizer(Protocol):
    """The interface of a quantizer of complete decoder blocks."""

    NEEDS: str

    def compress_block(
        self, block: Block, mask_of: Callable[[str], Tensor], config: Quantize, /
    ) -> Iterator[tuple[str, Tensor, Grid]]:
        """Yield name, weight and grid of every Linear, like :meth:`Quantizer.compress`."""


def quantizer(method: str) -> Quantizer | BlockQuantizer:
    """Return the module of a method."""
    module = importlib.import_module(f"{__name__}.{method}")
    return cast(BlockQuantizer, module) if module.NEEDS == "block" else cast(Quantizer, module)


if TYPE_CHECKING:  # mypy checks every module against its protocol
    from sqft_export.quantizers import gptq, nncf, rtn

    _QUANTIZERS: tuple[Quantizer, ...] = (gptq, rtn)
    _BLOCK_QUANTIZERS: tuple[BlockQuantizer, ...] = (nncf,)

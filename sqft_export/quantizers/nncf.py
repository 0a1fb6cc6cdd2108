"""NNCF's weight compression as the source of codes and grid, a decoder block at a time.

The block is traced to OpenVINO and given to ``nncf.compress_weights`` with its own calibration
inputs: AWQ, scale estimation, NNCF's GPTQ, and INT4/INT8 by sensitivity within the block. What
NNCF stored is taken over as it is, scales and zero points included, except that every pruned
weight goes (back) to its zero code: NNCF's GPTQ moves 1 to 3 % of them. A group that is pruned
whole has a scale of zero there, and the smallest one here. Its symmetric scales may be
negative, so that the largest weight of a group gets the longer side of the range.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sqft_export.errors import UserError
from sqft_export.model.blocks import Block
from sqft_export.numerics.affine import Grid, dequantize, quantize, settled
from sqft_export.recipe.schema import Quantize

NEEDS = "block"


class _Positional(nn.Module):
    """A block called with the tensors of its arguments alone, as tracing wants it."""

    def __init__(self, block: Block):
        super().__init__()
        self.block = block.module
        self.leaves, self.tree = tree_flatten(block.calls[0])

    def forward(self, *tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(x, Tensor) else x for x in self.leaves]
        hidden, kwargs = tree_unflatten(leaves, self.tree)
        output = self.block(hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def compress_block(
    block: Block, mask_of: Callable[[str], Tensor], config: Quantize
) -> Iterator[tuple[str, Tensor, Grid]]:
    """Name, weight float32 ``[out, in]`` on its grid points, and grid of every Linear.

    :param mask_of: Linear -> bool ``[out, in]``, True = kept.
    :raises UserError: if AWQ had to put a multiplication into the graph, which codes and grids
        alone can't carry, or a scale is no number.
    """
    import openvino as ov

    from sqft_export.targets.openvino import codes_and_grids

    feeds = [[t for t in tree_flatten(call)[0] if isinstance(t, Tensor)] for call in block.calls]
    graph = ov.convert_model(_Positional(block), example_input=tuple(feeds[0]))
    graph = _compress(graph, [[tensor.numpy() for tensor in feed] for feed in feeds], config)
    if added := [n for n in graph.get_ops() if n.get_friendly_name().endswith("/awq_mul")]:
        raise UserError(
            f"quantize.nncf.awq: block {block.index} needs {len(added)} multiplications beside "
            "its weights, which no codes can carry; set it to false"
        )
    found = {name: (quantized, bits) for name, quantized, bits in codes_and_grids(graph)}
    prefix = next(iter(block.linears)).split(f".{block.index}.")[0] + f".{block.index}"
    for name, linear in block.linears.items():
        path = name.removeprefix(f"{prefix}.")
        quantized, bits = found[f"self.block.{path}"]
        codes, scale, zero_point = map(torch.from_numpy, quantized)
        grid = Grid(scale.half(), zero_point, bits, linear.in_features // scale.shape[1])
        try:
            codes, grid = settled(codes, grid)
        except ValueError as error:
            raise UserError(f"quantize.method: nncf: {name}: {error}") from error
        weight = _with_fractions(linear.weight, codes, grid)
        yield name, weight.masked_fill_(~mask_of(name), 0), grid


def _with_fractions(weight: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """The weight itself where its code is NNCF's, so that tuning starts where the weight is and not
    in the middle of a step; the grid point where NNCF moved it (GPTQ, AWQ)."""
    same = quantize(weight, grid) == codes
    return torch.where(same, weight, dequantize(codes, grid))


def _compress(graph: Any, feeds: list[Any], config: Quantize) -> Any:
    import nncf
    from nncf import AdvancedCompressionParameters, CompressWeightsMode, SensitivityMetric
    from nncf.quantization.advanced_parameters import GroupSizeFallbackMode

    mode = {
        (4, True): CompressWeightsMode.INT4_SYM,
        (4, False): CompressWeightsMode.INT4_ASYM,
        (8, True): CompressWeightsMode.INT8_SYM,
        (8, False): CompressWeightsMode.INT8_ASYM,
    }[config.bits, config.symmetric]
    if config.bits == 8:
        return nncf.compress_weights(graph, mode=mode)
    options = config.nncf
    return nncf.compress_weights(
        graph,
        mode=mode,
        group_size=config.group_size or -1,
        ratio=options.int4_ratio,
        all_layers=True,  # the last product of a block is as good as any other
        sensitivity_metric=SensitivityMetric(options.sensitivity),
        awq=options.awq,
        scale_estimation=options.scale_estimation,
        gptq=options.gptq,
        dataset=nncf.Dataset(feeds),
        subset_size=len(feeds),
        backup_mode=nncf.BackupMode.INT8_SYM if config.symmetric else nncf.BackupMode.INT8_ASYM,
        advanced_parameters=AdvancedCompressionParameters(
            group_size_fallback_mode=GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=16
        ),
    )

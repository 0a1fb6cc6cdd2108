"""Quantize decoder blocks with NNCF's weight compression.

Each block is traced to OpenVINO. ``nncf.compress_weights`` compresses it with the block's own
calibration inputs. It offers AWQ, scale estimation, NNCF's GPTQ, and a choice of INT4 or INT8 by
sensitivity within the block.

Codes, scales and zero points are those of NNCF, with two exceptions. Every pruned weight gets its
zero code again: NNCF's GPTQ changes 1 to 3 % of them. A group in which all weights are pruned gets
the smallest scale, where NNCF stores a scale of zero. NNCF's symmetric scales can be negative: the
largest weight of a group then gets the longer side of the range.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sqft_export.errors import UserError
from sqft_export.model.blocks import Block
from sqft_export.numerics.affine import dequantize, quantize, replace_zero_scales
from sqft_export.numerics.codes import Grid, QuantizedWeight
from sqft_export.recipe.schema import Quantize

if TYPE_CHECKING:
    import numpy as np
    import openvino as ov

NEEDS = "block"


class _Positional(nn.Module):
    """A block whose arguments are only tensors, which tracing requires."""

    def __init__(self, block: Block):
        super().__init__()
        self.block, self.call = block.module, block.calls[0]

    def forward(self, *tensors: Tensor) -> Tensor:
        rest = iter(tensors)
        hidden, kwargs = (_replace_tensors(part, rest) for part in self.call)
        output = self.block(hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for part in value.values() for tensor in _tensors_in(part))
    elif isinstance(value, tuple | list):
        yield from (tensor for part in value for tensor in _tensors_in(part))


def _replace_tensors(value, tensors: Iterator[Tensor]):
    """Return ``value`` with the next tensors in place of those that :func:`_tensors_in` yields."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _replace_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([_replace_tensors(part, tensors) for part in value])
    return value


def compress_block(
    block: Block, mask_of: Callable[[str], Tensor], config: Quantize
) -> Iterator[tuple[str, Tensor, Grid]]:
    """Yield name, weight (float32 ``[out, in]``) and grid of every Linear.

    :param mask_of: Linear -> mask, bool ``[out, in]``, True = kept.
    :raises UserError: if AWQ added a multiplication to the graph, which codes and grids cannot
        represent; or if a scale is NaN or infinite.
    """
    import openvino as ov

    from sqft_export.targets.openvino import read_weights

    feeds = [list(_tensors_in(call)) for call in block.calls]
    graph = ov.convert_model(_Positional(block), example_input=tuple(feeds[0]))
    graph = _compress(graph, [[tensor.numpy() for tensor in feed] for feed in feeds], config)
    if added := [n for n in graph.get_ops() if n.get_friendly_name().endswith("/awq_mul")]:
        raise UserError(
            f"quantize.nncf.awq: AWQ adds {len(added)} multiplications to block {block.index}, "
            "which codes and scales cannot represent; set it to false"
        )
    found = dict(read_weights(graph))
    prefix = next(iter(block.linears)).split(f".{block.index}.")[0] + f".{block.index}"
    for name, linear in block.linears.items():
        path = name.removeprefix(f"{prefix}.")
        quantized = found[f"self.block.{path}"]
        arrays = quantized.codes, quantized.scale, quantized.zero_point
        codes, scale, zero_point = map(torch.from_numpy, arrays)
        grid = Grid(scale.half(), zero_point, quantized.bits, quantized.grid.group_size)
        try:
            codes, grid = replace_zero_scales(QuantizedWeight(codes, grid))
        except ValueError as error:
            raise UserError(f"quantize.method: nncf: {name}: {error}") from error
        weight = _keep_fractions(linear.weight, codes, grid)
        yield name, weight.masked_fill_(~mask_of(name), 0), grid


def _keep_fractions(weight: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """Return the original weight where it has NNCF's code, and the grid point elsewhere.

    Training then starts from the original floats. NNCF's GPTQ and AWQ change codes; such a weight
    has no original float with that code.
    """
    same = quantize(weight, grid) == codes
    return torch.where(same, weight, dequantize(codes, grid))


def _compress(graph: "ov.Model", feeds: "list[list[np.ndarray]]", config: Quantize) -> "ov.Model":
    """Run ``nncf.compress_weights`` with the options of the recipe; return the graph."""
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
        all_layers=True,  # the last Linear of a block is not the head of the model
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

"""sparsify: prune the decoder Linears; write the checkpoint and the pruning masks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sqft_export.data.calibration import calibration_fields, calibration_tensors
from sqft_export.data.items import TASK_FILES
from sqft_export.machine.device import device_name, device_of
from sqft_export.metrics import SparsifyMetrics
from sqft_export.model.activations import CalibrationStatistics
from sqft_export.model.blocks import Block, Inputs, count_parts, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.companions import copy_companions, float_config
from sqft_export.model.coverage import expert_warnings
from sqft_export.model.storage import (
    MAX_BUFFER_BYTES,
    finite_dtype,
    mask_writer,
    plain_names,
    quantized_names,
    read_quantized,
)
from sqft_export.numerics.affine import dequantize
from sqft_export.numerics.masks import mask_to_bits
from sqft_export.recipe.schema import Recipe, Sparsify
from sqft_export.recipe.sections import CalibrationSections, DeviceSection, SparsifySection
from sqft_export.recipe.view import section_fields
from sqft_export.sparsifiers import Pruning, Sparsifier, override_for, pruning_of, sparsifier
from sqft_export.sparsifiers.allocation import Curve, allocate, error_curve
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = ()
READS: tuple[str, ...] = ("model", "calibration", "device")
SETTINGS = section_fields("sparsify", Sparsify, without=("reconstruct",))
FREE: tuple[str, ...] = ("device", *TASK_FILES)
VERSION = 5
RESUMES = False
DISTRIBUTED = False


class Sections(CalibrationSections, SparsifySection, DeviceSection, Protocol):
    """The recipe sections that this pass reads."""


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the settings, and the calibration fields if the method calibrates."""
    return (*SETTINGS, *(calibration_fields(recipe) if recipe.sparsify.calibrates else ()))


class _Masks:
    """Context manager that writes masks one by one and counts the weights that each drops."""

    def __init__(self, folder: Path) -> None:
        self._writer = mask_writer(folder)
        self.dropped: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    def add(self, name: str, mask: Tensor) -> None:
        """Write the mask of one Linear: bool ``[out, in]``, True = kept."""
        self._writer.add(name, mask_to_bits(mask).cpu())
        self.dropped[name] = int((~mask).sum())
        self.sizes[name] = mask.numel()

    def sparsity(self) -> dict[str, float]:
        """Return the share of pruned weights per Linear, and over all Linears (``all``)."""
        shares = {name: self.dropped[name] / self.sizes[name] for name in self.sizes}
        return shares | {"all": sum(self.dropped.values()) / sum(self.sizes.values())}

    def __enter__(self) -> "_Masks":
        return self

    def __exit__(self, *failure: object) -> None:
        self._writer.__exit__(*failure)


def run(context: Context[Sections]) -> SparsifyMetrics:
    """Write ``model/`` and ``masks.safetensors``."""
    config, checkpoint = context.recipe.sparsify, Checkpoint(context.model)
    if checkpoint.quantized_linears:
        return _mask_existing_zeros(context, checkpoint)
    method, device = sparsifier(config.method), device_of(context.recipe.device)
    samples, seen, uncalibrated = None, CalibrationStatistics(), list[str]()
    if config.calibrates:
        samples = calibration_tensors(context.recipe, context.model)
    prunings = _prunings(context, checkpoint, samples, device, seen)
    inputs = Inputs(method.NEEDS)
    if inputs.collector is None:
        samples = None  # only the allocation needed them
    advance = context.start(count_parts(checkpoint))
    copy_companions(context.model, context.folder / "model", checkpoint.config)
    model_writer = checkpoint.writer(context.folder / "model", MAX_BUFFER_BYTES)
    with model_writer as writer, _Masks(context.folder) as masks:
        for block in walk(checkpoint, samples, inputs.collector, device, seen=seen):
            if starved := inputs.has_too_few(block):
                uncalibrated += block.linears
            used = sparsifier("magnitude") if starved else method
            found = None if starved else inputs
            for name, tensor in _prune_block(checkpoint, block, used, prunings, found, masks):
                writer.add(name, tensor)
            advance()
        for name, tensor in checkpoint.tensors(checkpoint.outer_names()):
            writer.add(name, tensor)
    return SparsifyMetrics(
        sparsity=masks.sparsity(),
        device=device_name(device),
        **seen.metrics(),
        uncalibrated_experts=uncalibrated,
        warnings=[
            *seen.warnings(checkpoint.linears, inputs.has_hessian),
            *expert_warnings(uncalibrated, seen.tokens, "pruned by magnitude"),
        ],
    )


def _prune_block(
    checkpoint: Checkpoint,
    block: Block,
    method: Sparsifier,
    prunings: dict[str, Pruning | None],
    inputs: Inputs | None,
    masks: _Masks,
) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a block with its pruned Linears first; write their masks.

    :param inputs: statistics of the Linears' inputs; None if the method needs none.
    """
    rest = set(block.names)
    for name, linear in block.linears.items():
        statistic = inputs.take(name) if inputs else None
        weight, mask = _compress(method, linear.weight, prunings[name], statistic)
        masks.add(name, mask)
        linear.weight.copy_(weight)
        key = f"{name}.weight"
        yield key, weight.to(checkpoint.dtype(key)).cpu()
        rest.remove(key)
    yield from checkpoint.tensors(sorted(rest))


def _prunings(
    context: Context[Sections],
    checkpoint: Checkpoint,
    samples: list[Tensor] | None,
    device: torch.device,
    seen: CalibrationStatistics,
) -> dict[str, Pruning | None]:
    """Return the pruning of every Linear; None leaves the Linear dense.

    It follows the recipe. An allocation distributes the overall sparsity by the output error that
    it costs in each Linear.

    :param seen: receives the statistics, if the allocation measures them.
    """
    config = context.recipe.sparsify
    prunings = {name: pruning_of(config, name) for name in checkpoint.linears}
    if not config.allocated:
        return prunings
    assert config.sparsity is not None and samples is not None
    free = [name for name in prunings if override_for(config, name) is None]
    inputs, curves = Inputs("norms"), dict[str, Curve]()
    advance = context.start(count_parts(checkpoint))
    for block in walk(checkpoint, samples, inputs.collector, device, seen=seen):
        for name, linear in block.linears.items():
            few = inputs.has_too_few(block)
            norms = torch.ones_like(linear.weight[0]) if few else inputs.take(name)
            if name in free:
                curves[name] = error_curve(linear.weight, norms, config.sparsity)
        advance()
    shares = allocate(curves, config.sparsity)
    return prunings | {name: Pruning(share, None, config.at_most) for name, share in shares.items()}


def _mask_existing_zeros(context: Context[Sections], checkpoint: Checkpoint) -> SparsifyMetrics:
    """Write a quantized checkpoint as floats, and the mask of weights that are not zero.

    A weight is zero if its code is the zero point. One tensor is in memory at a time. Tensors that
    the checkpoint stores as floats keep their dtype.
    """
    names, dtype = quantized_names(checkpoint), checkpoint.float_dtype
    linears, keys = set(checkpoint.quantized_linears), {f"{name}.weight" for name in names}
    advance = context.start(len(names))
    model = context.folder / "model"
    config = float_config(checkpoint.config, str(dtype).removeprefix("torch."))
    copy_companions(checkpoint.folder, model, config)
    model_writer = checkpoint.writer(model, MAX_BUFFER_BYTES)
    with model_writer as writer, _Masks(context.folder) as masks:
        for key, tensor in checkpoint.tensors(n for n in plain_names(checkpoint) if n not in keys):
            writer.add(key, tensor)
        for name in names:
            weight = dequantize(*read_quantized(checkpoint, name))
            if name in linears:
                masks.add(name, weight != 0)
            writer.add(f"{name}.weight", weight.to(finite_dtype(weight, dtype)))
            advance()
    return SparsifyMetrics(sparsity=masks.sparsity())


def _compress(
    method: Sparsifier, weight: Tensor, pruning: Pruning | None, inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the pruned weight and the mask of one Linear; without a pruning it stays dense."""
    if pruning is None:
        return weight, torch.ones_like(weight, dtype=torch.bool)
    return method.compress(weight, pruning, inputs)

"""reconstruct: train the kept weights of each block to reproduce the dense block's output."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from sqft_export.data.calibration import calibration_fields, calibration_tensors
from sqft_export.data.items import TASK_FILES
from sqft_export.machine.device import device_name, device_of
from sqft_export.machine.progress import start_at
from sqft_export.metrics import ReconstructMetrics
from sqft_export.model.activations import CalibrationStatistics
from sqft_export.model.block_state import BlockStates
from sqft_export.model.blocks import Block, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.companions import copy_companions
from sqft_export.model.reconstruction import Reconstructed, reconstruct
from sqft_export.model.storage import MAX_BUFFER_BYTES, load_weight_mask
from sqft_export.recipe.schema import Recipe
from sqft_export.recipe.sections import CalibrationSections, DeviceSection, SparsifySection
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = ("sparsify",)
READS: tuple[str, ...] = ("model", "calibration", "device")
FREE: tuple[str, ...] = ("device", *TASK_FILES)
VERSION = 3
RESUMES = True  # at the first block that is not finished
DISTRIBUTED = False


class Sections(CalibrationSections, SparsifySection, DeviceSection, Protocol):
    """The recipe sections that this pass reads."""


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the fields of the reconstruction and the calibration data."""
    return ("sparsify.reconstruct", "seed", *calibration_fields(recipe))


@dataclass
class _Results:
    """Relative errors of the finished blocks, before and after training; their statistics."""

    errors: list[tuple[float, float]] = field(default_factory=list)
    seen: CalibrationStatistics = field(default_factory=CalibrationStatistics)


def run(context: Context[Sections]) -> ReconstructMetrics:
    """Write ``model/``; the pruned positions are those of sparsify."""
    sparsified, device = context.inputs["sparsify"].path, device_of(context.recipe.device)
    dense, sparse = Checkpoint(context.model), Checkpoint(sparsified / "model")
    samples = calibration_tensors(context.recipe, context.model)
    model = context.folder / "model"
    with sparse.writer(model, MAX_BUFFER_BYTES) as writer:
        states = BlockStates(context.folder, {"model": writer}, _Results, ("dense", "sparse"))
        results, places = states.results, (states.position("dense"), states.position("sparse"))
        copy_companions(sparse.folder, model, sparse.config)
        advance = start_at(context.start, sparse.blocks, states.finished)
        targets = walk(dense, samples, None, device, position=places[0])
        blocks = walk(sparse, samples, None, device, results.seen, places[1])
        for target, block in zip(targets, blocks, strict=True):
            trained = _reconstruct(context, target, block)
            writer.add_all(_stored_tensors(sparse, block, trained))
            results.errors.append(trained.errors)
            advance()
        writer.add_all(sparse.tensors(sparse.outer_names()))
    return ReconstructMetrics(
        block_errors=results.errors,
        device=device_name(device),
        calibration_tokens=results.seen.tokens,
        warnings=results.seen.warnings(sparse.linears, has_hessian=False),
    )


def _reconstruct(context: Context[Sections], target: Block, block: Block) -> Reconstructed:
    """Train a pruned block to reproduce the output of the dense block ``target``."""
    config, sparsified = context.recipe.sparsify.reconstruct, context.inputs["sparsify"].path
    assert config is not None
    masks = {
        name: load_weight_mask(sparsified, name, li.weight) for name, li in block.linears.items()
    }
    return reconstruct(target, block, masks, config, context.recipe.seed + block.index)


def _stored_tensors(
    sparse: Checkpoint, block: Block, trained: Reconstructed
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a trained block; its Linears get the weights as they are stored."""
    for name in sorted(trained.weights):
        key = f"{name}.weight"
        weight = trained.weights[name].to("cpu", sparse.dtype(key))
        block.linears[name].weight.copy_(weight)  # later blocks get the output of stored weights
        yield key, weight
    stored = {f"{name}.weight" for name in trained.weights}
    rest = [name for name in sparse.block_names(block.index) if name not in stored]
    yield from sparse.tensors(rest)

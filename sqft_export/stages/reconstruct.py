"""reconstruct: train the kept weights of each pruned block to reproduce the dense block's output.

Finished blocks are kept in ``blocks/``, from which an interrupted run resumes.
"""

import shutil
from pathlib import Path
from typing import Protocol

from sqft_export.data.calibration import calibration_fields, calibration_tensors
from sqft_export.data.items import TASK_FILES
from sqft_export.machine.device import device_name, device_of
from sqft_export.metrics import ReconstructMetrics
from sqft_export.model.activations import CalibrationStatistics
from sqft_export.model.blocks import Block, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.companions import copy_companions
from sqft_export.model.reconstruction import Reconstructed, reconstruct
from sqft_export.model.storage import MAX_BUFFER_BYTES, load_weight_mask
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.recipe.schema import Recipe
from sqft_export.recipe.sections import CalibrationSections, DeviceSection, SparsifySection
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = ("sparsify",)
READS: tuple[str, ...] = ("model", "calibration", "device")
FREE: tuple[str, ...] = ("device", *TASK_FILES)
VERSION = 3
RESUMES = True
DISTRIBUTED = False
BLOCKS = "blocks"


class Sections(CalibrationSections, SparsifySection, DeviceSection, Protocol):
    """The recipe sections that this pass reads."""


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the fields of the reconstruction and the calibration data."""
    return ("sparsify.reconstruct", "seed", *calibration_fields(recipe))


def run(context: Context[Sections]) -> ReconstructMetrics:
    """Write ``model/``; the pruned positions are those of sparsify."""
    sparsified, device = context.inputs["sparsify"].path, device_of(context.recipe.device)
    dense, sparse = Checkpoint(context.model), Checkpoint(sparsified / "model")
    samples = calibration_tensors(context.recipe, context.model)
    finished = context.folder / BLOCKS
    finished.mkdir(exist_ok=True)
    advance = context.start(sparse.blocks)
    errors, seen = [], CalibrationStatistics()
    compressed = walk(sparse, samples, None, device, seen=seen)
    for target, block in zip(walk(dense, samples, None, device), compressed, strict=True):
        file = finished / f"{block.index}.safetensors"
        if not file.is_file():
            dtypes = {name: sparse.dtype(f"{name}.weight") for name in block.linears}
            _reconstruct(context, target, block).save(file, dtypes)
        trained = Reconstructed.load(file)
        for name, linear in block.linears.items():  # later blocks get the output of stored weights
            linear.weight.copy_(trained.weights[name])
        errors.append(trained.errors)
        advance()
    _assemble(sparse, finished, context.folder / "model")
    shutil.rmtree(finished)
    return ReconstructMetrics(
        block_errors=errors,
        device=device_name(device),
        calibration_tokens=seen.tokens,
        warnings=seen.warnings(sparse.linears, has_hessian=False),
    )


def _reconstruct(context: Context[Sections], target: Block, block: Block) -> Reconstructed:
    """Train a pruned block to reproduce the output of the dense block ``target``."""
    config, sparsified = context.recipe.sparsify.reconstruct, context.inputs["sparsify"].path
    assert config is not None
    masks = {
        name: load_weight_mask(sparsified, name, li.weight) for name, li in block.linears.items()
    }
    return reconstruct(target, block, masks, config, context.recipe.seed + block.index)


def _assemble(sparse: Checkpoint, finished: Path, folder: Path) -> None:
    """Write the complete checkpoint, block by block, from the files of the trained blocks."""
    copy_companions(sparse.folder, folder, sparse.config)
    with sparse.writer(folder, MAX_BUFFER_BYTES) as writer:
        for block in range(sparse.blocks):
            trained = TensorFiles(finished, str(block))
            rest = [name for name in sparse.block_names(block) if name not in trained.headers]
            for name, tensor in (*trained.tensors(sorted(trained.headers)), *sparse.tensors(rest)):
                writer.add(name, tensor)
        for name, tensor in sparse.tensors(sparse.outer_names()):
            writer.add(name, tensor)

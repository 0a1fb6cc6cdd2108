"""reconstruct: the pruned checkpoint, its kept weights trained to give the dense blocks' output.

A finished block is kept in ``blocks/``, from where an interrupted run goes on.
"""

import shutil
from pathlib import Path

from sqft_export.data.calibration import calibration_fields, calibration_tensors
from sqft_export.data.items import TRAIN_FILES
from sqft_export.model.blocks import Block, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.companions import copy_companions, write_config
from sqft_export.model.coverage import coverage_warnings
from sqft_export.model.reconstruction import Reconstructed, reconstruct
from sqft_export.model.storage import HELD_BYTES, mask_for
from sqft_export.model.tensorfiles import TensorFiles, TensorWriter
from sqft_export.recipe.schema import Recipe
from sqft_export.run.device import device_name, device_of
from sqft_export.stages import Context

CONSUMES: tuple[str, ...] = ("sparsify",)
READS: tuple[str, ...] = ("model", "calibration", "device")
FREE: tuple[str, ...] = ("device", *TRAIN_FILES)
VERSION = 3
RESUMES = True
DISTRIBUTED = False
BLOCKS = "blocks"


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    return ("sparsify.reconstruct", "seed", *calibration_fields(recipe))


def run(context: Context) -> dict:
    """Writes ``model/``; pruned positions are those of sparsify."""
    sparsified, device = context.inputs["sparsify"].path, device_of(context.recipe.device)
    dense, sparse = Checkpoint(context.model), Checkpoint(sparsified / "model")
    samples = calibration_tensors(context.recipe, context.model)
    done = context.folder / BLOCKS
    done.mkdir(exist_ok=True)
    advance = context.start(sparse.blocks)
    errors, tokens = [], dict[str, int]()
    compressed = walk(sparse, samples, None, device, tokens=tokens)
    for theirs, ours in zip(walk(dense, samples, None, device), compressed, strict=True):
        file = done / f"{ours.index}.safetensors"
        if not file.is_file():
            dtypes = {name: sparse.dtype(f"{name}.weight") for name in ours.linears}
            _reconstructed(context, theirs, ours).save(file, dtypes)
        made = Reconstructed.load(file)
        for name, linear in ours.linears.items():  # as stored: what the blocks after it shall see
            linear.weight.copy_(made.weights[name])
        errors.append(made.errors)
        advance()
    _assemble(sparse, done, context.folder / "model")
    shutil.rmtree(done)
    return {
        "block_errors": errors,
        "device": device_name(device),
        "calibration_tokens": tokens,
        "warnings": coverage_warnings(tokens, sparse.linears, has_hessian=False),
    }


def _reconstructed(context: Context, theirs: Block, ours: Block) -> Reconstructed:
    config, sparsified = context.recipe.sparsify.reconstruct, context.inputs["sparsify"].path
    assert config is not None
    masks = {name: mask_for(sparsified, name, li.weight) for name, li in ours.linears.items()}
    return reconstruct(theirs, ours, masks, config, context.recipe.seed + ours.index)


def _assemble(sparse: Checkpoint, done: Path, folder: Path) -> None:
    """The whole checkpoint, in the order of its blocks."""
    copy_companions(sparse.folder, folder)
    write_config(folder, sparse.config)
    with TensorWriter(folder, shard_bytes=HELD_BYTES) as writer:
        for block in range(sparse.blocks):
            trained = TensorFiles(done, str(block))
            rest = [name for name in sparse.block_names(block) if name not in trained.headers]
            for name, tensor in (*trained.tensors(sorted(trained.headers)), *sparse.tensors(rest)):
                writer.add(name, tensor)
        for name, tensor in sparse.tensors(sparse.outer_names()):
            writer.add(name, tensor)

"""peers-<kind>: quantize the dense model with merged LoRA, as its users do without this package.

peers-grid   our GPTQ on the grid of the recipe; a deployment of each runtime
peers-gguf   files of llama.cpp's quantizer with an importance matrix
peers-nncf   an OpenVINO folder of NNCF's weight compression

The benchmark measures them next to the recipe's own deployments.
"""

import shutil
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sqft_export.adapters.files import Base
from sqft_export.adapters.loading import Layers
from sqft_export.adapters.merging import write_merged
from sqft_export.data.calibration import (
    calibration_fields,
    calibration_samples,
    calibration_tensors,
)
from sqft_export.data.items import CARD_FIELDS, TASK_FILES, TRAIN_FIELDS, load_tokenizer
from sqft_export.machine.device import device_of
from sqft_export.machine.host import allowed_processors
from sqft_export.measure.head import choose_head
from sqft_export.measure.peers import peers_in
from sqft_export.metrics import PeersMetrics
from sqft_export.model.blocks import Inputs, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.companions import copy_companions, float_config
from sqft_export.model.storage import MAX_BUFFER_BYTES, GridWriter, outer_grid
from sqft_export.numerics.affine import Grid, fake_quantize
from sqft_export.numerics.groups import fallback_group_size
from sqft_export.packed.seal import write_seal
from sqft_export.packed.usage import usage_section
from sqft_export.quantizers import gptq
from sqft_export.recipe.peers import PEERS
from sqft_export.recipe.schema import Export, Recipe
from sqft_export.recipe.sections import (
    CalibrationSections,
    DeviceSection,
    ExportSection,
    OriginSections,
    PeersSection,
    QuantizeSection,
)
from sqft_export.report.prompts import example_prompt, prompt_section
from sqft_export.report.provenance import SEALED_BY, origin_of
from sqft_export.stages import Context
from sqft_export.targets import target
from sqft_export.targets.gguf.importance import importance_matrix
from sqft_export.targets.gguf.quantizer import quantize_gguf

CONSUMES: tuple[str, ...] = ("teacher",)
READS: tuple[str, ...] = ("model", "train", "calibration", "device")
ABOUT = "{base} with LoRA, trained and merged in floats and quantized afterwards, without pruning."
_CARD_AND_ORIGIN = ("name", "base_name", "model.revision", "task.kind", *TRAIN_FIELDS, *CARD_FIELDS)
FIELDS_OF_KIND: dict[str, tuple[str, ...]] = {
    "peers-grid": (
        *(f"quantize.{n}" for n in ("bits", "group_size", "symmetric", "damping")),
        *("quantize.embedding_bits", "scale_bits", "grid_targets"),
    ),
    "peers-gguf": ("peers",),
    "peers-nncf": ("quantize.group_size",),
}
FREE: tuple[str, ...] = ("device", *TASK_FILES)
VERSION = 2
RESUMES = False
DISTRIBUTED = False
# Calibration texts, and tokens of each, on which a rounded head is measured.
HEAD_TEXTS, HEAD_TOKENS = 6, 64


class Sections(
    OriginSections,
    CalibrationSections,
    QuantizeSection,
    ExportSection,
    DeviceSection,
    PeersSection,
    Protocol,
):
    """The sections that these passes read."""


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the calibration fields, those of the card, and those of this kind."""
    in_onnx = name == "peers-grid" and "onnx" in recipe.grid_targets
    in_gguf = name == "peers-grid" and "gguf" in recipe.grid_targets
    options = ("export.onnx_graph",) * in_onnx + ("export.gguf_head",) * in_gguf
    return (*calibration_fields(recipe), *_CARD_AND_ORIGIN, *FIELDS_OF_KIND[name], *options)


def run(context: Context[Sections]) -> PeersMetrics:
    """Write a sealed folder per deployment, named after its row."""
    write = {"peers-grid": _write_grid, "peers-gguf": _write_gguf, "peers-nncf": _write_nncf}
    notes = write[context.name](context)
    origin = origin_of(context.recipe, context.model, context.lineage)
    tokenizer = load_tokenizer(context.model)
    prompt = example_prompt(context.recipe, tokenizer)
    for found in peers_in(context.folder):
        lines = [f"# {found.name}", "", ABOUT.format(base=origin.base.model), ""]
        lines += [f"- {note}" for note in notes.get(found.id, [])]
        lines += ["", usage_section(found.folder, prompt), "## Origin", "", SEALED_BY, ""]
        card = "\n".join(lines) + prompt_section(context.recipe, tokenizer)
        (found.folder / "README.md").write_text(card)
        write_seal(found.folder, origin.to_json())
    return PeersMetrics(notes=notes)


def _lora(context: Context[Sections]) -> Path:
    return context.inputs["teacher"].path / "dense-lora"


def _write_grid(context: Context[Sections]) -> dict[str, list[str]]:
    """Write ``merged/`` and a deployment of every runtime."""
    targets = context.recipe.grid_targets
    scratch, merged = context.folder / "quantized", context.folder / "merged"
    _quantize(context, scratch)
    write_merged(Layers(Base(scratch / "model", grids=scratch)), merged)
    shutil.rmtree(scratch)
    for name in targets:
        folder = context.folder / f"lora-then-int4-{name}"
        folder.mkdir()
        target(name).export(merged, folder, _options(context, name, merged))
    return {}


def _options(context: Context[Sections], runtime: str, merged: Path) -> Export:
    """Return the options of an export, as those of the recipe's own deployment."""
    if runtime == "onnx":
        return Export(onnx_graph=context.recipe.export.onnx_graph)
    if runtime == "gguf":
        texts = [one.flatten()[:HEAD_TOKENS].tolist() for one in _samples(context)[:HEAD_TEXTS]]
        return Export(gguf_head=choose_head(context.recipe.export.gguf_head, merged, texts)[0])
    return Export()


@torch.no_grad()
def _quantize(context: Context[Sections], folder: Path) -> None:
    """Write ``model/``, on the grid points that GPTQ chooses, and its grids.

    There is no mask: LoRA was trained without one.
    """
    config, checkpoint = context.recipe.quantize, Checkpoint(_lora(context))
    inputs, samples = Inputs(gptq.NEEDS, config.damping), _samples(context)
    advance = context.start(checkpoint.blocks)
    copy_companions(checkpoint.folder, folder / "model", float_config(checkpoint.config))
    weights_writer = checkpoint.writer(folder / "model", MAX_BUFFER_BYTES)
    with GridWriter(folder) as grids, weights_writer as weights:

        def add(name: str, weight: Tensor, grid: Grid) -> None:
            key = f"{name}.weight"
            grids.add(name, grid)
            # The code of a grid point survives the cast.
            weights.add(key, fake_quantize(weight, grid).to(checkpoint.dtype(key)))

        for block in walk(checkpoint, samples, inputs.collector, device_of(context.recipe.device)):
            rest = set(block.names)
            for name, linear in block.linears.items():
                size = fallback_group_size(linear.in_features, config.group_size)
                kept = torch.ones_like(linear.weight, dtype=torch.bool)
                grid_options = config.bits, size, config.symmetric
                factor, bits = inputs.take(name), context.recipe.scale_bits
                weight, grid = gptq.compress(linear.weight, kept, *grid_options, factor, bits)
                add(name, weight.cpu(), grid.cpu())
                linear.weight.copy_(fake_quantize(weight, grid))
                rest.remove(f"{name}.weight")
            weights.add_all(checkpoint.tensors(sorted(rest)))
            advance()
        for name, tensor in checkpoint.tensors(checkpoint.outer_names()):
            of_rows = outer_grid(checkpoint, name, tensor, config)
            if of_rows is not None:
                add(name.removesuffix(".weight"), tensor.float(), of_rows)
            else:
                weights.add(name, tensor)


def _samples(context: Context[Sections]) -> list[Tensor]:
    return calibration_tensors(context.recipe, context.model)


def _write_gguf(context: Context[Sections]) -> dict[str, list[str]]:
    """Write a folder per file type; float file and importance matrix are made once."""
    names = [name for name in context.recipe.peers if PEERS[name].stage == context.name]
    advance = context.start(len(names) + 1)
    scratch = context.folder / "float"
    scratch.mkdir()
    target("gguf").export(_lora(context), scratch, Export())
    device = device_of(context.recipe.device)
    matrix = importance_matrix(Checkpoint(_lora(context)), _samples(context), device)
    advance()
    notes = {}
    for name in names:
        kind = name.removeprefix("lora-then-").upper()
        folder = context.folder / name
        notes[name] = quantize_gguf(scratch, folder, kind, matrix, allowed_processors())
        advance()
    shutil.rmtree(scratch)
    return notes


def _write_nncf(context: Context[Sections]) -> dict[str, list[str]]:
    """Write the OpenVINO folder."""
    from sqft_export.targets.nncf_file import compress_ir

    advance = context.start(1)
    scratch = context.folder / "float"
    scratch.mkdir()
    target("openvino").export(_lora(context), scratch, Export())
    samples = calibration_samples(context.recipe, load_tokenizer(context.model))
    size = context.recipe.quantize.group_size or -1
    compress_ir(scratch, context.folder / "lora-then-nncf", samples, size)
    shutil.rmtree(scratch)
    advance()
    return {}

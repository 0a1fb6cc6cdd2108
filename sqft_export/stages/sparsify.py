"""sparsify: a checkpoint with zeros, and the mask they follow."""

from types import ModuleType

import torch
from torch import Tensor

from sqft_export import tasks
from sqft_export.calibration import walk
from sqft_export.checkpoint import Checkpoint, CheckpointWriter, copy_companions
from sqft_export.compressed import read_packed, save_masks, write_float_checkpoint
from sqft_export.numerics.affine import dequantize
from sqft_export.numerics.masks import pack_mask
from sqft_export.recipe import Recipe
from sqft_export.sparsifiers import Rule, rule_for, sparsifier
from sqft_export.stages import Context

CONSUMES = ()
READS = ("model", "calibration")
VERSION = 1


def options(recipe: Recipe) -> dict:
    return {
        "sparsify": recipe.sparsify.model_dump(),
        "calibration": recipe.calibration.model_dump(),
        "seed": recipe.seed,
    }


class _Inputs:
    """What a sparsifier needs of the calibration inputs of the block at hand."""

    def __init__(self, needs: str):
        self.needs = needs
        self.sums: dict[str, Tensor] = {}

    def collect(self, name: str, inputs: Tensor) -> None:
        fresh = inputs.square().sum(dim=0) if self.needs == "norms" else inputs.T @ inputs
        self.sums[name] = self.sums[name].add_(fresh) if name in self.sums else fresh

    def take(self, name: str) -> Tensor | None:
        if self.needs == "nothing":
            return None
        total = self.sums.pop(name)
        return total.sqrt() if self.needs == "norms" else total


class _Masks:
    """Packed masks of the model so far, and how many weights each drops."""

    def __init__(self) -> None:
        self.packed: dict[str, Tensor] = {}
        self.dropped: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    def add(self, name: str, mask: Tensor) -> None:
        self.packed[name] = pack_mask(mask)
        self.dropped[name] = int((~mask).sum())
        self.sizes[name] = mask.numel()

    def sparsity(self) -> dict[str, float]:
        """Share of pruned weights per Linear and over all of them (``all``)."""
        shares = {name: self.dropped[name] / self.sizes[name] for name in self.sizes}
        return shares | {"all": sum(self.dropped.values()) / sum(self.sizes.values())}


def run(context: Context) -> dict:
    """Writes ``model/`` and ``masks.safetensors``."""
    config, checkpoint = context.recipe.sparsify, Checkpoint(context.model)
    if checkpoint.packed:
        return _given_codes(context, checkpoint)
    method = sparsifier(config.method)
    inputs, masks = _Inputs(method.NEEDS), _Masks()
    asleep = method.NEEDS == "nothing"
    samples = [] if asleep else calibration(context)
    advance = context.start(checkpoint.blocks)
    copy_companions(context.model, context.folder / "model")
    with CheckpointWriter(context.folder / "model") as writer:
        for block in walk(checkpoint, samples, None if asleep else inputs.collect):
            changed: dict[str, Tensor] = {}
            for name, linear in block.linears.items():
                rule = rule_for(config, name)
                changed[name], mask = _compress(method, linear.weight, rule, inputs.take(name))
                masks.add(name, mask)
                linear.weight.copy_(changed[name])
            for name, tensor in checkpoint.tensors(checkpoint.block_names(block.index)):
                linear_name = name.removesuffix(".weight")
                is_weight = linear_name in changed and name != linear_name
                writer.add(name, changed[linear_name].to(tensor.dtype) if is_weight else tensor)
            advance()
        for name, tensor in checkpoint.tensors(checkpoint.outer_names()):
            writer.add(name, tensor)
    save_masks(context.folder, masks.packed)
    return {"sparsity": masks.sparsity()}


def _given_codes(context: Context, checkpoint: Checkpoint) -> dict:
    """The mask of a quantized checkpoint: where its code is not the zero point."""
    masks = _Masks()
    advance = context.start(len(checkpoint.packed))
    write_float_checkpoint(checkpoint, context.folder / "model", torch.float16)
    for name in checkpoint.packed:
        masks.add(name, dequantize(*read_packed(checkpoint, name)) != 0)
        advance()
    save_masks(context.folder, masks.packed)
    return {"sparsity": masks.sparsity()}


def _compress(
    method: ModuleType, weight: Tensor, rule: Rule | None, inputs: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight and mask of one Linear; no rule leaves it dense."""
    if rule is None:
        return weight, torch.ones_like(weight, dtype=torch.bool)
    return method.compress(weight, rule, inputs)


def calibration(context: Context) -> list[Tensor]:
    """Token ids of the calibration samples, int64 ``[length]`` each."""
    tokenizer = tasks.load_tokenizer(context.model)
    return [torch.tensor(ids) for ids in tasks.calibration_samples(context.recipe, tokenizer)]

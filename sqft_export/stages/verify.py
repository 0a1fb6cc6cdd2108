"""verify: what was trained is what runs. Any difference stops the run.

Zeros and codes are compared bit for bit, in every decoder Linear, adapted or not; logits in the
runtimes' exact mode, before and after the cache is used; greedy tokens on real prompts.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from sqft_export import tasks
from sqft_export.adapters import compressed_layers, load_adapted
from sqft_export.checkpoint import Checkpoint
from sqft_export.compressed import (
    MASKS,
    load_float_model,
    load_mask,
    quantized_names,
    read_quantized,
)
from sqft_export.errors import UserError
from sqft_export.evaluate import equal_lengths, generate
from sqft_export.numerics.affine import Grid, dequantize
from sqft_export.recipe import Recipe
from sqft_export.sparse.container import PackedFile
from sqft_export.sparse.folders import PACKED, packed_file
from sqft_export.stages import Context
from sqft_export.targets import Session, target
from sqft_export.targets.torch import TorchSession
from sqft_export.tensorfiles import TensorFiles

CONSUMES = ("sparsify", "quantize", "search", "merge", "export-openvino", "export-onnx")
READS = ("test",)
VERSION = 2

Weights = dict[str, Tensor]  # Linear -> float32 [out, in], or codes less zero points


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, of how many things, how many differ or by how much."""

    name: str
    compared: int
    differing: float
    allowed: float
    unit: str

    @property
    def passed(self) -> bool:
        return self.differing <= self.allowed


def options(recipe: Recipe) -> dict:
    return {"verify": recipe.verify.model_dump()}


def _zeros(name: str, weights: Weights, masks: Weights) -> Check:
    """Pruned positions that are not exactly zero."""
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    back = sum(int((weights[n][~mask] != 0).sum()) for n, mask in masks.items())
    return Check(f"pruned positions zero in {name}", pruned, back, 0, "positions")


def _stored_weights(folder: Any, names: list[str]) -> Weights:
    checkpoint = Checkpoint(folder)
    return {
        key.removesuffix(".weight"): tensor
        for key, tensor in checkpoint.tensors(f"{name}.weight" for name in names)
    }


def _steps(codes: np.ndarray, zero_point: np.ndarray) -> Tensor:
    """``q - z``: zero where the weight is."""
    repeat = -(-codes.shape[1] // zero_point.shape[1])
    zeros = np.repeat(zero_point, repeat, axis=1)[:, : codes.shape[1]]
    return torch.from_numpy(codes.astype(np.int16) - zeros)


Packed = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes, scale, zero point


def _as_arrays(codes: Tensor, grid: Grid) -> Packed:
    return codes.numpy(), grid.scale.numpy(), grid.zero_point.numpy()


def _same_packed(name: str, one: dict[str, Packed], other: dict[str, Packed]) -> Check:
    """Codes, scales and zero points that are not equal; a Linear missing counts whole."""
    compared = differing = 0
    for layer, parts in one.items():
        for index, part in enumerate(parts):
            compared += part.size
            if layer not in other or other[layer][index].shape != part.shape:
                differing += part.size
            else:
                # Compared in float64: a float16 scale and its float32 copy are the same number.
                theirs = other[layer][index].astype(np.float64)
                differing += int((part.astype(np.float64) != theirs).sum())
    return Check(f"codes, scales, zero points: {name}", compared, differing, 0, "numbers")


def _logits(name: str, one: Session, other: Session, prompts: list[list[int]], allowed: float):
    """Largest logit difference in standard deviations, over the prompt and one cached step."""
    worst, count = 0.0, 0
    for indices in equal_lengths(prompts, 16):
        ids = np.array([prompts[i] for i in indices], np.int64)
        one.reset()
        other.reset()
        for part in (ids[:, :-1], ids[:, -1:]):
            ours, theirs = one.forward(part), other.forward(part)
            worst = max(worst, float(np.abs(ours - theirs).max() / ours.std()))
            count += ours.size
    return Check(f"logits: {name}", count, worst, allowed, "standard deviations")


def _tokens(name: str, one: list[list[int]], other: list[list[int]]) -> Check:
    differing = sum(a != b for a, b in zip(one, other, strict=True))
    return Check(f"greedy tokens: {name}", len(one), differing, 0, "prompts")


def _effective(model: nn.Module) -> Weights:
    """The weight every Linear multiplies with in the trained forward."""
    with torch.no_grad():
        return {
            name: layer.effective_weight(update)
            for name, (layer, update) in compressed_layers(model).items()
        }


def _prompts(context: Context) -> list[list[int]]:
    data = tasks.load(context.recipe, tasks.load_tokenizer(context.model))
    items = data.test[: context.recipe.verify.prompts]
    if items[0].text is not None:
        return [item.prompt for item in items]
    # A text window: its first quarter is the prompt.
    return [item.prompt + item.target[: max(2, len(item.target) // 4)] for item in items]


class _Checks:
    """Collects the checks of one run."""

    def __init__(self, context: Context):
        self.context, self.done = context, list[Check]()
        self.prompts = _prompts(context)
        self.new_tokens = context.recipe.verify.new_tokens

    def add(self, *checks: Check) -> None:
        self.done += checks

    def sessions(self, name: str, one: Session, other: Session, allowed: float) -> None:
        """Compare logits and greedy tokens of two sessions."""
        self.add(_logits(name, one, other, self.prompts, allowed))
        texts = (generate(s, self.prompts, self.new_tokens, stop=[]) for s in (one, other))
        self.add(_tokens(name, *texts))


def _check_stages(checks: _Checks, trained: nn.Module, masks: Weights) -> None:
    context = checks.context
    for stage in ("sparsify", "quantize"):
        if folder := context.path(stage):
            weights = _stored_weights(folder / "model", list(masks))
            checks.add(_zeros(stage, weights, masks))
    if not context.recipe.adapt.merge_dense:
        checks.add(_zeros("the trained forward", _effective(trained), masks))


def _check_merged(
    checks: _Checks, trained: nn.Module, merged: Session, masks: Weights
) -> dict[str, Packed]:
    """The merged model against the trained one; returns its packed layers."""
    folder = checks.context.inputs["merge"].path / "model"
    checkpoint = Checkpoint(folder)
    packed = {name: read_quantized(checkpoint, name) for name in quantized_names(checkpoint)}
    arrays = {name: _as_arrays(*layer) for name, layer in packed.items()}
    if packed:
        with torch.no_grad():
            seen = {
                name: _as_arrays(layer.codes(update), layer.grid)  # type: ignore[arg-type]
                for name, (layer, update) in compressed_layers(trained).items()
            }
        checks.add(_same_packed("trained forward and merged", seen, arrays))
        weights = {name: dequantize(*layer) for name, layer in packed.items()}
    else:
        weights = _stored_weights(folder, list(masks))
    if not checks.context.recipe.adapt.merge_dense:
        checks.add(_zeros("the merged model", weights, masks))
    # Floats that merge cast to a shorter dtype are not the trained ones any more.
    if packed or all(header.dtype == "F32" for header in checkpoint.headers.values()):
        tolerance = checks.context.recipe.verify.tolerance
        checks.sessions("trained and merged in torch", TorchSession(trained), merged, tolerance)
    return arrays


def _check_target(
    checks: _Checks, name: str, in_torch: Session, merged: dict[str, Packed], masks: Weights
) -> None:
    context, runtime = checks.context, target(name)
    folder = context.inputs[f"export-{name}"].path / "model"
    if merged:
        found = runtime.read_back(folder)
        checks.add(_same_packed(f"merged and {name}", merged, found))
        steps = {layer: _steps(codes, zero) for layer, (codes, _, zero) in found.items()}
        checks.add(_zeros(name, steps, masks))
        compressed = runtime.compressed_kernels(folder)
        floats = [layer for layer in merged if layer not in compressed]
        checks.add(
            Check(f"layers on compressed kernels in {name}", len(merged), len(floats), 0, "layers")
        )
    exact = runtime.open_session(folder, True, None)
    tolerance = context.recipe.verify.tolerance
    checks.sessions(f"merged in torch and {name}", in_torch, exact, tolerance)


def _check_packed(checks: _Checks, name: str, artifact: Path) -> None:
    """The packed copy: the same bytes, and as deployed the same logits to the last bit."""
    dense, packed = artifact / "model", artifact / PACKED
    file = packed_file(packed)
    assert file is not None
    with PackedFile(file) as opened:
        inflated = opened.inflate()
        stored = np.fromfile(dense / opened.header.file, np.uint8)
    same = stored.shape == inflated.shape
    differing = int((stored != inflated).sum()) if same else len(stored)
    checks.add(Check(f"bytes inflated from the packed {name}", len(stored), differing, 0, "bytes"))
    runtime = target(name)
    one, other = (runtime.open_session(folder, False, None) for folder in (dense, packed))
    checks.add(_logits(f"{name} dense and packed, as deployed", one, other, checks.prompts, 0.0))


def _merged_model(context: Context) -> nn.Module:
    """The merged folder in float32, with its adapter by stock peft where one is kept apart."""
    folder = context.inputs["merge"].path
    model = load_float_model(folder / "model")
    if not context.recipe.adapt.apart:
        return model
    return PeftModel.from_pretrained(model, folder / "adapter").eval()


def run(context: Context) -> dict:
    """Writes ``verify.json``.

    :raises UserError: listing every check that failed.
    """
    targets = context.recipe.export.targets
    advance: Callable[[], None] = context.start(2 + len(targets))
    adapter = context.inputs["search"].path / "adapter"
    trained = load_adapted(context.base(), adapter, torch.float32)
    sparsified = context.path("sparsify")
    pruned = TensorFiles(sparsified, MASKS).headers if sparsified else {}
    shapes = {name: layer.weight.shape for name, (layer, _) in compressed_layers(trained).items()}
    masks = {name: load_mask(sparsified, name, shapes[name]) for name in pruned}
    checks = _Checks(context)
    _check_stages(checks, trained, masks)
    advance()
    in_torch = TorchSession(_merged_model(context))
    merged = _check_merged(checks, trained, in_torch, masks)
    advance()
    for name in targets:
        _check_target(checks, name, in_torch, merged, masks)
        if context.recipe.export.sparse_files:
            _check_packed(checks, name, context.inputs[f"export-{name}"].path)
        advance()
    results = [asdict(check) | {"passed": check.passed} for check in checks.done]
    (context.folder / "verify.json").write_text(json.dumps(results, indent=2) + "\n")
    if failed := [check for check in checks.done if not check.passed]:
        lines = [f"{c.name}: {c.differing:g} {c.unit} differ of {c.compared}" for c in failed]
        raise UserError("verify failed:\n" + "\n".join(lines))
    return {"checks": results}

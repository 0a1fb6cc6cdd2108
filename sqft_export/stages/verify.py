"""verify: what was trained is what runs. Any difference stops the run.

Zeros and codes are compared bit for bit, in every decoder Linear, adapted or not, one layer in
memory; logits in the runtimes' exact mode, before and after the cache is used; greedy tokens on
real prompts.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sqft_export.adapters.files import read_low_rank
from sqft_export.adapters.loading import Layers
from sqft_export.data.items import load_data, load_tokenizer
from sqft_export.errors import UserError
from sqft_export.measure.decode import equal_lengths, generate
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import Reference
from sqft_export.model.storage import (
    MASKS,
    grid_arrays,
    load_mask,
    quantized_arrays,
    quantized_names,
    read_quantized,
)
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.numerics.affine import dequantize
from sqft_export.numerics.codes import Quantized
from sqft_export.packed.container import PackedFile
from sqft_export.packed.folders import PACKED, packed_file
from sqft_export.recipe.schema import Recipe
from sqft_export.run.artifact import sha256_of
from sqft_export.stages import Context
from sqft_export.targets import Session, target

CONSUMES: tuple[str, ...] = (
    "sparsify",
    "quantize",
    "search",
    "merge",
    "export-openvino",
    "export-onnx",
)
READS: tuple[str, ...] = ("test",)
VERSION = 3
RESUMES = False
DISTRIBUTED = False
BATCH = 16  # prompts that go through the reference at once


@dataclass
class Check:
    """One comparison: what was compared, of how many things, how many differ or by how much."""

    name: str
    unit: str
    allowed: float = 0
    compared: int = 0
    differing: float = 0

    @property
    def passed(self) -> bool:
        return self.differing <= self.allowed

    def count(self, differs: Tensor | np.ndarray) -> None:
        """Add an array that is True where something differs."""
        self.compared += int(np.prod(differs.shape))
        self.differing += int(np.count_nonzero(np.asarray(differs)))

    def count_zeros(self, dropped: Tensor | None, weight: Tensor) -> None:
        """Add what was dropped; what of it is not zero differs."""
        if dropped is not None:
            # Numpy counts bools several times as fast as torch.
            self.compared += int(np.count_nonzero(dropped.numpy()))
            self.differing += int(np.count_nonzero((dropped & (weight != 0)).numpy()))

    def compare(self, one: Quantized, other: Quantized) -> None:
        """Add codes, scales and zero points; all of them differ where the shapes do."""
        for ours, theirs in zip(one, other, strict=True):
            if ours.shape == theirs.shape:
                # A float16 scale and its float32 copy are compared as float32, which is exact.
                self.count(ours != theirs)
            else:
                self.count(np.ones(ours.shape, bool))


def options(recipe: Recipe) -> dict:
    return {"verify": recipe.verify.model_dump()}


class _Checks:
    """Collects the checks of one run.

    masks: of pruned Linears; those whose update was merged densely are not looked at.
    """

    def __init__(self, context: Context):
        self.context, self.done = context, list[Check]()
        self.prompts = _prompts(context)
        self.masks = context.path("sparsify")
        self.pruned = set(TensorFiles(self.masks, MASKS).headers) if self.masks else set()
        self.kept_zero = not context.recipe.adapt.merge_dense
        self.merged = Checkpoint(context.inputs["merge"].path / "model")
        self.quantized = quantized_names(self.merged)

    def start(self, name: str, unit: str, allowed: float = 0) -> Check:
        self.done.append(Check(name, unit, allowed))
        return self.done[-1]

    def zeros(self, name: str) -> Check:
        return self.start(f"pruned positions zero in {name}", "positions")

    def dropped(self, layer: str, shape: torch.Size) -> Tensor | None:
        """bool ``[out, in]``, True where the Linear was pruned; None where it was not."""
        return ~load_mask(self.masks, layer, shape) if layer in self.pruned else None


def _prompts(context: Context) -> list[list[int]]:
    data = load_data(context.recipe, load_tokenizer(context.model))
    items = data.test[: context.recipe.verify.prompts]
    if items[0].text is not None:
        return [item.prompt for item in items]
    # A text window: its first quarter is the prompt.
    return [item.prompt + item.target[: max(2, len(item.target) // 4)] for item in items]


@torch.no_grad()
def _check_layers(checks: _Checks) -> None:
    """Every decoder Linear along the passes, from its base to the merged file."""
    context = checks.context
    stages = {
        name: (Checkpoint(folder / "model"), checks.zeros(name))
        for name in ("sparsify", "quantize")
        if (folder := context.path(name))
    }
    in_forward = checks.zeros("the trained forward") if checks.kept_zero else None
    in_merged = checks.zeros("the merged model") if checks.kept_zero else None
    quantized = set(checks.quantized)
    name = "codes, scales, zero points" if quantized else "weights"
    same = checks.start(f"{name}: trained forward and merged", "numbers")
    layers = Layers(context.base(), context.inputs["search"].path / "adapter")
    for linear in layers.names:
        layer, update = layers.layer(linear)
        dropped = checks.dropped(linear, layer.weight.shape)
        for checkpoint, zeros in stages.values():
            zeros.count_zeros(dropped, checkpoint.tensor(f"{linear}.weight"))
        trained = layer.effective_weight(update)
        if linear in quantized:
            assert layer.grid is not None
            codes, grid = read_quantized(checks.merged, linear)
            trained_codes = grid_arrays(layer.codes(update), layer.grid)
            same.compare(trained_codes, grid_arrays(codes, grid))
            merged = dequantize(codes, grid)
        else:
            merged = checks.merged.tensor(f"{linear}.weight")
            same.count(trained.to(merged.dtype) != merged)
        if in_forward and in_merged:
            in_forward.count_zeros(dropped, trained)
            in_merged.count_zeros(dropped, merged)


def _check_written(checks: _Checks, name: str, folder: Path) -> None:
    """Codes and zeros of a deployment's file, and the kernels that its runtime takes."""
    runtime = target(name)
    same = checks.start(f"codes, scales, zero points: merged and {name}", "numbers")
    zeros = checks.zeros(name)
    missing = set(checks.quantized)
    for layer, written in runtime.read_back(folder):
        missing.discard(layer)
        stored = checks.merged.stored_name(layer)
        ours = quantized_arrays(checks.merged, stored)
        same.compare(ours, written)
        steps = torch.from_numpy(written.steps)
        zeros.count_zeros(checks.dropped(layer, steps.shape), steps)
    for layer in missing:  # counts whole
        same.count(np.ones(read_quantized(checks.merged, layer)[0].shape, bool))
    kernels = checks.start(f"layers on compressed kernels in {name}", "layers")
    compressed = runtime.compressed_kernels(folder)
    kernels.count(np.array([layer not in compressed for layer in checks.quantized]))


def _prompt_logits(session: Session, prompts: list[list[int]]) -> list[np.ndarray]:
    """``[length, vocabulary]`` of every prompt, its last token by a step from the cache."""
    found: list[np.ndarray] = [np.empty(0)] * len(prompts)
    for indices in equal_lengths(prompts, BATCH):
        ids = np.array([prompts[i] for i in indices], np.int64)
        session.reset()
        logits = np.concatenate([session.forward(part) for part in (ids[:, :-1], ids[:, -1:])], 1)
        for index, one in zip(indices, logits, strict=True):
            found[index] = one
    return found


def _check_session(checks: _Checks, name: str, reference: Reference, session: Session) -> None:
    """Logits over every prompt, and the tokens that follow: each the likeliest in torch."""
    settings, both = checks.context.recipe.verify, f"merged in torch and {name}"
    logits = checks.start(f"logits: {both}", "standard deviations", settings.tolerance)
    tokens = checks.start(f"greedy tokens: {both}", "tokens")
    for start in range(0, len(checks.prompts), BATCH):
        prompts = checks.prompts[start : start + BATCH]
        said = generate(session, prompts, settings.new_tokens, stop=[])
        ours = reference.logits([p + s for p, s in zip(prompts, said, strict=True)])
        theirs = _prompt_logits(session, prompts)
        for prompt, answer, one, other in zip(prompts, said, ours, theirs, strict=True):
            of_prompt = one[: len(prompt)]
            worst = np.abs(of_prompt - other).max() / of_prompt.std()
            logits.differing = max(logits.differing, float(worst))
            logits.compared += of_prompt.size
            tokens.count(one[len(prompt) - 1 : -1].argmax(axis=-1) != np.array(answer))


def _check_packed(checks: _Checks, name: str, artifact: Path) -> None:
    """The packed copy: the same bytes, and as deployed the same logits to the last bit."""
    dense, packed = artifact / "model", artifact / PACKED
    file = packed_file(packed)
    assert file is not None
    check = checks.start(f"bytes inflated from the packed {name}", "bytes")
    with tempfile.TemporaryDirectory(dir=checks.context.folder) as scratch:
        with PackedFile(file) as opened:
            stored, inflated = dense / opened.header.file, Path(scratch) / "inflated"
            opened.inflate_file(inflated)
        check.compared = stored.stat().st_size
        if sha256_of(inflated) != sha256_of(stored):
            check.differing = check.compared
    same = checks.start(f"logits: {name} dense and packed, as deployed", "standard deviations")
    one, other = (
        _prompt_logits(target(name).open_session(folder, False, None), checks.prompts)
        for folder in (dense, packed)
    )
    for ours, theirs in zip(one, other, strict=True):
        same.compared += ours.size
        same.differing = max(same.differing, float(np.abs(ours - theirs).max() / ours.std()))


def run(context: Context) -> dict:
    """Writes ``verify.json``.

    :raises UserError: listing every check that failed.
    """
    targets, merge = context.recipe.export.targets, context.inputs["merge"].path
    advance = context.start(1 + len(targets))
    checks = _Checks(context)
    _check_layers(checks)
    advance()
    unmerged = context.recipe.adapt.unmerged
    reference = Reference(merge / "model", read_low_rank(merge / "adapter") if unmerged else None)
    for name in targets:
        artifact = context.inputs[f"export-{name}"].path
        if checks.quantized:
            _check_written(checks, name, artifact / "model")
        session = target(name).open_session(artifact / "model", True, None)
        _check_session(checks, name, reference, session)
        del session
        if context.recipe.export.sparse_files:
            _check_packed(checks, name, artifact)
        advance()
    results = [asdict(check) | {"passed": check.passed} for check in checks.done]
    (context.folder / "verify.json").write_text(json.dumps(results, indent=2) + "\n")
    if failed := [check for check in checks.done if not check.passed]:
        lines = [f"{c.name}: {c.differing:g} {c.unit} differ of {c.compared}" for c in failed]
        raise UserError("verify failed:\n" + "\n".join(lines))
    return {"checks": results}

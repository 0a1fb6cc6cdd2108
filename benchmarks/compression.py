"""Quality loss and speed of each sparsifier and quantizer on a real model.

    python benchmarks/compression.py --model <Hugging Face folder> --text <text file>

Runs every combination of {magnitude, wanda, sparsegpt} at 50 % and {none, INT8, INT4} by {rtn,
plain gptq, mask-aware gptq, nncf with AWQ and scale estimation}. Floats and mask-aware gptq also
run with blocks reconstructed before or after. Prints the mean relative output error of the decoder
Linears on calibration inputs of the dense model, perplexity on held-out text, and the share of
pruned positions that are still zero. Plain GPTQ is the same code without a mask. AWQ moves scales
between the Linears of a block, so nncf has no output error per Linear.

Then compares GPTQ and Wanda on one Linear with a transcription of the published algorithms,
interleaved.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import torch
from document import finish, spread, table
from torch import Tensor

from sqft_export.data.items import load_tokenizer
from sqft_export.measure.likelihood import likelihood
from sqft_export.model.blocks import Block, Inputs, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import load_model
from sqft_export.model.reconstruction import reconstruct
from sqft_export.numerics.affine import Grid, fake_quantize
from sqft_export.numerics.groups import fallback_group_size
from sqft_export.numerics.hessian import inverse_factor
from sqft_export.quantizers import gptq, nncf, rtn
from sqft_export.recipe.schema import Quantize, Reconstruct
from sqft_export.sparsifiers import Pruning, magnitude, sparsegpt, wanda
from sqft_export.targets.torch import TorchSession

GROUP_SIZE = 32
WINDOW, CALIBRATION, TEST = 256, 48, 32
SPARSIFIERS = {"dense": None, "magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}
BEFORE, AFTER = "reconstructed, ", ", reconstructed"  # of a quantizer
QUANTIZERS = (
    *("none", "rtn", "gptq plain", "gptq mask-aware", "nncf"),
    *(f"{BEFORE}none", f"{BEFORE}gptq mask-aware", f"gptq mask-aware{AFTER}"),
)
# With nothing pruned, the first is plain GPTQ, and there is nothing to reconstruct before rounding.
UNPRUNED_ALIKE = ("gptq mask-aware", f"{BEFORE}none", f"{BEFORE}gptq mask-aware")
DAMPING = 0.01


def windows(folder: Path, text: Path) -> tuple[list[Tensor], list[list[int]]]:
    """Calibration windows from the start of a text, test windows from its end."""
    ids = load_tokenizer(folder)(text.read_text(), add_special_tokens=False)["input_ids"]
    whole = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW, WINDOW)]
    return [torch.tensor(w) for w in whole[:CALIBRATION]], whole[-TEST:]


def pruned(weight: Tensor, hessian: Tensor, sparsifier) -> tuple[Tensor, Tensor]:
    """Weight and mask after one sparsifier."""
    if sparsifier is None:
        return weight, torch.ones_like(weight, dtype=torch.bool)
    inputs = {
        "nothing": lambda: None,
        "norms": lambda: hessian.diagonal().sqrt(),
        "factor": lambda: factor_of(hessian),
    }[sparsifier.NEEDS]()
    return sparsifier.compress(weight, Pruning(0.5, None), inputs)


def on_grid(
    block: Block, masks: dict[str, Tensor], hessians: dict[str, Tensor], quantizer: str, bits: int
) -> Iterator[tuple[str, Tensor, Grid]]:
    """Name, weight before rounding and grid of every Linear of a pruned block."""
    if quantizer == "nncf":
        # Its INT8 is per channel and looks at no data.
        config = Quantize(method="nncf", bits=bits, group_size=GROUP_SIZE if bits == 4 else None)
        with contextlib.redirect_stdout(sys.stderr):  # NNCF's tables and bars
            found = list(nncf.compress_block(block, masks.__getitem__, config))
        yield from found
        return
    method = rtn if quantizer == "rtn" else gptq
    for name, linear in block.linears.items():
        mask = torch.ones_like(masks[name]) if quantizer == "gptq plain" else masks[name]
        options = bits, fallback_group_size(linear.in_features, GROUP_SIZE), True
        factor = factor_of(hessians[name]) if method is gptq else None
        yield name, *method.compress(linear.weight, mask, *options, factor)


def quantized(
    theirs: Block | None,
    block: Block,
    masks: dict[str, Tensor],
    hessians: dict[str, Tensor],
    quantizer: str,
    bits: int,
) -> Iterator[tuple[str, Tensor]]:
    """Name and result of every Linear of a pruned block; its dense one, if it is reconstructed."""
    if quantizer.startswith(BEFORE):
        assert theirs
        reconstruct(theirs, block, masks, Reconstruct(), 0)
        quantizer = quantizer.removeprefix(BEFORE)
    if quantizer == "none":
        yield from ((name, linear.weight.clone()) for name, linear in block.linears.items())
        return
    made = on_grid(block, masks, hessians, quantizer.removesuffix(AFTER), bits)
    if quantizer.endswith(AFTER):
        assert theirs
        grids = {}
        for name, weight, grids[name] in made:
            block.linears[name].weight.copy_(weight)
        trained = reconstruct(theirs, block, masks, Reconstruct(), 0, grids)
        made = ((name, trained.weights[name], grid) for name, grid in trained.grids.items())
    yield from ((name, fake_quantize(weight, grid)) for name, weight, grid in made)


def run(folder: Path, samples: list[Tensor], test, dense: dict, choice) -> dict[str, float]:
    """One row: compress block by block, then score the whole model."""
    sparsifier, quantizer, bits = choice
    model, inputs = load_model(Checkpoint(folder)), Inputs("hessian")
    errors, kept, dropped = [], 0, 0
    dense_blocks: Iterator[Block | None] = repeat(None)
    if quantizer.startswith(BEFORE) or quantizer.endswith(AFTER):
        dense_blocks = walk(Checkpoint(folder), samples, None)
    ours = walk(Checkpoint(folder), samples, inputs.collector)
    for block, theirs in zip(ours, dense_blocks, strict=False):
        weights = {name: linear.weight.clone() for name, linear in block.linears.items()}
        hessians = {name: inputs.take(name) for name in weights}
        masks = {}
        for name, linear in block.linears.items():
            sparse, masks[name] = pruned(weights[name], hessians[name], sparsifier)
            linear.weight.copy_(sparse)
        for name, result in quantized(theirs, block, masks, hessians, quantizer, bits):
            difference, weight = result - weights[name], weights[name]
            energy = ((weight @ dense[name]) * weight).sum()
            errors.append(float(((difference @ dense[name]) * difference).sum() / energy))
            dropped += int((~masks[name]).sum())
            kept += int((result[~masks[name]] == 0).sum())
            block.linears[name].weight.copy_(result)
            model.get_submodule(name).weight.data.copy_(result)
    scored = likelihood(TorchSession(model), [ids[:1] for ids in test], [ids[1:] for ids in test])
    return {
        "output_error": sum(errors) / len(errors) if quantizer != "nncf" else float("nan"),
        "perplexity": scored.perplexity,
        "zeros_kept": kept / dropped if dropped else 1.0,
    }


def dense_hessians(folder: Path, samples: list[Tensor]) -> dict[str, Tensor]:
    inputs = Inputs("hessian")
    found: dict[str, Tensor] = {}
    for block in walk(Checkpoint(folder), samples, inputs.collector):
        found |= {name: inputs.take(name) for name in block.linears}
    return found


def published_gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """arXiv 2210.17323, algorithm 1: blocks of 128 columns, scale from each group's largest."""
    weight, hessian = weight.clone(), hessian.clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    rounded = torch.zeros_like(weight)
    half = 2 ** (bits - 1)
    for start in range(0, weight.shape[1], 128):
        stop = min(start + 128, weight.shape[1])
        part = weight[:, start:stop].clone()
        errors = torch.zeros_like(part)
        inner = factor[start:stop, start:stop]
        for at in range(stop - start):
            if (start + at) % group_size == 0:
                group = part[:, at : at + group_size]
                scale = group.abs().amax(dim=1, keepdim=True) * 2 / (2**bits - 1)
            column = part[:, at : at + 1]
            value = scale * ((column / scale).round() + half).clamp(0, 2**bits - 1).sub(half)
            rounded[:, start + at : start + at + 1] = value
            error = (column - value) / inner[at, at]
            part[:, at:] -= error * inner[at, at:]
            errors[:, at : at + 1] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded


def published_wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """arXiv 2306.11695: sort every row by |W| ||X||, zero the lower half."""
    result = weight.clone()
    order = torch.sort(weight.abs() * norms, dim=1, stable=True)[1]
    result.scatter_(1, order[:, : weight.shape[1] // 2], 0)
    return result


def factor_of(hessian: Tensor) -> Tensor:
    return inverse_factor(hessian.clone(), DAMPING)


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def speed(repeats: int) -> dict[str, dict[str, float]]:
    """Our time over the transcription's on one Linear of 1024 x 2048, interleaved."""
    torch.manual_seed(0)
    weight, samples = torch.randn(1024, 2048) * 0.02, torch.randn(4096, 2048)
    hessian = samples.T @ samples
    norms, mask = hessian.diagonal().sqrt(), torch.ones(1024, 2048, dtype=torch.bool)
    pairs = {
        "gptq_time": (
            lambda: gptq.compress(weight, mask, 4, 128, True, factor_of(hessian)),
            lambda: published_gptq(weight, hessian, 4, 128),
        ),
        "wanda_time": (
            lambda: wanda.compress(weight, Pruning(0.5, None), norms),
            lambda: published_wanda(weight, norms),
        ),
    }
    ratios: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(repeats):
        for name, (ours, theirs) in pairs.items():
            ratios[name].append(seconds(ours) / seconds(theirs))
    return {name: spread(samples) for name, samples in ratios.items()}


def error_ratio() -> dict[str, float]:
    """Output error of our GPTQ over the transcription's, same layer and bits."""
    ratios = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(256, 512, generator=generator) * 0.02
        mixing = torch.randn(512, 512, generator=generator) / 512**0.5 + torch.eye(512)
        samples = torch.randn(2048, 512, generator=generator) @ mixing
        hessian, mask = samples.T @ samples, torch.ones(256, 512, dtype=torch.bool)
        ours = (
            fake_quantize(*gptq.compress(weight, mask, 4, 128, True, factor_of(hessian))) - weight
        )
        theirs = published_gptq(weight, hessian, 4, 128) - weight
        ratios.append(float(((ours @ hessian) * ours).sum() / ((theirs @ hessian) * theirs).sum()))
    return spread(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    samples, test = windows(arguments.model, arguments.text)
    dense = dense_hessians(arguments.model, samples)
    rows, values = [], {}
    for name, sparsifier in SPARSIFIERS.items():
        for quantizer in QUANTIZERS:
            for bits in (0,) if quantizer.endswith("none") else (8, 4):
                if sparsifier is None and quantizer in UNPRUNED_ALIKE:
                    continue
                found = run(arguments.model, samples, test, dense, (sparsifier, quantizer, bits))
                rows.append([name, f"INT{bits}" if bits else "float", quantizer, *found.values()])
                values[f"{name}/{quantizer}/{bits}"] = found
    header = ["sparsifier", "weights", "quantizer", "output error", "perplexity", "zeros kept"]
    table(header, rows)
    ratios = speed(arguments.repeats) | {"gptq_output_error": error_ratio()}
    print()
    table(
        ["ratio to the published algorithm", "median", "low", "high"],
        [[name, *found.values()] for name, found in ratios.items()],
    )
    finish("compression", ratios, values)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()

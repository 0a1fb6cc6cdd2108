"""What each sparsifier and quantizer costs a real model, and how fast they are.

    python benchmarks/compression.py --model <Hugging Face folder> --text <text file>

Every combination of {magnitude, wanda, sparsegpt} at 50 % and {none, INT8, INT4} by {rtn, plain
gptq, mask-aware gptq}: mean relative output error of the decoder Linears on calibration inputs of
the dense model, perplexity on held-out text, and the share of pruned positions still zero. Plain
GPTQ is the same code with nothing marked as pruned, which is what GPTQ does to a sparse model.

Then, on one Linear, GPTQ and Wanda against a transcription of the published algorithms, in turns.
"""

import argparse
import time
from pathlib import Path

import torch
from document import finish, spread, table
from torch import Tensor

from sqft_export.calibration import walk
from sqft_export.checkpoint import Checkpoint
from sqft_export.compressed import load_float_model
from sqft_export.evaluate import likelihood
from sqft_export.numerics.affine import fake_quantize
from sqft_export.numerics.groups import fallback_group_size
from sqft_export.quantizers import gptq, rtn
from sqft_export.sparsifiers import Rule, magnitude, sparsegpt, wanda
from sqft_export.targets.torch import TorchSession
from sqft_export.tasks import load_tokenizer

GROUP_SIZE = 32
WINDOW, CALIBRATION, TEST = 256, 48, 32
SPARSIFIERS = {"dense": None, "magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}
QUANTIZERS = ("none", "rtn", "gptq plain", "gptq mask-aware")


def windows(folder: Path, text: Path) -> tuple[list[Tensor], list[list[int]]]:
    """Calibration windows from the start of a text, test windows from its end."""
    ids = load_tokenizer(folder)(text.read_text(), add_special_tokens=False)["input_ids"]
    whole = [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW, WINDOW)]
    return [torch.tensor(w) for w in whole[:CALIBRATION]], whole[-TEST:]


class Hessians:
    """``X^T X`` of every Linear of the block at hand."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def __call__(self, name: str, inputs: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + inputs.T @ inputs


def compress(weight: Tensor, hessian: Tensor, sparsifier, quantizer: str, bits: int):
    """Weight after one combination, and its mask."""
    mask = torch.ones_like(weight, dtype=torch.bool)
    if sparsifier is not None:
        inputs = {
            "nothing": None,
            "norms": hessian.diagonal().sqrt(),
            "hessian": hessian,
        }[sparsifier.NEEDS]
        weight, mask = sparsifier.compress(weight, Rule(0.5, None), inputs)
    if quantizer == "none":
        return weight, mask
    method = rtn if quantizer == "rtn" else gptq
    seen = torch.ones_like(mask) if quantizer == "gptq plain" else mask
    group_size = fallback_group_size(weight.shape[1], GROUP_SIZE)
    result, grid = method.compress(weight, seen, bits, group_size, True, hessian, 0.01)
    return fake_quantize(result, grid), mask


def run(folder: Path, samples: list[Tensor], test, dense: dict, choice) -> dict[str, float]:
    """One row: compress block by block, then score the whole model."""
    checkpoint, collected = Checkpoint(folder), Hessians()
    model = load_float_model(folder)
    errors, kept, pruned = [], 0, 0
    for block in walk(checkpoint, samples, collected):
        for name, linear in block.linears.items():
            weight = linear.weight.clone()
            result, mask = compress(weight, collected.sums.pop(name), *choice)
            hessian = dense[name]
            difference = result - weight
            errors.append(
                float(
                    ((difference @ hessian) * difference).sum()
                    / ((weight @ hessian) * weight).sum()
                )
            )
            pruned += int((~mask).sum())
            kept += int((result[~mask] == 0).sum())
            linear.weight.copy_(result)
            model.get_submodule(name).weight.data.copy_(result)
    scored = likelihood(TorchSession(model), [ids[:1] for ids in test], [ids[1:] for ids in test])
    return {
        "output_error": sum(errors) / len(errors),
        "perplexity": scored["perplexity"],
        "zeros_kept": kept / pruned if pruned else 1.0,
    }


def dense_hessians(folder: Path, samples: list[Tensor]) -> dict[str, Tensor]:
    collected = Hessians()
    for _ in walk(Checkpoint(folder), samples, collected):
        pass
    return collected.sums


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


def seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def speed(repeats: int) -> dict[str, dict[str, float]]:
    """Our time over the transcription's on one Linear of 1024 x 2048, in turns."""
    torch.manual_seed(0)
    weight, samples = torch.randn(1024, 2048) * 0.02, torch.randn(4096, 2048)
    hessian = samples.T @ samples
    norms, mask = hessian.diagonal().sqrt(), torch.ones(1024, 2048, dtype=torch.bool)
    pairs = {
        "gptq_time": (
            lambda: gptq.compress(weight, mask, 4, 128, True, hessian, 0.01),
            lambda: published_gptq(weight, hessian, 4, 128),
        ),
        "wanda_time": (
            lambda: wanda.compress(weight, Rule(0.5, None), norms),
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
        ours = fake_quantize(*gptq.compress(weight, mask, 4, 128, True, hessian, 0.01)) - weight
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
            for bits in (8, 4) if quantizer != "none" else (0,):
                if sparsifier is None and quantizer == "gptq mask-aware":
                    continue  # with nothing pruned it is plain GPTQ
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

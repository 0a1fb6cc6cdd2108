"""Time and memory of one training step, ours and others', on the same blocks and batch.

    python benchmarks/training_step.py [--hidden 1024] [--batch 8] [--length 128] [--rounds 5]
        [--precision bfloat16] [--model <folder>] [--before <checkout>]

    (a) lora         stock peft LoRA on the pruned float model
    (b) sparsepeft   ours: masked adapter
    (c) qa           ours: masked adapter through the INT4 grid
    (d) nncf         NNCF's FQ_LORA_NLS (no mask: it has none; adapters on all Linears)
    (e) published    the SQFT forward transcribed from its formulas, by plain autograd

Trains two Mistral-shaped blocks, or all of a model, with adapters of rank 32 on q, k, v, up and
down, and AdamW. Every variant runs in separate processes, interleaved. A step is forward, backward
and update; the first two steps of a process are not counted. Peak memory is that of the process.
With --before, (c) also runs on the code of another commit (`git worktree add <checkout> <commit>`).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from document import finish, spread, table
from torch import Tensor, nn

from sqft_export.adapters.files import Base
from sqft_export.adapters.loading import add_adapters, load_compressed
from sqft_export.measure.worker import peak_memory
from sqft_export.model.storage import GridWriter, mask_writer
from sqft_export.numerics.affine import fit_grid
from sqft_export.numerics.masks import drop_share, mask_to_bits

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
RANK, ALPHA, GROUP_SIZE, WARM = 32, 64.0, 64, 2
VOCABULARY = 4096
BEFORE = "qa before"
VARIANTS = ("lora", "sparsepeft", "qa", "nncf", "published")


def write_base(folder: Path, hidden: int) -> None:
    """Two blocks of Mistral with random weights."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=2,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
    )
    MistralForCausalLM(config).save_pretrained(folder / "whole")


def compress_base(source: Path, folder: Path) -> None:
    """A model by magnitude at 50 %, its masks and INT4 grids."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    with mask_writer(folder) as masks, GridWriter(folder) as grids, torch.no_grad():
        for name, module in model.model.layers.named_modules(prefix="model.layers"):
            if isinstance(module, nn.Linear):
                mask = drop_share(module.weight.abs().float(), 0.5)
                module.weight.mul_(mask)
                masks.add(name, mask_to_bits(mask))
                grids.add(name, fit_grid(module.weight, 4, GROUP_SIZE, True))
    model.save_pretrained(folder / "model")
    shutil.copyfile(source / "config.json", folder / "model" / "config.json")


class Published(nn.Module):
    """QA-SparsePEFT as published: mask from the weight, full-size scales, straight-through by
    detach, dropout before the whole layer; everything autograd needs is kept."""

    def __init__(self, linear: nn.Linear, scale: Tensor):
        super().__init__()
        self.base_weight = linear.weight.detach()
        self.scale = scale.float()
        self.group = torch.arange(linear.in_features) // GROUP_SIZE
        self.lora_a = nn.Parameter(torch.randn(RANK, linear.in_features) / linear.in_features)
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        mask = self.base_weight != 0
        weight = self.base_weight + (self.lora_b @ self.lora_a) * (ALPHA / RANK) * mask
        scale = self.scale[:, self.group]
        codes = ((weight + 8 * scale) / scale).round().clamp(0, 15)
        weight = weight + (scale * (codes - 8) - weight).detach()
        return nn.functional.linear(nn.functional.dropout(x, 0.0), weight)


def in_precision(folder: Path, precision: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=precision)


def published(folder: Path, precision: torch.dtype) -> nn.Module:
    from sqft_export.model.storage import load_grids

    model = in_precision(folder, precision).requires_grad_(False)
    for name, grid in load_grids(folder).items():
        parent, _, child = name.rpartition(".")
        if child in TARGETS:
            owner = model.get_submodule(parent)
            setattr(owner, child, Published(getattr(owner, child), grid.scale))
    return model


def stock_lora(folder: Path, precision: torch.dtype) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = in_precision(folder, precision)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    return get_peft_model(model, config)


def nncf_nls(folder: Path, ids: Tensor, precision: torch.dtype) -> nn.Module:
    import nncf
    from nncf.parameters import CompressionFormat
    from nncf.quantization.advanced_parameters import AdvancedCompressionParameters

    model = in_precision(folder, precision).requires_grad_(False)
    model.config.use_cache = False
    model = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=GROUP_SIZE,
        ratio=1.0,
        dataset=nncf.Dataset([{"input_ids": ids, "labels": ids}]),
        compression_format=CompressionFormat.FQ_LORA_NLS,
        backup_mode=nncf.BackupMode.NONE,
        advanced_parameters=AdvancedCompressionParameters(lora_adapter_rank=RANK),
    )
    return model


def build(variant: str, folder: Path, ids: Tensor, precision: torch.dtype) -> nn.Module:
    if variant == "lora":
        return stock_lora(folder, precision)
    if variant == "nncf":
        return nncf_nls(folder, ids, precision)
    if variant == "published":
        return published(folder, precision)
    base = Base(folder / "model", folder, None if variant == "sparsepeft" else folder)
    model = load_compressed(base, precision)
    return add_adapters(model, TARGETS, RANK, ALPHA, 0.0)


def measure(variant: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every counted step, and the peak resident bytes."""
    shape, steps = (arguments.batch, arguments.length), arguments.steps
    ids = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    model = build(variant, folder, ids, getattr(torch, arguments.precision)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    seconds = []
    for _ in range(WARM + steps):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[WARM:], "peak": peak_memory()}


def counted(hidden: int, tokens: int) -> dict[str, float]:
    """Return the multiply-adds of a block's Linears per step, relative to stock LoRA.

    Stock LoRA needs the product with the weight forward and back (2 per weight and token). An
    update that enters the weight also needs the weight's own gradient, 1 more on adapted Linears,
    and ``B A`` twice and two products with its gradient, whatever the number of tokens.
    """
    inner, keys = hidden * 7 // 2, hidden // 4
    adapted = hidden * hidden + 2 * hidden * keys + 2 * hidden * inner
    every = adapted + hidden * hidden + hidden * inner
    ours = 2 * every * tokens + adapted * tokens + 4 * RANK * adapted
    return {"of_stock_lora": ours / (2 * every * tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--model", type=Path, help="model to train, instead of two random blocks")
    parser.add_argument("--before", type=Path, help="checkout of a commit to compare (c) with")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        variant, folder = arguments.child
        print(json.dumps(measure(variant, Path(folder), arguments)))
        return
    found: dict[str, list[dict[str, Any]]] = {variant: [] for variant in arguments.variants}
    if arguments.before:
        found[BEFORE] = []
    with tempfile.TemporaryDirectory() as scratch:
        if not arguments.model:
            write_base(Path(scratch), arguments.hidden)
        compress_base(arguments.model or Path(scratch) / "whole", Path(scratch))
        for _ in range(arguments.rounds):
            for variant, runs in found.items():
                runs.append(run(variant, scratch, arguments))
    report(found, arguments)


def run(variant: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one variant in a separate process."""
    code = arguments.before if variant == BEFORE else Path(__file__).parent.parent
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--child", variant, folder]
    for name in ("batch", "length", "steps", "precision"):
        command += [f"--{name}", str(getattr(arguments, name))]
    paths = os.pathsep.join([str(code), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def report(found: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    medians = {name: [median(run["seconds"]) for run in runs] for name, runs in found.items()}
    peaks = {name: median(run["peak"] for run in runs) for name, runs in found.items()}
    ratios = {}
    for one, other in (
        ("sparsepeft", "lora"),
        ("qa", "lora"),
        ("published", "qa"),
        ("nncf", "qa"),
        (BEFORE, "qa"),
    ):
        if one in medians and other in medians:
            pairs = zip(medians[one], medians[other], strict=True)
            ratios[f"{one} / {other}"] = spread([a / b for a, b in pairs])
    rows = [
        [name, median(each), min(each), max(each), peaks[name] / 2**20]
        for name, each in medians.items()
    ]
    table(["variant", "s per step", "low", "high", "peak MiB"], rows)
    print()
    table(["ratio", "median", "low", "high"], [[n, *found.values()] for n, found in ratios.items()])
    values: dict[str, Any] = {
        "runs": found,
        "sizes": {k: str(v) for k, v in vars(arguments).items()},
    }
    if not arguments.model:
        arithmetic = counted(arguments.hidden, arguments.batch * arguments.length)
        print(f"\nmultiply-adds of (b) and (c) over (a): {arithmetic['of_stock_lora']:.2f}")
        values["multiply_adds"] = arithmetic
    finish("training_step", ratios, values)


if __name__ == "__main__":
    main()

"""Peak memory and speed of sparsify + quantize on a Mistral-7B-shaped checkpoint.

    python benchmarks/streaming.py [--blocks 2 4 8] [--samples 4] [--length 128] [--small]

Writes checkpoints of the true width with random weights and an increasing number of blocks, and
runs both passes on each in a separate process: Wanda at 50 %, mask-aware GPTQ in INT4. Bound: two
decoder blocks in float32 + the calibration activations + 1.5 GiB, for any number of blocks. The
kernel reports the peak of the process, including imports and mapped file pages.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from document import finish, in_a_process, table
from shapes import SMALL, WIDE, write_checkpoint

from sqft_export.machine.progress import silent
from sqft_export.measure.worker import peak_memory
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.recipe.load import load_recipe
from sqft_export.stages import Context, quantize, sparsify

GIB = 2**30
ROOT = Path(__file__).parent.parent


def compress(model: Path, out: Path, samples: int, length: int) -> dict[str, Any]:
    """Both passes in this process; seconds of each and the peak resident bytes so far."""
    recipe = load_recipe(
        ROOT / "recipes" / "tiny.yaml",
        (
            f"calibration={{samples: {samples}, sequence_length: {length}}}",
            "quantize.group_size=128",
        ),
        model,
    )
    measured: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    for name, stage in (("sparsify", sparsify), ("quantize", quantize)):
        (out / name).mkdir()
        context = Context(name, recipe, model, dict(inputs), out / name, silent)
        started = time.monotonic()
        stage.run(context)
        measured[f"{name}_seconds"] = time.monotonic() - started
        measured[f"{name}_peak"] = peak_memory()
        inputs[name] = argparse.Namespace(path=out / name)
    return measured


def measure(shape: dict[str, int], blocks: int, samples: int, length: int) -> dict[str, Any]:
    """One row, its files deleted afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        write_checkpoint(model, shape, blocks)
        out.mkdir()
        amount = ("--samples", str(samples), "--length", str(length))
        found = in_a_process(__file__, "--child", str(model), str(out), *amount)
        weights = sum(o * i for o, i in Checkpoint(model).linears.values())
    block = 4 * weights / blocks
    activations = 4 * samples * length * shape["hidden_size"]
    seconds = found["sparsify_seconds"] + found["quantize_seconds"]
    return found | {
        "blocks": blocks,
        "bound": 2 * block + activations + 1.5 * GIB,
        "peak": found["quantize_peak"],
        "seconds_per_billion_weights": seconds / weights * 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--small", action="store_true", help="a narrow model, to try this out")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        model, out = arguments.child
        print(json.dumps(compress(model, out, arguments.samples, arguments.length)))
        return
    shape = SMALL if arguments.small else WIDE
    rows = [measure(shape, n, arguments.samples, arguments.length) for n in arguments.blocks]
    header = [
        "blocks",
        "sparsify s",
        "quantize s",
        "s per billion weights",
        "peak GiB",
        "bound GiB",
    ]
    table(
        header,
        [
            [
                row["blocks"],
                row["sparsify_seconds"],
                row["quantize_seconds"],
                row["seconds_per_billion_weights"],
                row["peak"] / GIB,
                row["bound"] / GIB,
            ]
            for row in rows
        ],
    )
    shares = [row["peak"] / row["bound"] for row in rows]
    middle = sorted(shares)[len(shares) // 2]
    ratio = {"median": middle, "low": min(shares), "high": max(shares)}
    finish("streaming", {"peak_over_bound": ratio}, {str(row["blocks"]): row for row in rows})


if __name__ == "__main__":
    main()

"""Bytes that zeros save in packed files, and the time to inflate them when they are loaded.

    python benchmarks/sparse_files.py [--blocks 4] [--rounds 3] [--small]

Sizes: one 4096 x 4096 matrix of normal weights, pruned by magnitude in groups of 128, at four
sparsities. Printed are bits per weight without scales of the dense codes; of our packed file (mask
and kept codes) and its entropy level (zstd on top); of zlib and zstd on the dense codes; of an ONNX
``sparse_initializer`` (with the int64 indices that the checker requires); and the Shannon bound
(mask and kept codes as independent draws). Loading: Mistral-7B-shaped blocks at 50 %, from the
folder to a session's first answer, each in a separate process, interleaved. A ratio compares with
the dense folder in the same round; memory is the peak of the process, runtime included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import zstandard
from document import finish, in_a_process, spread, table
from shapes import SMALL, WIDE, pruned_grid, write_checkpoint, write_merged

from sqft_export.measure.worker import peak_memory
from sqft_export.model.checkpoint import file_bytes
from sqft_export.numerics.nibbles import pack_nibbles
from sqft_export.packed.container import Writer
from sqft_export.packed.folders import pack
from sqft_export.recipe.schema import Export
from sqft_export.targets import target

GROUP = 128
SPARSITIES = (0.5, 0.6, 0.75, 0.9)
WAYS = ("dense", "packed", "entropy")


def entropy_of(counts: np.ndarray) -> float:
    """Bits of one draw."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def stored(folder: Path, dense: np.ndarray, bits: int, elements: int, entropy: bool) -> int:
    """Bytes of mask and kept codes in a packed file."""
    writer = Writer(folder / "w.sqft", entropy)
    fill = 2 ** (bits - 1)
    writer.sparse("w", 0, dense, bits, elements, fill, np.array([fill], np.uint32), 0)
    header = writer.finish("w", len(dense), "0" * 64)
    pieces = [
        p for r in header.regions for p in ([r.data] if r.kind == "raw" else [r.mask, r.kept])
    ]
    return sum(piece.size for piece in pieces)


def sizes(bits: int, sparsity: float, width: int) -> dict[str, float]:
    """Bits a weight of every way to store one matrix."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator) * 0.02
    codes = pruned_grid(weight, sparsity, bits, GROUP)[0].numpy().reshape(-1)
    dense = pack_nibbles(codes.reshape(1, -1))[0] if bits == 4 else codes
    kept = codes[codes != 2 ** (bits - 1)]
    share = len(kept) / len(codes)
    mask = entropy_of(np.array([len(kept), len(codes) - len(kept)]))
    with tempfile.TemporaryDirectory() as scratch:
        packed, entropy = (
            stored(Path(scratch), dense, bits, len(codes), level) for level in (False, True)
        )
    found = {
        "dense": len(dense),
        "packed": packed,
        "entropy": entropy,
        "zlib": len(zlib.compress(dense.tobytes(), 9)),
        "zstd": len(zstandard.ZstdCompressor(level=19).compress(dense.tobytes())),
        # One byte of a value (ONNX has no sparse nibbles) and its index.
        "sparse_initializer": 9 * len(kept),
    }
    bound = mask + share * entropy_of(np.bincount(kept))
    return {name: 8 * size / len(codes) for name, size in found.items()} | {"bound": bound}


def touch_memory(size: int) -> None:
    """Have ``size`` bytes touched and freed by another process.

    A virtual machine gives free memory back to its host, and waits for it when it is next touched:
    a cost of that machine, several times the load itself, and not of a way to load.
    """
    subprocess.run([sys.executable, "-c", f"b'x' * {size}"], check=True)


def child(runtime: str, folder: Path, threads: int) -> None:
    touch_memory(8 * file_bytes(folder))
    started = time.perf_counter()
    session = target(runtime).open_session(folder, False, threads)
    session.forward(np.array([[5, 6, 7]], np.int64))
    print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak_memory()}))


def deployments(root: Path, shape: dict[str, int], blocks: int) -> dict[str, dict[str, Path]]:
    """Runtime and bits -> way -> folder."""
    found: dict[str, dict[str, Path]] = {}
    base = root / "base"
    write_checkpoint(base, shape, 1)
    for bits in (4, 8):
        merged = root / f"merged-{bits}"
        write_merged(base, merged, 0.5, bits, GROUP, blocks)
        for runtime in ("openvino", "onnx"):
            folders = {way: root / f"{runtime}-{bits}-{way}" for way in WAYS}
            folders["dense"].mkdir()
            target(runtime).export(merged, folders["dense"], Export())
            for way in WAYS[1:]:
                pack(folders["dense"], folders[way], way == "entropy")
            found[f"{runtime} INT{bits}"] = folders
    return found


def loads(shape: dict[str, int], blocks: int, rounds: int, threads: int) -> dict[str, Any]:
    """Deployment -> way -> one entry a round."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        with redirect_stdout(sys.stderr):  # exporters talk
            made = deployments(Path(scratch), shape, blocks)
        for name, folders in made.items():
            found[name] = {way: [] for way in WAYS}
            for number in range(rounds + 1):
                for way in WAYS if number % 2 else WAYS[::-1]:
                    os.sync()  # nothing waits to be written, which would hold up a loader's
                    arguments = ("--child", name.partition(" ")[0], str(folders[way]))
                    run = in_a_process(__file__, *arguments, "--threads", str(threads))
                    if number:  # the first reads from the disk
                        found[name][way].append(run)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="256 wide, to see that it runs")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]), arguments.threads)
        return
    shape = SMALL if arguments.small else WIDE
    rows, values = [], {}
    ratios: dict[str, dict[str, float]] = {}
    for bits in (4, 8):
        for sparsity in SPARSITIES:
            found = sizes(bits, sparsity, shape["hidden_size"])
            values[f"INT{bits} at {sparsity}"] = found
            rows.append([f"INT{bits}", sparsity, *found.values()])
    print("bits/weight")
    table(["codes", "sparsity", *found], rows)
    rows = []
    for name, runs in loads(shape, arguments.blocks, arguments.rounds, arguments.threads).items():
        values[name] = runs
        for way in WAYS:
            pairs = list(zip(runs[way], runs["dense"], strict=True))
            seconds, peak = (
                spread([one[key] / dense[key] for one, dense in pairs])
                for key in ("seconds", "peak")
            )
            ratios |= {f"{name} {way} load": seconds, f"{name} {way} peak": peak}
            figures = [median(run[key] for run in runs[way]) for key in ("seconds", "peak")]
            rows.append(
                [name, way, figures[0], *seconds.values(), figures[1] / 2**20, *peak.values()]
            )
    print("\nloading")
    header = ["deployment", "way", "s", "ratio", "low", "high", "peak MiB", "ratio", "low", "high"]
    table(header, rows)
    finish("sparse_files", ratios, values)


if __name__ == "__main__":
    main()

"""Peak memory of exporting a Mistral-7B-shaped model, against the bytes of its checkpoint.

    python benchmarks/export_memory.py [--blocks 32] [--small]

Exports a merged INT4 checkpoint of the true width and vocabulary, in groups of 128, with every
exporter in a separate process. Bound: the checkpoint's bytes + 2 GiB. The kernel reports the peak
of the process, including imports and mapped file pages.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from document import finish, in_a_process, spread, table
from shapes import SMALL, WIDE, write_checkpoint, write_merged

from sqft_export.measure.worker import peak_memory
from sqft_export.model.checkpoint import file_bytes
from sqft_export.recipe.schema import Export
from sqft_export.targets import target

GIB = 2**30
KINDS = {"openvino": "openvino", "onnx fused": "onnx", "onnx standard": "onnx", "gguf": "gguf"}


def export(kind: str, merged: Path, folder: Path) -> dict[str, Any]:
    started = time.monotonic()
    graph = "standard" if kind == "onnx standard" else "fused"
    target(KINDS[kind]).export(merged, folder, Export(onnx_graph=graph))
    seconds = time.monotonic() - started
    return {"seconds": seconds, "peak": peak_memory(), "bytes": file_bytes(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--words", type=int, default=32768, help="size of the vocabulary")
    parser.add_argument("--small", action="store_true", help="256 wide, to see that it runs")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, merged, out = arguments.child
        print(json.dumps(export(kind, Path(merged), Path(out))))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base, merged = Path(scratch) / "base", Path(scratch) / "merged"
        write_checkpoint(base, SMALL if arguments.small else WIDE, 1, arguments.words)
        write_merged(base, merged, 0.5, 4, 128, arguments.blocks)
        stored = file_bytes(merged)
        bound = stored + 2 * GIB
        for kind in arguments.kinds:
            out = Path(scratch) / kind.replace(" ", "-")
            out.mkdir()
            found[kind] = in_a_process(__file__, "--child", kind, str(merged), str(out))
            for file in out.iterdir():
                if file.is_file():
                    file.unlink()
    rows = [
        [kind, run["seconds"], run["bytes"] / GIB, run["peak"] / GIB, run["peak"] / bound]
        for kind, run in found.items()
    ]
    print(f"{arguments.blocks} blocks, checkpoint {stored / GIB:.2f} GiB, bound {bound / GIB:.2f}")
    table(["export", "seconds", "GiB written", "peak GiB", "of bound"], rows)
    ratio = spread([run["peak"] / bound for run in found.values()])
    finish("export_memory", {"peak_over_bound": ratio}, {"checkpoint": stored, "runs": found})


if __name__ == "__main__":
    main()

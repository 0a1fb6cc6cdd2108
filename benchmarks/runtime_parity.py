"""Latency of our deployments and of the runtimes' own compression of the same float model.

    python benchmarks/runtime_parity.py [--blocks 4] [--rounds 5] [--bits 4 8] [--small]

A Mistral-shaped model, 1024 wide. OpenVINO: our IR against ``nncf.compress_weights`` on the same
float IR (INT4 symmetric in groups of 64, or INT8 per channel), embedding and head in INT8 in both.
ONNX Runtime: our graph against the GenAI model builder's own quantization, in groups of 64,
embedding and head in floats in both.

Both run in one process, interleaved pass by pass, so that a slow moment of the machine hits both. A
ratio compares the medians of one process; low and high are over the processes. optimum-onnx is
missing, since it needs an older transformers than this environment has.
"""

import argparse
import importlib.metadata
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from document import finish, in_a_process, spread, table
from shapes import MIDDLE, SMALL, write_checkpoint, write_merged

from sqft_export.recipe.schema import Export
from sqft_export.targets import target

GROUP = 64
PROMPT, TOKENS, REPEATS = 128, 32, 6
PEERS = {"openvino": "nncf", "onnx": "builder"}


def our_merged(base: Path, folder: Path, bits: int, words_too: bool) -> None:
    """Our merged model; ``words_too``: embedding and head in INT8, as NNCF has them."""
    from sqft_export.model.checkpoint import Checkpoint
    from sqft_export.model.storage import GridWriter
    from sqft_export.numerics.affine import fit_grid

    # NNCF's INT8 is per channel.
    write_merged(base, folder, 0.5, bits, None if words_too and bits == 8 else GROUP)
    if words_too:
        checkpoint = Checkpoint(base)
        with GridWriter(folder) as grids:
            for name in ("model.embed_tokens", "lm_head"):
                weight = checkpoint.tensor(f"{name}.weight").float()
                grids.add(name, fit_grid(weight, 8, weight.shape[1], True))


def nncf_folder(base: Path, folder: Path, bits: int) -> None:
    """The same float model compressed by NNCF, as optimum-intel does it."""
    import nncf
    import openvino as ov
    from optimum.exporters.openvino import export_from_model
    from optimum.intel import OVConfig
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    floats = folder / "floats"
    export_from_model(
        model, floats, task="text-generation-with-past", ov_config=OVConfig(dtype="fp32")
    )
    graph = ov.Core().read_model(floats / "openvino_model.xml")
    four = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": GROUP, "ratio": 1.0}
    eight = {"mode": nncf.CompressWeightsMode.INT8_SYM}
    graph = nncf.compress_weights(graph, **(four if bits == 4 else eight))
    ov.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)


def builder_folder(base: Path, folder: Path, bits: int) -> None:
    """The same float model quantized by ONNX Runtime GenAI's model builder."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    options = [f"block_size={GROUP}", "accuracy_level=4", "nodes_to_exclude=/lm_head/MatMul"]
    precision = f"int{bits}"
    arguments = ("", str(base), str(folder), precision, "cpu", str(folder / "cache"))
    create_model(*arguments, **parse_extra_options(*arguments, options))


def build(root: Path, base: Path, bits: int) -> dict[str, Path]:
    """Candidate -> folder."""
    folders: dict[str, Path] = {}
    for runtime, peer in PEERS.items():
        merged = root / f"merged-{runtime}-{bits}"
        our_merged(base, merged, bits, words_too=runtime == "openvino")
        ours, theirs = root / f"{runtime}-ours-{bits}", root / f"{runtime}-{peer}-{bits}"
        ours.mkdir()
        theirs.mkdir()
        target(runtime).export(merged, ours, Export())
        (nncf_folder if runtime == "openvino" else builder_folder)(base, theirs, bits)
        folders |= {f"{runtime} ours": ours, f"{runtime} {peer}": theirs}
    return folders


def child(runtime: str, folders: list[Path], number: int, threads: int) -> None:
    """Milliseconds of every pass, ours and theirs: over 128 tokens, and over one token after them.

    :param number: of the round; in every other one theirs is loaded first.
    """
    loaded = sorted((0, 1), reverse=bool(number % 2))
    opened = {who: target(runtime).open_session(folders[who], False, threads) for who in loaded}
    sessions = [opened[0], opened[1]]
    prompt = np.array([[5 + i % 300 for i in range(PROMPT)]], np.int64)
    token = np.array([[7]], np.int64)
    found = {"ttft": ([], []), "tpot": ([], [])}  # type: dict[str, tuple[list, list]]
    for repeat in range(REPEATS + 1):
        for session in sessions:
            session.reset()
        for step in range(1 + TOKENS):
            order = (0, 1) if (repeat + step) % 2 else (1, 0)
            for who in order:
                started = time.perf_counter()
                sessions[who].forward(token if step else prompt)
                if repeat:  # the first warms up
                    spent = 1e3 * (time.perf_counter() - started)
                    found["tpot" if step else "ttft"][who].append(spent)
    medians = {figure: [median(each) for each in both] for figure, both in found.items()}
    print(json.dumps(medians))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--bits", type=int, nargs="+", choices=(4, 8), default=[4, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="256 wide, to see that it runs")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        runtime, *folders = arguments.child
        child(runtime, [Path(f) for f in folders], arguments.number, arguments.threads)
        return
    rows, ratios, values = [], {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_checkpoint(root / "base", SMALL if arguments.small else MIDDLE, arguments.blocks)
        for bits in arguments.bits:
            folders = build(root, root / "base", bits)
            for runtime, peer in PEERS.items():
                pair = [str(folders[f"{runtime} {who}"]) for who in ("ours", peer)]
                options = ("--child", runtime, *pair, "--threads", str(arguments.threads))
                runs = [
                    in_a_process(__file__, *options, "--number", str(number))
                    for number in range(arguments.rounds)
                ]
                values[f"{runtime} INT{bits}"] = runs
                for figure in ("ttft", "tpot"):
                    ours, theirs = zip(*(run[figure] for run in runs), strict=True)
                    ratio = spread([a / b for a, b in zip(ours, theirs, strict=True)])
                    ratios[f"{runtime} INT{bits} {figure}: ours / {peer}"] = ratio
                    medians = [median(ours), median(theirs)]
                    row = [f"{runtime} INT{bits}", figure, peer, *medians, *ratio.values()]
                    rows.append(row)
    header = ["deployment", "figure", "peer", "ours ms", "peer ms", "ratio", "low", "high"]
    table(header, rows)
    print(
        ", ".join(
            f"{name} {importlib.metadata.version(name)}"
            for name in ("openvino", "nncf", "onnxruntime", "onnxruntime-genai")
        )
    )
    finish("runtime_parity", ratios, values)


if __name__ == "__main__":
    main()

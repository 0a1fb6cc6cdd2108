"""Speed of sparse weights: matrix products, and tokens per second in ``LLMPipeline``.

    python benchmarks/sparse_decode.py [--rounds 9] [--processes 3] [--blocks 8]
                                       [--model <SmolLM2>] [--keep <folder>] [--small]

Products: INT4 and INT8 in groups of 128, one token, 268 million weights of a 7B model's matrices
(4096 x 4096, 14336 x 4096, 4096 x 14336), far beyond any cache. All variants run in one process,
interleaved, and each measured pass follows an unmeasured one that puts caches in the same state:

    ours       dense; any mask at 50, 60 and 75 %; 2:4
    OpenVINO   its own kernel in its default mode, and with float32 and dynamic quantization by 128
    ONNX Runtime  MatMulNBits with accuracy level 4

Ours run as an operator of OpenVINO, on the threads of its arena. Printed are medians and quartiles
of the rounds and CPU time, with the clock, the read bandwidth of one thread and the load.

Pipelines: a 7B-shaped model of `--blocks` random blocks with the embedded model's vocabulary, and
SmolLM2-135M if `--model` names its folder, pruned to 50 % and rounded. They run on the runtime's
kernels, on our dense kernel, from mask and kept codes, and with the same codes in llama.cpp.
Printed are tokens per second, time to first token of 128 and 512, tokens per second of a batch,
energy per token where the processor reports it, and resident memory during one sequence and after
the long prompts and batches. Every pipeline runs in a separate process, interleaved, and imports
only what a deployment needs, without torch. ``--keep`` names a folder for the deployments.
"""

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from document import finish, in_a_process, table

from sqft_export.kernels.choice import kernel_model, stock_model
from sqft_export.kernels.extension import require_kernels
from sqft_export.kernels.library import Matrix, count_kept
from sqft_export.kernels.rewrite import resolve_format
from sqft_export.machine.counters import energy_joules, memory_now
from sqft_export.measure.decode import greedy
from sqft_export.targets import target

GROUP = 128
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
SMALL_SHAPES = ((256, 256), (896, 256), (256, 896))
SETS = 2  # of the three shapes
OURS: dict[str, float | str] = {
    "dense": 0.0,
    "mask 50 %": 0.5,
    "mask 60 %": 0.6,
    "mask 75 %": 0.75,
    "2:4": "2:4",
}
PEERS = ("OpenVINO", "OpenVINO f32, dynamic 128", "ONNX Runtime")
LLAMA = "llama.cpp"
WAYS = ("stock", "dense", "sparse", LLAMA)
UNLIKE = 512  # rows of a matrix, which the others repeat


def random_matrix(bits: int, rows: int, inputs: int, sparsity: float | str) -> Matrix:
    """Symmetric codes in groups of 128, signed; the share that is zero, or 2:4."""
    random, made = np.random.default_rng(0), min(rows, UNLIKE)
    codes = random.integers(1 - 2 ** (bits - 1), 2 ** (bits - 1), (made, inputs)).astype(np.int8)
    codes[codes == 0] = 1
    if isinstance(sparsity, str):
        dropped = random.random((made, inputs // 4, 4), np.float32).argsort(2).reshape(made, -1) < 2
    else:
        dropped = random.random((made, inputs), np.float32) < sparsity
    some = np.where(dropped, 0, codes).astype(np.uint8)
    flat = np.resize(some, (rows, inputs)).reshape(-1)
    stored = (flat[0::2] & 15) | (flat[1::2] << 4) if bits == 4 else flat
    scale = np.full((rows, inputs // GROUP), 0.01, np.float16)
    return Matrix(bits, rows, inputs, stored, 2 ** (bits - 1), None, scale)


class Way:
    """Products one after the other: one pass is one token through all matrices."""

    def __init__(self, requests: list[Any], stored: int):
        self.requests, self.stored = requests, stored

    def run(self) -> tuple[float, float]:
        """Wall and CPU seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        for request in self.requests:
            request()
        return time.perf_counter() - wall, time.process_time() - cpu


def openvino_way(models: list[Any], threads: int, stored: int, **properties: str) -> Way:
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"} | properties
    calls = []
    for model in models:
        request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        inputs = model.inputs[0].get_partial_shape()[1].get_length()
        request.set_input_tensor(ov.Tensor(np.ones((1, inputs), np.float32)))
        calls.append(request.infer)
    return Way(calls, stored)


def onnx_way(found: list[Matrix], threads: int) -> Way:
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    calls = []
    for matrix in found:
        rows, inputs, bits = matrix.rows, matrix.inputs, matrix.bits
        flip = matrix.flip * (17 if bits == 4 else 1)
        codes = (matrix.codes ^ np.uint8(flip)).reshape(rows, inputs // GROUP, GROUP * bits // 8)
        parts, nodes, outputs = [], [], []
        for copy in range(SETS):
            names = f"codes{copy}", f"scale{copy}"
            scale = np.ascontiguousarray(matrix.scale.astype(np.float32).reshape(-1))
            parts.append(onnx.numpy_helper.from_array(codes, names[0]))
            parts.append(onnx.numpy_helper.from_array(scale, names[1]))
            options = {"K": inputs, "N": rows, "bits": bits, "block_size": GROUP}
            nodes.append(
                helper.make_node(
                    *("MatMulNBits", ["x", *names], [f"y{copy}"]),
                    **(options | {"domain": "com.microsoft", "accuracy_level": 4}),
                )
            )
            shape = [1, rows]
            outputs.append(helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, shape))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs])
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(nodes, "products", [x], outputs, parts)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options_of = ort.SessionOptions()
        options_of.intra_op_num_threads = threads
        # Threads that wait for work by spinning would take the other ways' processor.
        options_of.add_session_config_entry("session.force_spinning_stop", "1")
        session = ort.InferenceSession(
            model.SerializeToString(), options_of, providers=["CPUExecutionProvider"]
        )
        feeds = {"x": np.ones((1, inputs), np.float32)}
        calls.append(lambda session=session, feeds=feeds: session.run(None, feeds))
    return Way(calls, sum(SETS * (m.codes.nbytes + 2 * m.scale.nbytes) for m in found))


def ways_of(bits: int, threads: int, shapes: tuple) -> tuple[dict[str, Way], list[Any]]:
    """Every way with the same threads, and what must stay alive."""
    kernels, made, held = require_kernels(), {}, []
    for name, sparsity in OURS.items():
        models, stored = [], 0
        for rows, inputs in shapes:
            matrix = random_matrix(bits, rows, inputs, sparsity)
            kept = count_kept(matrix)
            form = resolve_format("sparse" if sparsity else "dense", kept, matrix, kernels)
            if name.startswith("mask"):
                form = "mask"
            built = kernel_model(matrix, kept, form, SETS, kernels)
            assert built is not None
            models.append(built[0])
            held.append(built[1])
            stored += built[1].nbytes
        made[name] = openvino_way(models, threads, stored)
    dense = [random_matrix(bits, rows, inputs, 0.0) for rows, inputs in shapes]
    stored = sum(SETS * (m.codes.nbytes + m.scale.nbytes) for m in dense)
    models = [stock_model(matrix, SETS) for matrix in dense]
    made[PEERS[0]] = openvino_way(models, threads, stored)
    f32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}
    made[PEERS[1]] = openvino_way(models, threads, stored, **f32)
    made[PEERS[2]] = onnx_way(dense, threads)
    return made, held


ADDITIONS = """
#define ADD x += 1; __asm__ volatile("" : "+r"(x));
unsigned long additions(long times) {
  unsigned long x = 0;
  for (long i = 0; i < times; i++) { ADD ADD ADD ADD ADD ADD ADD ADD }
  return x;
}
"""


def clock() -> Callable[[], float]:
    """GHz by a chain of additions of one cycle each, since the system reports a nominal clock."""
    with tempfile.TemporaryDirectory() as scratch:
        source, library = Path(scratch) / "additions.c", Path(scratch) / "additions.so"
        source.write_text(ADDITIONS)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        additions = ctypes.CDLL(str(library)).additions
    additions.argtypes, additions.restype = [ctypes.c_long], ctypes.c_ulong

    def measured() -> float:
        started = time.perf_counter()
        return int(additions(2**22)) / (time.perf_counter() - started) / 1e9

    return measured


def read_bandwidth(buffer: np.ndarray) -> float:
    """GB/s that one thread reads, by our kernel that computes least per byte."""
    started = time.perf_counter()
    np.bitwise_xor.reduce(buffer)
    return buffer.nbytes / (time.perf_counter() - started) / 1e9


def products(bits: int, threads: int, rounds: int, shapes: tuple) -> dict[str, Any]:
    """Medians of every variant, interleaved, in this process."""
    made, held = ways_of(bits, threads, shapes)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    buffer, hertz = np.ones(2**25, np.uint64), clock()
    bandwidths, clocks, random = [], [], np.random.default_rng(0)
    order = list(made)
    for number in range(rounds + 1):
        random.shuffle(order)
        clocks.append(hertz())
        bandwidths.append(read_bandwidth(buffer))
        for name in order:
            made[name].run()
            sample = made[name].run()
            if number:
                samples[name].append(sample)
    del held
    found = {}
    for name, taken in samples.items():
        wall, cpu = (np.array([t[i] for t in taken]) for i in (0, 1))
        low, middle, high = np.percentile(wall, [25, 50, 75])
        found[name] = {
            "ms": middle * 1e3,
            "low": low * 1e3,
            "high": high * 1e3,
            "cpu_ms": float(np.median(cpu)) * 1e3,
            "gb_per_s": made[name].stored / middle / 1e9,
            "mb": made[name].stored / 1e6,
        }
    return {
        "ways": found,
        "bandwidth": median(bandwidths),
        "ghz": median(clocks),
        "load": os.getloadavg()[0],
    }


def ratios_of(found: dict[str, Any]) -> dict[str, float]:
    """Times as fast, of one table."""
    ways = {name: way["ms"] for name, way in found["ways"].items()}
    fastest = min(ways[name] for name in PEERS)
    return {
        "50_over_fastest_peer": fastest / ways["mask 50 %"],
        "2:4_over_fastest_peer": fastest / ways["2:4"],
        "dense_over_fastest_peer": fastest / ways["dense"],
        "dense_over_openvino": ways[PEERS[0]] / ways["dense"],
        **{f"{p}_over_own_dense": ways["dense"] / ways[f"mask {p} %"] for p in (50, 60, 75)},
        "2:4_over_own_dense": ways["dense"] / ways["2:4"],
    }


def run_products(rounds: int, shapes: tuple) -> tuple[dict[str, Any], dict[str, float]]:
    values: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for bits in (4, 8):
        for threads in (1, 2):
            arguments = ("--products", str(bits), str(threads), "--rounds", str(rounds))
            small = ("--small",) if shapes[0][0] < 1024 else ()
            found = in_a_process(__file__, *arguments, *small)
            name = f"INT{bits}, {threads} thread{'s' if threads > 1 else ''}"
            values[name] = found
            speed, ghz, load = (found[key] for key in ("bandwidth", "ghz", "load"))
            print(f"\n{name}: one thread reads {speed:.1f} GB/s, {ghz:.2f} GHz, load {load:.2f}")
            header = ["way", "MB", "ms", "25 %", "75 %", "CPU ms", "GB/s"]
            rows = [
                [way, f["mb"], f["ms"], f["low"], f["high"], f["cpu_ms"], f["gb_per_s"]]
                for way, f in found["ways"].items()
            ]
            table(header, rows)
            end = "" if threads == 1 else "_2_threads"
            ratios |= {f"int{bits}_{k}{end}": v for k, v in ratios_of(found).items()}
    return values, ratios


def deployment(source: Path, root: Path, bits: int, sparsity: float, blocks: int | None) -> None:
    """A packed OpenVINO folder and a GGUF of a float checkpoint, pruned by magnitude, rounded."""
    from shapes import write_merged

    from sqft_export.packed.folders import pack
    from sqft_export.recipe.schema import Export

    merged, folder = root / "merged", root / "dense"
    width = json.loads((source / "config.json").read_text())["hidden_size"]
    write_merged(source, merged, sparsity, bits, GROUP if width % GROUP == 0 else 64, blocks)
    for name, place in (("gguf", root / "gguf"), ("openvino", folder)):
        place.mkdir()
        target(name).export(merged, place, Export())
    pack(folder, root / "packed")  # the last of it, so that there is all or it is made again
    shutil.rmtree(merged)
    shutil.rmtree(folder)


class Pipeline:
    """``LLMPipeline`` on one of the ways that it has."""

    def __init__(self, folder: Path, way: str, threads: int):
        import openvino_genai

        from sqft_export.packed.loaders import load_openvino_genai

        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.pipe = load_openvino_genai(folder / "packed", execution=way, **settings)
        self.config = openvino_genai.GenerationConfig(
            do_sample=False, ignore_eos=True, apply_chat_template=False, max_new_tokens=2
        )

    def __call__(self, ids: np.ndarray, new: int) -> tuple[float, float]:
        """Seconds of the first token, and of each later one."""
        import openvino as ov
        import openvino_genai

        self.config.max_new_tokens = new
        inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        found = self.pipe.generate(inputs, self.config).perf_metrics
        return found.get_ttft().mean / 1e3, found.get_tpot().mean / 1e3


class Llama:
    """llama.cpp with the same codes, whatever of them is zero."""

    def __init__(self, folder: Path, threads: int):
        self.session = target("gguf").open_session(folder / "gguf", False, threads)

    def __call__(self, ids: np.ndarray, new: int) -> tuple[float, float]:
        first, *later = [seconds for _, seconds in greedy(self.session, ids, new)]
        return first, mean(later) if later else 0.0


def pipeline(folder: Path, way: str, threads: int, long: bool) -> dict[str, Any]:
    """Tokens per second, TTFT, memory and energy of one way, in this process."""
    pipe = Llama(folder, threads) if way == LLAMA else Pipeline(folder, way, threads)
    gc.collect()
    random, found = np.random.default_rng(0), {}

    def measured(prompt: int, new: int, batch: int = 1) -> tuple[float, float]:
        return pipe(random.integers(5, 100, (batch, prompt)).astype(np.int64), new)

    measured(16, 4)
    before = energy_joules()
    tokens = [measured(16, 24)[1] for _ in range(3)]
    after = energy_joules()
    found["tokens_per_second"] = 1 / min(tokens)
    found["memory_bytes"] = memory_now()
    for prompt in (128, 512) if long else (128,):
        measured(prompt, 1)
        found[f"ttft_{prompt}_ms"] = 1e3 * min(measured(prompt, 1)[0] for _ in range(2))
    for batch in (4, 16):
        # The pipeline's own figure of a batch is per token of all rows: by the clock instead.
        seconds = []
        for new in (2, 14):
            started = time.perf_counter()
            measured(16, new, batch)
            seconds.append(time.perf_counter() - started)
        found[f"tokens_per_second_{batch}"] = 12 * batch / (seconds[1] - seconds[0])
    found["memory_later_bytes"] = memory_now()
    if before is not None and after is not None:
        found["joules_a_token"] = (after - before) / (3 * 24)
    return found


def run_pipelines(
    name: str, folders: dict[int, Path], rounds: int, long: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    """:param folders: what :func:`deployment` made, by bits."""
    values: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for bits, folder in folders.items():
        for threads in (1, 2):
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for number in range(rounds):
                for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                    arguments = ("--pipeline", str(folder), way, str(threads))
                    runs[way].append(
                        in_a_process(__file__, *arguments, *(["--long"] if long else []))
                    )
            middle = {
                way: {key: median(run[key] for run in taken) for key in taken[0]}
                for way, taken in runs.items()
            }
            print(f"\n{name}, INT{bits}, {threads} threads, {rounds} processes per variant")
            keys = list(middle["stock"])
            table(["way", *keys], [[way, *found.values()] for way, found in middle.items()])
            values[f"{name} INT{bits}, {threads} threads"] = runs
            end = "" if threads == 1 else "_2_threads"
            for way in WAYS[1:]:
                for key in keys:
                    ratio = middle[way][key] / middle["stock"][key]
                    ratios[f"genai_{name}_int{bits}_{way}_{key}_over_openvino{end}"] = ratio
    return values, ratios


def model_folders(
    source: Path, root: Path, blocks: int | None, bits: tuple[int, ...]
) -> dict[int, Path]:
    found = {one: root / f"int{one}" for one in bits}
    with redirect_stdout(sys.stderr):  # exporters talk
        for one, place in found.items():
            if not (place / "packed").is_dir():
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                deployment(source, place, one, 0.5, blocks)
    return found


def all_folders(arguments: argparse.Namespace, root: Path) -> dict[str, dict[int, Path]]:
    """The models that the pipelines run, by model and bits."""
    from shapes import SMALL, WIDE, write_checkpoint

    base, blocks = root / "base", arguments.blocks
    if not base.is_dir():
        write_checkpoint(base, SMALL if arguments.small else WIDE, 1)
    found = {"7b": model_folders(base, root / "7b", blocks, (4, 8))}
    if arguments.model:
        found["smollm2"] = model_folders(arguments.model, root / "smollm2", None, (4, 8))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=8, help="of the 7B-shaped model")
    parser.add_argument("--processes", type=int, default=3, help="of every pipeline")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M")
    parser.add_argument("--keep", type=Path, help="folder that deployments are kept in")
    parser.add_argument("--small", action="store_true", help="256 wide, to see that it runs")
    parser.add_argument("--products", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pipeline", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--long", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shapes = SMALL_SHAPES if arguments.small else SHAPES
    if arguments.products:
        bits, threads = arguments.products
        print(json.dumps(products(bits, threads, arguments.rounds, shapes)))
        return
    if arguments.pipeline:
        folder, way, threads = arguments.pipeline
        print(json.dumps(pipeline(Path(folder), way, int(threads), arguments.long)))
        return
    print(f"kernels: {require_kernels().name}")
    with tempfile.TemporaryDirectory() as scratch:
        folders = all_folders(arguments, arguments.keep or Path(scratch))
        values, ratios = run_products(arguments.rounds, shapes)
        for name, made in folders.items():
            long = name != "7b" or not arguments.small
            found = run_pipelines(name, made, arguments.processes, long)
            values, ratios = values | found[0], ratios | found[1]
    finish("sparse_decode", {k: {"median": v} for k, v in ratios.items()} | _named(ratios), values)


def _named(ratios: dict[str, float]) -> dict[str, Any]:
    """The ratios by the names that the project's goals have."""
    names = {
        "genai_7b_int4_50_over_openvino": "genai_7b_int4_sparse_tokens_per_second_over_openvino",
        "genai_smollm2_int4_50_over_openvino": (
            "genai_smollm2_int4_sparse_tokens_per_second_over_openvino"
        ),
        "resident_memory_int4_50_over_openvino": "genai_7b_int4_sparse_memory_bytes_over_openvino",
    }
    return {new: {"median": ratios[old]} for new, old in names.items() if old in ratios}


if __name__ == "__main__":
    main()

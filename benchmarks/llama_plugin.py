"""llama.cpp with and without our kernels: tokens per second, memory and load time.

    python benchmarks/llama_plugin.py --smollm2 <folder of SmolLM2-135M-Instruct>

It needs llama-cpp-python as shared libraries, compiled for this machine: ``pip install
llama-cpp-python`` with a compiler, or ``LLAMA_CPP_LIB_PATH=<folder of libllama.so>``. Each
measurement runs in its own process; llama.cpp and ours are interleaved. The file of 7B shape has
eight random blocks. Both sides read the same file, in which SmolLM2's head is Q8_0.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from document import finish, spread, table

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

BLOCKS, VOCABULARY = 8, 1024
SHAPE = {"hidden": 4096, "inner": 11008, "heads": 32}
SMALL_SHAPE = {"hidden": 256, "inner": 512, "heads": 4}
PROMPT, NEW_TOKENS = 128, 32
# file -> bits and share of zeros
FILES = {"int4_0": (4, 0.0), "int4_50": (4, 0.5), "int8_50": (8, 0.5)}
SIDES: dict[str, dict[str, str]] = {"llama.cpp": {"SQFT_GGML": "off"}, "ours": {}}


def quantize_rows(weight: np.ndarray, bits: int, sparsity: float) -> np.ndarray:
    """Round a float32 weight to Q4_0 or Q8_0, the smallest values of each block to zero."""
    from sqft_export.numerics.codes import from_arrays
    from sqft_export.targets.gguf.blocks import Q4_0, Q8_0, to_blocks

    rows, inputs = weight.shape
    parts = weight.reshape(rows, inputs // 32, 32)
    if sparsity:
        dropped = np.argpartition(np.abs(parts), int(32 * sparsity), axis=2)
        parts = parts.copy()
        np.put_along_axis(parts, dropped[..., : int(32 * sparsity)], 0, axis=2)
    top = 2 ** (bits - 1)
    scale = (np.abs(parts).max(axis=2) / (top - 1)).astype(np.float16)
    divisor = np.where(scale == 0, 1, scale).astype(np.float32)
    codes = np.rint(parts / divisor[..., None]).clip(-top, top - 1) + top
    zero = np.full(scale.shape, top, np.uint8)
    made = from_arrays(codes.astype(np.uint8).reshape(rows, inputs), scale, zero, bits)
    return to_blocks(made, Q4_0 if bits == 4 else Q8_0)


def random_matrix(rows: int, inputs: int, bits: int, sparsity: float) -> np.ndarray:
    rng = np.random.default_rng(rows + inputs)
    weight = rng.standard_normal((rows, inputs), dtype=np.float32) * np.float32(inputs**-0.5)
    return quantize_rows(weight, bits, sparsity)


def block_tensors(shape: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    """Yield name, rows and inputs of the matrices of a block."""
    hidden, inner = shape["hidden"], shape["inner"]
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        yield name, hidden, hidden
    yield from (("ffn_gate", inner, hidden), ("ffn_up", inner, hidden))
    yield "ffn_down", hidden, inner


def write_random(out: Path, shape: dict[str, int], bits: int, sparsity: float) -> None:
    """Write a Llama of random blocks. All blocks have the same bytes, each in its own place."""
    import gguf

    hidden = shape["hidden"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(shape["inner"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // shape["heads"])
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    matrices = {
        name: (rows, inputs, functools.partial(random_matrix, rows, inputs, bits, sparsity))
        for name, rows, inputs in block_tensors(shape)
    }
    head = functools.partial(random_matrix, VOCABULARY, hidden, 8, 0.0)
    _write(writer, hidden, bits, matrices, head)


def _write(
    writer: "GGUFWriter",
    hidden: int,
    bits: int,
    matrices: Mapping[str, tuple[int, int, Callable[[], np.ndarray]]],
    head: Callable[[], np.ndarray],
) -> None:
    """Write header and tensors of a random model."""
    import gguf

    kinds = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}
    norm, waiting = np.ones(hidden, np.float32), []
    for name in ("token_embd", "output"):
        data = head()
        writer.add_tensor_info(f"{name}.weight", data.shape, data.dtype, data.nbytes, kinds[8])
        waiting.append(head)
    writer.add_tensor_info("output_norm.weight", norm.shape, norm.dtype, norm.nbytes)
    waiting.append(lambda: norm)
    for block in range(BLOCKS):
        for name, (rows, inputs, make) in matrices.items():
            shape = (rows, inputs // 32 * (18 if bits == 4 else 34))
            size = shape[0] * shape[1]
            title = f"blk.{block}.{name}.weight"
            writer.add_tensor_info(title, shape, np.dtype(np.uint8), size, kinds[bits])
            waiting.append(make)
        for name in ("attn_norm", "ffn_norm"):
            title = f"blk.{block}.{name}.weight"
            writer.add_tensor_info(title, norm.shape, norm.dtype, norm.nbytes)
            waiting.append(lambda: norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    made: dict[int, np.ndarray] = {}
    for make in waiting:
        if id(make) not in made:
            made[id(make)] = make()
        writer.write_tensor_data(made[id(make)])
    writer.close()


def write_quantized(floats: "GGUFReader", out: Path, bits: int, sparsity: float) -> None:
    """Write a copy of a float GGUF file with quantized blocks and a Q8_0 head."""
    import gguf

    writer = gguf.GGUFWriter(out, floats.fields["general.architecture"].contents())
    for key, field in floats.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inside = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inside)
    for tensor in floats.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
            continue
        in_block = tensor.name.startswith("blk.")
        chosen = (bits, sparsity) if in_block else (8, 0.0)
        kind = gguf.GGMLQuantizationType.Q4_0 if chosen[0] == 4 else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, quantize_rows(values, *chosen), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_files(folder: Path, smollm2: Path | None, shape: dict[str, int]) -> dict[str, Path]:
    """Write all GGUF files; return name and path of each."""
    from sqft_export.packed.gguf_file import read_gguf
    from sqft_export.recipe.schema import Export
    from sqft_export.targets.gguf import export

    found = {}
    for name, (bits, sparsity) in FILES.items():
        out = found[f"7b_{name}"] = folder / f"7b_{name}.gguf"
        if not out.exists():
            write_random(out, shape, bits, sparsity)
    if smollm2:
        floats = folder / "smollm2"
        if not floats.exists():
            floats.mkdir()
            export(smollm2, floats, Export())
        for name, (bits, sparsity) in FILES.items():
            out = found[f"smollm2_{name}"] = folder / f"smollm2_{name}.gguf"
            if not out.exists():
                write_quantized(read_gguf(floats / "model.gguf"), out, bits, sparsity)
    return found


def measure(file: Path, threads: list[int], repeats: int) -> dict[str, float]:
    """Load a file in this process; return tokens per second, seconds and MiB."""
    import llama_cpp

    import sqft_export
    from sqft_export.machine.counters import memory_now

    if os.environ.get("SQFT_GGML") != "off":
        sqft_export.use_in_llama_cpp()
    llama_cpp.llama_backend_init()
    began = time.perf_counter()
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
    assert model, file
    found = {"load_seconds": time.perf_counter() - began}
    for count in threads:
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = 512, count, count
        context = llama_cpp.llama_init_from_model(model, options)
        for kind, tokens, passes in (("prompt", PROMPT, 1), ("decode", 1, NEW_TOKENS)):
            times = time_passes(context, tokens, passes, repeats)
            found[f"{kind}_{count}"] = tokens * passes / statistics.median(times)
        llama_cpp.llama_free(context)
    found["resident_mib"] = memory_now() / 2**20
    return found


def time_passes(context: object, tokens: int, passes: int, repeats: int) -> list[float]:
    """Return the seconds of ``passes`` calls of ``tokens`` tokens each; one more is a warm-up."""
    import llama_cpp

    ids = (llama_cpp.llama_token * tokens)(*[7 * i % VOCABULARY for i in range(tokens)])
    batch, times = llama_cpp.llama_batch_get_one(ids, tokens), []
    for _ in range(repeats + 1):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        began = time.perf_counter()
        for _ in range(passes):
            assert not llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_synchronize(context)
        times.append(time.perf_counter() - began)
    return times[1:]


def measure_in_process(side: str, file: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one file on one side in its own process."""
    settings = SIDES[side] | ({"SQFT_KERNELS": arguments.isa} if arguments.isa else {})
    settings |= {"SQFT_GROUP": str(arguments.group), "SQFT_CHOICE": arguments.choice}
    command = [sys.executable, __file__, "--measure", str(file)]
    command += ["--threads", *map(str, arguments.threads), "--repeats", str(arguments.repeats)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}, {file.name}:\n{done.stderr[-3000:]}")
    for line in done.stderr.splitlines():
        if line.startswith("sqft: "):
            print(f"{file.name}: {line.removeprefix('sqft: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(files: dict[str, Path], arguments: argparse.Namespace) -> None:
    """Interleave both sides over all rounds, print a table, and end with the document."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for number in range(arguments.rounds):
        for name, file in files.items():
            sides = found.setdefault(name, {side: [] for side in SIDES})
            for side in sides if number % 2 else reversed(sides):
                sides[side].append(measure_in_process(side, file, arguments))
    ratios, rows = {}, []
    for name, sides in found.items():
        for what in sides["ours"][0]:
            pairs = zip(sides["ours"], sides["llama.cpp"], strict=True)
            key = f"{name}_{what}_over_llama_cpp"
            ratios[key] = spread([ours[what] / theirs[what] for ours, theirs in pairs])
            medians = [
                round(statistics.median(one[what] for one in sides[side]), 2) for side in SIDES
            ]
            rows.append([name, what, *medians, *(round(r, 2) for r in ratios[key].values())])
    table(["file", "measure", *SIDES, "ratio", "low", "high"], rows)
    settings = {"group": arguments.group, "isa": arguments.isa, "prompt": PROMPT}
    settings["choice"] = arguments.choice
    finish("llama_plugin", ratios, {"measurements": found, "settings": settings})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smollm2", type=Path, help="Hugging Face folder")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--group", type=int, choices=(32, 64, 128), default=32)
    parser.add_argument(
        "--choice",
        choices=("ours", "measured"),
        default="ours",
        help="measured: shapes that llama.cpp multiplies faster are left to it",
    )
    parser.add_argument("--isa", help="our instruction set, such as avx2; default: the fastest")
    parser.add_argument("--only", nargs="+", help="names of files, such as 7b_int4_0")
    parser.add_argument("--small", action="store_true", help="a narrow model, to try the script")
    parser.add_argument("--files", type=Path, help="folder that keeps the files between runs")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.threads, arguments.repeats)))
        return
    shape = SMALL_SHAPE if arguments.small else SHAPE
    with tempfile.TemporaryDirectory(prefix="llama-plugin-") as scratch:
        folder = arguments.files or Path(scratch)
        folder.mkdir(exist_ok=True)
        files = make_files(folder, arguments.smollm2, shape)
        compare({n: f for n, f in files.items() if n in (arguments.only or files)}, arguments)


if __name__ == "__main__":
    main()

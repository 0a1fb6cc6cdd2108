"""Our GGUF file compared with llama.cpp's own conversion of the same merged model.

    python benchmarks/gguf_parity.py [--model <SmolLM2> --task <folder of sets>] [--items 60]
                                     [--runs <folder>] [--rounds 5] [--small]

llama.cpp's converter dequantizes a GPTQ checkpoint, and its quantizer then chooses new scales.
The benchmark compares files of one merged model: ours by codes, and llama.cpp's Q4_0 and Q8_0 of
the same numbers in float32 (quantizer of ``cyllama``; embedding and head stored like ours). Torch
is the reference. Columns: bytes, perplexity ratio, mean KL divergence in nats per token, share of
tokens with the same top-1 successor, accuracy on the task, and milliseconds per token
(interleaved).

Models: the embedded model, tuned by its recipe; and SmolLM2-135M if `--model` names its folder
(from the hub), pruned and quantized by its recipe without training. stories260K
has rows of 172, which ggml's blocks of 32 do not divide: the recipe refuses it in ``plan``.
"""

import argparse
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from document import finish, spread, table

from sqft_export.data.items import Data, load_tokenizer, stop_ids
from sqft_export.data.scoring import accuracy_of, judge, questions
from sqft_export.measure.decode import measure_latency
from sqft_export.measure.jobs import LatencyRequest
from sqft_export.measure.likelihood import distributions, score
from sqft_export.recipe.load import load_recipe
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import Session, target
from sqft_export.targets.folder import GRAPHS
from sqft_export.targets.gguf.session import write_float32

ROOT = Path(__file__).parent.parent
THEIRS = {"llama.cpp Q4_0": 2, "llama.cpp Q8_0": 7}  # its numbers of the types
COMPARED = 40  # items whose distributions are compared
SMALL = ("adapt.steps=4", "calibration.samples=4", "verify.prompts=2")


def requantized(floats: Path, ours: Path, folder: Path, kind: int) -> Path:
    """A folder like ours whose file llama.cpp's quantizer made; embedding and head as ours are."""
    import gguf
    from cyllama.llama import llama_cpp

    shutil.copytree(ours, folder, ignore=shutil.ignore_patterns("*.gguf", "provenance.json"))
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype = kind
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(ours / GRAPHS["gguf"]).tensors}
    outer = int(tensors["token_embd.weight"].tensor_type)
    params.token_embedding_type = params.output_tensor_type = outer
    llama_cpp.model_quantize(str(floats), str(folder / GRAPHS["gguf"]), params)
    return folder


def measured(session: Session, asked: dict[str, Any]) -> dict[str, Any]:
    found = score(session, asked["questions"])
    said = distributions(session, asked["sequences"])
    return {"score": found, "said": said}


def compared(theirs: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Against torch: KL divergence and the share of equal top-1 tokens."""
    one, other = theirs.astype(np.float64), ours.astype(np.float64)
    divergence = (np.exp(one) * (one - other)).sum(axis=1)
    return {
        "kl": float(divergence.mean()),
        "same_top": float((one.argmax(axis=1) == other.argmax(axis=1)).mean()),
    }


def compare(name: str, recipe: Any, runs: Path, items: int, rounds: int) -> dict[str, Any]:
    """Every way of one recipe's merge."""
    with redirect_stdout(sys.stderr):
        artifacts = run_recipe(recipe, runs / name, ("verify",))
    merged, ours = (artifacts[n].path / "model" for n in ("merge", "export-gguf"))
    tokenizer = load_tokenizer(merged)
    chosen = Data(recipe, tokenizer).test[:items]
    asked: dict[str, Any] = {
        "questions": questions(recipe, chosen, stop_ids(merged, tokenizer)),
        "sequences": [item.ids for item in chosen[:COMPARED]],
    }
    with tempfile.TemporaryDirectory() as scratch:
        floats = Path(scratch) / "float32.gguf"
        write_float32(ours / GRAPHS["gguf"], floats)
        folders = {"ours": ours} | {
            way: requantized(floats, ours, Path(scratch) / way, kind)
            for way, kind in THEIRS.items()
        }
        sizes = {w: (f / GRAPHS["gguf"]).stat().st_size for w, f in folders.items()}
        floats.unlink()
        sessions = {w: target("gguf").open_session(f, False, None) for w, f in folders.items()}
        reference = measured(target("torch").open_session(merged, True, None), asked)
        rows = {"torch": {"bytes": 0, "kl": 0.0, "same_top": 1.0, "ms": float("nan")}}
        found = {"torch": reference} | {w: measured(s, asked) for w, s in sessions.items()}
        taken = timed(sessions, asked["sequences"][0][:32], rounds)
    for way in folders:
        size = {"bytes": sizes[way], "ms": taken[way]}
        rows[way] = size | compared(reference["said"], found[way]["said"])
    for way, one in found.items():
        perplexity = one["score"].perplexity / reference["score"].perplexity
        right = accuracy_of(judge(recipe, chosen, one["score"], tokenizer), one["score"])
        rows[way] |= {"perplexity_ratio": perplexity, "accuracy": right}
    return rows


def timed(sessions: dict[str, Session], prompt: list[int], rounds: int) -> dict[str, float]:
    """Milliseconds a token, the median over rounds in which files take turns."""
    samples: dict[str, list[float]] = {way: [] for way in sessions}
    request = LatencyRequest(prompt=prompt, new_tokens=24, repeats=1)
    for number in range(rounds):
        ways = list(sessions) if number % 2 == 0 else list(sessions)[::-1]
        for way in ways:
            samples[way] += measure_latency(sessions[way], request).tpot
    return {way: median(taken) for way, taken in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M")
    parser.add_argument("--task", type=Path, help="folder with ARC-Easy, for SmolLM2")
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--runs", type=Path, help="keep what is made here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="hardly tuned, to see that it runs")
    arguments = parser.parse_args()
    asked = {"tiny": load_recipe(ROOT / "recipes/tiny.yaml", SMALL if arguments.small else ())}
    if arguments.model:
        settings = ["adapt=none", "export.sparse_execution=false"]
        settings += ["export.targets=[gguf]", "verify.prompts=4"]
        settings += [f"task.folder={arguments.task.resolve()}"] if arguments.task else []
        recipe = load_recipe(ROOT / "recipes/smollm2.yaml", tuple(settings), arguments.model)
        asked["smollm2"] = recipe
    values, ratios = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, recipe in asked.items():
            runs = arguments.runs or Path(scratch)
            rows = compare(name, recipe, runs, arguments.items, arguments.rounds)
            values[name] = rows
            print(f"\n{name}, {arguments.items} items")
            keys = ["bytes", "kl", "same_top", "perplexity_ratio", "accuracy", "ms"]
            table(["way", *keys], [[w, *(float(row[k]) for k in keys)] for w, row in rows.items()])
            ours, theirs = rows["ours"], rows["llama.cpp Q4_0"]
            for what, key in (("kl", "kl"), ("ms", "ms"), ("bytes", "bytes")):
                ratio = ours[key] / theirs[key]
                ratios[f"{name}_{what}_ours_over_requantized"] = spread([ratio])
    finish("gguf_parity", ratios, values)


if __name__ == "__main__":
    main()

"""Rows of the benchmark table: model, size, latency, accuracy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft_export.data.scoring import Judged, accuracy_by_set, accuracy_of
from sqft_export.measure.statistics import mcnemar, mean_interval, percentiles
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.targets.folder import kind_of

# For every target, the first words of the names of its deployments' rows.
TITLES = {"openvino": "OpenVINO", "onnx": "ONNX Runtime", "gguf": "llama.cpp"}
DEPLOYMENT_ROWS = tuple(TITLES.values())
DENSE = "dense base"
FINAL_ROWS = ("merged", *DEPLOYMENT_ROWS)  # the merged model and its deployments
MODEL_FILES = (
    *("*.safetensors", "*.bin", "*.xml", "*.onnx", "*.data", "*.onnx_adapter", "*.gguf"),
    "*.sqft",
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    kind: torch, adapted, openvino, onnx or gguf; selects how the worker opens the folder.
    stored: files and folders whose model files count as its size.
    sparsity: share of zero weights in the decoder's Linears, 0 to 1.
    device: cpu, gpu or npu.
    """

    name: str
    kind: str
    folder: Path
    stored: tuple[Path, ...]
    sparsity: float
    device: str = "cpu"


def stored_bytes(paths: tuple[Path, ...]) -> int:
    """Return the bytes of all model files: weights and graphs, no tokenizers or configs."""
    files = {file for path in paths for file in _model_files(path)}
    return sum(file.stat().st_size for file in files)


def _model_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    checkpoint = TensorFiles(path)
    if (path / "config.json").is_file() and checkpoint.exists and kind_of(path) == "torch":
        # Only the files that are loaded: the folder may hold the weights in a second format.
        grids = path.glob("grids*.safetensors")
        return [*(path / name for name in checkpoint.shards), *grids]
    found = [file for pattern in MODEL_FILES for file in path.glob(pattern)]
    return [file for file in found if "tokenizer" not in file.name]


def latency_row(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the median, 10th and 90th percentile of TTFT and TPOT over all processes of a row."""
    row = {}
    for figure in ("ttft", "tpot"):
        samples = [sample for run in runs for sample in run[f"{figure}_samples"]]
        low, middle, high = percentiles(samples, 10, 50, 90)
        row[figure] = {"median_ms": middle, "p10_ms": low, "p90_ms": high}
    return row


def accuracy_row(
    judged: list[Judged], result: dict[str, Any], first_right: list[bool]
) -> dict[str, Any]:
    """Return the accuracy with its 95 % interval, per set, and compared with the first row.

    :param judged: empty for plain text, whose accuracy counts tokens and has no interval.
    :param result: of ``likelihood.score``.
    :param first_right: whether the first row answered each item right.
    :return: ``p_same_as_first`` is the p-value of McNemar's test.
    """
    right = [answer.right for answer in judged]
    by_set: dict[str, list[float]] = {}
    for answer in judged:
        by_set.setdefault(answer.item.source, []).append(answer.points)
    sets = [sum(s) for s in by_set.values()], [len(s) for s in by_set.values()]
    return {
        "accuracy": accuracy_of(judged, result),
        "interval": mean_interval(*sets) if right else None,
        "p_same_as_first": mcnemar(right, first_right or right) if right else None,
        "accuracy_by_set": accuracy_by_set(judged),
    }


def answer_entry(judged: Judged) -> dict[str, Any]:
    """Return the line of ``items.jsonl`` for one answered item."""
    item = judged.item
    return {
        "set": item.source,
        "answer": judged.answer,
        "expected": item.text,
        "right": judged.right,
        **({} if judged.score is None else {"score": judged.score}),
    }

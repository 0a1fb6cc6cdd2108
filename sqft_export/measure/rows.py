"""Rows of the benchmark table: model, size, latency, accuracy."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from sqft_export.data.scoring import Judged, Scores, accuracy_by_set, accuracy_of
from sqft_export.kernels.choice import STOCK
from sqft_export.measure.jobs import LatencySamples
from sqft_export.measure.results import Accuracy, AnswerEntry, LatencySpread, RowKind, Runtime
from sqft_export.measure.statistics import mcnemar, mean_interval, percentiles
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.packed.folders import PACKED, SPARSE
from sqft_export.targets.execution import LLAMA_CPP_WITH_KERNELS
from sqft_export.targets.folder import kind_of

ON_KERNELS = "-kernels"  # end of the id of a deployment that also runs on our kernels
# Name of every target for readers.
TITLES: dict[Runtime, str] = {
    "openvino": "OpenVINO",
    "onnx": "ONNX Runtime",
    "gguf": "llama.cpp",
    "web": "web page",
}
MODEL_FILES = (
    *("*.safetensors", "*.bin", "*.xml", "*.onnx", "*.data", "*.onnx_adapter", "*.gguf"),
    "*.sqft",
)


@dataclass(frozen=True)
class Row:
    """A model to measure.

    id: unique in a benchmark and the same in every run: ``dense``, ``dense-lora``, ``sparse``,
        ``sparse-reconstructed``, ``sparse-quantized``, ``adapted``, ``merged``; a deployment has
        its target, followed by ``-packed`` or ``-sparse``; a peer has its name in
        ``recipe.peers.PEERS``, ``lora-then-int4`` followed by its target. A copy of a row for
        another device ends with it, as in ``openvino-gpu``, and one for our kernels in llama.cpp
        with ``-kernels``.
    name: name for readers.
    stored: files and folders whose model files count as its size.
    sparsity: share of zero weights in the decoder's Linears, 0 to 1.
    device: cpu, gpu or npu.
    notes: facts about its files and its runtime for readers.
    execution: kernels of an OpenVINO or GGUF folder, see ``targets/execution.py``.
    """

    id: str
    kind: RowKind
    name: str
    runtime: Runtime
    folder: Path
    stored: tuple[Path, ...]
    sparsity: float
    device: str = "cpu"
    notes: tuple[str, ...] = ()
    execution: str = STOCK

    def on(self, device: str) -> "Row":
        """Return a copy of this row for another device, with a separate id and name."""
        id, name = f"{self.id}-{device}", f"{self.name}, {device.upper()}"
        return replace(self, id=id, name=name, device=device)

    def on_our_kernels(self) -> "Row":
        """Return a copy of this row of a GGUF folder for our kernels in llama.cpp."""
        name = self.name.replace(TITLES["gguf"], LLAMA_CPP_WITH_KERNELS, 1)
        return replace(self, id=f"{self.id}{ON_KERNELS}", name=name, execution="auto")


@dataclass(frozen=True)
class DeploymentFolder:
    """A folder of an exported target: the deployment, or its packed or sparse copy."""

    id: str
    name: str
    folder: Path


# Folder in the artifact of an export -> ends of the id and of the name of its row.
DEPLOYMENT_FORMS = {
    "model": ("", ""),
    PACKED: ("-packed", ", packed"),
    SPARSE: ("-sparse", ", sparse execution"),
}


def deployments_in(artifact: Path, target: Runtime) -> list[DeploymentFolder]:
    """Return the deployments in the artifact of an export."""
    return [
        DeploymentFolder(f"{target}{id_end}", f"{TITLES[target]}{name_end}", artifact / folder)
        for folder, (id_end, name_end) in DEPLOYMENT_FORMS.items()
        if (artifact / folder).is_dir()
    ]


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


def latency_spreads(runs: list[LatencySamples]) -> tuple[LatencySpread, LatencySpread]:
    """Return the spread of TTFT and of TPOT over all processes of a row."""
    ttft, tpot = [s for run in runs for s in run.ttft], [s for run in runs for s in run.tpot]
    return _latency_spread(ttft), _latency_spread(tpot)


def _latency_spread(samples: list[float]) -> LatencySpread:
    low, middle, high = percentiles(samples, 10, 50, 90)
    return LatencySpread(median_ms=middle, p10_ms=low, p90_ms=high)


def measure_accuracy(judged: list[Judged], scores: Scores, first_right: list[bool]) -> Accuracy:
    """Return the accuracy with its 95 % interval, per set, and compared with the first row.

    :param judged: empty for plain text, whose accuracy counts tokens and has no interval.
    :param first_right: whether the first row answered each item right.
    """
    right = [answer.right for answer in judged]
    by_set: dict[str, list[float]] = {}
    for answer in judged:
        by_set.setdefault(answer.item.source, []).append(answer.points)
    sets = [sum(s) for s in by_set.values()], [len(s) for s in by_set.values()]
    return Accuracy(
        accuracy=accuracy_of(judged, scores),
        interval=mean_interval(*sets) if right else None,
        p_same_as_first=mcnemar(right, first_right or right) if right else None,
        accuracy_by_set=accuracy_by_set(judged),
    )


class IntervalField(TypedDict, total=False):
    """A field that a row has only if it was measured."""

    perplexity_interval: tuple[float, float]


def interval_field(scores: Scores) -> IntervalField:
    """Return the field of a row for the interval of the perplexity; none for a single item."""
    found = scores.perplexity_interval
    return {} if found is None else {"perplexity_interval": found}


def answer_entry(judged: Judged) -> AnswerEntry:
    """Return the line of ``items.jsonl`` for one answered item."""
    item = judged.item
    score = {} if judged.score is None else {"score": judged.score}
    return AnswerEntry(
        item_set=item.source,
        answer=judged.answer,
        expected=item.text,
        right=judged.right,
        **score,
    )

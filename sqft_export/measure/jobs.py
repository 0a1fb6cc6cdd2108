"""The job of a worker process and its result. Both are passed as JSON files."""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from sqft_export.data.scoring import Scores, ScoringRequest
from sqft_export.documents import Document
from sqft_export.measure.results import TaskMetrics

SessionKind = Literal["torch", "adapted", "openvino", "onnx", "gguf", "web"]
_Value = TypeVar("_Value")


class AdapterParts(Document):
    """The adapter of a base model in torch, with the masks and grids of the base."""

    adapter: Path
    masks: Path | None
    grids: Path | None
    unmerged: bool


class MeasuredModel(Document):
    """The model that a worker opens.

    kind: the runtime; ``adapted``: torch, with an adapter.
    threads: CPU threads; None: the runtime's choice.
    device: cpu, gpu or npu.
    execution: kernels of an OpenVINO or GGUF folder, see ``targets/execution.py``.
    precision: dtype of torch on the CPU for a model with 16-bit weights; None: measured.
    parts: only for ``adapted``.
    """

    kind: SessionKind
    folder: Path
    threads: int | None
    device: str
    execution: str = "stock"
    precision: str | None = None
    parts: AdapterParts | None = None


class ProfileRequest(Document):
    """Request latencies over prompt lengths and batch sizes, see ``decode.profile``."""

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    batches: tuple[int, ...]
    vocabulary: int
    device: str
    cpus: tuple[int, ...] | None


class LatencyRequest(Document):
    """Request TTFT and TPOT after one prompt, see ``decode.measure_latency``."""

    prompt: list[int]
    new_tokens: int
    repeats: int


class DistributionsRequest(Document):
    """Request next-token distributions after every token of ``ids``, written to ``file``."""

    file: Path
    ids: list[list[int]]


class LmEvalRequest(Document):
    """Request tasks of lm-eval; ``folder`` has additional task files."""

    tasks: list[str]
    folder: Path | None
    items: int


class Requests(Document):
    """The measurements that a worker makes; None: not requested."""

    profile: ProfileRequest | None = None
    latency: LatencyRequest | None = None
    questions: ScoringRequest | None = None
    distributions: DistributionsRequest | None = None
    lm_eval: LmEvalRequest | None = None


class Job(Document):
    """The job of a worker, which ends if the process ``parent`` ends.

    group: name under which the workers of a launcher's processes split the scoring; empty: this
        worker does it all.
    """

    model: MeasuredModel
    requests: Requests
    parent: int
    group: str = ""


class Profile(Document):
    """Latencies by prompt length and batch size, in milliseconds and tokens per second.

    prompt_tokens_per_second: prompts of the first length.

    passes: number of all passes, warm-up included, each counted once per row of its batch.
    energy_joules: energy of these passes; None if the machine does not report it.
    seconds: duration of these passes.
    """

    ttft_ms: dict[str, list[float]]
    tpot_ms: list[float]
    tokens_per_second: dict[str, float]
    prompt_tokens_per_second: dict[str, float]
    passes: int
    energy_joules: float | None = None
    seconds: float = 0.0


class LatencySamples(Document):
    """Latencies of repeated measurements in milliseconds."""

    ttft: list[float]
    tpot: list[float]


class TimedScores(Scores):
    """Scores of a model, and the time that scoring took."""

    seconds: float


class WorkerResult(Document):
    """The measurements of a worker; None: not requested.

    placement: of ``targets.Session``.
    device_memory_bytes: largest amount of a device's memory that the model took; None if the
        machine does not report it.
    """

    load_seconds: float
    placement: str = ""
    steady_memory_bytes: int
    peak_memory_bytes: int
    device_memory_bytes: int | None = None
    profile: Profile | None = None
    latency: LatencySamples | None = None
    scores: TimedScores | None = None
    lm_eval: TaskMetrics | None = None
    lm_eval_warnings: list[str] = Field(default_factory=list)


def requested(result: _Value | None) -> _Value:
    """Return a part of a result that the job requested."""
    assert result is not None
    return result

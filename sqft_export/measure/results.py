"""Measured results as typed documents: rows of the benchmark, and compared deployments."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from sqft_export.data.scoring import SetAccuracy
from sqft_export.documents import Document, MayBeMissing
from sqft_export.machine.counters import MachineFacts

# base: the dense base. baseline: the dense base, tuned. compressed: pruned or quantized, not tuned.
# adapted: compressed and tuned, with its adapter. merged: the result of merge.
# peer: the baseline, quantized after its training.
RowKind = Literal["base", "baseline", "compressed", "adapted", "merged", "deployment", "peer"]
Runtime = Literal["torch", "openvino", "onnx", "gguf", "web"]
FINAL_KINDS: tuple[RowKind, ...] = ("merged", "deployment")  # the results of a recipe
# Ids of rows; ``measure.rows.Row`` lists all.
DENSE, DENSE_LORA, MERGED = "dense", "dense-lora", "merged"
ROUNDING_ERROR = 1e-9  # an accuracy may be outside its interval by this much

Share = Annotated[float, Field(ge=0, le=1)]
Magnitude = Annotated[float, Field(ge=0, allow_inf_nan=False)]
WholeNumber = Annotated[int, Field(ge=0)]
Interval = Annotated[tuple[Share, Share], Strict(False)]
RealInterval = Annotated[tuple[float, float], Strict(False)]
Figure = Literal["load", "ttft", "tpot"]
TaskMetrics = dict[str, dict[str, int | float]]  # task of lm-eval -> metric -> value


class LatencySpread(Document):
    """Median, 10th and 90th percentile of a latency, in milliseconds."""

    median_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    p10_ms: Magnitude
    p90_ms: Magnitude

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.p10_ms <= self.median_ms <= self.p90_ms:
            raise ValueError("10th percentile, median and 90th percentile are not ascending")
        return self


class Agreement(Document):
    """Next-token distributions of two models, compared on the same tokens.

    tokens: number of compared tokens.
    agreement: share of tokens with the same argmax, with its 95 % interval ``low`` to ``high``.
    kl_nats: mean KL divergence in nats per token.
    """

    tokens: WholeNumber
    agreement: Share
    low: Share
    high: Share
    kl_nats: float


class Accuracy(Document):
    """Accuracy of a model.

    interval: 95 % interval; None for plain text.
    p_same_as_first: p-value of McNemar's test that the first model answers equally well.
    """

    accuracy: Share
    interval: Interval | None
    p_same_as_first: float | None
    accuracy_by_set: dict[str, SetAccuracy]

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        low, high = self.interval or (0.0, 1.0)
        if not low - ROUNDING_ERROR <= self.accuracy <= high + ROUNDING_ERROR:
            raise ValueError(f"accuracy {self.accuracy} is outside its interval")
        return self


class BenchmarkRow(Accuracy):
    """One measured model of a report; ``docs/reference/report.md`` explains the fields.

    id: unique in a report and the same in every report, such as ``dense`` or ``openvino-packed``.
    name: name for readers.
    p_same_as_peers: of a deployment: id of a peer's row -> p-value of McNemar's test that both
        answer equally well.
    notes: facts about its files, such as fallback types of K-quants.
    """

    id: str
    kind: RowKind
    name: str
    runtime: Runtime
    device: str
    sparsity: Share
    file_bytes: WholeNumber
    bits_per_weight: Magnitude
    ttft: LatencySpread
    tpot: LatencySpread
    load_seconds: Magnitude
    perplexity: float
    perplexity_interval: MayBeMissing[RealInterval] = None
    token_accuracy: Share
    score_seconds: Magnitude
    steady_memory_bytes: WholeNumber
    peak_memory_bytes: WholeNumber
    p_same_as_lora: float | None
    p_same_as_peers: dict[str, float] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    lm_eval: TaskMetrics = Field(default_factory=dict)
    lm_eval_warnings: list[str] = Field(default_factory=list)
    beside_dense: MayBeMissing[Agreement] = None
    beside_merged: MayBeMissing[Agreement] = None
    chance: Share | None = None
    at_chance: bool = False
    recovery: MayBeMissing[Magnitude] = None

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second at batch 1, from the median time per output token."""
        return 1000 / self.tpot.median_ms


class SampleAnswer(Document):
    """The answer of one row to a sample prompt; score: 0 to 1."""

    id: str
    row: str
    answer: str
    score: float


class SamplePrompt(Document):
    """A test prompt with its expected answer and the answers of some rows.

    prompt: as the model gets it, with special tokens.
    """

    prompt: str
    expected: str | None
    answers: list[SampleAnswer]


class RepeatedConversations(Document):
    """Test conversations that are left out, since they are training conversations too."""

    count: WholeNumber
    places: str


class BenchmarkSettings(Document):
    """How the rows of a benchmark were measured; ``items_sha256`` is a digest of the items."""

    items: WholeNumber
    items_sha256: str
    threads: WholeNumber
    rounds: WholeNumber
    latency_prompt_tokens: WholeNumber
    latency_new_tokens: WholeNumber
    latency_repeats: WholeNumber
    repeated: RepeatedConversations | None = None


class BenchmarkResults(Document):
    """``results.json`` of the pass ``benchmark``."""

    settings: BenchmarkSettings
    machine: MachineFacts
    rows: list[BenchmarkRow]
    samples: list[SamplePrompt]


class Percentiles(Document):
    """Median, 90th and 99th percentile."""

    median: float
    p90: float
    p99: float


class FolderResults(Document):
    """Figures of one deployment over all rounds, by prompt length and batch size where they vary.

    tokens_per_second: of decode. prompt_tokens_per_second: of the pass over prompts of the first
        length.
    joules_per_token: energy per pass of a row; None if the machine does not report it.
    watts: mean power of the device during the passes; None if the machine does not report it.
    device_memory_bytes: of the device, such as a GPU; None if the machine does not report it.
    notes: facts about its files, such as fallback types of K-quants.
    """

    runtime: Runtime
    file_bytes: WholeNumber
    load_seconds: Percentiles
    ttft_ms: dict[str, Percentiles]
    tpot_ms: Percentiles
    tokens_per_second: dict[str, float]
    prompt_tokens_per_second: dict[str, float]
    peak_memory_bytes: WholeNumber
    steady_memory_bytes: WholeNumber
    joules_per_token: float | None
    watts: float | None = None
    device_memory_bytes: int | None = None
    notes: list[str] = Field(default_factory=list)


class FigureRatio(Document):
    """The ratio of a figure of two folders, with its 95 % interval ``low`` to ``high``.

    over: the folder in the denominator.
    warning: why the ratio is not significant, or None.
    """

    folder: str
    over: str
    figure: Figure
    ratio: float
    low: float
    high: float
    warning: str | None


class AnswerEntry(Document):
    """The line of ``items.jsonl`` for one answered item."""

    item_set: str = Field(alias="set")
    answer: str
    expected: str | None
    right: bool
    score: float | None = None


class FolderAccuracy(Accuracy):
    """Accuracy of one deployment, with every answer.

    perplexity_interval: 95 % interval over items; missing for a single item.
    """

    folder: str
    perplexity: float
    perplexity_interval: MayBeMissing[RealInterval] = None
    items: list[AnswerEntry]


class ReferenceDivergence(Document):
    """Default mode of a deployment, compared with the reference in ``probe.json``.

    positions: number of compared positions. same_top: those with the same argmax token.
    kl_nats, largest_kl_nats: mean and largest KL divergence, in nats per token.
    """

    positions: WholeNumber
    same_top: WholeNumber
    kl_nats: float
    largest_kl_nats: float


class FolderAgreement(Agreement):
    """Agreement of one deployment with the first one."""

    folder: str


@dataclass(frozen=True)
class DeviceSettings:
    """Settings of a benchmark of deployments.

    prompt_tokens: prompt lengths for TTFT. TPOT is measured after the first one. Lengths that do
    not fit into a model's context together with ``new_tokens`` are left out.
    batches: batch sizes for tokens/s.
    rounds: processes per folder.
    threads: CPU threads; None: the runtime's choice.
    cpus: processors that the process may use; None: any.
    execution: kernels that OpenVINO folders run on, see ``packed/execution.py``. Each is measured.
    """

    prompt_tokens: tuple[int, ...] = (32, 128, 512, 2048)
    new_tokens: int = 32
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    threads: int | None = None
    cpus: tuple[int, ...] | None = None
    device: str = "cpu"
    execution: tuple[str, ...] = ("stock",)


class DeploymentResults(Document):
    """``results.json`` of the command ``benchmark``.

    accuracy, agreement: only with a task or a text. reference: only if it was requested.
    """

    machine: MachineFacts
    versions: dict[str, str]
    settings: DeviceSettings
    folders: dict[str, FolderResults]
    ratios: list[FigureRatio]
    accuracy: list[FolderAccuracy] = Field(default_factory=list)
    agreement: list[FolderAgreement] = Field(default_factory=list)
    reference: dict[str, ReferenceDivergence] = Field(default_factory=dict)
    lm_eval: dict[str, TaskMetrics] = Field(default_factory=dict)

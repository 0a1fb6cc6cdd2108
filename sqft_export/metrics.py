"""The metrics of every pass, which its manifest records."""

import json
from typing import TypeVar

from pydantic import Field

from sqft_export.artifacts.store import MANIFEST, Artifact
from sqft_export.documents import Document, MayBeMissing
from sqft_export.verify.results import CheckResult


class Metrics(Document):
    """Metrics of any pass; ``warnings`` are printed and listed in the report."""

    warnings: list[str] = Field(default_factory=list)


class SparsityMetrics(Metrics):
    """sparsity: share of zero weights per Linear, 0 to 1, and over all Linears (``all``)."""

    sparsity: dict[str, float]


class SparsifyMetrics(SparsityMetrics):
    """calibration_tokens: Linear -> tokens that it was calibrated on.

    largest_activations: Linear or block -> its largest absolute activation on these tokens.
    uncalibrated_experts: Linears of experts that saw too few tokens, pruned by magnitude.
    """

    device: MayBeMissing[str] = None
    calibration_tokens: dict[str, int] = Field(default_factory=dict)
    largest_activations: dict[str, float] = Field(default_factory=dict)
    uncalibrated_experts: list[str] = Field(default_factory=list)


class ReconstructMetrics(Metrics):
    """block_errors: relative errors of a block's outputs before and after the training."""

    block_errors: list[tuple[float, float]]
    device: str
    calibration_tokens: dict[str, int]


class QuantizeMetrics(Metrics):
    """group_size, bits: per quantized module. block_errors: only with a reconstruction.

    largest_activations: Linear or block -> its largest absolute activation on calibration tokens.
    largest_scales: module -> the largest scale of its grid.
    uncalibrated_experts: Linears of experts that saw too few tokens, rounded without GPTQ.
    """

    device: str
    group_size: dict[str, int]
    bits: dict[str, int]
    calibration_tokens: dict[str, int] = Field(default_factory=dict)
    uncalibrated_experts: list[str] = Field(default_factory=list)
    block_errors: list[tuple[float, float]] = Field(default_factory=list)
    largest_activations: dict[str, float] = Field(default_factory=dict)
    largest_scales: dict[str, float] = Field(default_factory=dict)


class HeldOutLoss(Document):
    """The mean loss per token, in nats, on held-out examples after a step."""

    step: int
    loss: float


class TrainingMetrics(Metrics):
    """padded_share: share of the trained tokens that are padding.

    held_out: the losses that ``adapt.stop`` measured; the adapter is that of the lowest.
    """

    precision: str
    device: str
    tokens_per_second: float
    padded_share: float
    held_out: list[HeldOutLoss] = Field(default_factory=list)


class AdaptMetrics(TrainingMetrics):
    """Numbers of steps and of examples, and the losses of the first and the last step.

    truncated_examples: cut to the length limit.
    examples_without_answer: cut before their answer.
    left_out_examples: not trained, because no token would enter the loss.
    """

    steps: int
    first_loss: float
    last_loss: float
    truncated_examples: int
    examples_without_answer: int
    left_out_examples: int


class TeacherMetrics(TrainingMetrics, SparsityMetrics):
    """Metrics of the dense model with LoRA."""


class PeersMetrics(Metrics):
    """notes: folder of a deployment -> notes for the report's tables."""

    notes: dict[str, list[str]]


class EvaluatedSize(Document):
    """Score and number of adapter parameters of one evaluated configuration."""

    accuracy: float
    likelihood: float
    parameters: int


class SearchMetrics(Metrics):
    """evaluations: number of scored configurations, listed in ``front``. ranks: the chosen ones."""

    evaluations: int
    seconds: float
    front: list[EvaluatedSize]
    ranks: dict[str, int]
    device: str


class MergeMetrics(SparsityMetrics):
    """facts: what every deployment stores about the model.

    first_example: the first training example of a chat task, with its loss mask marked.
    overflow: warnings about large activations and scales, for the model card.
    """

    facts: dict[str, str]
    first_example: str | None = None
    overflow: list[str] = Field(default_factory=list)


class PackedMetrics(Document):
    """Bytes of the weights before and after packing, and the number of sparse tensors."""

    dense_bytes: int
    packed_bytes: int
    sparse_tensors: int


class SparseExecution(Document):
    """The folder that runs on this package's kernels.

    missing: why there is no such folder; then all other fields are missing.
    bytes: of the weights.
    products: format -> number of products.
    tpot_times_as_fast, bytes_ratio, memory_ratio: compared with OpenVINO's own kernels, if both
        were measured.
    """

    missing: MayBeMissing[str] = None
    bytes: MayBeMissing[int] = None
    products: MayBeMissing[dict[str, int]] = None
    tpot_times_as_fast: MayBeMissing[float] = None
    bytes_ratio: MayBeMissing[float] = None
    memory_ratio: MayBeMissing[float] = None


class RoundedHead(Document):
    """KL divergence that a Q8_0 head adds, in nats per token.

    mean, largest: over ``positions`` tokens. rounded: whether the file has such a head.
    """

    mean: float
    largest: float
    positions: int
    rounded: bool

    def __str__(self) -> str:
        found = (
            f"KL divergence of {self.mean:.2g} nats per token (largest {self.largest:.2g} of "
            f"{self.positions} tokens)"
        )
        if self.rounded:
            return f"its output head is Q8_0, which adds a {found}"
        return f"its output head is float; Q8_0 would add a {found}"


class ExportMetrics(Metrics):
    """bytes: of the deployment's weights and graphs. packed, sparse: its copies, if requested.

    head: the output head of a GGUF file, if it was measured.
    """

    bytes: int
    head: MayBeMissing[RoundedHead] = None
    packed: MayBeMissing[PackedMetrics] = None
    sparse: MayBeMissing[SparseExecution] = None


class VerifyMetrics(Metrics):
    """checks: the results of the certificate's checks."""

    checks: list[CheckResult]
    device: str


class RowsMetrics(Metrics):
    """rows: number of rows of the table."""

    rows: int


_Metrics = TypeVar("_Metrics", bound=Metrics)


def read_metrics(artifact: Artifact, kind: type[_Metrics]) -> _Metrics:
    """Return those metrics of an artifact that ``kind`` has.

    :raises UserError: naming the metric that is missing or has another type.
    """
    found = {name: value for name, value in artifact.metrics.items() if name in kind.model_fields}
    return kind.parse(json.dumps(found), f"{artifact.path / MANIFEST}: metrics")

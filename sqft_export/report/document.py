"""``report.json`` as a typed document: built from the artifacts of a run, and read again."""

from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue

from sqft_export.artifacts.store import Artifact
from sqft_export.documents import Document
from sqft_export.errors import UserError
from sqft_export.machine.counters import MachineFacts
from sqft_export.measure.quality import PassQuality, quality_file, read_quality
from sqft_export.measure.results import (
    BenchmarkResults,
    BenchmarkRow,
    BenchmarkSettings,
    Magnitude,
    SamplePrompt,
    Share,
)
from sqft_export.metrics import (
    AdaptMetrics,
    ExportMetrics,
    MergeMetrics,
    Metrics,
    QuantizeMetrics,
    SearchMetrics,
    SparseExecution,
    VerifyMetrics,
    read_metrics,
)
from sqft_export.recipe.schema import Recipe
from sqft_export.report.recommendation import Recommendation, recommend, recommended_row
from sqft_export.report.verdict import best_deployment, verdict
from sqft_export.untrusted import MAX_JSON_BYTES, parse_json, read_bounded
from sqft_export.verify.results import CheckResult

REPORT = "report.json"
SCHEMA: Literal[5] = 5
MEASURES = {
    "problems": "exact match",
    "dataset": "answered right",
    "text": "tokens predicted right",
    "chat": "score of the answer",
}


class PassRecord(Document):
    """A pass of the run.

    key: beginning of the key of its artifact.
    quality: its cost on held-out data; None if it changes no model.
    """

    name: str = Field(alias="pass")
    key: str
    seconds: Magnitude
    quality: PassQuality | None


class LayerRecord(Document):
    """A decoder Linear of the merged model; bits and group size are None for floats."""

    layer: str
    sparsity: Share
    bits: int | None
    group_size: int | None


class SkippedTarget(Document):
    """A requested target that the model cannot have, and why."""

    target: str
    reason: str


class Report(Document):
    """``report.json``. ``docs/reference/report.md`` explains the fields.

    The file may be untrusted: ``compare`` also reads reports from other machines.
    """

    version: Literal[5] = Field(alias="schema")
    recipe: dict[str, JsonValue]
    measure: str
    verdict: str | None
    recommendation: Recommendation | None = None
    rows: list[BenchmarkRow]
    settings: BenchmarkSettings
    samples: list[SamplePrompt]
    verify: list[CheckResult]
    passes: list[PassRecord]
    layers: list[LayerRecord]
    sparse_execution: SparseExecution | None
    first_example: str | None
    search: SearchMetrics | None
    adapt: AdaptMetrics | None
    skipped: list[SkippedTarget]
    warnings: list[str]
    machine: MachineFacts
    overrides: list[str]
    versions: dict[str, str | None]

    @property
    def best(self) -> BenchmarkRow | None:
        """The recommended deployment; None if no deployment of the recipe was measured.

        It is the fastest one that is not significantly less accurate than the most accurate, or a
        model that was quantized after LoRA if that one is better (``report.recommendation``).
        """
        return recommended_row(self.rows, best_deployment(self.rows))


def read_report(file: Path) -> Report:
    """Read a ``report.json``.

    :raises UserError: if it is no report, or one of another version.
    """
    text = read_bounded(file, MAX_JSON_BYTES)
    document = parse_json(text, str(file))
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        raise UserError(
            f"{file}: found schema {found!r}, this version reads {SCHEMA}; run the recipe again"
        )
    return Report.parse(text, str(file))


def _passes(inputs: dict[str, Artifact]) -> list[PassRecord]:
    return [
        PassRecord(
            name=name,
            key=artifact.key[:16],
            seconds=artifact.manifest["seconds"],
            quality=read_quality(quality_file(artifact.path.parent, name, artifact.key)),
        )
        for name, artifact in inputs.items()
    ]


def _layers(inputs: dict[str, Artifact]) -> list[LayerRecord]:
    """Return sparsity, bits and group size of every decoder Linear of the merged model."""
    sparsity = read_metrics(inputs["merge"], MergeMetrics).sparsity
    grids = read_metrics(inputs["quantize"], QuantizeMetrics) if "quantize" in inputs else None
    return [
        LayerRecord(
            layer=name,
            sparsity=share,
            bits=grids.bits.get(name) if grids else None,
            group_size=grids.group_size.get(name) if grids else None,
        )
        for name, share in sparsity.items()
        if name != "all"
    ]


def _sparse_execution(
    inputs: dict[str, Artifact], rows: list[BenchmarkRow]
) -> SparseExecution | None:
    """Return the kernels of the sparse-execution folder, and its measured gains in this run."""
    export = inputs.get("export-openvino")
    sparse = read_metrics(export, ExportMetrics).sparse if export else None
    by_id = {row.id: row for row in rows}
    ours, theirs = by_id.get("openvino-sparse"), by_id.get("openvino")
    if not sparse or not ours or not theirs:
        return sparse
    gains = {
        "tpot_times_as_fast": theirs.tpot.median_ms / ours.tpot.median_ms,
        "bytes_ratio": ours.file_bytes / theirs.file_bytes,
        "memory_ratio": ours.steady_memory_bytes / theirs.steady_memory_bytes,
    }
    return sparse.model_copy(update=gains)


def _codes(recipe: Recipe) -> str:
    """Return the format of the deployed weights for readers."""
    quantize = recipe.quantize
    return "floats" if quantize.method == "none" else f"INT{quantize.bits}"


def report_of_run(recipe: Recipe, inputs: dict[str, Artifact]) -> Report:
    """Return the report of a run. Every number comes from a sealed artifact."""
    file = inputs["benchmark"].path / "results.json"
    benchmark = BenchmarkResults.parse(file.read_text(), str(file))
    measure, codes = MEASURES[recipe.task.kind], _codes(recipe)
    return Report(
        version=SCHEMA,
        recipe=recipe.model_dump(mode="json"),
        measure=measure,
        verdict=verdict(benchmark.rows, measure, codes),
        recommendation=recommend(benchmark.rows, best_deployment(benchmark.rows), codes),
        rows=benchmark.rows,
        settings=benchmark.settings,
        samples=benchmark.samples,
        verify=read_metrics(inputs["verify"], VerifyMetrics).checks,
        passes=_passes(inputs),
        layers=_layers(inputs),
        sparse_execution=_sparse_execution(inputs, benchmark.rows),
        first_example=read_metrics(inputs["merge"], MergeMetrics).first_example,
        search=read_metrics(inputs["search"], SearchMetrics) if "search" in inputs else None,
        adapt=read_metrics(inputs["adapt"], AdaptMetrics) if "adapt" in inputs else None,
        skipped=[SkippedTarget(target=name, reason=why) for name, why in recipe.skipped.items()],
        warnings=[w for one in inputs.values() for w in read_metrics(one, Metrics).warnings],
        machine=benchmark.machine,
        overrides=list(recipe.overrides),
        versions=inputs["benchmark"].manifest["environment"]["versions"],
    )

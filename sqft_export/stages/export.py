"""export-<target>: convert the merged model to a deployment folder of one runtime."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sqft_export.data.items import (
    CARD_FIELDS,
    TASK_FILES,
    TRAIN_FIELDS,
    load_tokenizer,
    stop_ids,
)
from sqft_export.data.stops import stop_texts
from sqft_export.inference.foundry import INFERENCE_MODEL, inference_model_text
from sqft_export.inference.modelfile import MODELFILE, modelfile_text
from sqft_export.kernels.extension import unavailable_reason
from sqft_export.measure.head import choose_head
from sqft_export.metrics import (
    ExportMetrics,
    MergeMetrics,
    PackedMetrics,
    RoundedHead,
    SparseExecution,
    read_metrics,
)
from sqft_export.model.checkpoint import file_bytes
from sqft_export.packed.execution import NothingSpecialized, specialize
from sqft_export.packed.folders import PACKED, SPARSE, NothingSaved, pack
from sqft_export.packed.seal import write_seal
from sqft_export.packed.usage import usage_section
from sqft_export.probes.document import read_probe
from sqft_export.probes.writing import copy_probe
from sqft_export.recipe.schema import Export, Recipe
from sqft_export.recipe.sections import CardSections, VerifySections
from sqft_export.report.prompts import example_prompt, prompt_section
from sqft_export.report.provenance import PROVENANCE_FIELDS, model_card, origin_of
from sqft_export.stages import Context
from sqft_export.targets import target
from sqft_export.web.static_page import settings_of_task, write_page

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONSUMES: tuple[str, ...] = ("merge",)
READS: tuple[str, ...] = ("model", "train")
FIELDS_OF_ALL = (
    *("export.sparse_files", "export.entropy"),
    *("verify.divergence", "verify.tokenizers"),  # of the self-test
)
FIELDS_OF_TARGET: dict[str, tuple[str, ...]] = {
    "openvino": ("export.sparse_execution",),
    "onnx": ("export.onnx_graph",),
    "gguf": ("export.gguf_head",),
    "web": ("export.onnx_graph",),
}
FREE: tuple[str, ...] = TASK_FILES
VERSION = 13
RESUMES = False
DISTRIBUTED = False


class Sections(CardSections, VerifySections, Protocol):
    """The recipe sections that this pass reads."""


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the fields of all targets and those of this target."""
    return (
        *PROVENANCE_FIELDS,
        *TRAIN_FIELDS,
        *CARD_FIELDS,
        *FIELDS_OF_ALL,
        *FIELDS_OF_TARGET[name.removeprefix("export-")],
    )


def run(context: Context[Sections]) -> ExportMetrics:
    """Write ``model/``; ``packed/`` and ``sparse/`` if the recipe requests them."""
    advance = context.start(1)
    folder = context.folder / "model"
    folder.mkdir()
    runtime = context.name.removeprefix("export-")
    merge = context.inputs["merge"]
    found = read_metrics(merge, MergeMetrics)
    options, head = _choose_head(context) if runtime == "gguf" else (context.recipe.export, None)
    target(runtime).export(merge.path / "model", folder, options, found.facts)
    if context.recipe.unmerged:
        target(runtime).add_adapter(folder, merge.path / "adapter")
    origin = origin_of(context.recipe, context.model, context.lineage)
    tokenizer = load_tokenizer(context.model)
    usage = usage_section(folder, example_prompt(context.recipe, tokenizer))
    sparsity, overflow = found.sparsity["all"], found.overflow
    card = model_card(context.recipe, origin, sparsity, usage, overflow)
    card += prompt_section(context.recipe, tokenizer)
    if head and head.rounded:
        card += f"\n## Output head\n\nIn this file, {head}.\n"
    (folder / "README.md").write_text(card)
    _write_runtime_files(context, folder, runtime, tokenizer)
    copy_probe(merge.path, folder, runtime, context.recipe.verify)
    write_seal(folder, origin.to_json())
    metrics = ExportMetrics(bytes=file_bytes(folder))
    if head:
        metrics = metrics.model_copy(update={"head": head})
    if context.recipe.export.sparse_files and runtime != "web":  # a page loads plain weights
        metrics = metrics.model_copy(update=_pack(context, folder))
    if runtime == "openvino" and context.recipe.export.sparse_execution:
        metrics = metrics.model_copy(update={"sparse": _specialize(context, folder)})
    advance()
    return metrics


def _write_runtime_files(
    context: Context[Sections], folder: Path, runtime: str, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    """Write what programs of one runtime read: Ollama, Foundry Local, or a browser."""
    name, task = context.recipe.name, context.recipe.task
    if runtime == "gguf":
        ends, stops = stop_ids(folder, tokenizer), stop_texts(task)
        (folder / MODELFILE).write_text(modelfile_text(folder, ends, stops))
    if runtime == "onnx":
        text = inference_model_text(folder, name)
        (folder / INFERENCE_MODEL).write_text(text, encoding="utf-8")
    if runtime == "web":
        prompt = example_prompt(context.recipe, tokenizer)
        write_page(folder, settings_of_task(folder, name, task, prompt))


def _choose_head(context: Context[Sections]) -> tuple[Export, RoundedHead | None]:
    """Return the options of a GGUF export with ``gguf_head`` resolved, and the measured cost.

    The cost is measured on the short prompts of the self-test and their continuations. The head
    stays float with an unmerged adapter.
    """
    if context.recipe.unmerged:
        return Export(gguf_head="float"), None
    merged = context.inputs["merge"].path / "model"
    probe = read_probe(merged)
    assert probe is not None  # merge has written it
    texts = [one.ids + one.continuation for one in probe.prompts if one.beyond is None]
    head, cost = choose_head(context.recipe.export.gguf_head, merged, texts)
    measured = None if cost is None else RoundedHead(**asdict(cost), rounded=head == "q8_0")
    return Export(gguf_head=head), measured


def _pack(context: Context[Sections], folder: Path) -> dict[str, PackedMetrics | list[str]]:
    """Write the packed copy; return its metrics, or a warning if packing saves nothing."""
    try:
        sizes = pack(folder, context.folder / PACKED, context.recipe.export.entropy)
    except NothingSaved as error:
        return {"warnings": [f"{context.name}: {error}"]}
    return {"packed": PackedMetrics(**sizes)}


def _specialize(context: Context[Sections], folder: Path) -> SparseExecution:
    """Write the copy that runs on our kernels; return its metrics, or why it is missing."""
    packed = context.folder / PACKED
    if missing := unavailable_reason():
        return SparseExecution(missing=missing)
    try:
        made = specialize(packed if packed.is_dir() else folder, context.folder / SPARSE)
    except NothingSpecialized as error:
        return SparseExecution(missing=str(error))
    return SparseExecution(**made)

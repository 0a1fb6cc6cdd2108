"""merge: add the adapter, if there is one, to the weights of the base and store the model.

The stored codes are the codes that the adapted model's forward computes with.
"""

import math
import shutil
from typing import TYPE_CHECKING

from sqft_export.adapters.files import read_low_rank
from sqft_export.adapters.loading import Layers
from sqft_export.adapters.merging import write_merged
from sqft_export.adapters.templates import set_prompt_format
from sqft_export.data.first_example import first_example
from sqft_export.data.items import (
    CARD_FIELDS,
    TASK_FILES,
    TEST_FIELDS,
    TRAIN_FIELDS,
    load_tokenizer,
)
from sqft_export.machine.host import float32_fits
from sqft_export.metrics import (
    MergeMetrics,
    QuantizeMetrics,
    SparsifyMetrics,
    SparsityMetrics,
    read_metrics,
)
from sqft_export.model.activations import overflow_warnings, scale_warnings
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import Reference
from sqft_export.model.storage import MASKS, model_facts
from sqft_export.probes.writing import make_probe
from sqft_export.recipe.schema import Recipe
from sqft_export.recipe.sections import CardSections
from sqft_export.report.prompts import example_prompt, prompt_section
from sqft_export.report.provenance import PROVENANCE_FIELDS, merged_usage, model_card, origin_of
from sqft_export.stages import BASE_FIELDS, Context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONSUMES: tuple[str, ...] = ("sparsify", "reconstruct", "quantize", "search")
# Tensors that no pass changes are copied from the model. The model card shows a training item, and
# the probe has test prompts.
READS: tuple[str, ...] = ("model", "train", "test")
FREE: tuple[str, ...] = TASK_FILES
VERSION = 6
RESUMES = False
DISTRIBUTED = False


def fields(recipe: Recipe, name: str) -> tuple[str, ...]:
    """Return the fields of the base, the model card, the prompts in it and those of the probe."""
    items = (*TRAIN_FIELDS, *TEST_FIELDS)
    return (*BASE_FIELDS, *PROVENANCE_FIELDS, *items, *CARD_FIELDS, "dense_update")


def _write_probe(context: Context[CardSections], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write ``probe.json`` into the model's folder.

    With an unmerged adapter it is written next to the folder: the folder lacks the adapter.
    """
    folder, adapter = context.folder / "model", context.folder / "adapter"
    updates = read_low_rank(adapter) if context.recipe.unmerged else None
    # The probe runs the model about 20 times.
    fits = float32_fits(sum(map(math.prod, Checkpoint(folder).shapes.values())))
    reference = Reference(folder, updates, keep=fits)
    probe = make_probe(context.recipe, tokenizer, folder, reference)
    probe.write(context.folder if context.recipe.unmerged else folder)


def _overflow_warnings(context: Context[CardSections]) -> list[str]:
    """Return the warnings of calibration about float16, of the last pass that calibrated."""
    activations, scales = dict[str, float](), dict[str, float]()
    if "sparsify" in context.inputs:
        found = read_metrics(context.inputs["sparsify"], SparsifyMetrics)
        activations = found.largest_activations
    if "quantize" in context.inputs:
        quantized = read_metrics(context.inputs["quantize"], QuantizeMetrics)
        activations = quantized.largest_activations or activations
        scales = quantized.largest_scales
    return overflow_warnings(activations) + scale_warnings(scales)


def run(context: Context[CardSections]) -> MergeMetrics:
    """Write ``model/``, a copy of the masks, and the adapter if the recipe leaves it unmerged.

    The model's folder has a self-test (``probes/``). Every export stores the metric ``facts``.
    """
    searched = context.path("search")
    adapter = searched / "adapter" if searched else None
    if adapter and context.recipe.unmerged:
        shutil.copytree(adapter, context.folder / "adapter")
    if sparsified := context.path("sparsify"):
        for file in sparsified.glob(f"{MASKS}*"):
            shutil.copyfile(file, context.folder / file.name)
    sparsity = write_merged(Layers(context.base(), adapter), context.folder / "model")
    tokenizer = load_tokenizer(context.model)
    set_prompt_format(context.recipe, context.folder / "model", tokenizer)
    origin = origin_of(context.recipe, context.model, context.lineage)
    usage = merged_usage(context.recipe, example_prompt(context.recipe, tokenizer))
    overflow = _overflow_warnings(context)
    card = model_card(context.recipe, origin, sparsity["all"], usage, overflow)
    card += prompt_section(context.recipe, tokenizer)
    (context.folder / "model" / "README.md").write_text(card)
    warnings = []
    if context.recipe.dense_update and sparsified:
        before = read_metrics(context.inputs["sparsify"], SparsityMetrics).sparsity["all"]
        warnings.append(
            f"merge_dense: a dense update was merged; {sparsity['all']:.1%} of the weights are "
            f"zero now, {before:.1%} were zero before"
        )
    _write_probe(context, tokenizer)
    facts = model_facts(Checkpoint(context.folder / "model"), sparsity["all"])
    return MergeMetrics(
        sparsity=sparsity,
        facts=facts,
        warnings=warnings,
        first_example=first_example(context.recipe, tokenizer),
        overflow=overflow,
    )

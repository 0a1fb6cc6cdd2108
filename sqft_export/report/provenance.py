"""Where a model is from, for its folder: facts, and a card in the Hugging Face form."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from sqft_export.data.datasets import set_names
from sqft_export.errors import one_line
from sqft_export.recipe.schema import Dataset, Recipe
from sqft_export.untrusted import fault_of_file, open_regular

# Licences of named sets, as their publishers state them; others are to be looked up.
LICENCES = {
    "gsm8k": "MIT",
    "svamp": "MIT",
    "arc_easy": "CC BY-SA 4.0",
    "arc_challenge": "CC BY-SA 4.0",
    "boolq": "CC BY-SA 3.0",
    "hellaswag": "MIT",
}
UNKNOWN = "unknown"
MAX_CARD_BYTES = 2**16  # of a model card; its head is read
# The recipe fields that a card or an origin shows.
PROVENANCE_FIELDS = (
    *("name", "base_name", "model.revision", "task.kind", "task.name", "task.train_sets"),
    *("sparsify.method", "quantize.method", "quantize.bits", "quantize.group_size"),
    *("quantize.symmetric", "adapt.pipeline", "adapt.merge_dense"),
)


def base_licence(folder: Path) -> str:
    """What the base's own card says; unknown without one."""
    card = folder / "README.md"
    if fault_of_file(card):
        return UNKNOWN
    with open_regular(card) as stream:
        text = stream.read(MAX_CARD_BYTES).decode(errors="replace")
    for line in text.split("\n")[:60]:
        if line.startswith("license:"):
            return one_line(line.partition(":")[2]) or UNKNOWN
    return UNKNOWN


def origin_of(recipe: Recipe, base: Path, lineage: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Base, data, passes with their settings and versions, licences.

    :param lineage: facts of every pass that the model is made from.
    """
    reads = {source: d for facts in lineage.values() for source, d in facts["reads"].items()}
    return {
        "made_by": {"sqft-export": importlib.metadata.version("sqft-export")},
        "recipe": recipe.name,
        "base": {
            "model": recipe.base_name,
            "revision": recipe.model.revision,
            "sha256": reads.get("model"),
            "license": base_licence(base),
        },
        "data": {
            "train": reads.get("train"),
            "calibration": reads.get("calibration"),
            "licenses": _data_licences(recipe),
        },
        "passes": {
            name: {"version": facts["version"], "options": facts["options"]}
            for name, facts in lineage.items()
        },
    }


def _data_licences(recipe: Recipe) -> dict[str, str]:
    if not isinstance(recipe.task, Dataset):
        return {"task": UNKNOWN}
    return {name: LICENCES.get(name, UNKNOWN) for name in set_names(recipe.task, "train")}


def model_card(recipe: Recipe, origin: dict[str, Any], sparsity: float, usage: str) -> str:
    """README.md of a model folder.

    :param usage: a section with code that loads and runs it.
    """
    base, quantize = origin["base"], recipe.quantize
    codes = "floats as stored"
    if quantize.method != "none":
        group = quantize.group_size or "a whole row"
        kind = "symmetric" if quantize.symmetric else "asymmetric"
        codes = f"INT{quantize.bits}, {kind}, groups of {group}, by {quantize.method}"
    revision = f" at {base['revision']}" if base["revision"] else ""
    merged = "unmerged" if recipe.unmerged else "merged"
    facts = {
        "zero weights in the decoder's Linears": f"{100 * sparsity:.1f} %",
        "pruned by": recipe.sparsify.method,
        "weights": codes,
        "adapter": f"{recipe.adapt.pipeline}, {merged}" if recipe.adapt else "none",
        "task": recipe.task.kind,
        "base, SHA-256": base["sha256"],
        "licence of the base": base["license"],
        **{f"licence of {name}": found for name, found in origin["data"]["licenses"].items()},
    }
    lines = [
        *("---", f"base_model: {base['model']}", f"license: {base['license']}"),
        *("pipeline_tag: text-generation", "tags: [sqft, sparse, quantized]", "---", ""),
        *(f"# {recipe.name}", "", f"Made from {base['model']}{revision}.", ""),
        *("| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items())),
        *("", usage),
        *("## Where it is from", ""),
        "`provenance.json`, where there is one, lists passes, settings and every file's digest.",
    ]
    return "\n".join(lines) + "\n"


def merged_usage(recipe: Recipe, prompt: str) -> str:
    """Return the section of a merged model's card with code to run inside its folder."""
    in_gptq_layout = recipe.quantize.method != "none"
    first = ["In this folder:", ""]
    if in_gptq_layout:
        first = [
            "The weights are in the GPTQ layout, which transformers reads through gptqmodel. That "
            "needs other versions",
            "of torch and transformers than sqft_export, so use a Python environment of its own:",
            *("", "```sh", "pip install gptqmodel optimum", "```", "", *first),
        ]
    peft = ['model = peft.PeftModel.from_pretrained(model, "../adapter")'] * recipe.unmerged
    code = [
        *(["import peft"] * recipe.unmerged),
        *("from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".")',
        *(*peft, f"prompt = {json.dumps(prompt, ensure_ascii=False)}"),
        'batch = tokenizer(prompt, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**batch, max_new_tokens=64)[0]))",
    ]
    lines = ["## How to run it", "", *first, "```python", *code, "```", ""]
    return "\n".join(lines)

"""Write the origin of a model: facts for ``provenance.json``, and a Hugging Face model card."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sqft_export.artifacts.store import Facts
from sqft_export.data.datasets import set_names
from sqft_export.documents import Document
from sqft_export.errors import one_line
from sqft_export.model.chat import uses_template
from sqft_export.recipe.schema import Dataset, Quantize
from sqft_export.recipe.sections import CardSections, OriginSections
from sqft_export.untrusted import fault_of_file, open_regular

# Licences of named datasets, as their publishers state them. Others are reported as unknown.
LICENCES = {
    "gsm8k": "MIT",
    "svamp": "MIT",
    "arc_easy": "CC BY-SA 4.0",
    "arc_challenge": "CC BY-SA 4.0",
    "boolq": "CC BY-SA 3.0",
    "hellaswag": "MIT",
}
UNKNOWN = "unknown"
MAX_CARD_BYTES = 2**16  # only the beginning of a model card is read
# The recipe fields that a card or an origin shows.
SEALED_BY = "`provenance.json`, if present, lists passes, settings and the digest of every file."
PROVENANCE_FIELDS = (
    *("name", "base_name", "model.revision", "task.kind", "task.name", "task.train_sets"),
    *("sparsify.method", "quantize.method", "quantize.bits", "quantize.group_size"),
    *("quantize.symmetric", "adapt.pipeline", "adapt.merge_dense"),
)


def base_licence(folder: Path) -> str:
    """Return the licence in the base model's card, or ``unknown`` without one."""
    card = folder / "README.md"
    if fault_of_file(card):
        return UNKNOWN
    with open_regular(card) as stream:
        text = stream.read(MAX_CARD_BYTES).decode(errors="replace")
    for line in text.split("\n")[:60]:
        if line.startswith("license:"):
            return one_line(line.partition(":")[2]) or UNKNOWN
    return UNKNOWN


class BaseOrigin(Document):
    """The base model; ``sha256`` is the digest of its files."""

    model: str
    revision: str | None
    sha256: object
    license: str


class DataOrigin(Document):
    """Digests of the training and calibration data, and the licences of the training sets."""

    train: object
    calibration: object
    licenses: dict[str, str]


class PassOrigin(Document):
    """Version and settings of a pass."""

    version: int
    options: Mapping[str, object]


class Origin(Document):
    """The origin of a model; made_by: packages with their versions."""

    made_by: dict[str, str]
    recipe: str
    base: BaseOrigin
    data: DataOrigin
    passes: dict[str, PassOrigin]


def origin_of(recipe: OriginSections, base: Path, lineage: dict[str, Facts]) -> Origin:
    """Return the origin of a model.

    :param lineage: facts of every pass that the model depends on.
    """
    reads = {source: d for facts in lineage.values() for source, d in facts["reads"].items()}
    return Origin(
        made_by={"sqft-export": importlib.metadata.version("sqft-export")},
        recipe=recipe.name,
        base=BaseOrigin(
            model=recipe.base_name,
            revision=recipe.model.revision,
            sha256=reads.get("model"),
            license=base_licence(base),
        ),
        data=DataOrigin(
            train=reads.get("train"),
            calibration=reads.get("calibration"),
            licenses=_data_licences(recipe),
        ),
        passes={
            name: PassOrigin(version=facts["version"], options=facts["options"])
            for name, facts in lineage.items()
        },
    )


def _data_licences(recipe: OriginSections) -> dict[str, str]:
    if not isinstance(recipe.task, Dataset):
        return {"task": UNKNOWN}
    return {name: LICENCES.get(name, UNKNOWN) for name in set_names(recipe.task, "train")}


def model_card(
    recipe: CardSections,
    origin: Origin,
    sparsity: float,
    usage: str,
    overflow: Sequence[str] = (),
) -> str:
    """Return README.md of a model folder.

    :param sparsity: share of zero weights in the decoder's Linears, 0 to 1.
    :param usage: a section with code that loads and runs the model.
    :param overflow: warnings about activations and scales that float16 may not hold.
    """
    base = origin.base
    revision = f" at {base.revision}" if base.revision else ""
    merged = "unmerged" if recipe.unmerged else "merged"
    facts = {
        "zero weights in the decoder's Linears": f"{100 * sparsity:.1f} %",
        "pruning method": recipe.sparsify.method,
        "weights": _weight_format(recipe.quantize),
        "adapter": f"{recipe.adapt.pipeline}, {merged}" if recipe.adapt else "none",
        "task": recipe.task.kind,
        "SHA-256 of the base": base.sha256,
        "licence of the base": base.license,
        **{f"licence of {name}": found for name, found in origin.data.licenses.items()},
    }
    lines = [
        *("---", f"base_model: {base.model}", f"license: {base.license}"),
        *("pipeline_tag: text-generation", "tags: [sqft, sparse, quantized]", "---", ""),
        *(f"# {recipe.name}", "", f"Made from {base.model}{revision}.", ""),
        *("| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items())),
        *("", usage),
        *_overflow_section(overflow),
        *("## Origin", ""),
        SEALED_BY,
    ]
    return "\n".join(lines) + "\n"


def _weight_format(quantize: Quantize) -> str:
    """Return bits, kind and groups of the grid as a card states them."""
    if quantize.method == "none":
        return "floats"
    group = quantize.group_size or "a whole row"
    kind = "symmetric" if quantize.symmetric else "asymmetric"
    return f"INT{quantize.bits}, {kind}, groups of {group}, by {quantize.method}"


def _overflow_section(warnings: Sequence[str]) -> list[str]:
    """Return the lines of a card about values that float16 may not hold; none without warnings."""
    if not warnings:
        return []
    return ["## Number formats", "", *(f"- {warning}" for warning in warnings), ""]


def merged_usage(recipe: CardSections, prompt: str) -> str:
    """Return the section of a merged model's card with code to run inside its folder."""
    in_gptq_layout = recipe.quantize.method != "none"
    first = ["In this folder:", ""]
    if in_gptq_layout:
        first = [
            "The weights are in the GPTQ layout, which transformers reads through gptqmodel. It "
            "needs other versions",
            "of torch and transformers than sqft_export, so use a separate Python environment:",
            *("", "```sh", "pip install gptqmodel optimum", "```", "", *first),
        ]
    peft = ['model = peft.PeftModel.from_pretrained(model, "../adapter")'] * recipe.unmerged
    code = [
        *(["import peft"] * recipe.unmerged),
        *("from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".")',
        *(*peft, f"prompt = {json.dumps(prompt, ensure_ascii=False)}"),
        *_tokenized(recipe),
        "print(tokenizer.decode(model.generate(**batch, max_new_tokens=64)[0]))",
    ]
    lines = ["## How to run it", "", *first, "```python", *code, "```", ""]
    return "\n".join(lines)


def _tokenized(recipe: CardSections) -> list[str]:
    """Return the lines of code that tokenize a prompt."""
    if not uses_template(recipe.task):
        return ['batch = tokenizer(prompt, return_tensors="pt")']
    return [
        'messages = [{"role": "user", "content": prompt}]',
        "batch = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
    ]

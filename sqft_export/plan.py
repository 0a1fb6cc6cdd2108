"""What a recipe will do, checked and predicted from headers alone; nothing is loaded."""

import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path

from sqft_export import sources, tasks
from sqft_export.checkpoint import decoder_linears
from sqft_export.errors import UserError
from sqft_export.families import Family, adapted, family_of
from sqft_export.machine import installed
from sqft_export.numerics.groups import fallback_group_size
from sqft_export.recipe import Amount, Recipe
from sqft_export.selection import matches
from sqft_export.targets.devices import places

NEEDS = {
    "openvino": ("openvino", "openvino_tokenizers", "optimum.intel"),
    "onnx": ("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir"),
    "nncf": ("nncf", "openvino"),
}


def pass_names(recipe: Recipe) -> list[str]:
    """The passes of this recipe, in order."""
    names = []
    if recipe.sparsify.method != "none":
        names.append("sparsify")
    if recipe.quantize.method != "none":
        names.append("quantize")
    distill, baselines = recipe.adapt.distill, recipe.benchmark.baselines
    if "dense-lora" in baselines or (distill and distill.teacher == "dense-lora"):
        names.append("teacher")
    names += ["adapt", "search", "merge"]
    names += [f"export-{target}" for target in recipe.export.targets]
    names.append("verify")
    if "sparse-quantized" in baselines and recipe.quantize.method != "none":
        names.append("baselines")
    return [*names, "benchmark", "report"]


@dataclass(frozen=True)
class Layout:
    """Shapes of the base model, as the recipe sees them.

    family: of the model.
    linears: decoder Linear -> (outputs, inputs).
    others: count of all weights outside them.
    width: bytes of one stored weight.
    """

    family: Family
    linears: dict[str, tuple[int, int]]
    others: int
    width: int

    @property
    def weights(self) -> int:
        return sum(prod(shape) for shape in self.linears.values())


def layout_of(recipe: Recipe, folder: Path | None) -> Layout:
    shapes = sources.weight_shapes(recipe, folder)
    config = recipe.model.config if folder is None else sources.Checkpoint(folder).config
    family = family_of(config or {}, str(recipe.file))
    linears = decoder_linears(shapes, family.blocks)
    total = sum(prod(shape) for shape in shapes.values())
    weights = sum(prod(shape) for shape in linears.values())
    return Layout(family, linears, total - weights, sources.weight_bytes(recipe, folder))


def group_sizes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """The group size every Linear really gets."""
    asked = recipe.quantize.group_size
    return {
        name: fallback_group_size(inputs, asked) for name, (_, inputs) in layout.linears.items()
    }


def fallbacks(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Linears whose group size is not the one asked for, and the one they get."""
    asked = recipe.quantize.group_size
    if recipe.quantize.method == "none" or asked is None:
        return {}
    return {name: size for name, size in group_sizes(recipe, layout).items() if size != asked}


def predict_bytes(recipe: Recipe, layout: Layout) -> dict[str, int]:
    """Bytes that each pass will write, from shapes and bit widths."""
    stored = (layout.weights + layout.others) * layout.width
    masks = layout.weights // 8
    groups = group_sizes(recipe, layout)
    targets, _ = adapted(layout.family, recipe.adapt.target_modules, None)
    scales = sum(prod(shape) // groups[name] for name, shape in layout.linears.items())
    adapter = 4 * sum(
        recipe.adapt.max_rank * (outputs + inputs)
        for name, (outputs, inputs) in layout.linears.items()
        if name.rsplit(".", 1)[1] in targets
    )
    quantized = recipe.quantize.method != "none"
    # A scale is two bytes, a zero point at most one.
    codes = layout.weights * recipe.quantize.bits // 8 + 3 * scales if quantized else 0
    merged = codes + layout.others * layout.width if quantized else stored
    deployed = codes + 4 * layout.others if quantized else 4 * (layout.weights + layout.others)
    if recipe.export.sparse_files:
        deployed *= 2  # at most: a packed copy is never larger
    predicted = {
        "sparsify": stored + masks,
        "quantize": stored + 3 * scales,
        "adapt": adapter,
        "search": adapter,
        "merge": merged + masks,
        "export-openvino": deployed,
        "export-onnx": deployed,
        "teacher": stored,
        "baselines": merged,
    }
    return {name: predicted.get(name, 2**20) for name in pass_names(recipe)}


def check(recipe: Recipe, folder: Path | None) -> Layout:
    """Refuse what can't be run here, before anything is run.

    :raises UserError: listing every fault, each with its field, what was found and what is
        allowed.
    """
    layout = layout_of(recipe, folder)
    tasks.check(recipe)
    faults = [
        *_rank_faults(recipe, layout),
        *_pattern_faults(recipe, layout),
        *_group_faults(recipe, layout),
        *_given_faults(recipe, folder),
        *_missing_faults(recipe),
        *_target_faults(recipe, layout.family),
        *_device_faults(recipe),
    ]
    if faults:
        raise UserError("\n".join(f"{recipe.file}: {fault}" for fault in faults))
    return layout


def _rank_faults(recipe: Recipe, layout: Layout) -> list[str]:
    adapt = recipe.adapt
    targets, _ = adapted(layout.family, adapt.target_modules, None)
    ends = {name.rsplit(".", 1)[1] for name in layout.linears}
    if strangers := sorted(set(targets) - ends):
        return [
            f"adapt.target_modules: found {', '.join(strangers)}, which no decoder Linear is "
            f"called; allowed are {', '.join(sorted(ends))}"
        ]
    smallest = {
        end: min(min(shape) for name, shape in layout.linears.items() if name.endswith("." + end))
        for end in targets
    }
    return [
        f"adapt.ranks: found {adapt.max_rank}, but {end} has only {size} rows or columns"
        for end, size in smallest.items()
        if size < adapt.max_rank
    ]


def _pattern_faults(recipe: Recipe, layout: Layout) -> list[str]:
    amounts: list[tuple[str, Amount, tuple[str, ...]]]
    amounts = [("sparsify", recipe.sparsify, ("*",))]
    faults = []
    for number, override in enumerate(recipe.sparsify.overrides):
        where = f"sparsify.overrides.{number}"
        amounts.append((where, override, override.modules))
        if strangers := [
            m for m in override.modules if not any(matches(n, (m,)) for n in layout.linears)
        ]:
            ends = sorted({name.rsplit(".", 1)[1] for name in layout.linears})
            faults.append(
                f"{where}.modules: found {', '.join(strangers)}, which matches no decoder Linear; "
                f"last names are {', '.join(ends)}"
            )
    for where, amount, modules in amounts:
        found = amount.n_of_m()
        faults += [
            f"{where}.pattern: found {amount.pattern}, but {name} has {inputs} inputs, "
            f"which {found[1]} does not divide"
            for name, (_, inputs) in layout.linears.items()
            if found and inputs % found[1] and matches(name, modules)
        ]
    return faults


def _group_faults(recipe: Recipe, layout: Layout) -> list[str]:
    quantize = recipe.quantize
    if quantize.group_size_fallback == "allow":
        return []
    return [
        f"quantize.group_size: found {quantize.group_size}, which does not divide the "
        f"{layout.linears[name][1]} inputs of {name}; group_size_fallback: allow would use {size}"
        for name, size in fallbacks(recipe, layout).items()
    ]


def _given_faults(recipe: Recipe, folder: Path | None) -> list[str]:
    """What does not go with a base model that is quantized already, or is not."""
    config = sources.Checkpoint(folder).config if folder else recipe.model.config or {}
    stored, quantize = config.get("quantization_config"), recipe.quantize
    if stored is None:
        if quantize.method == "given":
            return ["quantize.method: found given, but the model is not quantized"]
        return []
    faults = []
    if stored.get("quant_method") != "gptq":
        faults.append(
            f"model: quantized by {stored.get('quant_method')!r}; only the gptq layout is taken"
        )
    if stored.get("desc_act"):
        faults.append("model: desc_act is true: its columns are out of order and are not taken")
    if quantize.method != "given":
        faults.append(
            f"quantize.method: found {quantize.method}, but the model is quantized; use given"
        )
    if recipe.sparsify.method not in ("given", "none"):
        faults.append(
            f"sparsify.method: found {recipe.sparsify.method}, but the model is quantized; "
            "allowed are given and none"
        )
    group_size = quantize.group_size or -1
    for field, found, there in (
        ("bits", quantize.bits, stored.get("bits")),
        ("group_size", group_size, stored.get("group_size")),
        ("symmetric", quantize.symmetric, stored.get("sym", True)),
    ):
        if found != there:
            faults.append(f"quantize.{field}: found {found}, but the model has {there}")
    return faults


def _missing_faults(recipe: Recipe) -> list[str]:
    faults = []
    wanted: list[tuple[str, str, str]]
    wanted = [("export.targets", name, name) for name in recipe.export.targets]
    if recipe.quantize.method == "nncf":
        wanted.append(("quantize.method", "nncf", "openvino"))
    for field, name, extra in wanted:
        missing = [module for module in NEEDS[name] if not installed(module)]
        if missing:
            faults.append(
                f"{field}: {name} needs {', '.join(missing)}, not installed here; "
                f"pip install 'sqft-export[{extra}]', or leave {name} out"
            )
    return faults


def _target_faults(recipe: Recipe, family: Family) -> list[str]:
    """What a runtime can't do with this model."""
    fused = "onnx" in recipe.export.targets and recipe.export.onnx_graph == "fused"
    if fused and family.builder is None:
        return [
            "export.onnx_graph: found fused, but ONNX Runtime GenAI's builder is not used for "
            f"{', '.join(family.model_types)}; use standard, or auto"
        ]
    return []


def _device_faults(recipe: Recipe) -> list[str]:
    """Devices to measure on that no runtime of the recipe reaches here."""
    wanted = [d for d in recipe.benchmark.targets if d not in ("auto", "cpu")]
    found = places() if wanted else []
    runtimes = {*recipe.export.targets, "torch"}
    faults = []
    for device in wanted:
        candidates = [p for p in found if p.device == device and p.runtime in runtimes]
        if all(p.missing for p in candidates):
            reasons = "; ".join(f"{p.runtime} ({p.name}): {p.missing}" for p in candidates)
            faults.append(
                f"benchmark.targets: found {device}, which nothing reaches here "
                f"({reasons or 'no runtime of export.targets knows it'}); auto takes what is here"
            )
    return faults


def check_disk(recipe: Recipe, layout: Layout, root: Path) -> None:
    """Refuse a run that the disk can't hold.

    :raises UserError: with bytes needed and free.
    """
    needed, free = disk_bytes(recipe, layout, root)
    if free < needed:
        raise UserError(
            f"{recipe.file}: disk: {needed / 2**30:.1f} GiB needed in {root}, "
            f"{free / 2**30:.1f} GiB free"
        )


def disk_bytes(recipe: Recipe, layout: Layout, root: Path) -> tuple[int, int]:
    """Bytes that a whole run needs at most, and bytes free."""
    # The exporters trace a float32 copy of the merged model, which is deleted afterwards.
    transient = 4 * (layout.weights + layout.others)
    needed = sum(predict_bytes(recipe, layout).values()) + transient
    return needed, shutil.disk_usage(existing(root)).free


def existing(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return place

"""Which passes a recipe has."""

from sqft_export.recipe.schema import Recipe


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

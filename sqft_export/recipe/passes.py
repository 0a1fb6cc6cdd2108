"""Which passes a recipe has."""

from sqft_export.recipe.schema import Recipe


def pass_names(recipe: Recipe) -> list[str]:
    """The passes of this recipe, in order."""
    names = []
    if recipe.sparsify.method != "none":
        names.append("sparsify")
    if recipe.sparsify.reconstruct:
        names.append("reconstruct")
    if recipe.quantize.method != "none":
        names.append("quantize")
    baselines = recipe.benchmark.baselines
    if recipe.adapt:
        distill = recipe.adapt.distill
        if "dense-lora" in baselines or (distill and distill.teacher == "dense-lora"):
            names.append("teacher")
        names += ["adapt", "search"]
    names.append("merge")
    names += [f"export-{target}" for target in recipe.export.targets]
    names.append("verify")
    # Untrained, this is the merged model itself.
    if "sparse-quantized" in baselines and recipe.adapt and recipe.quantize.method != "none":
        names.append("baselines")
    return [*names, "benchmark", "report"]

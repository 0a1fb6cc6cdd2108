"""Which passes a recipe has."""

from sqft_export.recipe.schema import Recipe

ON_CPU = ("merge", "baselines", "export-openvino", "export-onnx", "export-gguf", "report")


def runs_on_cpu(name: str, recipe: Recipe) -> bool:
    """Whether nothing of a pass runs on an accelerator."""
    return name in ON_CPU or (name == "quantize" and recipe.quantize.method == "nncf")


def pass_names(recipe: Recipe) -> list[str]:
    """The passes of this recipe, in order; one is made from some of those before it alone."""
    names = []
    if recipe.sparsify.method != "none":
        names.append("sparsify")
    if recipe.sparsify.reconstruct:
        names.append("reconstruct")
    if recipe.quantize.method != "none":
        names.append("quantize")
    distill = recipe.adapt.distill if recipe.adapt else None
    taught = distill is not None and distill.teacher == "dense-lora"
    if recipe.adapt:
        names += ["teacher"] if taught else []
        names += ["adapt", "search"]
    names.append("merge")
    names += [f"export-{target}" for target in recipe.export.targets]
    names.append("verify")
    baselines = recipe.benchmark.baselines
    # Untrained, these are the base and the merged model.
    if "sparse-quantized" in baselines and recipe.adapt and recipe.quantize.method != "none":
        names.append("baselines")
    if "dense-lora" in baselines and recipe.adapt and not taught:
        names.append("teacher")
    return [*names, "benchmark", "report"]

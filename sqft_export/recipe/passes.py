"""The passes that a recipe runs, and where they run."""

from sqft_export.recipe.peers import PEERS
from sqft_export.recipe.schema import Recipe

CPU_PASSES = (
    *("merge", "baselines", "export-openvino", "export-onnx", "export-gguf"),
    *("export-web", "peers-nncf", "report"),
)


def runs_on_cpu(name: str, recipe: Recipe) -> bool:
    """Return whether a pass never uses an accelerator."""
    return name in CPU_PASSES or (name == "quantize" and recipe.quantize.method == "nncf")


def pass_names(recipe: Recipe) -> list[str]:
    """Return the names of this recipe's passes, in order; each depends only on earlier ones."""
    names = []
    if recipe.sparsify.method != "none":
        names.append("sparsify")
    if recipe.sparsify.reconstruct:
        names.append("reconstruct")
    if recipe.quantize.method != "none":
        names.append("quantize")
    distill = recipe.adapt.distill if recipe.adapt else None
    learns_from_lora = distill is not None and distill.teacher == "dense-lora"
    if recipe.adapt:
        names += ["teacher"] if learns_from_lora else []
        names += ["adapt", "search"]
    names.append("merge")
    names += [f"export-{target}" for target in recipe.export.targets]
    names.append("verify")
    baselines = recipe.benchmark.baselines
    # Without training, these rows would repeat the base and the merged model.
    if "sparse-quantized" in baselines and recipe.adapt and recipe.quantize.method != "none":
        names.append("baselines")
    if ("dense-lora" in baselines or recipe.peers) and recipe.adapt and not learns_from_lora:
        names.append("teacher")
    names += dict.fromkeys(PEERS[peer].stage for peer in recipe.peers)
    return [*names, "benchmark", "report"]

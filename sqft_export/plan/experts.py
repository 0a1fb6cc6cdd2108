"""Checks and warnings about models with routed experts."""

from collections.abc import Iterator

from sqft_export.model.families import adapted
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Recipe

_ALL_EXPERTS = {"openvino": "OpenVINO", "onnx": "ONNX"}  # graphs that compute every expert


def expert_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield settings that need every expert to see the same tokens, or that train experts."""
    if layout.family.experts is None:
        return
    advice = "the experts' tokens change with the weights before them"
    if recipe.sparsify.reconstruct:
        yield f"sparsify.reconstruct: not allowed for a mixture of experts, because {advice}"
    if recipe.quantize.reconstruct:
        yield f"quantize.reconstruct: not allowed for a mixture of experts, because {advice}"
    if recipe.quantize.method == "nncf":
        yield (
            "quantize.method: found nncf, which traces complete blocks; allowed for a mixture of "
            "experts are gptq, rtn, existing and none"
        )
    if recipe.adapt is None:
        return
    targets, _ = adapted(layout.family, recipe.adapt.target_modules, None)
    inside = {n.rpartition(".")[2] for n in layout.linears if ".experts." in n}
    if found := sorted(inside & set(targets)):
        yield (
            f"adapt.target_modules: found {', '.join(found)}, which are Linears of experts; "
            f"adapters are only on attention: {', '.join(layout.family.targets)}"
        )


def find_computed_experts(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield which deployments compute every expert for every token."""
    if layout.family.experts is None:
        return
    graphs = [_ALL_EXPERTS[name] for name in recipe.export.targets if name in _ALL_EXPERTS]
    if graphs:
        yield (
            f"export.targets: the graphs of {' and '.join(graphs)} compute all experts for every "
            "token and weight them by the router, so that they are slower than their weights "
            "suggest; llama.cpp computes only the chosen experts"
        )

"""Checks of gates: the benchmark must have the rows that a gate compares."""

from collections.abc import Iterator

from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Recipe


def gate_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a fault if ``gates.accuracy_drop`` is set but its rows are not measured."""
    baselines = recipe.benchmark.baselines
    if recipe.gates.accuracy_drop is None:
        return
    if "dense" not in baselines:
        yield (
            f"gates.accuracy_drop: found {recipe.gates.accuracy_drop:g}, but benchmark.baselines "
            f"is {list(baselines)}; add dense, from which the drop is computed"
        )
    elif not recipe.export.measured and (recipe.unmerged or "merged" not in baselines):
        yield (
            f"gates.accuracy_drop: found {recipe.gates.accuracy_drop:g}, but the benchmark has "
            "no row of a merged model or deployment; add a target to export.targets"
        )

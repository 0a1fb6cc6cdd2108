"""Baselines that are quantized after LoRA: faults of a recipe, and what to expect of the run."""

from collections.abc import Iterator

from sqft_export.plan.layout import Layout
from sqft_export.plan.workload import Workload
from sqft_export.recipe.peers import PEERS
from sqft_export.recipe.schema import Recipe

# Training examples after which 50 % sparse INT4 was as accurate as dense INT4 on BANKING77
# (SmolLM2-135M: 450 steps of 16); after 4,800 it was five points behind.
EXAMPLES_OF_SPARSE = 7200
SHORT_TRAINING = (
    "sparse INT4 was 5 points less accurate than dense INT4 after 4,800 examples and level with it "
    "after 7,200 (BANKING77, SmolLM2-135M)"
)


def peer_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield the listed peers that can't be made here, with what is missing."""
    listed = [name for name in PEERS if name in recipe.benchmark.baselines]
    if listed and recipe.adapt is None:
        yield (
            f"benchmark.baselines: found {', '.join(listed)}, which need a trained LoRA, but adapt "
            "is none; remove them"
        )
        return
    for name in listed:
        peer = PEERS[name]
        if not peer.installed:
            yield (
                f"benchmark.baselines: {name} needs {' or '.join(peer.modules)}, not installed "
                f"here; pip install 'sqft-export[{peer.extra}]', or remove {name}"
            )
        elif recipe.quantize.method == "existing":
            yield (
                f"benchmark.baselines: found {name}, which quantizes the base model with LoRA, but "
                "the base model is quantized already (quantize.method: existing); remove it"
            )


def find_left_out_peers(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield the listed peers whose runtime is no target of the recipe."""
    for name in PEERS if recipe.adapt else ():
        runtime = PEERS[name].runtime
        if name in recipe.benchmark.baselines and name not in recipe.peers:
            yield (
                f"benchmark.baselines: {name} is left out: {runtime} is no target; add it to "
                "export.targets"
            )


def expectation(recipe: Recipe, workload: Workload) -> str | None:
    """Return which deployment the report will probably recommend; None without training."""
    if recipe.adapt is None:
        return None
    stop = "; adapt.stop may end the training earlier, so its time is an upper bound"
    return f"{_expected_form(recipe, workload)}{stop if recipe.adapt.stop else ''}"


def _expected_form(recipe: Recipe, workload: Workload) -> str:
    compared = ", ".join(PEERS[name].title for name in recipe.peers) or "no such model"
    first = (
        "the report compares the best deployment with the dense base quantized after LoRA "
        f"({compared})"
    )
    if recipe.sparsify.method == "none":
        return f"{first}; dense weights: expect equal bytes and the same or a higher accuracy"
    config = recipe.training
    if config.steps is None and workload.examples is None:
        return f"{first}; {SHORT_TRAINING}"
    seen = config.total_steps(workload.examples or 0) * config.batch * config.accumulation
    likely = "dense" if seen < EXAMPLES_OF_SPARSE else "dense or sparse"
    return (
        f"{first}; it will probably recommend {likely} weights: training sees {seen:,} examples, "
        f"and {SHORT_TRAINING}"
    )

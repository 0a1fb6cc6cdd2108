"""The smallest number of GPUs of common sizes that a recipe needs, from predicted memory."""

from sqft_export.plan.document import GpuNeed
from sqft_export.plan.layout import Layout
from sqft_export.plan.memory import accelerator_bytes, predict_memory
from sqft_export.plan.workload import Workload
from sqft_export.recipe.passes import runs_on_cpu
from sqft_export.recipe.schema import Recipe

GPU_BYTES = tuple(size * 2**30 for size in (24, 48, 80, 140))
USABLE_SHARE = 0.94  # of a GPU; the rest is for its context and for fragments of free memory
MAX_GPUS = 1024
# Passes whose memory per GPU does not hold the whole model: they walk over blocks, or train with
# FSDP2.
_SPLIT_PASSES = ("sparsify", "reconstruct", "quantize", "adapt", "teacher")


def gpu_needs(recipe: Recipe, layout: Layout, workload: Workload) -> list[GpuNeed]:
    """Return the smallest number of GPUs for each size of ``GPU_BYTES``.

    All passes that use the accelerator and do not hold the whole model fit into this number.
    """
    return [_need(size, recipe, layout, workload) for size in GPU_BYTES]


def _need(size: int, recipe: Recipe, layout: Layout, workload: Workload) -> GpuNeed:
    """Return the number of GPUs of a size by doubling, then by bisection."""
    usable = USABLE_SHARE * size

    def needed(count: int) -> float:
        memory = _split_bytes(recipe, layout, workload, count)
        return max(memory.values(), default=0)

    high = 1
    while needed(high) > usable and high < MAX_GPUS:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle) <= usable else (middle, high)
    largest = needed(high)
    memory = predict_memory(recipe, layout, workload)
    others = [n for n in memory if n not in _SPLIT_PASSES and not runs_on_cpu(n, recipe)]
    whole = accelerator_bytes(recipe, memory, others)
    return GpuNeed(
        gpu_bytes=size,
        count=high if largest <= usable else None,
        needed_bytes=int(largest),
        too_large={name: int(most) for name, most in whole.items() if most > usable},
    )


def _split_bytes(
    recipe: Recipe, layout: Layout, workload: Workload, count: int
) -> dict[str, float]:
    """Return the bytes on each of ``count`` GPUs of the passes that are split."""
    memory = predict_memory(recipe, layout, workload, count)
    return accelerator_bytes(recipe, memory, [name for name in _SPLIT_PASSES if name in memory])

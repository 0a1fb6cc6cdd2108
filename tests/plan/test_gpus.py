"""The smallest number of GPUs, on paper for a model of 70 billion weights."""

import pytest

from conftest import ROOT, small_recipe
from sqft_export.plan.gpus import GPU_BYTES, USABLE_SHARE, gpu_needs
from sqft_export.plan.layout import layout_of
from sqft_export.plan.memory import FIXED_MEMORY, predict_memory
from sqft_export.plan.workload import workload_of
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.schema import Recipe
from sqft_export.report.text import _gpu_line

LARGE = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
OUTER = 2 * 128256 * 8192  # weights of embedding and head


@pytest.fixture(scope="module")
def large() -> Recipe:
    """The Mistral recipe on the shapes of Llama 70B."""
    settings = ("adapt.gradient_checkpointing=true", "adapt.batch=1")
    recipe = load_recipe(ROOT / "recipes" / "mistral.yaml", settings)
    model = recipe.model.model_copy(update={"hub": "meta-llama/Llama-3.1-70B", "config": LARGE})
    return recipe.model_copy(update={"model": model})


def memory(recipe: Recipe, count: int) -> dict[str, float]:
    return predict_memory(recipe, layout_of(recipe, None), workload_of(recipe, None), count)


def test_processes_share_weights_and_samples(large):
    """FSDP2: all but a constant part shrinks with the number of GPUs; masks and grids do not."""
    layout = layout_of(large, None)
    assert 68e9 < layout.weights < 70e9
    one, four, eight = (memory(large, count) for count in (1, 4, 8))
    stored = 2 * (layout.weights + layout.others)
    assert one["adapt"] > stored + layout.weights / 8
    # Gathered: two of 80 blocks, and all tensors outside of the blocks.
    gathered = 2 * (2 * layout.weights / 80 + layout.others)
    adapter = 5 * memory_of_adapter(large)
    saved = (stored + adapter) * 3 / 4 - gathered
    assert one["adapt"] - four["adapt"] == pytest.approx(saved, rel=1e-3)
    assert four["adapt"] - eight["adapt"] == pytest.approx((stored + adapter) / 8, rel=1e-3)
    for name in ("sparsify", "quantize"):
        assert FIXED_MEMORY < eight[name] < four[name] < one[name] < 0.2 * stored
    for name in ("search", "merge", "benchmark"):
        assert eight[name] == one[name]


def memory_of_adapter(recipe: Recipe) -> float:
    from sqft_export.plan.disk import adapter_bytes

    return adapter_bytes(recipe, layout_of(recipe, None))


def test_the_number_of_gpus_is_the_smallest(large):
    layout, workload = layout_of(large, None), workload_of(large, None)
    needs = {need.gpu_bytes: need for need in gpu_needs(large, layout, workload)}
    assert [*needs] == list(GPU_BYTES)
    for size, need in needs.items():
        if need.count is None:
            assert memory(large, 1024)["adapt"] - FIXED_MEMORY > USABLE_SHARE * size
            continue
        assert memory(large, need.count)["adapt"] - FIXED_MEMORY <= USABLE_SHARE * size
        assert memory(large, need.count - 1)["adapt"] - FIXED_MEMORY > USABLE_SHARE * size
        assert "search" in need.too_large  # it holds the whole model, 141 GB in 16 bits
    counts = [needs[size].count for size in GPU_BYTES]
    assert None not in counts and counts == sorted(counts, reverse=True)
    assert counts[2] in range(3, 9)


def test_plan_prints_gpus_only_for_models_that_need_several(large):
    layout, workload = layout_of(large, None), workload_of(large, None)
    lines = [_gpu_line(need) for need in gpu_needs(large, layout, workload)]
    assert "GPUs of 24.0 GiB with FSDP2: " in lines[0]
    assert "GPUs of 80.0 GiB with FSDP2: " in lines[2] and "search" in lines[2]
    tiny = small_recipe()
    from conftest import TINY

    small = gpu_needs(tiny, layout_of(tiny, TINY), workload_of(tiny, TINY))
    assert [need.count for need in small] == [1] * 4
    assert not any(need.too_large for need in small)

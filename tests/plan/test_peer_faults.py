"""What plan says about models that are quantized after LoRA."""

import pytest

from conftest import TINY, small_recipe
from sqft_export.plan.layout import layout_of
from sqft_export.plan.peers import expectation, find_left_out_peers, peer_faults
from sqft_export.plan.workload import workload_of
from sqft_export.recipe import peers

FILES = "benchmark.baselines=[dense, lora-then-q4_0, lora-then-nncf]"


def faults(*settings: str) -> list[str]:
    recipe = small_recipe(*settings)
    return list(peer_faults(recipe, layout_of(recipe, TINY)))


def test_a_listed_peer_that_cannot_be_made_is_named_with_its_extra(monkeypatch):
    assert faults(FILES) == []
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found = faults(FILES)
    assert "lora-then-q4_0 needs cyllama or llama_cpp, not installed here" in found[0]
    assert "pip install 'sqft-export[openvino]'" in found[1]
    assert faults() == []  # not listed: left out


def test_a_peer_needs_a_training_and_a_float_base():
    assert "which need a trained LoRA" in faults(FILES, "adapt=none")[0]
    assert "quantized already" in faults(FILES, "quantize.method=existing")[0]


def test_a_file_of_a_runtime_that_is_no_target_is_left_out_with_a_warning():
    recipe = small_recipe(FILES, "export.targets=[openvino]")
    assert recipe.peers == ("lora-then-nncf",)
    (warning,) = find_left_out_peers(recipe, layout_of(recipe, TINY))
    assert "lora-then-q4_0 is left out: gguf is no target" in warning
    assert list(find_left_out_peers(small_recipe(FILES), layout_of(recipe, TINY))) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((), "probably recommend dense weights: training sees 96 examples"),
        (("adapt.steps=1000",), "probably recommend dense or sparse weights"),
        (("sparsify={method: none}",), "expect equal bytes and the same or a higher accuracy"),
    ],
)
def test_the_expectation_depends_on_the_length_of_training(settings, words):
    recipe = small_recipe(*settings)
    found = expectation(recipe, workload_of(recipe, TINY))
    assert words in found and "(LoRA, then GPTQ, LoRA, then Q4_K_M)" in found
    assert expectation(small_recipe("adapt=none"), workload_of(recipe, TINY)) is None

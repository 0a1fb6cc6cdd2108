"""Which models that were quantized after LoRA a recipe measures."""

import pytest

from conftest import small_recipe
from sqft_export.errors import UserError
from sqft_export.recipe import peers
from sqft_export.recipe.passes import pass_names


def test_a_recipe_that_trains_has_our_grid_and_one_other_quantizer():
    recipe = small_recipe()
    assert recipe.peers == ("lora-then-int4", "lora-then-q4_k_m")
    assert recipe.grid_targets == ("openvino", "gguf")
    assert small_recipe("export.targets=[openvino]").peers == ("lora-then-int4", "lora-then-nncf")
    assert small_recipe("export.targets=[onnx]").grid_targets == ("onnx",)
    assert small_recipe("adapt=none").peers == ()


def test_a_library_that_is_missing_leaves_its_rows_out(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert small_recipe().peers == ("lora-then-int4",)


def test_all_peers_share_one_training_of_the_dense_lora():
    recipe = small_recipe("benchmark.baselines=[lora-then-nncf, lora-then-q4_0, lora-then-q4_1]")
    names = pass_names(recipe)
    assert names.count("teacher") == 1
    assert names.index("teacher") < names.index("peers-gguf") < names.index("peers-nncf")
    assert "peers-grid" not in names and names.count("peers-gguf") == 1


def test_an_unknown_name_is_refused_with_the_allowed_ones():
    with pytest.raises(UserError, match=r"lora-then-q5.*'lora-then-q4_k_m'"):
        small_recipe("benchmark.baselines=[lora-then-q5]")

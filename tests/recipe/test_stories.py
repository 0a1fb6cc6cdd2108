"""The recipe for a plain text takes a model of every family that the README lists."""

import pytest

from conftest import ROOT, random_model
from sqft_export.model.families import FAMILIES
from sqft_export.plan.checks import check_recipe
from sqft_export.recipe.load import load_recipe

CONFIGS = {
    "phi3": {"original_max_position_embeddings": 256},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "opt": {"ffn_dim": 172},
    "granitemoehybrid": {
        "num_local_experts": 0,
        "layer_types": ["attention", "attention"],
        "shared_intermediate_size": 172,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gemma4_text": {
        **{"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 32},
        "vocab_size_per_layer_input": 416,
    },
    "hunyuan_v1_dense": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 1e3},
    },
}


DENSE = sorted(name for name, family in FAMILIES.items() if family.experts is None)


@pytest.mark.parametrize("model_type", DENSE)
def test_the_recipe_fits_every_family(tmp_path, model_type):
    model = random_model(tmp_path, model_type=model_type, **CONFIGS.get(model_type, {}))
    recipe = load_recipe(ROOT / "recipes" / "stories.yaml", (), model)
    check_recipe(recipe, model)


def test_no_recipe_reads_outside_of_the_repository():
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        assert "../.." not in file.read_text(), file


def test_its_text_is_in_the_repository():
    recipe = load_recipe(ROOT / "recipes" / "stories.yaml")
    text = recipe.resolve(recipe.task.text).resolve()  # follows the link in the package
    assert text.is_relative_to(ROOT / "data") and text.is_file()

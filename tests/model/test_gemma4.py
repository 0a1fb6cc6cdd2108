"""Gemma 4: per-layer embeddings, stored scalars, and layers that read the cache of earlier ones."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import ROOT, random_model, small_recipe
from sqft_export.model.blocks import walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.contexts import cache_sizes
from sqft_export.model.floats import Reference, StreamedWeights
from sqft_export.model.miniature import shrink_config
from sqft_export.model.storage import load_grids
from sqft_export.numerics.affine import fit_grid, table_grid
from sqft_export.plan.disk import predict_bytes
from sqft_export.plan.exporters import find_caps
from sqft_export.plan.layout import layout_of
from sqft_export.recipe.load import load_recipe
from sqft_export.run.pipeline import run_recipe

TABLE = "model.embed_tokens_per_layer"
SIZES = {
    **{"head_dim": 16, "global_head_dim": 32, "sliding_window": 16, "num_hidden_layers": 4},
    **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 416},
    **{"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Of google/gemma-4-E2B, without fields that change no shape.
E2B = {
    **{"vocab_size": 262144, "hidden_size": 1536, "intermediate_size": 6144},
    **{"num_hidden_layers": 35, "num_attention_heads": 8, "num_key_value_heads": 1},
    **{"num_kv_shared_layers": 20, "use_double_wide_mlp": True, "sliding_window": 512},
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
}
IDS = list(range(5, 45))


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("gemma4"), model_type="gemma4_text", **SIZES)


@pytest.fixture(scope="module")
def merged(gemma4, tmp_path_factory):
    recipe = small_recipe(
        *("adapt.steps=2", "adapt.ranks=[8, 4]", "adapt.target_modules=null"),
        *("adapt.elastic_groups=null", "benchmark.baselines=[merged]", "export.targets=[]"),
        *("quantize.group_size=32", "quantize.embedding_bits=null"),
        model_path=gemma4,
    )
    return run_recipe(recipe, tmp_path_factory.mktemp("runs"), ("merge",))


def test_scalars_of_blocks_are_read_as_weights(gemma4):
    stored = load_file(gemma4 / "model.safetensors")
    name = "model.layers.1.layer_scalar"
    checkpoint = Checkpoint(gemma4)
    checkpoint.check()
    assert stored[name].item() != 1
    assert torch.equal(checkpoint.tensor(name), stored[name])
    theirs = AutoModelForCausalLM.from_pretrained(gemma4, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([IDS])).logits[0]
    assert (Reference(gemma4).logits([IDS])[0] - expected.numpy()).max() < 1e-4 * expected.std()


def test_blocks_one_by_one_compute_what_the_model_computes(gemma4):
    """Layers without keys get those of the layers before them."""
    checkpoint = Checkpoint(gemma4)
    model = AutoModelForCausalLM.from_pretrained(gemma4, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states
    for block in walk(checkpoint, [torch.tensor(IDS)], None):
        [(hidden, _)] = block.calls
        assert (hidden - states[block.index]).abs().max() < 1e-4, block.index


def test_linears_of_per_layer_embeddings_stay_in_floats(gemma4, merged):
    linears = {name.partition("layers.0.")[2] for name in Checkpoint(gemma4).linears}
    assert not {"per_layer_input_gate", "per_layer_projection"} & linears
    assert "mlp.gate_proj" in linears
    before = load_file(gemma4 / "model.safetensors")
    after = load_file(merged["merge"].path / "model" / "model.safetensors")
    for name in ("layers.1.per_layer_input_gate.weight", "per_layer_model_projection.weight"):
        assert torch.equal(before[f"model.{name}"], after[f"model.{name}"])


def test_the_table_is_int8_with_a_scale_per_layer(gemma4, merged):
    """Also where the embedding stays in floats."""
    folder = merged["merge"].path / "model"
    grids = load_grids(folder)
    assert set(grids) == {TABLE}
    assert (grids[TABLE].bits, grids[TABLE].group_size) == (8, 16)
    assert grids[TABLE].scale.shape == (416, 4) and grids[TABLE].symmetric
    table = Checkpoint(gemma4).tensor(f"{TABLE}.weight")
    expected = fit_grid(table, 8, 16, True)
    assert torch.equal(grids[TABLE].scale, expected.scale)
    error = Checkpoint(folder).tensor(f"{TABLE}.weight") - table
    steps = expected.scale.float().repeat_interleave(16, dim=1)
    assert (error.abs() / steps).max() < 1.51  # clipped at most by one step


def test_chunks_of_a_large_table_do_not_change_its_grid(monkeypatch):
    table = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    whole = table_grid(table, 32)
    monkeypatch.setattr("sqft_export.numerics.affine.ROWS_AT_ONCE", 7)
    chunked = table_grid(table, 32)
    assert torch.equal(whole.scale, chunked.scale)
    assert torch.equal(whole.zero_point, chunked.zero_point)


def test_a_reference_reads_only_the_rows_of_its_text(gemma4, monkeypatch):
    """The table of E2B has 9 GB in float32."""
    read = []
    original = StreamedWeights.__getitem__
    monkeypatch.setattr(
        StreamedWeights, "__getitem__", lambda self, name: read.append(name) or original(self, name)
    )
    Reference(gemma4).logits([IDS])
    assert f"{TABLE}.weight" not in read and "model.layers.0.mlp.up_proj.weight" in read


def test_only_layers_with_keys_have_a_cache():
    sizes = cache_sizes(AutoConfig.for_model("gemma4_text", **E2B).to_dict())
    assert sizes == [(1, 512) if index % 5 == 4 else (1, 256) for index in range(15)]


def test_a_miniature_keeps_one_layer_of_each_kind():
    small = shrink_config(AutoConfig.for_model("gemma4_text", **E2B).to_dict())
    assert small["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert small["num_kv_shared_layers"] == 2


@pytest.fixture(scope="module")
def e2b():
    return load_recipe(ROOT / "recipes" / "gemma4-e2b.yaml")


def test_plan_counts_the_table_as_int8(e2b):
    layout = layout_of(e2b, None)
    assert layout.config["model_type"] == "gemma4_text"
    assert layout.tables == 262144 * 35 * 256
    assert layout.tables > layout.weights
    predicted = predict_bytes(e2b, layout)
    assert predicted["export-openvino"] < 2 * (layout.weights + layout.tables + 4 * layout.head)


def test_plan_names_the_first_llama_cpp_that_reads_the_file(e2b):
    [said] = [text for text in find_caps(e2b, layout_of(e2b, None)) if "llama.cpp" in text]
    assert "llama.cpp reads gemma4_text from b8639 (April 2026) on" in said

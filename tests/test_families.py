"""Every family, with its peculiarities: all passes, both runtimes, both ONNX graphs."""

import numpy as np
import onnx
import pytest

from conftest import random_model, small_recipe
from sqft_export import pipeline
from sqft_export.families import FAMILIES
from sqft_export.recipe import Export
from sqft_export.targets import openvino as openvino_target
from sqft_export.targets import target

# model_type, what is peculiar, target modules, elastic group
MODELS = [
    ("llama", {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}, "q_proj"),
    ("llama", {"num_key_value_heads": 4, "dtype": "bfloat16"}, "q_proj"),
    ("mistral", {"sliding_window": 16, "head_dim": 16}, "q_proj"),
    ("phi3", {"original_max_position_embeddings": 256}, "qkv_proj"),
    ("qwen2", {"tie_word_embeddings": True}, "q_proj"),
    ("qwen3", {"head_dim": 32}, "q_proj"),
]


def ids_of(case) -> str:
    return f"{case[0]}-{'-'.join(case[1])}"


@pytest.fixture(scope="module", params=MODELS, ids=ids_of)
def family_run(request, tmp_path_factory):
    model_type, config, query = request.param
    root = tmp_path_factory.mktemp(model_type)
    down = "down_proj" if query == "q_proj" else "gate_up_proj"
    recipe = small_recipe(
        "adapt.steps=2",
        "adapt.ranks=[8, 4]",
        f"adapt.target_modules=[{query}, {down}]",
        f"adapt.elastic_groups=[[{query}]]",
        model_path=random_model(root / "model", model_type=model_type, **config),
    )
    return pipeline.run(recipe, root / "runs", ("verify",))


def test_every_model_type_has_its_case():
    assert {case[0] for case in MODELS} == set(FAMILIES)


def test_every_check_passes_in_both_runtimes(family_run):
    checks = family_run["verify"].metrics["checks"]
    assert all(check["passed"] for check in checks)
    names = {check["name"] for check in checks}
    for runtime in ("openvino", "onnx"):
        assert f"greedy tokens: merged in torch and {runtime}" in names
        assert f"codes, scales, zero points: merged and {runtime}" in names


def test_the_standard_graph_is_standard_and_agrees(family_run, tmp_path):
    """onnx.checker in full, the same codes and logits, also when OpenVINO reads it."""
    merged = family_run["merge"].path / "model"
    target("onnx").export(merged, tmp_path, Export(onnx_graph="standard"))
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    domains = {n.domain for n in onnx.load(tmp_path / "model.onnx").graph.node}
    assert domains == {"", "com.microsoft"}
    fused = target("onnx").read_back(family_run["export-onnx"].path / "model")
    standard = target("onnx").read_back(tmp_path)
    assert standard.keys() == fused.keys()
    for name, arrays in fused.items():
        for ours, theirs in zip(arrays, standard[name], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    reference = target("torch").open_session(merged, True, None)
    session = target("onnx").open_session(tmp_path, True, None)
    ids = np.random.RandomState(0).randint(5, 400, (4, 40))
    for part in (ids[:, :38], ids[:, 38:39], ids[:, 39:]):
        ours, theirs = reference.forward(part), session.forward(part)
        assert np.abs(ours - theirs).max() / ours.std() < 1e-4
    _openvino_reads(tmp_path, ids, reference)


def _openvino_reads(folder, ids, reference):
    compiled = openvino_target.ov.Core().compile_model(
        str(folder / "model.onnx"), "CPU", openvino_target.EXACT
    )
    batch, length = ids.shape
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, length), np.int64),
        "position_ids": np.tile(np.arange(length), (batch, 1)),
    }
    decoder = target("onnx")._decoder_of(folder)
    empty = np.zeros((batch, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    for port in compiled.inputs:
        name = port.get_any_name()
        if name.startswith("past_"):
            feeds[name] = empty
    found = compiled({k: v for k, v in feeds.items()})["logits"]
    reference.reset()
    ours = reference.forward(ids)
    assert np.abs(ours - found).max() / ours.std() < 1e-4

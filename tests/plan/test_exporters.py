"""An unsupported target is found before any work, skipped, and reported with its true reason."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import random_model, small_recipe
from sqft_export.errors import UserError
from sqft_export.model.architecture import family_of
from sqft_export.model.families import FAMILIES
from sqft_export.plan import exporters, readers
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.exporters import drop_unsupported, rehearse
from sqft_export.plan.warnings import plan_warnings
from sqft_export.recipe.schema import Recipe

ALL = "export.targets=[openvino, onnx, gguf]"


def planned(model: Path, *settings: str) -> tuple[Recipe, list[str]]:
    """The recipe without skipped targets, and the warnings of plan."""
    recipe = small_recipe("adapt=none", *settings, model_path=model)
    layout = check_recipe(recipe, model)
    kept = drop_unsupported(recipe, layout)
    return kept, list(plan_warnings(kept, layout))


def reason_of(name: str, model: Path) -> str:
    return planned(model, ALL)[0].skipped[name]


def test_a_model_that_every_target_has_keeps_all(random_llama):
    kept, warnings = planned(random_llama, ALL, "quantize.method=none")
    assert kept.export.targets == ("openvino", "onnx", "gguf")
    assert kept.skipped == {} and warnings == []


def test_an_old_bound_of_transformers_skips_openvino_and_names_both_versions(tmp_path):
    model = random_model(tmp_path / "model", model_type="gemma", head_dim=16)
    recipe = small_recipe("adapt=none", "export.targets=[openvino]", model_path=model)
    with pytest.raises(UserError, match=r"found openvino, but .*gemma .*5\.0; 5\.5\.4"):
        check_recipe(recipe, model)


def test_a_type_that_optimum_lacks_is_refused_by_name():
    assert exporters._optimum_lacks("ministral3") == (
        "optimum-intel has no OpenVINO export for ministral3"
    )
    assert exporters._optimum_lacks("stablelm") is None


def test_llama_cpp_is_not_blamed_for_what_this_package_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "rehearse", lambda *asked: None)
    model = random_model(tmp_path / "model", model_type="olmo")
    kept, warnings = planned(model, ALL)
    assert kept.export.targets == ("openvino", "onnx")
    reason = kept.skipped["gguf"]
    assert reason.startswith("this package can't write olmo as GGUF yet")
    assert any("gguf is skipped" in warning and reason in warning for warning in warnings)


def test_error_refuses_and_names_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "rehearse", lambda *asked: None)
    model = random_model(tmp_path / "model", model_type="olmo")
    recipe = small_recipe(ALL, "export.on_unsupported=error", model_path=model)
    with pytest.raises(UserError, match=r"export\.targets=\[openvino, onnx\]"):
        check_recipe(recipe, model)


def test_it_is_an_error_where_no_target_works(tmp_path):
    model = random_model(tmp_path / "model", model_type="opt", ffn_dim=172)
    recipe = small_recipe("export.targets=[gguf]", model_path=model)
    with pytest.raises(UserError, match=r"found gguf, but llama.cpp has no architecture for opt"):
        check_recipe(recipe, model)


def test_a_rehearsed_export_that_fails_names_the_cause(monkeypatch):
    """Phi of grouped queries fails with optimum's own export config; of equal heads it works."""
    monkeypatch.setitem(FAMILIES, "phi", replace(FAMILIES["phi"], openvino_config=None))
    sizes = {"model_type": "phi", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 416}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 128}
    failing = rehearse("openvino", json.dumps(sizes | {"num_key_value_heads": 2}), "auto")
    assert failing and failing.startswith("the export of a small phi model fails: RuntimeError")
    assert rehearse("openvino", json.dumps(sizes | {"num_key_value_heads": 4}), "auto") is None


@pytest.mark.slow
def test_a_standard_graph_that_torch_cannot_trace_skips_onnx(monkeypatch):
    monkeypatch.setattr("sqft_export.targets.onnx.standard.cache_sizes", lambda _: [(4, 16)] * 2)
    config = {"model_type": "falcon", "multi_query": True, "num_attention_heads": 4}
    config |= {"vocab_size": 416, "hidden_size": 64, "num_hidden_layers": 2}
    reason = rehearse("onnx", json.dumps(config), "auto")
    assert reason and "the export of a small falcon model fails" in reason


def test_recurrent_blocks_that_are_not_listed_are_refused_before_any_work():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(
        UserError, match=r"falcon_h1: model\.layers\.0\.mamba belongs to a recurrent"
    ):
        family_of({"model_type": "falcon_h1", **sizes}, "config.json")


def test_longrope_in_a_standard_graph_is_refused_before_any_work(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8}
    rope |= {"long_factor": [2.0] * 8, "original_max_position_embeddings": 64}
    config = {"original_max_position_embeddings": 64, "rope_parameters": rope}
    model = random_model(tmp_path / "model", model_type="phi3", **config)
    kept, _ = planned(model, "export.targets=[openvino, onnx]", "export.onnx_graph=standard")
    assert "export.onnx_graph=fused" in kept.skipped["onnx"]
    kept, _ = planned(model, "export.targets=[openvino, onnx]")
    assert kept.skipped == {}


def test_dynamic_ntk_is_capped_and_said(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = random_model(tmp_path / "model", max_position_embeddings=128, rope_parameters=rope)
    kept, warnings = planned(model, ALL, "quantize.method=none")
    assert kept.export.targets == ("openvino", "onnx")
    assert "rope_type dynamic" in kept.skipped["gguf"]
    assert any("up to 128 tokens" in warning for warning in warnings)


def test_a_tokenizer_that_differs_is_a_warning_and_required_an_error(random_llama, monkeypatch):
    """As ONNX Runtime GenAI's of SmolLM2, which takes one character for another."""
    real = readers.tokenize_as_deployed

    def differing(runtime, source, texts, rows):
        found = real(runtime, source, texts, rows)
        return {name: [[*ids[0][:-1], 7], *ids[1:]] for name, ids in found.items()}

    monkeypatch.setattr(readers, "tokenize_as_deployed", differing)
    readers._tokenized.cache_clear()
    targets = "export.targets=[onnx]"
    _, warnings = planned(random_llama, targets)
    assert any("the tokenizer of ONNX Runtime GenAI makes other ids of 1" in w for w in warnings)
    recipe = small_recipe(targets, "verify.tokenizers=required", model_path=random_llama)
    with pytest.raises(UserError, match=r"verify.tokenizers: found required.* reported allow it"):
        check_recipe(recipe, random_llama)
    readers._tokenized.cache_clear()


def test_a_target_whose_tokenizer_has_no_form_there_is_skipped(random_llama, monkeypatch):
    real = readers.tokenize_as_deployed

    def failing(runtime, source, texts, rows):
        if runtime == "openvino":
            raise RuntimeError("no such pre-tokenizer")
        return real(runtime, source, texts, rows)

    monkeypatch.setattr(readers, "tokenize_as_deployed", failing)
    readers._tokenized.cache_clear()
    kept, _ = planned(random_llama, "export.targets=[openvino, onnx]")
    assert kept.skipped == {
        "openvino": "its tokenizer can't be converted: no such pre-tokenizer",
    }
    readers._tokenized.cache_clear()


@pytest.mark.parametrize("runtime", ["openvino", "onnx", "gguf"])
def test_tokenizers_are_tried_without_a_model(random_llama, runtime):
    texts = ["Question: 3 + 4\nAnswer:", "caf\u00e9"]
    expected = [AutoTokenizer.from_pretrained(random_llama)(text)["input_ids"] for text in texts]
    found = readers.tokenize_as_deployed(runtime, random_llama, texts, 416)
    assert found and all(ids == expected for ids in found.values())

"""Activations and scales that float16 may not hold are recorded during calibration and named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import small_recipe
from sqft_export.data.calibration import calibration_tensors
from sqft_export.model.activations import (
    CalibrationStatistics,
    overflow_warnings,
    scale_warnings,
)
from sqft_export.model.blocks import walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.run.pipeline import run_recipe


@pytest.fixture(scope="module")
def large(random_llama, tmp_path_factory):
    """A random model whose second block has huge keys; its queries make up for it."""
    folder = tmp_path_factory.mktemp("large") / "model"
    shutil.copytree(random_llama, folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.self_attn.k_proj.weight"] *= 2.0**16
    state["model.layers.1.self_attn.q_proj.weight"] *= 2.0**-8
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def largest_by_hooks(folder, samples) -> dict[str, float]:
    """The literal version: every Linear's inputs and outputs of the whole model."""
    model, found = AutoModelForCausalLM.from_pretrained(folder), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(
                lambda _m, args, out, name=name: found.__setitem__(
                    name,
                    max(found.get(name, 0.0), float(args[0].abs().max()), float(out.abs().max())),
                )
            )
    for sample in samples:
        model(input_ids=sample[None])
    return found


def test_the_largest_activations_are_those_of_the_model(large):
    samples = calibration_tensors(small_recipe(model_path=large), large)[:3]
    statistics = CalibrationStatistics()
    for _ in walk(Checkpoint(large), samples, None, seen=statistics):
        pass
    largest = statistics.largest
    expected = largest_by_hooks(large, samples)
    blocks = {f"output of block {index}" for index in range(2)}
    assert largest.keys() == expected.keys() | blocks
    for name, value in expected.items():
        assert largest[name] == pytest.approx(value, rel=1e-4), name


def test_overflow_is_named_in_metrics_report_and_card(large, tmp_path):
    recipe = small_recipe("adapt=none", "export.targets=[onnx]", model_path=large)
    made = run_recipe(recipe, tmp_path, ("export-onnx",))
    metrics = made["quantize"].metrics
    key = "model.layers.1.self_attn.k_proj"
    assert metrics["largest_activations"][key] > 3e4 and metrics["largest_scales"][key] > 100
    activations, scales = metrics["warnings"][-2:]
    assert activations.startswith("activations: ") and key in activations
    assert "float16 ends at 65,504" in activations
    assert scales.startswith("scales: ") and key in scales
    for folder in (made["merge"].path / "model", made["export-onnx"].path / "model"):
        card = (folder / "README.md").read_text()
        assert f"- {activations}" in card and f"- {scales}" in card
    assert json.dumps(metrics)


def test_usual_models_have_no_warning(random_llama, tmp_path):
    assert not overflow_warnings({"a": 2.9e4}) and not scale_warnings({"a": 99.0})
    assert "2 of 3 modules" in overflow_warnings({"a": 1.0, "b": 4e4, "c": 5e4})[0]
    recipe = small_recipe("adapt=none", model_path=random_llama)
    made = run_recipe(recipe, tmp_path, ("quantize",))
    assert not made["quantize"].metrics["warnings"]

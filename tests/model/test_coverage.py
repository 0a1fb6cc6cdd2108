"""Calibration that says nothing, or too little, about a Linear is an error or a warning."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import random_model, small_recipe
from sqft_export.data.calibration import calibration_tensors
from sqft_export.errors import UserError
from sqft_export.model.blocks import Inputs, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.numerics.hessian import inverse_factor
from sqft_export.run.pipeline import run_recipe

RECONSTRUCT = "{steps: 1, batch: 2}"


def changed(folder, **tensors):
    """The model of a folder with some tensors filled with a value; dots are double underscores."""
    state = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        state[name.replace("__", ".")].fill_(value)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run_until(last, model, root, *settings):
    recipe = small_recipe("adapt=none", *settings, model_path=model)
    return run_recipe(recipe, root, (last,))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sparsify", ("sparsify={method: wanda, sparsity: 0.5}",)),
        ("sparsify", ("sparsify={method: sparsegpt, sparsity: 0.5}",)),
        (
            "sparsify",
            ("sparsify={method: magnitude, sparsity: 0.5, allocation: output-error}",),
        ),
        (
            "reconstruct",
            (f"sparsify={{method: magnitude, sparsity: 0.5, reconstruct: {RECONSTRUCT}}}",),
        ),
        ("quantize", ("quantize.method=gptq",)),
        ("quantize", ("quantize.method=nncf", "quantize.group_size=32")),
        ("quantize", ("quantize.method=rtn", f"quantize.reconstruct={RECONSTRUCT}")),
    ],
)
def test_every_linear_counts_its_tokens(random_llama, tmp_path, name, settings):
    made = run_until(name, random_llama, tmp_path, *settings)[name]
    recipe = small_recipe(model_path=random_llama)
    tokens = sum(map(len, calibration_tensors(recipe, random_llama)))
    linears = Checkpoint(random_llama).linears
    assert made.manifest["metrics"]["calibration_tokens"] == dict.fromkeys(linears, tokens)
    assert not made.metrics["warnings"]


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        ("sparsify", ("sparsify={method: wanda, sparsity: 0.5}",), 128),
        ("sparsify", ("sparsify={method: sparsegpt, sparsity: 0.5}",), 172),
        ("quantize", (), 172),
    ],
)
def test_few_tokens_are_a_warning(random_llama, tmp_path, name, settings, wanted):
    few = ("calibration.samples=2", "calibration.sequence_length=8")
    made = run_until(name, random_llama, tmp_path, *few, *settings)[name]
    [warning] = made.metrics["warnings"]
    assert "14 of 14 Linears saw few tokens" in warning
    assert f"saw 16, {wanted} are needed" in warning and "calibration.samples" in warning


@pytest.mark.parametrize("needs", ["norms", "factor", "nothing"])
def test_a_linear_that_is_never_called_is_named(random_llama, needs):
    inputs, samples = Inputs(needs), [torch.arange(2, 40)]
    blocks = walk(Checkpoint(random_llama), samples, inputs.collector)
    block = next(blocks)
    block.module.mlp.forward = lambda hidden: hidden
    inputs.forget()
    with pytest.raises(UserError, match=r"layers.0.mlp.\w+: saw no calibration token"):
        next(blocks)  # none is called on the way to the next block
    if needs != "nothing":
        with pytest.raises(UserError, match=r"layers.0.mlp.up_proj: saw no calibration token"):
            inputs.take("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_that_are_all_zero_are_named(tmp_path, method):
    model = changed(random_model(tmp_path / "model"), model__layers__1__input_layernorm__weight=0)
    with pytest.raises(UserError, match=r"layers.1.self_attn.\w_proj: .* are all zero"):
        run_until("sparsify", model, tmp_path, f"sparsify={{method: {method}, sparsity: 0.5}}")


@pytest.mark.parametrize("setting", ["sparsify.method=sparsegpt", "sparsify.method=wanda"])
def test_inputs_that_overflow_are_named(tmp_path, setting):
    model = changed(
        random_model(tmp_path / "model"), model__layers__1__input_layernorm__weight=1e30
    )
    with pytest.raises(UserError, match=r"layers.1.self_attn.\w_proj: .* NaN or infinite"):
        run_until("sparsify", model, tmp_path, setting)


def test_activations_that_overflow_are_named_where_no_sum_is_made(tmp_path):
    model = changed(
        random_model(tmp_path / "model"), model__layers__0__post_attention_layernorm__weight=1e38
    )
    settings = ("sparsify.method=none", "sparsify.sparsity=null", "quantize.method=rtn")
    with pytest.raises(UserError, match="output of block 0: NaN or infinite on 16 of 16"):
        run_until("quantize", model, tmp_path, *settings, f"quantize.reconstruct={RECONSTRUCT}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_not_factored(value):
    hessian = torch.eye(8)
    hessian[3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        inverse_factor(hessian, 0.01)


def test_damping_that_never_suffices_ends():
    hessian = torch.full((4, 4), -1e38)
    hessian.fill_diagonal_(1e-3)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="at any damping"):
        inverse_factor(hessian, 0.01)

"""A model that is sparse and quantized already, as the base of a recipe."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import TINY, small_recipe
from sqft_export.artifacts.store import Artifact
from sqft_export.errors import UserError
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.storage import load_mask, read_quantized
from sqft_export.numerics.affine import Grid, dequantize
from sqft_export.plan.checks import check_recipe
from sqft_export.run.pipeline import run_recipe

LAYER = "model.layers.1.mlp.up_proj"
GIVEN = ("sparsify={method: existing}", "quantize.method=existing", "adapt.steps=2")


def next_round(base: Path, runs: Path, *settings: str) -> dict[str, Artifact]:
    """Run the recipe up to ``verify`` on a merged model; its zeros and grid stay."""
    return run_recipe(small_recipe(*GIVEN, *settings, model_path=base), runs, ("verify",))


@pytest.fixture(scope="module")
def second_round(tiny_run, tmp_path_factory) -> dict[str, Artifact]:
    base = tiny_run["merge"].path / "model"
    return next_round(base, tmp_path_factory.mktemp("second"), "adapt.learning_rate=1e-9")


def layers(model: Path) -> dict[str, tuple[torch.Tensor, Grid]]:
    checkpoint = Checkpoint(model)
    return {name: read_quantized(checkpoint, name) for name in checkpoint.quantized_linears}


def test_a_merged_model_is_the_base_of_the_next_recipe(tiny_run, second_round):
    assert all(check["passed"] for check in second_round["verify"].metrics["checks"])
    # Hardly trained, so the codes that come out are the ones that went in.
    before, after = (layers(run["merge"].path / "model") for run in (tiny_run, second_round))
    assert len(before) == 28
    for name, (codes, grid) in before.items():
        assert torch.equal(codes, after[name][0])
        assert torch.equal(grid.scale, after[name][1].scale)
    found = second_round["sparsify"].metrics["sparsity"]["all"]
    assert found == tiny_run["merge"].metrics["sparsity"]["all"]


def test_a_third_round_on_other_data_keeps_zeros_and_grid(tiny_run, second_round, tmp_path):
    problems = (TINY / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(x for x in problems if "*" in x))
    base, data = second_round["merge"].path / "model", f"task.train={tmp_path}/train.jsonl"
    third = next_round(base, tmp_path / "runs", data, "adapt.steps=20")
    assert all(check["passed"] for check in third["verify"].metrics["checks"])
    first, masks = layers(tiny_run["merge"].path / "model"), tiny_run["sparsify"].path
    changed = 0
    for name, (codes, grid) in layers(third["merge"].path / "model").items():
        assert torch.equal(grid.scale, first[name][1].scale)
        assert torch.equal(grid.zero_point, first[name][1].zero_point)
        dropped = ~load_mask(masks, name, codes.shape)
        assert not dequantize(codes, grid)[dropped].any()
        changed += int((codes != first[name][0]).sum())
    assert changed  # it learned


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("quantize.method=gptq",), "quantize.method: found gptq, but the model is quantized"),
        (("sparsify={method: wanda, sparsity: 0.5}",), "sparsify.method: found wanda, but the mod"),
        (("quantize.bits=8",), "quantize.bits: found 8, but the model has 4"),
        (("quantize.group_size=32",), "quantize.group_size: found 32, but the model has 64"),
    ],
)
def test_what_does_not_go_with_a_quantized_model_is_refused(tiny_run, settings, message):
    base = tiny_run["merge"].path / "model"
    recipe = small_recipe(*GIVEN, *settings, model_path=base)
    with pytest.raises(UserError, match=message):
        check_recipe(recipe, base)


def test_act_order_is_refused_before_any_work(tiny_run, tmp_path):
    base = shutil.copytree(tiny_run["merge"].path / "model", tmp_path / "model")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="desc_act is true"):
        check_recipe(small_recipe(*GIVEN, model_path=base), base)


def test_given_codes_need_a_quantized_model(random_llama):
    recipe = small_recipe("quantize.method=existing", model_path=random_llama)
    with pytest.raises(UserError, match="found existing, but the model is not quantized"):
        check_recipe(recipe, random_llama)


def with_scale(base: Path, folder: Path, scale: float) -> Path:
    """A quantized model, one group of whose weights has another scale."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.scales"][1, 2] = scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_group_at_scale_zero_is_trained_as_zeros(tiny_run, tmp_path):
    """Tools that scale by the largest weight store a group of zeros so; 0 / 0 would be the loss."""
    base = with_scale(tiny_run["merge"].path / "model", tmp_path / "base", 0)
    run = next_round(base, tmp_path / "runs")
    assert all(check["passed"] for check in run["verify"].metrics["checks"])
    codes, grid = layers(run["merge"].path / "model")[LAYER]
    assert not dequantize(codes, grid)[2, 64:128].any()


def test_a_scale_that_is_no_number_is_named(tiny_run, tmp_path):
    base = with_scale(tiny_run["merge"].path / "model", tmp_path / "base", float("inf"))
    with pytest.raises(UserError, match=rf"{LAYER}: 1 of \d+ scales are NaN or infinite"):
        next_round(base, tmp_path / "runs")


def test_the_floats_of_a_quantized_model_keep_their_dtype(tiny_run, tmp_path, monkeypatch):
    """A norm of 1e5 is a bfloat16 and no float16; the whole model is never held."""
    base = shutil.copytree(tiny_run["merge"].path / "model", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    floats = {name: t.bfloat16() for name, t in tensors.items() if t.dtype == torch.float32}
    floats |= {name: t.bfloat16() for name, t in tensors.items() if name.endswith("norm.weight")}
    floats["model.norm.weight"][0] = 1e5
    save_file(tensors | floats, base / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("sqft_export.stages.sparsify.MAX_BUFFER_BYTES", 2**16)
    made = run_recipe(small_recipe(*GIVEN, model_path=base), tmp_path / "runs", ("quantize",))
    for name in ("sparsify", "quantize"):
        written = Checkpoint(made[name].path / "model")
        dtype = Checkpoint(base).float_dtype
        assert written.tensor("model.norm.weight")[0] == torch.tensor(1e5).bfloat16()
        assert written.dtype(f"{LAYER}.weight") == dtype
        assert not any(key.endswith("qweight") for key in written.headers)
    assert len(Checkpoint(made["sparsify"].path / "model").shards) > 1
    dense = Checkpoint(made["sparsify"].path / "model").tensor(f"{LAYER}.weight").float()
    codes, grid = read_quantized(Checkpoint(base), LAYER)
    assert torch.equal(dense, dequantize(codes, grid).to(dtype).float())

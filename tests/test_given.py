"""A model that is sparse and quantized already, as the base of a recipe."""

import json
import shutil

import pytest
import torch

from conftest import small_recipe
from sqft_export import pipeline, plan
from sqft_export.checkpoint import Checkpoint
from sqft_export.compressed import read_quantized
from sqft_export.errors import UserError

GIVEN = ("sparsify={method: given}", "quantize.method=given", "adapt.steps=2")


def test_a_merged_model_is_the_base_of_the_next_recipe(tiny_run, tmp_path, monkeypatch):
    base = tiny_run["merge"].path / "model"
    recipe = small_recipe(*GIVEN, "adapt.learning_rate=1e-9", model_path=base)
    passes = plan.pass_names(recipe)
    monkeypatch.setattr(pipeline.plan, "pass_names", lambda _: passes[: passes.index("verify") + 1])
    again = pipeline.run(recipe, tmp_path)
    assert all(check["passed"] for check in again["verify"].metrics["checks"])
    # Hardly trained, so the codes that come out are the ones that went in.
    before, after = Checkpoint(base), Checkpoint(again["merge"].path / "model")
    assert len(before.packed) == 28
    for name in before.packed:
        ours, theirs = read_quantized(before, name), read_quantized(after, name)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1].scale, theirs[1].scale)
    found = again["sparsify"].metrics["sparsity"]["all"]
    assert found == tiny_run["merge"].metrics["sparsity"]["all"]


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
        plan.check(recipe, base)


def test_act_order_is_refused_before_any_work(tiny_run, tmp_path):
    base = shutil.copytree(tiny_run["merge"].path / "model", tmp_path / "model")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="desc_act is true"):
        plan.check(small_recipe(*GIVEN, model_path=base), base)


def test_given_codes_need_a_quantized_model(random_llama):
    recipe = small_recipe("quantize.method=given", model_path=random_llama)
    with pytest.raises(UserError, match="found given, but the model is not quantized"):
        plan.check(recipe, random_llama)

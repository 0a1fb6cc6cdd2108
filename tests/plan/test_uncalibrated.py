"""Methods that need no data do not read calibration data, and nothing is planned for it."""

import importlib
from typing import get_args

import pytest

from conftest import small_recipe
from sqft_export.errors import UserError
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.memory import predict_memory
from sqft_export.plan.workload import workload_of
from sqft_export.recipe.schema import Quantize, Sparsify
from sqft_export.run.pipeline import run_recipe

WITHOUT_DATA = (
    "sparsify={method: magnitude, sparsity: 0.5}",
    "quantize.method=rtn",
    "adapt=none",
    "calibration.source=not-there.txt",
)


def test_a_calibration_file_that_nobody_reads_may_be_missing(random_llama, tmp_path):
    made = run_recipe(small_recipe(*WITHOUT_DATA, model_path=random_llama), tmp_path, ("quantize",))
    assert made["quantize"].metrics["calibration_tokens"] == {}
    assert made["sparsify"].metrics["calibration_tokens"] == {}


@pytest.mark.parametrize(
    "setting",
    [
        "sparsify.method=wanda",
        "sparsify.allocation=output-error",
        "sparsify.reconstruct={}",
        "quantize.method=gptq",
        "quantize.reconstruct={}",
    ],
)
def test_one_that_is_read_may_not(random_llama, setting):
    recipe = small_recipe(*WITHOUT_DATA, setting, model_path=random_llama)
    with pytest.raises(UserError, match=r"calibration.source: found 'not-there.txt'"):
        check_recipe(recipe, random_llama)


@pytest.mark.parametrize(("method", "grows"), [("magnitude", False), ("wanda", True)])
def test_memory_of_samples_counts_where_they_are_loaded(random_llama, method, grows):
    needed = []
    for samples in (16, 64):
        recipe = small_recipe(
            *WITHOUT_DATA[1:3],
            f"sparsify={{method: {method}, sparsity: 0.5}}",
            f"calibration.samples={samples}",
            model_path=random_llama,
        )
        layout = check_recipe(recipe, random_llama)
        needed.append(predict_memory(recipe, layout, workload_of(recipe, random_llama)))
    few, many = needed
    assert (many["sparsify"] > few["sparsify"]) == grows
    assert many["quantize"] == few["quantize"]


@pytest.mark.parametrize("part", [Sparsify, Quantize])
def test_the_recipe_knows_which_methods_look_at_data(part):
    room = {Sparsify: "sparsifiers", Quantize: "quantizers"}[part]
    for method in set(get_args(part.model_fields["method"].annotation)) - {"none", "existing"}:
        amount = {"sparsity": 0.5} if part is Sparsify else {}
        needs = importlib.import_module(f"sqft_export.{room}.{method}").NEEDS
        assert part(method=method, **amount).calibrates == (needs != "nothing"), method

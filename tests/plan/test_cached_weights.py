"""plan counts the effective weights that a tuned, unmerged model keeps, where memory holds them."""

import pytest

from conftest import small_recipe
from sqft_export.model.hub import model_folder
from sqft_export.plan import memory, work
from sqft_export.plan.layout import layout_of
from sqft_export.plan.memory import predict_memory
from sqft_export.plan.seconds import predict_seconds
from sqft_export.plan.speeds import Speed, Speeds
from sqft_export.plan.workload import Workload

SLOW = Speed("cpu", {"float32": 1e7, "bfloat16": 1e7}, 1e6)
WORK = Workload(examples=None, example=80, test=None, scored=160, prompt=40, answer=40)


@pytest.fixture
def planned():
    recipe = small_recipe("search.strategy=hill-climb")
    return recipe, layout_of(recipe, model_folder(recipe, download=False))


def test_search_needs_one_more_set_of_weights_and_never_more_than_is_free(planned, monkeypatch):
    recipe, layout = planned
    free = {"bytes": 2**40}
    monkeypatch.setattr(memory, "free_memory", lambda: free["bytes"])
    roomy = predict_memory(recipe, layout, WORK)["search"]
    free["bytes"] = 0
    tight = predict_memory(recipe, layout, WORK)["search"]
    assert roomy - tight == 4 * layout.weights
    for share in range(20):  # whatever is free, the cache is no reason to refuse a run
        free["bytes"] = int(tight) + 1 + share * layout.weights
        assert predict_memory(recipe, layout, WORK)["search"] <= free["bytes"]


def test_an_evaluation_makes_its_weights_once_where_they_are_kept(planned, monkeypatch):
    recipe, layout = planned
    machine = Speeds(SLOW, SLOW, SLOW, 1e9)
    taken = {}
    for fits in (True, False):
        monkeypatch.setattr(work, "float32_fits", lambda weights, fits=fits: fits)
        taken[fits] = predict_seconds(recipe, layout, machine, WORK)
    assert taken[True]["search"] < taken[False]["search"]
    assert taken[True]["benchmark"] < taken[False]["benchmark"]
    assert taken[True]["adapt"] == taken[False]["adapt"]

"""Strategies on a made-up landscape, and on a trained adapter."""

import json

import pytest

from conftest import random_model, small_recipe
from sqft_export.data.items import Data, load_tokenizer
from sqft_export.errors import UserError
from sqft_export.run.pipeline import run_recipe
from sqft_export.search import STRATEGIES
from sqft_export.search.rules import pick_median, pick_most_frequent
from sqft_export.search.space import Score, Space

GROUPS = ["0.q", "1.q", "2.q"]
RANKS = (32, 24, 16)
PEAK = {"0.q": 16, "1.q": 32, "2.q": 24}


def landscape(ranks) -> Score:
    """Best at PEAK, worse with every step away from it."""
    away = sum(abs(RANKS.index(ranks[g]) - RANKS.index(PEAK[g])) for g in GROUPS)
    return Score(1 - away / 10, 0.0, -sum(ranks.values()))


def space(budget: int = 30, **changes) -> Space:
    log = [
        {"loss": 3.0, "ranks": {"0.q": 32, "1.q": 24, "2.q": 16}},
        {"loss": 1.0, "ranks": PEAK},
        {"loss": 2.0, "ranks": {"0.q": 16, "1.q": 24, "2.q": 16}},
    ]
    settings = {"configured": PEAK, "score": landscape} | changes
    return Space(GROUPS, RANKS, log, budget, 0, **settings)


@pytest.mark.parametrize("name", ["lowest-loss", "hill-climb", "evolutionary"])
def test_strategies_that_evaluate_find_the_peak(name):
    found = space()
    assert STRATEGIES[name](found) == PEAK
    assert 0 < len(found.seen) <= 27


@pytest.mark.parametrize("name", ["hill-climb", "evolutionary"])
@pytest.mark.parametrize("budget", [1, 4])
def test_the_budget_is_kept_and_the_best_seen_returned(name, budget):
    found = space(budget)
    chosen = STRATEGIES[name](found)
    assert len(found.seen) == budget
    assert found.seen[found.key(chosen)] == max(found.seen.values())


@pytest.mark.parametrize("name", ["hill-climb", "evolutionary", "lowest-loss"])
def test_what_was_evaluated_is_not_evaluated_again(name):
    asked = []

    def score(ranks):
        asked.append(tuple(ranks.values()))
        return landscape(ranks)

    STRATEGIES[name](space(score=score))
    assert len(asked) == len(set(asked))


def test_rules_that_evaluate_nothing():
    assert pick_median(space()) == dict.fromkeys(GROUPS, 24)
    assert pick_most_frequent(space()) == {"0.q": 16, "1.q": 24, "2.q": 16}
    assert STRATEGIES["configured"](space()) == PEAK
    assert STRATEGIES["maximal"](space()) == dict.fromkeys(GROUPS, 32)
    assert STRATEGIES["minimal"](space()) == dict.fromkeys(GROUPS, 16)


def test_search_scores_on_training_items_that_training_never_saw(tmp_path):
    model = random_model(tmp_path / "model")
    common = ("adapt.ranks=[8, 4]", "adapt.steps=3", "task.max_new_tokens=20")
    recipe = small_recipe(
        *common, "search={strategy: hill-climb, budget: 3, items: 8}", model_path=model
    )
    found = run_recipe(recipe, tmp_path / "runs", ("search",))["search"]
    lines = (found.path / "evaluations.jsonl").read_text().splitlines()
    assert found.metrics["evaluations"] == len(lines) == 3
    entries = [json.loads(line) for line in lines]
    best = max(entries, key=lambda e: (e["accuracy"], e["likelihood"], -e["parameters"]))
    assert found.metrics["ranks"] == best["ranks"]
    # The same configuration can be given to a later run.
    (tmp_path / "ranks.json").write_text(json.dumps(best["ranks"]))
    given = f"search={{strategy: configured, configuration: {tmp_path / 'ranks.json'}}}"
    recipe = small_recipe(*common, given, model_path=model)
    again = run_recipe(recipe, tmp_path / "again", ("search",))["search"]
    assert again.metrics["ranks"] == best["ranks"] and again.metrics["evaluations"] == 0
    (tmp_path / "ranks.json").write_text(json.dumps({"0.q_proj": 7}))
    with pytest.raises(UserError, match=r"ranks.json: expected a rank of \[8, 4\] for each of"):
        run_recipe(recipe, tmp_path / "wrong", ("search",))


def test_validation_and_training_items_are_apart_and_test_ones_the_same():
    from conftest import TINY

    tokenizer = load_tokenizer(TINY)
    plain = Data(small_recipe(), tokenizer)
    split = Data(small_recipe("search={strategy: evolutionary, items: 20}"), tokenizer)
    assert plain.validation == [] and len(split.validation) == 20
    assert len(split.train) == len(plain.train) - 20 and split.test == plain.test
    train = [tuple(example.ids) for example in plain.train]
    for item in split.validation:
        ids = tuple(item.prompt + item.target)
        assert train.count(ids) == sum(tuple(e.ids) == ids for e in split.train) + 1
    with pytest.raises(UserError, match=r"search.items: found 999999, but the training data has"):
        _ = Data(small_recipe("search={strategy: hill-climb, items: 999999}"), tokenizer).train

"""Old words of a recipe have the meaning and the cache keys of the new ones."""

import json
import logging

import pytest

from conftest import TINY, small_recipe
from sqft_export.artifacts.store import Store
from sqft_export.errors import UserError
from sqft_export.recipe.aliases import OLD_WORDS
from sqft_export.recipe.load import load_recipe
from sqft_export.run.pipeline import plan_passes

CHOSEN = "configuration.json"


def settings(path: str, word: str, folder) -> str:
    if path == "search.strategy":
        return f"search={{strategy: {word}, configuration: {folder / CHOSEN}}}"
    section, _, field = path.partition(".")
    return f"{section}={{{field}: {word}}}"


@pytest.fixture
def configured(tmp_path):
    modules = [f"model.layers.{n}.self_attn.q_proj" for n in range(4)]
    (tmp_path / CHOSEN).write_text(json.dumps(dict.fromkeys(modules, 24)))
    return tmp_path


@pytest.mark.parametrize("path", sorted(OLD_WORDS))
def test_both_words_give_the_same_recipe_and_keys(path, configured, caplog, tmp_path):
    ((old, new),) = OLD_WORDS[path].items()
    with caplog.at_level(logging.WARNING):
        recipes = [small_recipe(settings(path, word, configured)) for word in (new, old)]
    assert recipes[0].model_dump() == recipes[1].model_dump()
    assert caplog.messages == [f"{path}: {old} is the old name of {new}"]
    plans = [plan_passes(recipe, TINY, Store(tmp_path / "runs")) for recipe in recipes]
    keys = [{p.name: p.key for p in plan if p.name != "report"} for plan in plans]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("path", sorted(OLD_WORDS))
def test_a_setting_takes_the_old_word_too(path, configured):
    """The old word clears the unused fields of the method, as the new one does."""
    ((old, new),) = OLD_WORDS[path].items()
    more = (f"search.configuration={configured / CHOSEN}",) if path == "search.strategy" else ()
    section, _, field = path.partition(".")
    recipe = small_recipe(f"{path}={old}", *more)
    assert getattr(getattr(recipe, section), field) == new


def test_a_file_with_old_words_is_read(tmp_path):
    text = (TINY.parents[2] / "recipes" / "tiny.yaml").read_text()
    text = text.replace("sparsify: {method: wanda, sparsity: 0.5}", "sparsify: {method: given}")
    (tmp_path / "mine.yaml").write_text(text)
    assert load_recipe(tmp_path / "mine.yaml").sparsify.method == "existing"


@pytest.mark.parametrize("word", ["[given]", "{given: 1}", "null", "7"])
def test_other_values_get_the_usual_message(word):
    with pytest.raises(UserError, match=r"sparsify\.method"):
        small_recipe(f"sparsify={{method: {word}}}")

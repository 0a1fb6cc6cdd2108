"""Recipes that name what is no file, or stand for more than they hold: one message, soon."""

import json
import os
import time

import pytest

from conftest import ROOT
from sqft_export.errors import UserError
from sqft_export.plan.checks import check_recipe
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.schema import Recipe

TINY = ROOT / "sqft_export" / "builtin" / "tiny"
SECONDS = 10  # of a plan's checks, on a busy machine


def recipe_at(folder, *overrides: str) -> Recipe:
    """The embedded recipe, as a file of ``folder``."""
    (folder / "recipe.yaml").write_text((ROOT / "recipes" / "tiny.yaml").read_text())
    return load_recipe(folder / "recipe.yaml", overrides)


def refused(folder, *overrides: str) -> str:
    """The message of ``plan``'s checks."""
    started = time.monotonic()
    with pytest.raises(UserError) as found:
        check_recipe(recipe_at(folder, *overrides), TINY)
    assert time.monotonic() - started < SECONDS
    assert found.value.code == 2
    return str(found.value)


@pytest.mark.parametrize("merge", ["<<", "? <<\n  "])
def test_a_bomb_of_merge_keys_is_refused_at_once(tmp_path, merge):
    levels = ["a0: &a0 {k: v}"]
    for level in range(1, 12):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        levels.append(f"a{level}: &a{level}\n  {merge}: [{aliases}]")
    (tmp_path / "bomb.yaml").write_text("\n".join(levels))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"merge keys \(<<\) are not read; write the settings out"):
        load_recipe(tmp_path / "bomb.yaml")
    assert time.monotonic() - started < 1


def given(name: str) -> str:
    return f"search={{strategy: configured, configuration: {name}}}"


def test_a_search_configuration_that_is_a_device_or_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    assert "search.configuration: /dev/zero: is no regular file (a device)" in refused(
        tmp_path, given("/dev/zero")
    )
    assert "pipe.json: is no regular file (a pipe)" in refused(tmp_path, given("pipe.json"))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert "deep.json: is nested too deeply" in refused(tmp_path, given("deep.json"))
    (tmp_path / "twice.json").write_text('{"a": 1, "a": 2}')
    assert "the key 'a' appears twice" in refused(tmp_path, given("twice.json"))
    (tmp_path / "ranks.json").write_text(json.dumps({"a": [1]}))
    assert "expected a rank of" in refused(tmp_path, given("ranks.json"))


@pytest.mark.parametrize("field", ["task.train", "task.test", "calibration.source"])
def test_a_path_that_leads_in_a_circle_is_named(tmp_path, field):
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    message = refused(tmp_path, f"{field}=loop.jsonl")
    assert field in message and "loop.jsonl" in message


def test_a_pipe_as_training_data_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "task.train: is no regular file (a pipe)" in refused(tmp_path, "task.train=pipe.jsonl")


@pytest.mark.parametrize(
    "field", ["calibration.source", "task.train", "benchmark.lm_eval_folder", "model.path"]
)
def test_a_name_that_no_file_system_has_is_named_by_its_field(tmp_path, field):
    with pytest.raises(UserError, match=rf"{field}: found 'x+.*more than 255 bytes") as found:
        recipe_at(tmp_path, f"{field}={'x' * 300}")
    assert len(str(found.value)) < 1000


@pytest.mark.parametrize("search", ["lowest-loss", "median"])
def test_a_folder_of_data_that_is_missing_is_named_by_its_field(tmp_path, search):
    overrides = (
        "task={kind: dataset, name: gsm8k, folder: nowhere}",
        f"search={{strategy: {search}}}",
    )
    assert "task.folder: no such folder" in refused(tmp_path, *overrides)

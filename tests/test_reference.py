"""The reference pages match the schema and the command line."""

import importlib.util
import json
import subprocess
import sys

import pytest

from conftest import ROOT
from sqft_export.recipe.fields import recipe_fields

spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
assert spec and spec.loader
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_reference_page_is_up_to_date(name):
    written = (generate.REFERENCE / name).read_text()
    assert written == generate.PAGES[name](), "run: python docs/generate.py"


def test_the_table_of_targets_in_the_readme_is_up_to_date():
    assert generate.README.read_text() == generate.readme(), "run: python docs/generate.py"


def test_a_field_is_listed_with_what_is_allowed_and_its_default():
    rows = {row.field: row for row in recipe_fields()}
    assert rows["quantize.bits"].allowed == "2, 3, 4, 8" and rows["quantize.bits"].default == "4"
    assert rows["adapt.ranks"].default == "[32, 28, 24, 20, 16]"
    assert rows["sparsify.overrides"].allowed == "list of sections"
    assert rows["sparsify.overrides.0.skip"].default == "false"
    assert rows["task.test_share"].allowed == "number, more than 0, less than 1"


def test_list_fields_prints_every_field():
    command = [sys.executable, "-m", "sqft_export.cli", "list", "fields", "--json"]
    shown = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert [row["field"] for row in shown] == [row.field for row in recipe_fields()]

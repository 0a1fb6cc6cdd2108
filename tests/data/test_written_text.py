"""Models are trained, calibrated and scored on the text that the user wrote."""

import json
import shutil
from pathlib import Path

import pytest

from conftest import TINY, small_recipe
from sqft_export.data.calibration import calibration_samples
from sqft_export.data.files import numbered_rows
from sqft_export.data.items import Data, deployed_text, encode, load_tokenizer
from sqft_export.model.endings import disable_end_token
from sqft_export.recipe.templates import fill_template


@pytest.fixture
def ending(tmp_path) -> Path:
    """A model whose tokenizer ends every text."""
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    document = json.loads((model / "tokenizer.json").read_text())
    processor = document["post_processor"]
    processor["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    processor["special_tokens"]["</s>"] = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    (model / "tokenizer.json").write_text(json.dumps(document))
    return model


def test_a_tokenizer_that_ends_every_text_gives_the_ids_of_one_that_does_not(ending, tmp_path):
    plain, ended = load_tokenizer(TINY), load_tokenizer(ending)
    assert ended("Tom")["input_ids"][-1] == ended.eos_token_id
    texts = ["Tom has 3 pens.", "", "</s>", "It ends.</s>", "<s>Tom"]
    assert encode(ended, texts) == encode(plain, texts)
    recipe = small_recipe()
    ours, theirs = (Data(recipe, tokenizer) for tokenizer in (ended, plain))
    assert ours.train[3] == theirs.train[3] and ours.test[3] == theirs.test[3]
    (tmp_path / "c.jsonl").write_text('{"text": "Tom has 3 pens."}\n{"text": "<s>Eva"}\n')
    source = f"calibration={{source: {tmp_path / 'c.jsonl'}, samples: 2}}"
    samples = calibration_samples(small_recipe(source), ended)
    assert sorted(samples) == sorted(encode(plain, ["Tom has 3 pens.", "Eva"]))


def test_the_deployed_tokenizer_ends_no_text(ending):
    disable_end_token(ending)
    tokenizer = load_tokenizer(ending)
    texts = ["Tom has 3 pens.", ""]
    assert tokenizer(texts)["input_ids"] == load_tokenizer(TINY)(texts)["input_ids"]
    before = {file.name: file.read_bytes() for file in TINY.glob("tokenizer*")}
    for name, content in before.items():
        (ending / name).write_bytes(content)
    disable_end_token(ending)
    assert {name: (ending / name).read_bytes() for name in before} == before


def test_a_start_token_in_the_text_is_not_doubled():
    tokenizer = load_tokenizer(TINY)
    once, twice, plain = encode(tokenizer, ["<s>Tom has", "<s><s>Tom", "Tom has"])
    assert once == plain and twice[:2] == [tokenizer.bos_token_id] * 2
    assert deployed_text(tokenizer, "<s>Tom has") == "Tom has"
    assert deployed_text(tokenizer, "Tom <s>") == "Tom <s>"


def test_booleans_and_numbers_are_written_as_json_writes_them(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"a": true, "b": [false], "c": 1.50, "d": 2e3, "e": -0.0, "f": 12, "g": NaN}\n'
    )
    ((number, row),) = numbered_rows(file)
    filled = fill_template("{a} {b[0]} {c} {d} {e} {f} {g} {c:.1f} {f:04d}", row, file, number)
    assert filled == "true false 1.50 2e3 -0.0 12 NaN 1.5 0012"

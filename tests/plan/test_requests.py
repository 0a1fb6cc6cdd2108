"""A recipe from a model and data: the kind of data, lengths, steps, and models on the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from ruamel.yaml import YAML

from conftest import ROOT, TINY, write_conversations
from sqft_export.data.conversations import split_conversations
from sqft_export.data.items import Item
from sqft_export.errors import UserError
from sqft_export.plan.presets import PRESETS
from sqft_export.plan.requests import (
    Request,
    answer_length,
    model_section,
    percentile,
    run_name,
    sequence_length,
    step_and_epochs,
    task_section,
    write_preset,
)
from sqft_export.recipe.load import parse_recipe
from sqft_export.recipe.schema import Chat, Recipe


def section(file: Path, content: str, test: str | None = None) -> dict:
    file.write_text(content)
    return task_section(Request("builtin:tiny", str(file), test), TINY)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, None),
        ({"conversations": [{"from": "human", "value": "x"}]}, None),
        ({"prompt": "x", "completion": "y"}, None),
        ({"prompt": "x", "answer": "y"}, None),
        ({"instruction": "x", "input": "", "output": "y"}, None),
        ({"question": "x", "answer": "y"}, {"prompt": "question"}),
        ({"question": "x", "response": "y"}, {"prompt": "question", "answer": "response"}),
        ({"input": "x", "output": "y"}, {"prompt": "input", "answer": "output"}),
        ({"conversation": [{"role": "user", "content": "x"}]}, {"messages": "conversation"}),
    ],
)
def test_conversations_are_recognised_by_their_columns(tmp_path, row, columns):
    found = section(tmp_path / "data.jsonl", json.dumps(row) + "\n")
    assert found["kind"] == "chat"
    assert found.get("columns") == columns
    # llama.cpp puts the start token before every prompt, so the training has it too.
    assert found["template"].startswith("{{ bos_token }}{% for message")


def test_a_text_file_a_known_dataset_and_unknown_columns(tmp_path):
    assert section(tmp_path / "book.txt", "Once.")["kind"] == "text"
    known = task_section(Request("builtin:tiny", "gsm8k"), TINY)
    assert known == {"kind": "dataset", "name": "gsm8k"}
    with pytest.raises(UserError, match=r"found the columns a, b"):
        section(tmp_path / "odd.csv", "a,b\n1,2\n")
    with pytest.raises(UserError, match="no such data"):
        task_section(Request("builtin:tiny", str(tmp_path / "nowhere.jsonl")), TINY)
    with pytest.raises(UserError, match="the end is held out"):
        section(tmp_path / "book.txt", "Once.", test=str(tmp_path / "book.txt"))


def test_a_separate_file_of_held_out_data_is_the_test_split(tmp_path):
    row = json.dumps({"prompt": "x", "answer": "y"}) + "\n"
    (tmp_path / "test.jsonl").write_text(row)
    found = section(tmp_path / "train.jsonl", row, test=str(tmp_path / "test.jsonl"))
    assert found["test"] == str(tmp_path / "test.jsonl")


def items(prompts: list[int], answers: list[int]) -> list[Item]:
    pairs = zip(prompts, answers, strict=True)
    return [Item([1] * prompt, [2] * answer, "text") for prompt, answer in pairs]


def test_lengths_are_the_99th_percentile_rounded_up():
    assert percentile(list(range(1, 101))) == 99
    assert percentile([5]) == 5
    many = items([100] * 199 + [2000], [21] * 199 + [900])
    assert sequence_length(many, 4096) == 128
    assert answer_length(many) == 32
    assert sequence_length(many, 100) == 100  # the context
    assert sequence_length(items([3], [1]), 4096) == 64
    assert sequence_length(items([9000], [1]), 32768) == 2048


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_recipe_with_a_comment_for_every_field(tmp_path, preset):
    data = write_conversations(tmp_path / "chats.jsonl", 200)
    name, text = write_preset(Request("builtin:tiny", str(data), preset=preset))
    recipe = parse_recipe(text, tmp_path / "recipe.yaml")
    assert (name, recipe.name) == ("tiny", "tiny")
    assert recipe.quantize.bits == (8 if preset == "int8" else 4)
    assert (recipe.sparsify.method != "none") == (preset == "int4-sparse")
    assert (recipe.adapt is None) == (preset == "int4-untuned")
    if recipe.adapt is not None:  # 180 rows in steps of 4, three times, 5 % of them warmup
        assert recipe.adapt.batch * recipe.adapt.accumulation == 4
        assert recipe.adapt.warmup_steps == round(0.05 * 135)
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if line.startswith("  ") and not line.strip().startswith("#"):
            assert lines[at - 1].startswith("  # "), line


def test_a_small_set_gets_enough_steps():
    """Also by more epochs; the stopping rule ends a training that has learned its set."""
    found = {n: step_and_epochs(n) for n in (1, 20, 60, 180, 300, 534, 100_000)}
    assert found == {
        **{1: (4, 10), 20: (4, 10), 60: (4, 7), 180: (4, 3)},
        **{300: (8, 3), 534: (16, 3), 100_000: (16, 3)},
    }


def test_names_of_runs_and_models():
    assert run_name({"hub": "HuggingFaceTB/SmolLM2-135M-Instruct"}) == "SmolLM2-135M-Instruct"
    assert run_name({"path": "/models/my model (v2)"}) == "my-model-v2-"
    assert model_section("owner/name") == {"hub": "owner/name"}
    assert model_section(str(TINY)) == {"path": str(TINY)}
    with pytest.raises(UserError, match="not a Hugging Face model folder"):
        model_section(str(ROOT))
    with pytest.raises(UserError, match="neither a model folder nor a name on the hub"):
        model_section("no such thing")


def test_a_name_on_the_hub_is_found_in_the_cache_without_a_network(tmp_path):
    """As huggingface_hub lays its cache out after a download."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--owner--little"
    snapshot = repository / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(TINY, snapshot, ignore=shutil.ignore_patterns("*.jsonl", "*.py", "__pycache__"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    data = write_conversations(tmp_path / "chats.jsonl", 20)
    code = (
        "from sqft_export.plan.requests import Request, write_preset\n"
        f"print(write_preset(Request('owner/little', {str(data)!r}))[1])"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    recipe = YAML(typ="safe").load(done.stdout)
    assert recipe["name"] == "little" and recipe["model"] == {"hub": "owner/little"}


def test_a_name_that_is_neither_cached_nor_reachable_is_one_message(tmp_path):
    data = write_conversations(tmp_path / "chats.jsonl", 20)
    with pytest.raises(UserError, match=r"owner/missing can't be downloaded"):
        write_preset(Request("owner/missing", str(data)))


def pairs(file: Path, count: int) -> Path:
    rows = [{"prompt": f"Say {n}", "answer": str(n)} for n in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_folder_of_train_and_test_files_is_data(tmp_path):
    """The layout of mlx-lm; a file of another role is not read."""
    folder = tmp_path / "my data"
    folder.mkdir()
    train, valid = pairs(folder / "train.jsonl", 3), pairs(folder / "valid.jsonl", 2)
    (folder / "README.md").write_text("Sums.")
    found = task_section(Request("builtin:tiny", str(folder)), TINY)
    assert (found["train"], found["test"]) == (str(train), str(valid))
    test = pairs(folder / "test.jsonl", 2)
    found = task_section(Request("builtin:tiny", str(folder)), TINY)
    assert found["test"] == str(test)
    given = pairs(tmp_path / "given.jsonl", 2)
    found = task_section(Request("builtin:tiny", str(folder), str(given)), TINY)
    assert (found["train"], found["test"]) == (str(train), str(given))
    pairs(folder / "train.csv", 2)
    with pytest.raises(UserError, match=r"found train\.csv, train\.jsonl; one file per split"):
        task_section(Request("builtin:tiny", str(folder)), TINY)


def test_a_saved_dataset_with_a_test_split_is_tested_on_it(tmp_path):
    table = datasets.Dataset.from_list([{"prompt": "x", "answer": "y"}])
    for splits in (("train",), ("train", "test")):
        folder = tmp_path / "-".join(splits)
        datasets.DatasetDict(dict.fromkeys(splits, table)).save_to_disk(str(folder))
        found = task_section(Request("builtin:tiny", str(folder)), TINY)
        assert found["train"] == str(folder)
        assert found.get("test") == (str(folder) if "test" in splits else None)


def test_of_a_few_conversations_the_last_one_is_held_out(tmp_path):
    def split(count: int):
        section = {"task": Chat(kind="chat", train=str(pairs(tmp_path / f"{count}.jsonl", count)))}
        return split_conversations(Recipe.model_construct(**section), section["task"])

    train, test = split(4)
    assert [len(train), [one.messages[0]["content"] for one in test]] == [3, ["Say 3"]]
    train, test = split(20)
    assert [one.messages[0]["content"] for one in test] == ["Say 9", "Say 19"]
    with pytest.raises(UserError, match=r"leaves 0 to train on and 1 to test with; .*--test"):
        split(1)

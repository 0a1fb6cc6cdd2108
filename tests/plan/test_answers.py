"""Data that can't be learned or judged is named before any work."""

import json
import shutil
from pathlib import Path

import pytest

from conftest import TINY, random_model, small_recipe
from sqft_export.data.items import Data, load_tokenizer
from sqft_export.errors import UserError
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.warnings import plan_warnings
from sqft_export.recipe.schema import Recipe
from sqft_export.report.text import plan_text
from sqft_export.run import preview


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def task_of(model: Path, answers: list[str], *settings: str, prompt: str = "Say {n}") -> Recipe:
    """Problems with these answers; training and test items have other prompts."""
    for split, start in (("train", 100), ("test", 0)):
        rows = [
            {"prompt": prompt.format(n=n), "answer": answer}
            for n, answer in enumerate(answers, start)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (model.parent / f"{split}.jsonl").write_text(text)
    files = {split: str(model.parent / f"{split}.jsonl") for split in ("train", "test")}
    task = {"kind": "problems", **files, "answer": " {answer}", "sequence_length": 64}
    return small_recipe(f"task={json.dumps(task)}", *settings, model_path=model)


def refusal(recipe: Recipe, model: Path) -> str:
    with pytest.raises(UserError) as found:
        check_recipe(recipe, model)
    return str(found.value)


def warnings_of(recipe: Recipe, model: Path) -> list[str]:
    """Warnings about the data; the recipes here train for a few steps, which plan doubts too."""
    found = plan_warnings(recipe, check_recipe(recipe, model))
    return [line for line in found if not line.startswith(("adapt.", "calibration."))]


def add_special_token(model: Path, name: str) -> None:
    """In place of the last merged token."""
    file = model / "tokenizer.json"
    document = json.loads(file.read_text())
    words = document["model"]
    last = max(words["vocab"], key=words["vocab"].get)
    number = words["vocab"].pop(last)
    words["vocab"][name] = number
    words["merges"] = [merge for merge in words["merges"] if "".join(merge) != last]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append({"id": number, "content": name, "special": True, **flags})
    file.write_text(json.dumps(document))


def test_blanks_that_a_tokenizer_would_clean_up_are_judged_as_they_stand(model):
    edit(model / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    assert not warnings_of(task_of(model, ["x != y", "yes , it is .", "who ? me", "do n't"]), model)


def test_a_special_token_in_an_answer_is_part_of_what_a_model_says(model):
    add_special_token(model, "<ans>")
    recipe = task_of(model, [f"so it is <ans>{n}" for n in range(4)], "task.final=<ans>")
    assert not warnings_of(recipe, model)


def test_answers_longer_than_what_is_generated_are_refused_or_counted(model):
    long, short = "so it is " * 6 + "9", "4"
    said = refusal(task_of(model, [long] * 4, "task.max_new_tokens=8"), model)
    assert "all 4 expected answers that were checked are judged wrong" in said
    assert "raise task.max_new_tokens, which is 8, to " in said
    needed = int(said.rsplit("to ", 1)[1].split(",")[0])
    assert not warnings_of(task_of(model, [long], f"task.max_new_tokens={needed}"), model)
    some = warnings_of(task_of(model, [short, long, short], "task.max_new_tokens=8"), model)
    assert len(some) == 1 and "1 of 3 expected answers" in some[0] and repr(" " + long) in some[0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("\ufb01ve", "the tokenizer writes the Unicode form NFKC, in which it is ' five'"),
        ("4</s>", "it has the end token '</s>', at which a model stops"),
        ("4 Question: no", "it contains a stop text of task.stop, which is ['Question:']"),
    ],
)
def test_the_reason_is_told_why_an_answer_can_not_be_right(model, answer, reason):
    edit(model / "tokenizer.json", normalizer={"type": "NFKC"})
    prompt = "Say with another word what the number {n} of the row is"
    recipe = task_of(model, [answer], 'task.stop=["Question:"]', prompt=prompt)
    assert reason in refusal(recipe, model)


def test_an_answer_with_an_end_token_is_trained_with_one(model):
    tokenizer = load_tokenizer(model)
    (example,) = Data(task_of(model, ["4</s>"]), tokenizer).train
    assert example.ids.count(tokenizer.eos_token_id) == 1


def test_training_examples_without_an_answer_are_refused_or_counted(model):
    def recipe(long: int) -> Recipe:
        made = task_of(model, ["4"] * 40)
        file = model.parent / "train.jsonl"
        rows = [{"prompt": "Say " + "so " * 80 * (n < long), "answer": "4"} for n in range(40)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return made

    said = refusal(recipe(3), model)
    assert "task.sequence_length: found 64; 3 of 40 training examples" in said and "7.5%" in said
    (warning,) = warnings_of(recipe(2), model)
    assert "the answer of 2 of 40 training examples" in warning
    assert not warnings_of(recipe(0), model)


def test_test_items_that_are_training_items_are_counted(model):
    recipe = task_of(model, ["4", "5", "6"])
    rows = (model.parent / "train.jsonl").read_text().splitlines()
    (model.parent / "test.jsonl").write_text("\n".join([*rows[:2], '{"prompt": "a", "answer": 1}']))
    (warning,) = warnings_of(recipe, model)
    assert warning.startswith("task: 2 of 3 test items are training items too")


def test_prompts_that_begin_with_the_start_token_are_counted(model):
    (warning,) = warnings_of(task_of(model, ["4", "5"], prompt="<s>Say {n}"), model)
    assert "2 of 2 prompts that were checked begin with '<s>'" in warning


@pytest.fixture
def slim(tmp_path):
    """Models of 48 positions, learned or rotary."""

    def made(model_type: str) -> Path:
        sizes = {"ffn_dim": 128, "word_embed_proj_dim": 64} if model_type == "opt" else {}
        return random_model(
            tmp_path / model_type, 0, model_type, max_position_embeddings=48, **sizes
        )

    return made


FITTING = (
    "benchmark.prompt_tokens=8",
    "adapt.target_modules=null",
    "adapt.elastic_groups=null",
    "calibration.sequence_length=48",
    "verify.new_tokens=4",
)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("task.max_new_tokens=42", "task.max_new_tokens: found 42; the longest test prompt has 7"),
        ("task.sequence_length=49", "task.sequence_length: found 49, 49 tokens"),
        ("verify.new_tokens=42", "verify.new_tokens: found 42; the longest test prompt has 7"),
        ("benchmark.prompt_tokens=45", "benchmark: found prompt_tokens 45 and new_tokens 4"),
    ],
)
def test_what_learned_positions_do_not_reach_is_refused_and_rotary_ones_are_warned_of(
    slim, setting, said
):
    settings = ("task.sequence_length=48", "task.max_new_tokens=20", *FITTING)
    for model_type in ("opt", "llama"):
        model = slim(model_type)
        prompt = "How many is {n}?"
        fits = task_of(model, ["4", "5"], *settings, prompt=prompt)
        assert not warnings_of(fits, model)
        beyond = task_of(model, ["4", "5"], *settings, setting, prompt=prompt)
        found = (
            refusal(beyond, model) if model_type == "opt" else "".join(warnings_of(beyond, model))
        )
        assert said in found and "the model has 48 positions" in found


def test_a_prompt_that_fills_the_context_is_refused_whatever_its_positions(slim):
    model = slim("llama")
    recipe = task_of(model, ["4"], "task.sequence_length=48", prompt="How " * 60 + "{n}")
    recipe = recipe.model_copy(update={"adapt": None})
    assert "task: the longest test item has " in refusal(recipe, model)


def test_plan_prints_warnings(model, tmp_path):
    recipe = task_of(model, ["4", "so it is " * 9], "task.max_new_tokens=8")
    document = preview.preview(recipe, tmp_path / "runs")
    assert document.warnings
    for line in document.warnings:
        assert f"  warning: {line}" in plan_text(document)

"""Named datasets: both forms give the same examples, scored as lm-eval and LLM-Adapters do."""

import json

import pytest

from conftest import ROOT, SHARED, TINY, random_model, small_recipe
from sqft_export.data.datasets import SETS, local_file, missing_sets, records
from sqft_export.data.items import Item, load_tokenizer
from sqft_export.data.scoring import Answers, accuracy_by_set, is_right, judge
from sqft_export.errors import UserError
from sqft_export.plan.checks import check_recipe
from sqft_export.recipe.schema import Dataset
from sqft_export.run.pipeline import run_recipe

CHOICE = "Please choose the correct answer to the question: "
# (set, a row in the hub's columns, the same in the LLM-Adapters form)
TWINS = [
    (
        "arc_easy",
        {
            "question": "Which factor will most likely cause a fever?",
            "choices": {"text": ["a muscle", "bacteria", "food"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
        {
            "instruction": CHOICE + "Which factor will most likely cause a fever?\n\n"
            "Answer1: a muscle Answer2: bacteria Answer3: food\n\n"
            "Answer format: answer1/answer2/answer3",
            "answer": "answer2",
        },
    ),
    (
        "openbookqa",
        {
            "question_stem": "The sun is responsible for",
            "choices": {"text": ["puppies", "plants"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        {
            "instruction": CHOICE + "The sun is responsible for\n\nAnswer1: puppies "
            "Answer2: plants\n\nAnswer format: answer1/answer2",
            "answer": "answer2",
        },
    ),
    (
        "piqa",
        {"goal": "dresser", "sol1": "use a pin ", "sol2": "finish it", "label": 1},
        {
            "instruction": "Please choose the correct solution to the question: dresser\n\n"
            "Solution1: use a pin \n\nSolution2: finish it\n\n"
            "Answer format: solution1/solution2",
            "answer": "solution2",
        },
    ),
    (
        "winogrande",
        {
            "sentence": "Sarah was better than Maria so _ got the easier cases.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "2",
        },
        {
            "instruction": "Please choose the correct answer to fill in the blank to complete the "
            "given sentence: Sarah was better than Maria so _ got the easier cases.\n\n"
            "Option1: Sarah Option2: Maria Answer format: option1/option2",
            "answer": "option2",
        },
    ),
    (
        "boolq",
        {"question": "is pain felt", "answer": True},
        {
            "instruction": "Please answer the following question with true or false, question: "
            "is pain felt?\n\nAnswer format: true/false",
            "answer": "true",
        },
    ),
    (
        "svamp",
        {"Body": "Jo has 3 eggs. He gets 4.", "Question": "How many now?", "Answer": "7.0"},
        {"instruction": "Jo has 3 eggs. He gets 4. How many now?", "output": "", "answer": "7"},
    ),
]


@pytest.mark.parametrize(("name", "hub", "adapters"), TWINS, ids=[t[0] for t in TWINS])
def test_either_form_of_a_row_is_the_same_example(name, hub, adapters):
    read = SETS[name].read
    assert read(hub, "question") == read({"input": "", "output": "", **adapters}, "question")


def test_prompts_are_those_of_lm_eval():
    arc = SETS["arc_easy"].read(TWINS[0][1], "question")
    assert arc.prompt == "Question: Which factor will most likely cause a fever?\nAnswer:"
    assert [c[1] for c in arc.choices] == [" a muscle", " bacteria", " food"]
    assert (arc.answer, arc.right) == (" bacteria", 1)
    blank = SETS["winogrande"].read(TWINS[3][1], "question")
    assert blank.choices[1] == ("Sarah was better than Maria so Maria", " got the easier cases.")
    assert (blank.prompt, blank.answer) == blank.choices[1]
    row = {
        "activity_label": "Roof",
        "ctx_a": "A man [title] sits.",
        "ctx_b": "he",
        "endings": ["falls [step] off", "stays"],
        "label": "1",
    }
    ending = SETS["hellaswag"].read(row, "question")
    assert ending.prompt == "Roof: A man. sits. He"
    assert ending.choices[0][1] == " falls off"


@pytest.mark.parametrize(
    ("template", "start", "end"),
    [
        ("question", "Question: Add 1,000 to 2.", "\nAnswer:"),
        (
            "alpaca",
            "Below is an instruction",
            "### Instruction:\nAdd 1,000 to 2.\n\n### Response:\n",
        ),
        ("phi3", "<|user|>\nAdd 1,000 to 2. <|end|>", "<|assistant|> "),
    ],
)
def test_instructions_take_their_template(template, start, end):
    row = {
        "instruction": " Add 1,000 to 2. ",
        "input": "",
        "output": "\nA: It is 1,002.",
        "answer": "1002.0",
    }
    record = SETS["math_10k"].read(row, template)
    assert record.prompt.startswith(start) and record.prompt.endswith(end)
    assert record.answer.strip() == "It is 1,002." and record.final == "1002"
    # Joined without a blank too few or too many.
    assert record.prompt[-1].isspace() != record.answer[0].isspace()


@pytest.mark.parametrize(
    ("rule", "said", "expected", "right"),
    [
        ("mark", " so 2\n#### 1,018\nQuestion: 3", "1018", True),
        ("mark", " so 18", "18", False),  # lm-eval's strict match wants the mark
        ("mark", "#### $18", "18", False),
        ("mark", "#### 18.", "18", True),
        ("number", "it is 3 and then 1,018.0004", "1018", True),
        ("number", "18 of 20", "18", False),  # the last number counts
        ("number", "none", "18", False),
        ("number", "it is -4 Question: 9", "-4", True),
    ],
)
def test_answers_are_scored_by_their_rule(rule, said, expected, right):
    item = Item([0], [1], expected, scoring=rule)
    assert is_right(small_recipe().task, said, item) is right


def test_a_choice_is_right_by_likelihood_and_by_likelihood_a_byte():
    tokenizer = load_tokenizer(TINY)
    item = Item(
        [0], [5], "", "arc_easy", "choice", (([0], [5]), ([0], [6])), 1, (2, 20), ("so", "not so")
    )
    result = Answers(likelihoods=[-3.0, -4.0])
    (judged,) = judge(small_recipe(), [item], result, tokenizer)
    assert (judged.right, judged.right_normalized, judged.answer) == (False, True, "so")
    assert accuracy_by_set([judged])["arc_easy"].accuracy_normalized == 1


def _write(folder, name, split, rows):
    (folder / name).mkdir(exist_ok=True)
    (folder / name / f"{split}.json").write_text(json.dumps(rows))


def _dataset(folder, name, **settings):
    fields = ", ".join(f"{k}: {v}" for k, v in settings.items())
    return f"task={{kind: dataset, name: {name}, folder: {folder}{', ' if fields else ''}{fields}}}"


def test_a_mix_trains_on_all_its_sets_and_is_scored_set_by_set(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, row, _ in (TWINS[0], TWINS[3]):
        for split in ("train", "test"):
            _write(folder, name, split, [row] * 3)
    sets = "[arc_easy, winogrande]"
    recipe = small_recipe(
        _dataset(folder, "commonsense", train_sets=sets, test_sets=sets),
        "benchmark.items=2",
        "benchmark.baselines=[dense]",
        "calibration.samples=4",
        "adapt.steps=2",
        "adapt.ranks=[8, 4]",
        "search={strategy: hill-climb, budget: 2, items: 2}",
        "export.targets=[onnx]",
        model_path=random_model(tmp_path / "model"),
    )
    artifacts = run_recipe(recipe, tmp_path / "runs")
    report = json.loads((artifacts["report"].path / "report.json").read_text())
    for row in report["rows"]:
        assert {name: e["items"] for name, e in row["accuracy_by_set"].items()} == {
            "arc_easy": 2,
            "winogrande": 2,
        }
    assert "Accuracy by set" in (artifacts["report"].path / "index.html").read_text()
    lines = (artifacts["benchmark"].path / "items.jsonl").read_text().splitlines()
    assert json.loads(lines[0]).keys() == {
        *("id", "row", "item", "answer", "expected", "right", "set")
    }


def test_answers_without_choices_are_trained_on_but_never_scored(tmp_path):
    """The SQFT repository's ARC-Easy; any model would be right every time."""
    row = {"instruction": "Which is a metal?", "input": "", "output": "iron"}
    for split in ("train", "test"):
        _write(tmp_path, "arc_easy", split, [row])
    task = small_recipe(_dataset(tmp_path, "arc_easy")).task
    [(_, _, record)] = records(task, "train", tmp_path, "")
    assert record.answer.strip() == "iron"
    with pytest.raises(
        UserError, match=r"arc_easy/test.json.*: item 1: has an answer but no other choices"
    ):
        list(records(task, "test", tmp_path, ""))


def test_a_set_that_is_not_there_is_named_with_the_way_out(tmp_path):
    _write(tmp_path, "arc_easy", "train", [TWINS[0][1]])
    recipe = small_recipe(_dataset(tmp_path, "arc_easy"))
    with pytest.raises(UserError, match=r"has no test file of arc_easy \(<set>/test.json"):
        check_recipe(recipe, TINY)
    with pytest.raises(UserError, match=r"train_sets: found arc_ez; allowed are gsm8k"):
        check_recipe(small_recipe(_dataset(tmp_path, "arc_easy", train_sets="[arc_ez]")), TINY)
    with pytest.raises(UserError, match=r"math_10k is not on the hub"):
        check_recipe(small_recipe("task={kind: dataset, name: math_10k}"), TINY)


def test_a_row_of_another_kind_is_named(tmp_path):
    _write(tmp_path, "piqa", "train", [TWINS[2][1], {"goal": "x"}])
    task = small_recipe(_dataset(tmp_path, "piqa")).task
    with pytest.raises(UserError, match=r"piqa/train.json: item 2: not a row of piqa"):
        list(records(task, "train", tmp_path, "recipe"))


def test_gsm8k_of_the_package_is_read_whole():
    task, place = Dataset(kind="dataset", name="gsm8k"), ROOT / "data"
    assert not list(missing_sets(task, place))
    for split, count in (("train", 7473), ("test", 1319)):
        found = [record for _, _, record in records(task, split, place, "recipe")]
        assert len(found) == count
        assert all(record.prompt and record.final for record in found)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs data that may not be in this repository")
@pytest.mark.parametrize(
    ("folder", "name", "train", "test", "counts"),
    [
        (
            "llm_adapters",
            "math_10k",
            None,
            None,
            (3260, {"gsm8k": 1319, "svamp": 1000, "mawps": 238}),
        ),
        (
            "llm_adapters",
            "commonsense",
            ("arc_easy", "arc_challenge", "openbookqa", "boolq"),
            ("arc_easy", "arc_challenge", "openbookqa", "boolq", "piqa", "winogrande"),
            (None, {"piqa": 1838, "winogrande": 1267, "boolq": 3270, "openbookqa": 500}),
        ),
        (".", "arc_easy", None, ("svamp",), (None, {"svamp": 1000})),
    ],
)
def test_the_real_files_are_read_whole(folder, name, train, test, counts):
    task = Dataset(kind="dataset", name=name, train_sets=train, test_sets=test)
    place = SHARED / "tasks" / folder
    assert not list(missing_sets(task, place))
    trained = list(records(task, "train", place, "recipe"))
    if counts[0]:
        assert len(trained) == counts[0]
    tested = list(records(task, "test", place, "recipe"))
    for source, count in counts[1].items():
        found = [record for set_name, _, record in tested if set_name == source]
        assert len(found) == count
        for record in found:
            assert record.prompt and record.final
            assert not record.choices or 0 <= record.right < len(record.choices)
            assert "Answer1:" not in record.prompt and "Answer format" not in record.prompt


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs data that may not be in this repository")
def test_arc_easy_as_instructions_trains_the_same_prompts():
    tasks_folder = SHARED / "tasks"
    assert local_file(tasks_folder, "arc_easy", "train").name == "arce_train_instruct.json"
    task = Dataset(kind="dataset", name="arc_easy")
    instruct = next(records(task, "train", tasks_folder, "recipe"))[2]
    chosen = next(records(task, "train", tasks_folder / "llm_adapters", "recipe"))[2]
    assert (instruct.prompt, instruct.answer) == (chosen.prompt, chosen.answer)

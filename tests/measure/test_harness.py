"""lm-eval's own tasks over our sessions: the numbers of lm-eval, and those of our scoring."""

import json
import subprocess
from pathlib import Path

import pytest

from conftest import SQFT, TINY, random_model, small_recipe
from sqft_export.data.items import Data, load_tokenizer, stop_ids
from sqft_export.data.scoring import accuracy_by_set, judge, questions
from sqft_export.measure.likelihood import score
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import target

pytest.importorskip("lm_eval", reason="pip install 'sqft-export[lm-eval]'")

CHOICE_TASK = """
task: our_arc
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
"""
ANSWER_TASK = """
task: our_problems
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: generate_until
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer.split('####')[1].strip()}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 56}
filter_list:
  - name: final
    filter:
      - {function: regex, regex_pattern: "#### (-?[0-9]+)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match}
"""
TEXT_TASK = """
task: our_text
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity}
"""
ITEMS = 24


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for number in range(ITEMS):
        choices = [f"{number} pens", "a very long answer, of many words", "9", "blue boxes"]
        answers = {"text": choices, "label": list("ABCD")}
        question = f"Tom has {number} pens. What has he?"
        rows.append({"question": question, "choices": answers, "answerKey": "ABCD"[number % 4]})
    for set_ in ("train", "test"):
        (folder / "arc_easy").mkdir(exist_ok=True)
        (folder / "arc_easy" / f"{set_}.json").write_text(json.dumps(rows))
    problems = (TINY / "test.jsonl").read_text().splitlines()[:ITEMS]
    (folder / "problems.jsonl").write_text("\n".join(problems))
    for name, task, data in (
        ("our_arc", CHOICE_TASK, folder / "arc_easy" / "test.json"),
        ("our_problems", ANSWER_TASK, folder / "problems.jsonl"),
        ("our_text", TEXT_TASK, folder / "problems.jsonl"),
    ):
        (folder / f"{name}.yaml").write_text(task.replace("DATA", str(data)))
    return folder


@pytest.fixture(scope="module")
def deployed(tmp_path_factory) -> dict[str, Path]:
    """Folders of the embedded model's weights, as they are."""
    untrained = ("adapt=none", "sparsify={method: none}", "quantize.method=rtn")
    root = tmp_path_factory.mktemp("runs")
    export = "export={targets: [openvino, onnx]}"
    run = run_recipe(small_recipe(*untrained, export), root, ("export-openvino", "export-onnx"))
    found = {name: run[f"export-{name}"].path / "model" for name in ("openvino", "onnx")}
    return found | {"torch": run["merge"].path / "model"}


def by_lm_eval(folder: Path, tasks: Path, *names: str) -> dict:
    from sqft_export.measure.harness import SessionLM, evaluate

    return evaluate(SessionLM(folder), list(names), tasks, None)


@pytest.mark.parametrize("runtime", ["torch", "openvino", "onnx"])
def test_accuracies_are_those_of_our_own_scoring(deployed, tasks, runtime):
    found = by_lm_eval(deployed[runtime], tasks, "our_arc", "our_problems")
    session = target(runtime).open_session(deployed[runtime], False, None)
    tokenizer = load_tokenizer(TINY)

    def ours(*settings: str) -> dict[str, float]:
        recipe = small_recipe(*settings)
        items = Data(recipe, tokenizer).test
        asked = questions(recipe, items, stop_ids(TINY, tokenizer))
        return next(
            iter(accuracy_by_set(judge(recipe, items, score(session, asked), tokenizer)).values())
        )

    arc = ours(f"task={{kind: dataset, name: arc_easy, folder: {tasks}}}")
    assert found["our_arc"]["acc,none"] == arc["accuracy"]
    assert found["our_arc"]["acc_norm,none"] == arc["accuracy_normalized"]
    problems = ours(f"task.test={tasks / 'problems.jsonl'}")
    assert found["our_problems"]["exact_match,final"] == problems["accuracy"]
    assert problems["accuracy"] > 0.5


def test_likelihoods_are_those_of_lm_evals_own_model(deployed, tasks):
    """Its `hf` model on the same folder: rolling windows longer than the context too."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks))
    names = ["our_arc", "our_text"]
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(TINY), "dtype": "float32", "device": "cpu"},
        tasks=names,
        task_manager=manager,
    )["results"]
    ours = by_lm_eval(TINY, tasks, *names)
    assert ours["our_arc"]["acc,none"] == theirs["our_arc"]["acc,none"]
    assert ours["our_arc"]["acc_norm,none"] == theirs["our_arc"]["acc_norm,none"]
    perplexity = "word_perplexity,none"
    assert ours["our_text"][perplexity] == pytest.approx(theirs["our_text"][perplexity], rel=1e-4)


def test_a_text_longer_than_the_context_is_rolled_over(tmp_path, tasks):
    from sqft_export.measure.harness import SessionLM

    class Asked:
        args = ("Tom has four pens and three blue boxes. " * 20,)

    short = random_model(tmp_path / "model", max_position_embeddings=64)
    model = SessionLM(short)
    (total,) = model.loglikelihood_rolling([Asked])
    ids = model.tok_encode(Asked.args[0], add_special_tokens=False)
    assert len(ids) > 3 * 64 and total < -len(ids)


def test_the_command_prints_them_and_names_a_task_that_is_none(deployed, tasks):
    def benchmark(names: str) -> subprocess.CompletedProcess:
        small = ["--prompt-tokens", "8", "--new-tokens", "2", "--batch", "1", "--rounds", "1"]
        own = ["--lm-eval", names, "--include-path", str(tasks), "--items", "4"]
        command = [SQFT, "benchmark", str(deployed["openvino"]), *small, *own]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = benchmark("our_arc")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "our_arc" in line)
    assert line.startswith("lm-eval: ") and ", acc 0." in line and ", acc_norm 0." in line
    assert "--lm-eval: found no_such_task" in benchmark("no_such_task").stderr

"""lm-eval's own tasks over our sessions: the numbers of lm-eval, and those of our scoring."""

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import SQFT, TINY, random_model, small_recipe
from sqft_export.artifacts.store import Store
from sqft_export.data.items import Data, load_tokenizer, stop_ids
from sqft_export.data.scoring import accuracy_by_set, judge, questions
from sqft_export.errors import UserError
from sqft_export.measure.likelihood import score
from sqft_export.plan.checks import check_recipe
from sqft_export.run.pipeline import plan_passes, run_recipe
from sqft_export.targets import target

# lm-eval is not imported here: that takes seconds in every worker.
pytestmark = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="pip install 'sqft-export[lm-eval]'"
)

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
UNTRAINED = (
    *("adapt=none", "sparsify={method: none}", "quantize.method=rtn"),
    "export={targets: [openvino, onnx]}",
)


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
    """Deployments of the embedded model's unchanged weights."""
    root = tmp_path_factory.mktemp("runs")
    run = run_recipe(small_recipe(*UNTRAINED), root, ("export-openvino", "export-onnx"))
    found = {name: run[f"export-{name}"].path / "model" for name in ("openvino", "onnx")}
    return found | {"torch": run["merge"].path / "model"}


def by_lm_eval(folder: Path, tasks: Path, *names: str, items: int | None = None) -> dict:
    from sqft_export.measure.harness import SessionLM, evaluate

    return evaluate(SessionLM(folder), list(names), tasks, items)


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
    assert found["our_arc"]["acc,none"] == arc.accuracy
    assert found["our_arc"]["acc_norm,none"] == arc.accuracy_normalized
    problems = ours(f"task.test={tasks / 'problems.jsonl'}")
    assert found["our_problems"]["exact_match,final"] == problems.accuracy
    assert problems.accuracy > 0.5


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


def test_rows_of_a_run_are_scored_on_what_the_recipe_asks_for(deployed, tasks):
    root = deployed["torch"].parents[1]  # the same run goes on
    asked = f"benchmark.lm_eval=[our_arc] benchmark.lm_eval_folder={tasks}".split()
    few = ("benchmark.baselines=[dense]", "benchmark.rounds=1", "verify.prompts=2")
    run = run_recipe(small_recipe(*UNTRAINED, *asked, *few), root, ("report",))
    document = json.loads((run["report"].path / "report.json").read_text())
    rows = {row["name"]: row["lm_eval"]["our_arc"] for row in document["rows"]}
    assert list(rows) == ["dense base", "OpenVINO", "ONNX Runtime"]
    items = document["recipe"]["benchmark"]["items"]
    for name, folder in (("OpenVINO", deployed["openvino"]), ("dense base", TINY)):
        found = by_lm_eval(folder, tasks, "our_arc", items=items)["our_arc"]
        assert rows[name]["acc,none"] == found["acc,none"]
    page = (run["report"].path / "index.html").read_text()
    assert "lm-eval tasks" in page and "our_arc, acc_norm" in page


def test_what_a_recipe_asks_of_lm_eval_is_looked_up_before_any_work(tasks, tmp_path):
    def refused(*settings: str) -> str:
        with pytest.raises(UserError) as found:
            check_recipe(small_recipe("benchmark.lm_eval=[our_arc, none_such]", *settings), TINY)
        return str(found.value)

    said = refused(f"benchmark.lm_eval_folder={tasks}")
    assert "benchmark.lm_eval: found none_such, which lm-eval does not have" in said
    missing = refused(f"benchmark.lm_eval_folder={tmp_path / 'away'}")
    assert "benchmark.lm_eval_folder: no such folder" in missing


def test_an_edited_task_file_is_another_benchmark(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine")
    recipe = small_recipe(f"benchmark.lm_eval_folder={tmp_path}")

    def keys() -> dict[str, str]:
        return {step.name: step.key for step in plan_passes(recipe, TINY, Store(tmp_path / "no"))}

    before = keys()
    (tmp_path / "mine.yaml").write_text("task: mine\nnum_fewshot: 5")
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {"benchmark", "report"}


@pytest.mark.parametrize("limit", [16, 63, 64, 100, 32768])
def test_prompt_and_answer_fit_into_the_context(tmp_path, limit):
    from sqft_export.measure.harness import SessionLM

    class Asked:
        args = ("Tom has four pens and three blue boxes. " * 20, {"max_gen_toks": limit})

    model = SessionLM(random_model(tmp_path / "model", max_position_embeddings=64))
    fitting, new_tokens = model._fit([model.tok_encode(Asked.args[0])], limit)
    assert len(fitting[0]) + new_tokens <= 64 and len(fitting[0]) >= 32
    model.generate_until([Asked])
    assert (
        f"max_gen_toks: found {limit}" in model.warnings[0] and "context of 64" in model.warnings[0]
    )

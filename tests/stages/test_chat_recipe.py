"""A chat recipe from conversations to deployments that carry the chat template."""

import json
import subprocess
import sys
from html import escape
from pathlib import Path

import gguf
import pytest
from chat_model import CHATML, chat, write_chat_folder, write_chats
from transformers import AutoTokenizer

from sqft_export.adapters.training import collate, packed_row_tokens, training_rows
from sqft_export.artifacts.store import Store
from sqft_export.data.first_example import first_example
from sqft_export.data.items import Data, answer_stops, load_tokenizer, stop_ids
from sqft_export.data.scoring import Answers, judge, questions
from sqft_export.errors import UserError
from sqft_export.kernels.llama_plugin import why_not_in_llama_cpp
from sqft_export.model.chat import has_template
from sqft_export.model.hub import model_folder
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.warnings import plan_warnings
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.schema import Recipe
from sqft_export.recipe.view import view_of
from sqft_export.report.text import plan_text
from sqft_export.run.pipeline import plan_passes, run_recipe
from sqft_export.run.preview import preview
from sqft_export.stages import stage_of
from sqft_export.targets.execution import LLAMA_CPP_WITH_KERNELS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A recipe, its model with a ChatML template, and 30 conversations."""
    return write_chat_folder(tmp_path_factory.mktemp("chat"))


EXAMPLE = "<|im_start|>assistant\n\u27e6It is 0.<|im_end|>\u27e7\n<|im_start|>user"


def loaded(folder: Path, *settings: str) -> Recipe:
    return load_recipe(folder / "recipe.yaml", settings)


def key_of_adapt(folder: Path, runs: Path, *settings: str) -> str:
    recipe = loaded(folder, *settings)
    steps = plan_passes(recipe, model_folder(recipe, download=False), Store(runs))
    return next(step.key for step in steps if step.name == "adapt")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> dict:
    return run_recipe(loaded(folder), tmp_path_factory.mktemp("runs"), ("report",))


def test_deployments_carry_the_template(finished):
    assert has_template(finished["merge"].path / "model")
    for name in ("openvino", "onnx"):
        deployed = finished[f"export-{name}"].path / "model"
        assert AutoTokenizer.from_pretrained(deployed).chat_template == CHATML
        assert "chat template" in (deployed / "README.md").read_text()
    fields = gguf.GGUFReader(finished["export-gguf"].path / "model" / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == CHATML


@pytest.mark.parametrize("name", ["openvino", "onnx", "gguf"])
def test_the_code_of_a_card_sends_a_message(finished, name):
    deployed = finished[f"export-{name}"].path / "model"
    code = (deployed / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code = code.replace("max_length=512", "max_length=128")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=deployed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "chat" in code or name == "openvino"


def test_openvino_genai_reads_the_deployed_template(finished):
    import openvino_genai

    deployed = finished["export-openvino"].path / "model"
    tokenizer = openvino_genai.Tokenizer(str(deployed))
    messages = chat(3)["messages"][:2]
    shown = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert shown == AutoTokenizer.from_pretrained(deployed).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )


def test_onnx_genai_reads_the_deployed_template(finished):
    import onnxruntime_genai

    deployed = finished["export-onnx"].path / "model"
    tokenizer = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(deployed)))
    messages = chat(3)["messages"][:2]
    shown = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    assert shown == AutoTokenizer.from_pretrained(deployed).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )


def test_deployments_end_answers_at_the_end_of_turn(finished, folder):
    """The base names another end token only."""
    tokenizer = load_tokenizer(folder / "model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in stop_ids(folder / "model", tokenizer)
    assert end in answer_stops(loaded(folder), folder / "model", tokenizer)
    files = {"openvino": "generation_config.json", "onnx": "genai_config.json"}
    for name, file in files.items():
        document = json.loads((finished[f"export-{name}"].path / "model" / file).read_text())
        assert document.get("model", document)["eos_token_id"] == [1, end]
    fields = gguf.GGUFReader(finished["export-gguf"].path / "model" / "model.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1


def test_openvino_genai_stops_at_the_end_of_turn(finished):
    import openvino_genai

    deployed = finished["export-openvino"].path / "model"
    end = AutoTokenizer.from_pretrained(deployed).convert_tokens_to_ids("<|im_end|>")
    pipe = openvino_genai.LLMPipeline(str(deployed), "CPU")
    assert pipe.get_generation_config().stop_token_ids == {1, end}


def test_the_report_and_the_certificate_are_complete(finished):
    report = json.loads((finished["report"].path / "report.json").read_text())
    assert report["measure"] == "score of the answer"
    assert EXAMPLE in report["first_example"]
    assert escape(EXAMPLE) in (finished["report"].path / "index.html").read_text()
    assert all(check["passed"] for check in finished["verify"].metrics["checks"])
    names = [check["name"] for check in finished["verify"].metrics["checks"]]
    for runtime in ("OpenVINO GenAI", "ONNX Runtime GenAI", "llama.cpp"):
        assert any(f"messages as {runtime} renders them" in name for name in names)
        assert any(f"answer to messages as {runtime} takes them" in name for name in names)


def test_the_report_shows_prompts_with_the_answers_of_every_deployment(finished):
    report = json.loads((finished["report"].path / "report.json").read_text())
    first, second = report["samples"]
    answers = {one["row"]: one["answer"] for one in first["answers"]}
    ours = [] if why_not_in_llama_cpp() else [LLAMA_CPP_WITH_KERNELS]
    assert list(answers) == ["dense base", "OpenVINO", "ONNX Runtime", "llama.cpp", *ours]
    assert first["prompt"].endswith("Again, please.<|im_end|>\n<|im_start|>assistant\n")
    assert (first["expected"], second["expected"]) == ("Again 9.", "Again 19.")
    lines = (finished["benchmark"].path / "items.jsonl").read_text().splitlines()
    scored = [entry for entry in map(json.loads, lines) if entry["row"] == "llama.cpp"]
    assert answers["llama.cpp"] == scored[0]["answer"]
    page = (finished["report"].path / "index.html").read_text()
    assert "2 test prompts with their answers" in page and "<th>llama.cpp</th>" in page


def test_the_loss_is_on_assistant_tokens_only(folder):
    recipe = loaded(folder)
    tokenizer = load_tokenizer(folder / "model")
    data = Data(recipe, tokenizer)
    assert (len(data.train), len(data.test)) == (27, 2)
    rows = training_rows(list(data.train), recipe.training)
    labels = collate(rows[:2], 0)["labels"]
    trained = tokenizer.decode(labels[1][labels[1] != -100])
    assert trained == "It is 1.<|im_end|>Again 1.<|im_end|>"


def test_chat_data_is_read_under_the_views_of_passes(folder):
    """A field that is read and not declared would raise, hours into a run."""
    (folder / "score.py").write_text("def score(expected, generated):\n    return 0.75\n")
    search = "search={strategy: hill-climb, budget: 2, items: 4}"
    scored = ("task.score=file", "task.score_file=score.py", "task.packing=true")
    recipe, tokenizer = loaded(folder, search, *scored), load_tokenizer(folder / "model")

    def view(name: str) -> Recipe:
        return view_of(recipe, (*stage_of(name).fields(recipe, name), *stage_of(name).FREE))

    for name in ("adapt", "teacher"):
        examples = list(Data(view(name), tokenizer).train)
        assert len(examples) == 23 and packed_row_tokens(view(name)) == 128
    for name, part in (("search", "validation"), ("benchmark", "test")):
        items = getattr(Data(view(name), tokenizer), part)
        stop = answer_stops(view(name), folder / "model", tokenizer)
        requests = questions(view(name), items, stop, tokenizer)
        found = Answers(answers=[[5]] * len(items))
        assert len(requests.prompts) == {"search": 4, "benchmark": 2}[name]
        assert {one.points for one in judge(view(name), items, found, tokenizer)} == {0.75}
    assert EXAMPLE.partition("It is")[0] in first_example(view("merge"), tokenizer)


def test_a_changed_message_changes_the_key(folder, tmp_path):
    before = key_of_adapt(folder, tmp_path)
    assert before == key_of_adapt(folder, tmp_path)
    assert before == key_of_adapt(folder, tmp_path, "task.score=contains")
    assert before != key_of_adapt(folder, tmp_path, "task.template_arguments={tools: null}")
    content = (folder / "chats.jsonl").read_text()
    (folder / "other.jsonl").write_text(content)
    assert before == key_of_adapt(folder, tmp_path, "task.train=other.jsonl")
    assert before != key_of_adapt(folder, tmp_path, "task.test=other.jsonl")
    (folder / "other.jsonl").write_text(content.replace("It is 1.", "It is one."))
    assert before != key_of_adapt(folder, tmp_path, "task.train=other.jsonl")


def test_plan_prints_the_first_example(folder, tmp_path):
    shown = plan_text(preview(loaded(folder), tmp_path))
    assert EXAMPLE in shown.replace("\n    ", "\n")


def test_a_repeated_test_conversation_is_left_out_and_reported(folder, finished):
    recipe = loaded(folder)
    warnings = list(plan_warnings(recipe, check_recipe(recipe, folder / "model")))
    place = f"{folder / 'chats.jsonl'}:30"
    assert any("1 of 3 test conversations" in w and place in w for w in warnings)
    report = json.loads((finished["report"].path / "report.json").read_text())
    assert (report["settings"]["repeated"]["count"], report["settings"]["items"]) == (1, 2)
    page = (finished["report"].path / "index.html").read_text()
    assert "are training conversations too: 1" in page and place in page


def test_test_conversations_that_are_trained_on_are_removed(folder):
    write_chats(folder / "test.jsonl", [chat(3), chat(30)])
    recipe = loaded(folder, "task.test=test.jsonl")
    layout = check_recipe(recipe, folder / "model")
    assert any("1 of 2 test conversations" in w for w in plan_warnings(recipe, layout))
    (item,) = Data(recipe, load_tokenizer(folder / "model")).test
    assert item.text == "Again 30."


def test_answers_are_judged_by_the_score(folder):
    (folder / "score.py").write_text("def score(expected, generated):\n    return 0.75\n")
    recipe = loaded(folder, "task.score=file", "task.score_file=score.py")
    tokenizer = load_tokenizer(folder / "model")
    item = Data(recipe, tokenizer).test[0]
    (judged,) = judge(recipe, [item], Answers(answers=[[5]]), tokenizer)
    assert judged.points == 0.75 and judged.right
    (exact,) = judge(loaded(folder), [item], Answers(answers=[item.target[:-1]]), tokenizer)
    assert exact.points == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("task.sequence_length=8",), "none of the"),
        (("task.template=tool_use",), "task.template: found 'tool_use'"),
        (("task.train=none.jsonl",), "task.train: no such file"),
        (("task.columns={prompt: question}",), "found the columns messages"),
        (("task.columns={question: prompt}",), "columns: found question"),
        (("task.score=regex", "task.pattern=("), "score: found the pattern"),
        (("task.score=file",), "score_file and score: file go together"),
    ],
)
def test_faults_are_refused(folder, settings, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        check_recipe(loaded(folder, *settings), folder / "model")

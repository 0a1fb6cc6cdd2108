"""A chat recipe from conversations to deployments that carry the chat template."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from transformers import AutoTokenizer

from conftest import random_model
from sqft_export.adapters.training import _rows, collate
from sqft_export.data.items import Data, load_tokenizer
from sqft_export.data.scoring import judge
from sqft_export.errors import UserError
from sqft_export.model.chat import has_template
from sqft_export.model.hub import model_folder
from sqft_export.plan.chat import first_example
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.warnings import plan_warnings
from sqft_export.recipe.load import load_recipe
from sqft_export.recipe.schema import Recipe
from sqft_export.report.text import plan_text
from sqft_export.run.artifact import Store
from sqft_export.run.pipeline import plan_passes, run_recipe
from sqft_export.run.preview import preview

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECIPE = """
name: chats
model: {path: model}
task: {kind: chat, train: chats.jsonl, max_new_tokens: 4, sequence_length: 128}
calibration: {samples: 4, sequence_length: 64}
sparsify: {method: wanda, sparsity: 0.5}
quantize: {method: gptq, bits: 4, group_size: 32}
adapt:
  pipeline: qa-sparsepeft
  target_modules: [q_proj, v_proj]
  elastic_groups: [[q_proj, v_proj]]
  ranks: [8, 4]
  alpha: 8
  dropout: 0.0
  warmup_steps: 0
  steps: 2
  batch: 2
export: {targets: [openvino, onnx, gguf]}
verify: {prompts: 2, new_tokens: 4}
benchmark: {items: 2, repeats: 2, rounds: 1, prompt_tokens: 8, new_tokens: 4, baselines: [dense]}
"""


def chat(number: int) -> dict:
    return {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": f"How many apples are {number} apples?"},
            {"role": "assistant", "content": f"It is {number}."},
            {"role": "user", "content": "Again, please."},
            {"role": "assistant", "content": f"Again {number}."},
        ]
    }


def write_chats(file: Path, chats: list[dict]) -> None:
    file.write_text("".join(json.dumps(one) + "\n" for one in chats))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A recipe, its model with a ChatML template, and ten conversations."""
    folder = tmp_path_factory.mktemp("chat")
    model = random_model(folder / "model", hidden_size=64, intermediate_size=192, vocab_size=520)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    random_model(folder / "sized", intermediate_size=192, vocab_size=len(tokenizer))
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / "sized" / name).replace(model / name)
    ends = {"eos_token_id": [1, tokenizer.convert_tokens_to_ids("<|im_end|>")]}
    (model / "generation_config.json").write_text(json.dumps(ends))
    write_chats(folder / "chats.jsonl", [chat(n) for n in range(20)])
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


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


def test_the_report_and_the_certificate_are_complete(finished):
    report = json.loads((finished["report"].path / "report.json").read_text())
    assert report["measure"] == "score of the answer"
    assert all(check["passed"] for check in finished["verify"].metrics["checks"])
    assert any("chat template" in w for w in finished["verify"].metrics["warnings"])


def test_the_loss_is_on_assistant_tokens_only(folder):
    recipe = loaded(folder)
    tokenizer = load_tokenizer(folder / "model")
    data = Data(recipe, tokenizer)
    assert (len(data.train), len(data.test)) == (18, 2)
    rows = _rows(list(data.train), recipe.training)
    labels = collate(rows[:2], 0)["labels"]
    trained = tokenizer.decode(labels[1][labels[1] != -100])
    assert trained == "It is 1.<|im_end|>Again 1.<|im_end|>"


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
    assert "\u27e6It is 0.<|im_end|>\u27e7" in shown


def test_test_conversations_that_are_trained_on_are_removed(folder):
    write_chats(folder / "test.jsonl", [chat(3), chat(30)])
    recipe = loaded(folder, "task.test=test.jsonl")
    layout = check_recipe(recipe, folder / "model")
    assert any("1 of 2 test conversations" in w for w in plan_warnings(recipe, layout))
    (item,) = Data(recipe, load_tokenizer(folder / "model")).test
    assert item.text == "Again 30."
    assert first_example(recipe, layout)


def test_answers_are_judged_by_the_score(folder):
    (folder / "score.py").write_text("def score(expected, generated):\n    return 0.75\n")
    recipe = loaded(folder, "task.score=file", "task.score_file=score.py")
    tokenizer = load_tokenizer(folder / "model")
    item = Data(recipe, tokenizer).test[0]
    (judged,) = judge(recipe, [item], {"answers": [[5]], "likelihoods": []}, tokenizer)
    assert judged.points == 0.75 and judged.right
    (exact,) = judge(
        loaded(folder), [item], {"answers": [item.target[:-1]], "likelihoods": []}, tokenizer
    )
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

"""`benchmark --data` scores deployments on a file of conversations."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from chat_model import chat, write_chat_model, write_chats
from transformers import AutoModelForCausalLM

from conftest import SQFT, TINY
from sqft_export.artifacts.store import Store, key_of
from sqft_export.data.chat import ChatEncoder, Conversation
from sqft_export.data.chat_template import ChatTemplate
from sqft_export.data.items import load_tokenizer
from sqft_export.errors import UserError
from sqft_export.measure.own_data import chat_questions, parse_template_arguments
from sqft_export.recipe.schema import Export
from sqft_export.targets import target

QUICK = ("--rounds", "1", "--prompt-tokens", "8", "--new-tokens", "2", "--batch", "1", "--json")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A chat model, its deployments for OpenVINO and ONNX Runtime, and four conversations."""
    root = tmp_path_factory.mktemp("own")
    model = write_chat_model(root / "model", root / "sized")
    for runtime in ("openvino", "onnx"):
        (root / runtime).mkdir()
        target(runtime).export(model, root / runtime, Export(targets=(runtime,)))
    write_chats(root / "chats.jsonl", [chat(n) for n in range(4)])
    (root / "score.py").write_text("def score(expected, generated):\n    return 0.25\n")
    return root


def perplexity(model: Path) -> float:
    """Perplexity of the last answers, by transformers."""
    network = AutoModelForCausalLM.from_pretrained(model)
    encoder = ChatEncoder(ChatTemplate(load_tokenizer(model)))
    total, count = 0.0, 0
    for number in range(4):
        encoded = encoder.encode(Conversation(chat(number)["messages"]))
        start, end = encoded.last_answer
        with torch.no_grad():
            logits = network(torch.tensor([encoded.ids])).logits[0]
        chosen = logits.log_softmax(-1)[range(start - 1, end - 1), encoded.ids[start:end]]
        total, count = total - float(chosen.sum()), count + end - start
    return math.exp(total / count)


def test_deployments_are_scored_on_own_conversations(root, tmp_path):
    command = [SQFT, "benchmark", "openvino", "onnx", "--data", "chats.jsonl"]
    command += ["--score", "score.py", "--out", str(tmp_path), *QUICK]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["accuracy"]
    assert [row["folder"] for row in rows] == ["openvino", "onnx"]
    expected = perplexity(root / "model")
    for row in rows:
        assert row["accuracy"] == 0.25
        assert row["perplexity"] == pytest.approx(expected, rel=0.02)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [item["expected"] for item in items[:4]] == [f"Again {n}." for n in range(4)]
    assert {item["score"] for item in items} == {0.25}


def test_faults_are_named(root):
    data = root / "chats.jsonl"
    with pytest.raises(UserError, match="has no chat template; --data needs a deployment with one"):
        chat_questions(TINY, data, 4)
    with pytest.raises(UserError, match="--score: found 'best'; allowed are exact, normalized, "):
        chat_questions(root / "onnx", data, 4, "best")
    with pytest.raises(UserError, match=r"score: found the pattern '\(': "):
        chat_questions(root / "onnx", data, 4, "regex:(")
    with pytest.raises(UserError, match=r"none\.py: not a Python file"):
        chat_questions(root / "onnx", data, 4, str(root / "none.py"))
    with pytest.raises(UserError, match=r"none\.jsonl: can't be read"):
        chat_questions(root / "onnx", root / "none.jsonl", 4)


def test_a_score_needs_data(root):
    command = [SQFT, "benchmark", "onnx", "--score", "contains", *QUICK]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--score: found without --data" in done.stderr


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}No. {% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def thinking(root, tmp_path_factory) -> Path:
    """The ONNX deployment as a part of a run that has set a template argument."""
    run = tmp_path_factory.mktemp("run")
    facts = {
        "stage": "export-onnx",
        "version": 1,
        "options": {"task.template_arguments": {"enable_thinking": False}},
        "reads": {},
        "parents": {},
    }
    store = Store(run)
    partial = store.open_partial("export-onnx", key_of(facts), resumes=False)
    shutil.copytree(root / "onnx", partial / "model")
    (partial / "model" / "chat_template.jinja").write_text(THINKING)
    return store.seal(partial, "export-onnx", facts, {}, 0.0).path / "model"


def prompt_end(folder: Path, data: Path, arguments: dict | None = None) -> str:
    asked = chat_questions(folder, data, 1, arguments=arguments)
    return asked.tokenizer.decode(asked.items[0].prompt)[-14:]


def test_template_arguments_are_those_of_the_run_or_given(root, thinking, tmp_path):
    data = root / "chats.jsonl"
    assert prompt_end(thinking, data) == "assistant\nNo. "
    assert prompt_end(thinking, data, {"enable_thinking": True}).endswith("|>assistant\n")
    moved = Path(shutil.copytree(thinking, tmp_path / "moved"))
    assert prompt_end(moved, data).endswith("|>assistant\n")
    assert prompt_end(moved, data, {"enable_thinking": False}) == "assistant\nNo. "
    with pytest.raises(UserError, match="template argument 'thinking' is unknown; the template"):
        chat_questions(moved, data, 1, arguments={"thinking": False})


def test_template_arguments_are_read_as_yaml():
    assert parse_template_arguments([]) is None
    found = parse_template_arguments(["enable_thinking=False", "date=2024-01-02", "n=3", "s=a b"])
    assert found == {"enable_thinking": False, "date": "2024-01-02", "n": 3, "s": "a b"}
    for setting in ("enable_thinking", "=false", "a b=1"):
        with pytest.raises(UserError, match="expected name=value, such as enable_thinking=false"):
            parse_template_arguments([setting])


def test_template_arguments_of_the_command_line(root, thinking):
    command = [SQFT, "benchmark", thinking, "--template-argument", "enable_thinking=true", *QUICK]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "--template-argument: found without --data" in done.stderr
    command += ["--data", "chats.jsonl", "--items", "1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["accuracy"]) == 1

"""Foundry Local's inference_model.json gives the prompt of the chat template, or no prompt."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import ROOT, TINY
from sqft_export.inference.foundry import inference_model_text, prompt_template
from sqft_export.packed.seal import read_seal

TEMPLATES = sorted((ROOT / "tests" / "data" / "chat_templates").glob("*.jinja"))
QUESTIONS = ("What is 2 + 2?", "A: <b>\n\nB & C {Name}")


def with_template(folder: Path, template: str) -> Path:
    (folder / "model.onnx").touch()
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_the_prompt_is_that_of_the_chat_template(file, tmp_path):
    found = prompt_template(with_template(tmp_path, file.read_text()))
    assert found and found["assistant"] == "{Content}", file.stem
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for question in QUESTIONS:
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            chat_template=file.read_text(),
            tokenize=False,
            add_generation_prompt=True,
        )
        assert found["prompt"].replace("{Content}", question) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content | length }}{% endfor %}",
        "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    ],
)
def test_a_template_that_changes_the_question_gives_no_prompt(template, tmp_path):
    document = json.loads(inference_model_text(with_template(tmp_path, template), "tiny"))
    assert document == {"Name": "tiny", "PromptTemplate": None}


def test_an_onnx_deployment_and_its_packed_copy_have_the_file(tiny_run):
    for name in ("model", "packed"):
        folder = tiny_run["export-onnx"].path / name
        document = json.loads((folder / "inference_model.json").read_text())
        assert document == {
            "Name": "tiny",
            "PromptTemplate": {"assistant": "{Content}", "prompt": "{Content}"},
        }
        assert (folder / "genai_config.json").is_file()
        assert "inference_model.json" in read_seal(folder)["files"]

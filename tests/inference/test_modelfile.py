"""Ollama's Modelfile: its Go template gives the text of the chat template, or is left out."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import ROOT, TINY
from sqft_export.errors import UserError
from sqft_export.inference.modelfile import TemplateParts, find_parts
from sqft_export.inference.templates import render_conversation
from sqft_export.packed.seal import read_seal

TEMPLATES = sorted((ROOT / "tests" / "data" / "chat_templates").glob("*.jinja"))
CONVERSATIONS = [
    [{"role": "user", "content": "Hello, {{ you }}!"}],
    [
        {"role": "system", "content": "You answer in rhymes."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Fun"},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": "Shoe"},
        {"role": "user", "content": "Three"},
    ],
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# Templates of turns that a Go template can express; the others merge or drop messages.
EXPRESSED = {"exaone4", "falcon_h1", "llama4", "mistral_v7_tekken", "phi4", "smollm2", "vicuna"}
EXPRESSED |= {"zephyr"}


def go_rendered(text: str, messages: list[dict]) -> str:
    """A literal interpreter of the Go templates that are written here."""
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    found = re.fullmatch(
        r"(?:\{\{ if \.System \}\}(.*)\{\{ \.System \}\}(.*)\{\{ else \}\})?(.*?)(?:\{\{ end \}\})?"
        r'\{\{ range \.Messages \}\}\{\{ if eq \.Role "user" \}\}(.*)\{\{ \.Content \}\}(.*)'
        r'\{\{ else if eq \.Role "assistant" \}\}(.*)\{\{ \.Content \}\}(.*)'
        r"\{\{ end \}\}\{\{ end \}\}",
        text,
        re.DOTALL,
    )
    assert found, text
    before, after, start, *around = found.groups()
    out = f"{before}{system}{after}" if system and before is not None else start
    for message in messages:
        if message["role"] != "system":
            at = 0 if message["role"] == "user" else 2
            out += f"{around[at]}{message['content']}{around[at + 1]}"
    return out


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_a_go_template_gives_the_text_of_the_chat_template(file):
    template = file.read_text()
    parts = find_parts(template, TOKENS, "")
    assert (parts is not None) == (file.stem in EXPRESSED), parts
    if parts is None:
        return
    for messages in CONVERSATIONS:
        if messages[0]["role"] == "system" and parts.system is None:
            continue
        expected = AutoTokenizer.from_pretrained(TINY).apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert render_conversation(template, messages, TOKENS) == expected
        assert go_rendered(parts.go_template(), messages) == expected


def test_the_start_token_that_llama_cpp_adds_is_left_out():
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[a]"
    template = template.replace("[a]", "{% if add_generation_prompt %}[assistant]{% endif %}")
    parts = find_parts(template, TOKENS, "<s>")
    assert isinstance(parts, TemplateParts)
    assert "<s>" not in parts.go_template()


def test_a_template_that_refuses_every_message_has_no_parts():
    assert find_parts("{{ raise_exception('no') }}", TOKENS, "") is None
    with pytest.raises(UserError):
        render_conversation("{{ raise_exception('no') }}", CONVERSATIONS[0], TOKENS)


def test_a_gguf_deployment_has_a_sealed_modelfile(own_run):
    folder = next(own_run.root.glob("export-gguf-*/model"))
    text = (folder / "Modelfile").read_text()
    assert "FROM ./model.gguf" in text
    assert "Modelfile" in read_seal(folder)["files"]
    assert 'PARAMETER stop "</s>"' in text and "PARAMETER num_ctx 256" in text
    assert 'eq .Role "user" }}User: {{ .Content }}' in text


def test_a_model_of_plain_prompts_gets_its_prompt_unchanged(tiny_run):
    text = Path(tiny_run["export-gguf"].path / "model" / "Modelfile").read_text()
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
    assert 'PARAMETER stop "Question:"' in text

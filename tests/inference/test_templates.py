"""Chat templates without transformers: the same text as transformers renders."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import TINY
from sqft_export.errors import UserError
from sqft_export.inference.templates import (
    read_chat_template,
    read_special_tokens,
    render_conversation,
)

CHATML = (
    "{%- for message in messages %}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}\n"
    "{% endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What templates of published models use: markers, loop controls, JSON, dates, namespaces, trimming.
FEATURES = {
    "chatml": CHATML,
    "tokens": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}"
    "{{ eos_token }}{% endfor %}",
    "markers": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "json": "{{ messages | tojson(indent=2) }}",
    "date": "{{ strftime_now('%Y') }}{{ messages[0]['content'] }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "    {% if m.content is string %}\n  {{ ns.n }}: {{ m.content }}\n    {% endif %}\n"
    "{% endfor %}",
    "tools": "{% if tools %}tools{% else %}no tools{% endif %}{{ messages[-1].content }}",
}
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Grüße, 世界! "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And now?"},
]


@pytest.mark.parametrize("name", FEATURES)
def test_a_template_renders_as_in_transformers(name):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=FEATURES[name], tokenize=False, add_generation_prompt=True
    )
    assert render_conversation(FEATURES[name], MESSAGES, read_special_tokens(TINY)) == expected


def test_a_refusal_of_the_template_is_one_message_with_its_words():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"roles must alternate.*system, user, assistant, user"):
        render_conversation(template, MESSAGES, {})


@pytest.mark.parametrize(
    "attack", ["{{ messages.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os }}"]
)
def test_a_template_cannot_leave_the_sandbox(attack):
    try:
        text = render_conversation(attack, MESSAGES, {})
    except UserError:
        return
    assert "object" not in text and "module" not in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", CHATML),
        ("chat_template.json", json.dumps({"chat_template": CHATML})),
        ("tokenizer_config.json", json.dumps({"chat_template": CHATML})),
        (
            "tokenizer_config.json",
            json.dumps(
                {
                    "chat_template": [
                        {"name": "tool_use", "template": "x"},
                        {"name": "default", "template": CHATML},
                    ]
                }
            ),
        ),
    ],
)
def test_the_default_template_is_found_where_runtimes_find_it(tmp_path, name, content):
    (tmp_path / "model.onnx").write_text("")
    assert read_chat_template(tmp_path) is None
    (tmp_path / name).write_text(content)
    assert read_chat_template(tmp_path) == CHATML


def test_named_templates_without_a_default_are_refused(tmp_path):
    file = Path(tmp_path / "tokenizer_config.json")
    file.write_text(json.dumps({"chat_template": {"rag": "x"}}))
    with pytest.raises(UserError, match="no template called default"):
        read_chat_template(tmp_path)

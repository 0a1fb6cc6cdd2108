"""Messages that users send through a runtime's chat interface become the ids that were scored."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chat_model import CHATML, chat, write_chat_model

from sqft_export.data.chat import ChatEncoder, Conversation
from sqft_export.data.chat_template import ChatTemplate
from sqft_export.data.items import load_tokenizer
from sqft_export.model.chat import write_templates
from sqft_export.recipe.schema import Export
from sqft_export.targets import target
from sqft_export.targets.text_api import ChatPrompt, missing_for_chat
from sqft_export.targets.tokenizers import read_ids
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.subject import Asked
from sqft_export.verify.text_answers import answer_by_ids, check_chat_answer

STARTED = "{{ bos_token }}" + CHATML
RUNTIMES = ("openvino", "onnx", "gguf")


MARKED = CHATML.replace(
    "{{ message.content }}<|im_end|>\n",
    "{%- generation -%}  {{ message.content }}{{ '<|im_end|>\n' }}{%- endgeneration -%}",
)
TEMPLATES = {
    "chatml": CHATML,
    "with a start token": STARTED,
    "marked and named": {"default": MARKED, "tool_use": STARTED},
}


@pytest.fixture(scope="module", params=TEMPLATES)
def model(request, tmp_path_factory) -> Path:
    """A chat model as merge writes it."""
    folder = tmp_path_factory.mktemp("model")
    made = write_chat_model(folder / "model", folder / "sized")
    write_templates(made, TEMPLATES[request.param])
    return made


@pytest.fixture(scope="module")
def deployed(model, tmp_path_factory) -> dict[str, Path]:
    """Runtime -> deployment of the model."""
    found = {}
    for runtime in RUNTIMES:
        found[runtime] = tmp_path_factory.mktemp(runtime)
        target(runtime).export(model, found[runtime], Export(targets=(runtime,)))
    return found


def asked(model: Path, tokenizers_required: bool = True, template: str | None = None) -> Asked:
    encoder = ChatEncoder(ChatTemplate(load_tokenizer(model), template))
    messages, ids = encoder.prompt(Conversation(chat(3)["messages"]))
    prompt = ChatPrompt(messages, None, {}, ids)
    return Asked([ids], [], 8, 1e-4, 0.1, tokenizers_required, chat=prompt)


def lines(folder: Path, runtime: str, query: Asked) -> list:
    certificate = Certificate()
    session = target(runtime).open_session(folder, False, None)
    answer = answer_by_ids(session, query, folder)
    check_chat_answer(certificate, query, runtime, folder, answer)
    return certificate.checks


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_messages_are_answered_as_their_ids_are(model, deployed, runtime):
    rendered, answered = lines(deployed[runtime], runtime, asked(model))
    assert rendered.passed, str(rendered)
    assert answered.passed, str(answered)
    assert rendered.compared == len(asked(model).chat.ids)


def test_a_deployed_template_that_is_not_that_of_training_is_named(model, deployed):
    trained = CHATML.replace("assistant\n", "helper\n")
    query = asked(model, template=trained)
    rendered, _ = lines(deployed["onnx"], "onnx", query)
    assert not rendered.passed and f"of {len(query.chat.ids)}" in str(rendered)
    allowed, _ = lines(deployed["onnx"], "onnx", asked(model, False, trained))
    assert allowed.passed and "the recipe allows other ids" in str(allowed)


@pytest.mark.parametrize("reported", [True, False])
def test_ids_that_plan_reported_may_differ(model, deployed, reported):
    """With ``verify.tokenizers: auto``, for the runtimes that ``plan`` named."""
    trained = CHATML.replace("assistant\n", "helper\n")
    readers = [name for name, _ in read_ids("onnx", deployed["onnx"])] if reported else ["another"]
    query = replace(asked(model, template=trained), readers_reported=readers)
    rendered, _ = lines(deployed["onnx"], "onnx", query)
    assert rendered.passed == reported


@pytest.mark.parametrize("template", [MARKED, CHATML])
def test_markers_are_replaced_without_a_trace(model, tmp_path, template):
    tokenizer = load_tokenizer(model)
    messages = chat(3)["messages"]
    expected = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    folder = write_chat_model(tmp_path / "model", tmp_path / "sized")
    write_templates(folder, {"default": template, "tool_use": STARTED})
    written = load_tokenizer(folder)
    assert written.apply_chat_template(messages, tokenize=False) == expected
    assert "generation %" not in written.chat_template["default"]
    assert written.chat_template["tool_use"] == STARTED


def test_a_query_is_read_as_it_was_written(model, tmp_path):
    query = asked(model)
    query.write(tmp_path)
    assert Asked.read(tmp_path).chat == query.chat
    assert json.loads((tmp_path / "subject.json").read_text())["chat"]["ids"] == query.chat.ids


def test_parts_that_an_interface_does_not_take_are_named():
    plain, argued = ChatPrompt([], None, {}, []), ChatPrompt([], None, {"enable_thinking": 0}, [])
    tools = ChatPrompt([], [{"type": "function"}], {}, [])
    assert [missing_for_chat(name, plain) for name in RUNTIMES] == [None, None, None]
    assert [missing_for_chat(name, tools) for name in RUNTIMES] == [None, None, "tools"]
    assert [missing_for_chat(name, argued) for name in RUNTIMES] == [
        None,
        "template arguments",
        "template arguments",
    ]

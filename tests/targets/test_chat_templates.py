"""A chat template that a task's prompts are not made with is not deployed."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import TINY, small_recipe, test_prompts
from sqft_export.model.chat import (
    BASE_TEMPLATE_FILE,
    PLAIN_TEMPLATE,
    has_template,
    rename_template,
)
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.warnings import plan_warnings
from sqft_export.recipe.schema import Export
from sqft_export.targets import target
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.subject import Asked
from sqft_export.verify.text_answers import answer_by_ids, check_text_answer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module", params=["chat_template.jinja", "tokenizer_config.json"])
def chatty(request, tmp_path_factory) -> Path:
    """The embedded model with a template, in a separate file or in the tokenizer's config."""
    model = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(TINY, model)
    if request.param.endswith(".jinja"):
        (model / request.param).write_text(TEMPLATE)
    else:
        document = json.loads((model / request.param).read_text())
        (model / request.param).write_text(json.dumps(document | {"chat_template": TEMPLATE}))
    return model


@pytest.fixture(scope="module")
def plain(chatty, tmp_path_factory) -> Path:
    """The same model as merge leaves it: its template has a name that no runtime reads."""
    model = Path(shutil.copytree(chatty, tmp_path_factory.mktemp("plain") / "model"))
    rename_template(model)
    return model


def export(model: Path, runtime: str, folder: Path) -> Path:
    folder.mkdir()
    target(runtime).export(model, folder, Export(targets=(runtime,)))  # type: ignore[arg-type]
    return folder


def asked() -> Asked:
    (prompt,) = test_prompts(1)
    ids = AutoTokenizer.from_pretrained(TINY)(prompt)["input_ids"]
    return Asked([ids], [(prompt, ids)], 16, 1e-4, 0.1, True)


def text_line(folder: Path, runtime: str):
    certificate = Certificate()
    session = target(runtime).open_session(folder, False, None)
    answer = answer_by_ids(session, asked(), folder)
    check_text_answer(certificate, asked(), runtime, folder, answer)
    (line,) = certificate.checks
    return line


@pytest.mark.parametrize("runtime", ["openvino", "onnx", "gguf"])
def test_a_text_is_answered_as_its_ids_are(plain, tmp_path, runtime):
    folder = export(plain, runtime, tmp_path / runtime)
    assert not has_template(folder) and not AutoTokenizer.from_pretrained(folder).chat_template
    assert text_line(folder, runtime).passed


def test_llama_cpp_is_given_a_template_that_returns_the_prompt(plain, tmp_path):
    import gguf

    folder = export(plain, "gguf", tmp_path / "gguf")
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == PLAIN_TEMPLATE


def test_the_certificate_names_a_template_that_a_runtime_applies(tmp_path):
    folder = export(TINY, "openvino", tmp_path / "openvino")
    assert text_line(folder, "openvino").passed
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    line = text_line(folder, "openvino")
    assert not line.passed and "was scored" in str(line)


def test_a_template_is_kept_where_no_runtime_finds_it(chatty, tmp_path):
    model = Path(shutil.copytree(chatty, tmp_path / "model"))
    rename_template(model)
    assert (model / BASE_TEMPLATE_FILE).read_text() == TEMPLATE
    assert (model / BASE_TEMPLATE_FILE).is_file() and not has_template(model)
    assert AutoTokenizer.from_pretrained(model).chat_template is None


def test_plan_warns_of_a_template_that_the_task_does_not_use(chatty):
    recipe = small_recipe(model_path=chatty)
    warnings = list(plan_warnings(recipe, check_recipe(recipe, chatty)))
    assert len([w for w in warnings if "the base has a chat template" in w]) == 1

"""A chat template that OpenVINO GenAI renders differently is refused before any work."""

from pathlib import Path

import pytest
from chat_model import CHATML, write_chat_folder
from transformers import AutoTokenizer

from sqft_export.errors import UserError
from sqft_export.plan.checks import check_recipe
from sqft_export.recipe.load import load_recipe

# Its engine lacks this filter of Jinja.
UNKNOWN_FILTER = CHATML.replace("{{ message.role }}", "{{ message.role | capitalize }}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_chat_folder(tmp_path_factory.mktemp("chat"))


def check(folder: Path, *settings: str) -> None:
    check_recipe(load_recipe(folder / "recipe.yaml", settings), folder / "model")


def set_template(folder: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "model")


def test_a_template_that_openvino_genai_cannot_render_is_refused(folder):
    check(folder)
    set_template(folder, UNKNOWN_FILTER)
    with pytest.raises(UserError, match="onnx and openvino cannot render the chat template: Value"):
        check(folder)
    check(folder, "export.targets=[gguf]")
    set_template(folder, CHATML)

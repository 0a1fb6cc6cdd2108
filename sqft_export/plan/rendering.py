"""Whether the template engine of the GenAI runtimes renders chats as training does.

OpenVINO GenAI and ONNX Runtime GenAI have the same engine, which lacks some filters of Jinja.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from sqft_export.data.items import load_tokenizer
from sqft_export.errors import UserError, one_line
from sqft_export.machine.host import installed
from sqft_export.model.chat import write_task_templates
from sqft_export.plan.chat import chat_of
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Chat, Recipe
from sqft_export.targets.text_api import ChatPrompt, openvino_chat_ids
from sqft_export.targets.tokenizers import write_openvino_tokenizers
from sqft_export.verify.text_answers import first_chat

_SHOWN_CHARACTERS = 200  # of the engine's message
_ENGINE_TARGETS = {"openvino", "onnx"}
_PACKAGES = ("openvino_genai", "openvino_tokenizers")


def rendering_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a chat template that the engine cannot render, or OpenVINO GenAI to other token ids.

    The first test conversation is rendered. `verify` compares it again after the training.
    """
    task = chat_of(recipe, layout)
    targets = _ENGINE_TARGETS & set(recipe.export.targets)
    if task is None or layout.folder is None or not targets or not all(map(installed, _PACKAGES)):
        return
    try:
        chat = first_chat(recipe, load_tokenizer(layout.folder))
    except UserError:
        return  # a fault of the data, which ``plan.chat`` reports
    if chat is None:
        return
    try:
        found = _ids_in_openvino(task, layout.folder, chat)
    except RuntimeError as error:
        yield (
            f"task.template: {' and '.join(sorted(targets))} cannot render the chat template: "
            f"{_reason(error)}; name another, or set export.targets without them"
        )
        return
    if found != chat.ids and "openvino" in targets:
        yield (
            "task.template: OpenVINO GenAI renders messages to other token ids than transformers; "
            "name another, or set export.targets without openvino"
        )


def _ids_in_openvino(task: Chat, base: Path, chat: ChatPrompt) -> list[int]:
    """Return the ids of messages with the template that the deployment will have."""
    import openvino_genai

    tokenizer = load_tokenizer(base)
    with tempfile.TemporaryDirectory(prefix="sqft-") as scratch:
        source, folder = Path(scratch) / "source", Path(scratch) / "deployed"
        tokenizer.save_pretrained(source)
        write_task_templates(source, tokenizer, task.template)
        folder.mkdir()
        write_openvino_tokenizers(source, folder)
        return openvino_chat_ids(openvino_genai.Tokenizer(str(folder)), chat)


def _reason(error: RuntimeError) -> str:
    """Return the engine's own sentence of a long exception."""
    text = str(error).partition("Minja's error: ")[2] or str(error)
    return one_line(text.partition("\n")[0], _SHOWN_CHARACTERS)

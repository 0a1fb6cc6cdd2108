"""Chat templates of a model folder: deployed only if the task's prompts use one.

Runtimes apply a template that they find: OpenVINO GenAI and llama.cpp's tools to every prompt,
transformers and ONNX Runtime GenAI to chat messages. A model that was trained on plain prompts then
gets prompts of an untrained form. Without a template, all runtimes pass a text unchanged, with the
tokenizer's start token. llama-server's chat endpoint falls back to ChatML if a GGUF file has no
template, so a GGUF file gets ``PLAIN_TEMPLATE``.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.recipe.schema import Chat, Task
from sqft_export.textfiles import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = "{{ messages[-1]['content'] }}"
BASE_TEMPLATE_FILE = (
    "base_chat_template.jinja"  # the base's template, under a name that no runtime reads
)
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
NAMED_TEMPLATES = "additional_chat_templates"  # subfolder
DEFAULT = "default"
_MARKER = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def uses_template(task: Task) -> bool:
    """Return whether a task's prompts are rendered with a chat template."""
    return isinstance(task, Chat)


def has_template(folder: Path) -> bool:
    """Return whether runtimes find a chat template in a model folder."""
    if any((folder / name).is_file() for name in TEMPLATE_FILES):
        return True
    config = folder / TOKENIZER_CONFIG
    return config.is_file() and bool(read_json(config).get("chat_template"))


def remove_template(folder: Path) -> str:
    """Remove all chat templates of a model folder and return their text; empty without one."""
    texts = [text for name in TEMPLATE_FILES if (text := _pop_text(folder / name))]
    config = folder / TOKENIZER_CONFIG
    if config.is_file() and "chat_template" in (document := read_json(config)):
        found = document.pop("chat_template")
        texts += [found if isinstance(found, str) else json.dumps(found)] if found else []
        config.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return "\n".join(texts)


def rename_template(folder: Path) -> None:
    """Move the text of a model folder's chat templates to a name that no runtime reads."""
    if text := remove_template(folder):
        (folder / BASE_TEMPLATE_FILE).write_text(text)


def write_templates(folder: Path, templates: str | dict[str, str]) -> None:
    """Replace all chat templates of a model folder, in the files that transformers writes.

    Runtimes read the default template. Most of them lack the ``{% generation %}`` markers of
    transformers, so these become ``{% if true %}``, which renders the same text.

    :param templates: one template, or name -> template.
    """
    remove_template(folder)
    named = {DEFAULT: templates} if isinstance(templates, str) else templates
    for name, text in named.items():
        file = folder / TEMPLATE_FILES[0]
        if name != DEFAULT:
            file = folder / NAMED_TEMPLATES / f"{name}.jinja"
            file.parent.mkdir(exist_ok=True)
        file.write_text(_replace_markers(text))


def write_task_templates(
    folder: Path, tokenizer: "PreTrainedTokenizerBase", name: str | None
) -> None:
    """Write the chat templates with which a chat task trains, see :func:`write_templates`.

    :param tokenizer: of the base model.
    :param name: of one of its templates; None: all of them.
    """
    chosen = tokenizer.get_chat_template(name) if name else None
    write_templates(folder, chosen or tokenizer.chat_template)


def _replace_markers(template: str) -> str:
    """Return a template without generation markers; white space around them is treated alike."""
    return _MARKER.sub(lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", template)


def default_template(templates: str | dict[str, str] | None) -> str | None:
    """Return the template that runtimes apply, from all templates of a tokenizer."""
    return templates.get(DEFAULT) if isinstance(templates, dict) else templates


def _pop_text(file: Path) -> str:
    """Delete a file and return its text; empty if the file is missing."""
    if not file.is_file():
        return ""
    text = file.read_text()
    file.unlink()
    return text

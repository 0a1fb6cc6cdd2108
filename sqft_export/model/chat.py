"""Chat templates of a model folder: deployed only where a task's prompts are made with one.

A runtime applies a template that it finds to every prompt: OpenVINO GenAI and llama.cpp's tools by
default, transformers and ONNX Runtime GenAI where messages are given. A model that was trained on
other prompts then answers what it never saw. Without a template all of them take a text as it is,
with the tokenizer's start token. llama-server's chat endpoint takes ChatML where a GGUF file has no
template, so that this file gets ``PLAIN_TEMPLATE``.
"""

import json
from pathlib import Path

from sqft_export.recipe.schema import Dataset, Problems, Text
from sqft_export.textfiles import read_json

PLAIN_TEMPLATE = "{{ messages[-1]['content'] }}"
SET_ASIDE = "base_chat_template.jinja"  # the base's template; no runtime reads this name
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def uses_template(task: Problems | Dataset | Text) -> bool:
    """Whether a task's prompts are made with the base's chat template; none is so far."""
    return False


def has_template(folder: Path) -> bool:
    """Whether runtimes find a chat template in a model folder."""
    if any((folder / name).is_file() for name in TEMPLATE_FILES):
        return True
    config = folder / TOKENIZER_CONFIG
    return config.is_file() and bool(read_json(config).get("chat_template"))


def had_template(folder: Path) -> bool:
    """Whether a model folder has a chat template, or one that was set aside."""
    return (folder / SET_ASIDE).is_file() or has_template(folder)


def remove_template(folder: Path) -> str:
    """Take all chat templates out of a model folder; returns their text, empty if there is none."""
    texts = [text for name in TEMPLATE_FILES if (text := _taken(folder / name))]
    config = folder / TOKENIZER_CONFIG
    if config.is_file() and "chat_template" in (document := read_json(config)):
        found = document.pop("chat_template")
        texts += [found if isinstance(found, str) else json.dumps(found)] if found else []
        config.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return "\n".join(texts)


def set_template_aside(folder: Path) -> None:
    """Keep the text of a model folder's chat templates under a name that no runtime reads."""
    if text := remove_template(folder):
        (folder / SET_ASIDE).write_text(text)


def _taken(file: Path) -> str:
    """The text of a file, which is deleted; empty if there is none."""
    if not file.is_file():
        return ""
    text = file.read_text()
    file.unlink()
    return text

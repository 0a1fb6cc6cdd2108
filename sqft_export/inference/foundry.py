"""Write ``inference_model.json``, with which Foundry Local finds an ONNX deployment in its cache.

Foundry Local lists each folder of its cache that has this file and ``genai_config.json``. ``Name``
is the name of the model. ``PromptTemplate`` is used by releases that do not apply the chat template
of the folder: ``prompt`` is the text of one question, ``assistant`` that of an answer, each with
``{Content}`` in place of the content.
"""

import json
from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.inference.templates import (
    read_chat_template,
    read_special_tokens,
    render_conversation,
)

INFERENCE_MODEL = "inference_model.json"
CONTENT = "{Content}"
# Questions that a prompt is checked with; templates can trim or escape a content.
_PROBES = ("Hello?", "Two\nlines & <signs>", '{"a": 1}')


def prompt_template(folder: Path) -> dict[str, str] | None:
    """Return the texts around contents; None if the chat template has no such form.

    They are kept only if they give the text of the chat template for other questions too.
    """
    template, tokens = read_chat_template(folder), read_special_tokens(folder)
    if template is None:
        return {"assistant": CONTENT, "prompt": CONTENT}

    def render(question: str) -> str:
        return render_conversation(template, [{"role": "user", "content": question}], tokens)

    try:
        prompt = render(CONTENT)
        same = all(prompt.replace(CONTENT, probe) == render(probe) for probe in _PROBES)
    except UserError:  # such as a template that requires a system message
        return None
    return {"assistant": CONTENT, "prompt": prompt} if same and CONTENT in prompt else None


def inference_model_text(folder: Path, name: str) -> str:
    """Return the text of ``inference_model.json``.

    :param name: name of the model in Foundry Local.
    """
    document = {"Name": name, "PromptTemplate": prompt_template(folder)}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

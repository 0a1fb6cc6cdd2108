"""Read and render the chat template of a deployment, without transformers.

The rendered text is that of transformers' ``apply_chat_template``, which rendered the training
data. Templates are untrusted programs, so they run in Jinja's sandbox.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError, one_line
from sqft_export.model.chat import PLAIN_TEMPLATE, TEMPLATE_FILES, TOKENIZER_CONFIG
from sqft_export.packed.gguf_file import read_gguf
from sqft_export.packed.loaders import dense_gguf
from sqft_export.targets.folder import kind_of
from sqft_export.textfiles import decode_text, read_json
from sqft_export.untrusted import MAX_CONFIG_BYTES, read_bounded

GGUF_TEMPLATE_KEY = "tokenizer.chat_template"
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")  # that templates read


def read_chat_template(folder: Path) -> str | None:
    """Return the default chat template of a deployment or model folder; None if it has none.

    A GGUF file holds its template itself. A template that only repeats the last message is none.
    """
    found = _template_of_files(folder)
    if found is None and kind_of(folder) == "gguf":
        found = _template_of_gguf(folder)
    return None if found == PLAIN_TEMPLATE else found


def template_sources(folder: Path) -> list[tuple[str, str]]:
    """Return the chat templates of a deployment: where runtimes find each one, and its text."""
    found = [("the chat template file", _template_of_files(folder))]
    if kind_of(folder) == "gguf":
        found.append((GGUF_TEMPLATE_KEY, _template_of_gguf(folder)))
    return [(place, text) for place, text in found if text is not None]


def _template_of_files(folder: Path) -> str | None:
    plain, document = (folder / name for name in TEMPLATE_FILES)
    if plain.is_file():
        return decode_text(read_bounded(plain, MAX_CONFIG_BYTES), plain)
    for file in (document, folder / TOKENIZER_CONFIG):
        if file.is_file() and (found := read_json(file).get("chat_template")):
            return _default_template(found, file)
    return None


def _default_template(found: Any, file: Path) -> str:
    """Return the template that runtimes apply, of one text or of several named ones."""
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str):
        raise UserError(f"{file}: chat_template: found no text and no template called default")
    return found


def _template_of_gguf(folder: Path) -> str | None:
    with dense_gguf(folder) as file:
        field = read_gguf(file).fields.get(GGUF_TEMPLATE_KEY)
    return None if field is None else str(field.contents())


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens that templates read, by their names in the tokenizer's config."""
    file = folder / TOKENIZER_CONFIG
    document = read_json(file) if file.is_file() else {}
    found = {name: document.get(name) for name in TOKEN_NAMES}
    texts = {n: t.get("content") if isinstance(t, dict) else t for n, t in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def render_conversation(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> str:
    """Return the prompt text of a conversation, up to the beginning of the next answer.

    :param messages: each has ``role`` and ``content``.
    :param tools: JSON schemas of functions.
    :param arguments: variables of the template.
    :raises UserError: with the template's own message, if it refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        compiled = _environment().from_string(template)
        variables = {**special_tokens, **(arguments or {})}
        return compiled.render(
            messages=messages, tools=tools, add_generation_prompt=True, **variables
        )
    except (TemplateError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UserError(
            f"the chat template refuses these messages: {one_line(error)}; the roles are "
            f"{', '.join(str(message.get('role')) for message in messages)}"
        ) from error


def _environment() -> Any:
    """Return Jinja's sandbox with the filters, functions and tags of transformers."""
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationMarkers(ext.Extension):
        """``{% generation %}`` marks the answers for the loss; its content is rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    extensions = [GenerationMarkers, ext.loopcontrols]
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made

"""Compare tokenizers and chat templates of a deployment with training. Needs no torch."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from sqft_export.errors import UserError, one_line
from sqft_export.inference.templates import (
    read_special_tokens,
    render_conversation,
    template_sources,
)
from sqft_export.machine.host import installed
from sqft_export.probes.document import Probe, ProbeChat
from sqft_export.probes.results import TextResult
from sqft_export.targets.text_api import openvino_chat_ids
from sqft_export.targets.tokenizers import IdsOf, read_ids
from sqft_export.untrusted import MAX_JSON_BYTES, read_bounded

TOKENIZER_FILE = "tokenizer.json"
SHOWN_TEXT_CHARACTERS = 40  # of a text that differs


def read_file_ids(folder: Path, add_special_tokens: bool = True) -> Iterator[tuple[str, IdsOf]]:
    """Yield the tokenizer of ``tokenizer.json``, which `chat`, `serve` and `generate` use."""
    file = folder / TOKENIZER_FILE
    if not file.is_file() or not installed("tokenizers"):
        return
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(read_bounded(file, MAX_JSON_BYTES))
    except ValueError as error:
        raise UserError(f"{file}: can't be read: {one_line(error)}") from error
    yield (
        TOKENIZER_FILE,
        lambda text: tokenizer.encode(text, add_special_tokens=add_special_tokens).ids,
    )


def compare_texts(probe: Probe, runtime: str, folder: Path) -> Iterator[TextResult]:
    """Compare the token ids of texts by every deployed tokenizer."""
    for reader, ids_of in (*read_file_ids(folder), *read_ids(runtime, folder)):
        if probe.texts:
            name = f"token ids of texts by {reader}"
            wrong = [one.text for one in probe.texts if _fails(ids_of, one.text, one.ids)]
            where = [one_line(repr(text), SHOWN_TEXT_CHARACTERS) for text in wrong[:1]]
            cause = "another tokenizer, or other merges or added tokens in it"
            yield TextResult.of(name, "texts", len(probe.texts), len(wrong), where, cause)


def _fails(ids_of: IdsOf, text: str, expected: list[int]) -> bool:
    try:
        return ids_of(text) != expected
    except RuntimeError:
        return True


def compare_chat(probe: Probe, runtime: str, folder: Path) -> Iterator[TextResult]:
    """Compare the token ids of messages by every template engine that gave those of training."""
    chat = probe.chat
    if chat is None:
        return
    for engine, ids in chat_ids(chat, runtime, folder):
        if engine in chat.readers:
            pairs = itertools.zip_longest(ids or [], chat.ids)
            wrong = [place for place, (one, other) in enumerate(pairs) if one != other]
            where = [f"token {wrong[0]} of {len(chat.ids)}"] if wrong else []
            cause = "another chat template than the one of training"
            name = f"messages as {engine} renders them"
            yield TextResult.of(name, "tokens", len(chat.ids), len(wrong), where, cause)
    if missing := set(chat.readers) - {engine for engine, _ in chat_ids(chat, runtime, folder)}:
        name, total = f"messages as {min(missing)} renders them", len(chat.ids)
        where = ["the deployment has no such chat template"]
        yield TextResult.of(name, "tokens", total, total, where, "a chat template is missing")


def equal_engines(chat: ProbeChat, runtime: str, folder: Path) -> list[str]:
    """Return the template engines of a deployment that give the ids of training."""
    return [engine for engine, ids in chat_ids(chat, runtime, folder) if ids == chat.ids]


def chat_ids(chat: ProbeChat, runtime: str, folder: Path) -> Iterator[tuple[str, list[int] | None]]:
    """Yield the name of every template engine and the ids that it makes of messages.

    The ids are None if an engine refuses the template or the messages.
    """
    tokens = read_special_tokens(folder)
    for name, template in template_sources(folder):
        for _, ids_of in read_file_ids(folder, add_special_tokens=False):
            try:
                rendered = render_conversation(
                    template, chat.messages, tokens, chat.tools, chat.arguments
                )
            except UserError:
                yield name, None
            else:
                yield name, ids_of(rendered)
    if runtime == "openvino" and installed("openvino_genai"):
        import openvino_genai

        tokenizer = openvino_genai.Tokenizer(str(folder))
        try:
            yield "OpenVINO GenAI", openvino_chat_ids(tokenizer, chat.prompt())
        except RuntimeError:
            yield "OpenVINO GenAI", None

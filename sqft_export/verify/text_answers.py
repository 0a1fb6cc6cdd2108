"""Compare a runtime's answer to a text or chat prompt with its answer to the token ids."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.data.conversations import read_conversations
from sqft_export.data.items import chat_encoder, end_tokens
from sqft_export.errors import one_line
from sqft_export.measure.decode import generate
from sqft_export.model.chat import has_template
from sqft_export.recipe.schema import Chat
from sqft_export.recipe.sections import TaskSections
from sqft_export.targets import Session
from sqft_export.targets.text_api import ChatPrompt, TextApi, missing_for_chat, text_api
from sqft_export.targets.tokenizers import read_ids
from sqft_export.verify.certificate import Certificate, Check
from sqft_export.verify.subject import Asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_CHARACTERS = 60  # shown of an answer that differs


def first_chat(recipe: TaskSections, tokenizer: "PreTrainedTokenizerBase") -> ChatPrompt | None:
    """Return the first test conversation; None without one, or if its ids change with the date."""
    task = recipe.task
    if not isinstance(task, Chat):
        return None
    encoder = chat_encoder(recipe, tokenizer)
    if encoder.template.writes_date:
        return None
    conversation = read_conversations(recipe, task, "test")[0]
    messages, ids = encoder.prompt(conversation)
    return ChatPrompt(messages, conversation.tools, task.template_arguments, ids)


def answer_by_ids(session: Session, asked: Asked, folder: Path) -> list[int]:
    """Return the answer to the first text or chat from its token ids, as scoring computes it."""
    ids = asked.chat.ids if asked.chat else asked.texts[0][1]
    return generate(session, [ids], asked.new_tokens, end_tokens(folder))[0]


def check_answer(
    certificate: Certificate, asked: Asked, runtime: str, folder: Path, answer: list[int]
) -> None:
    """Compare the answer to messages, or to a text if the deployment has no chat template.

    With a template, some runtimes apply it to every text.

    :param answer: of :func:`answer_by_ids`.
    """
    check = check_chat_answer if has_template(folder) else check_text_answer
    check(certificate, asked, runtime, folder, answer)


def check_chat_answer(
    certificate: Certificate, asked: Asked, runtime: str, folder: Path, answer: list[int]
) -> None:
    """Send a test conversation through the runtime's chat interface.

    Compare the runtime's token ids with those of training, and its answer with ``answer``.

    :param answer: of :func:`answer_by_ids`.
    """
    chat = asked.chat
    if chat is None or missing_for_chat(runtime, chat):
        return
    with text_api(runtime, folder) as api:
        if api is not None:
            _compare_chat(certificate, asked, chat, api, runtime, folder, answer)


def _compare_chat(
    certificate: Certificate,
    asked: Asked,
    chat: ChatPrompt,
    api: TextApi,
    runtime: str,
    folder: Path,
    answer: list[int],
) -> None:
    """Compare the ids of the messages and the answer to them.

    Both may differ if the runtime produces other ids and ``verify.tokenizers`` allows it.
    """
    allowed = 0
    if api.chat_ids is not None:
        title = f"messages as {api.name} renders them, and their ids in training ({runtime})"
        rendered = certificate.start("compute", title, "tokens")
        _compare_ids(rendered, chat, api.chat_ids)
        if not rendered.passed and _may_differ(asked, runtime, folder):
            rendered.allowed, allowed = rendered.differing, 1
            rendered.where.append("the recipe allows other ids")
    title = f"answer to messages as {api.name} takes them, and to their token ids in {runtime}"
    check = certificate.start("compute", title, "answers", allowed)
    _compare(check, asked, api, answer, lambda: api.chat(chat, asked.new_tokens), chat.ids)


def _compare_ids(
    check: Check, chat: ChatPrompt, chat_ids: Callable[[ChatPrompt], list[int]]
) -> None:
    """Count the tokens that differ, and name the first one."""
    expected = chat.ids
    check.compared = len(expected)
    try:
        found = chat_ids(chat)
    except RuntimeError as error:  # the runtime refuses the template
        check.blame(one_line(error, ANSWER_CHARACTERS), len(expected))
        return
    pairs = itertools.zip_longest(found, expected)
    differing = [place for place, (one, other) in enumerate(pairs) if one != other]
    if differing:
        check.blame(f"token {differing[0]} of {len(expected)}", len(differing))


def check_text_answer(
    certificate: Certificate, asked: Asked, runtime: str, folder: Path, answer: list[int]
) -> None:
    """Compare the answer to a text with that to its ids.

    :param answer: of :func:`answer_by_ids`.
    """
    with text_api(runtime, folder) as api:
        if api is not None:
            title = f"answer to a text as {api.name} takes it, and to its token ids in {runtime}"
            check = certificate.start("compute", title, "answers")
            text, ids = asked.texts[0]
            _compare(check, asked, api, answer, lambda: api.answer(text, asked.new_tokens), ids)
            if not check.passed and _may_differ(asked, runtime, folder):
                _allow_other_ids(check, asked, runtime, folder)


def _may_differ(asked: Asked, runtime: str, folder: Path) -> bool:
    """Return whether the recipe or ``plan`` lets a tokenizer of this runtime give other ids."""
    if not asked.tokenizers_required:
        return True
    return any(reader in asked.readers_reported for reader, _ in read_ids(runtime, folder))


def _compare(
    check: Check,
    asked: Asked,
    api: TextApi,
    answer: list[int],
    ask: Callable[[], str],
    ids: list[int],
) -> None:
    """Compare an answer of a text interface with the answer to the same token ids.

    The interface's own answer to these ids counts as equal too: rounding in its attention can
    choose the other of two tokens with almost equal probability.
    """
    check.compared = 1
    try:
        expected, found = api.text_of(answer), ask()
        by_ids = api.answer_ids(ids, asked.new_tokens) if api.answer_ids else expected
    except RuntimeError as error:  # the runtime refuses its own tokenizer, graph or config
        check.blame(one_line(error, ANSWER_CHARACTERS), 1)
        return
    if found in (expected, by_ids):
        return
    check.blame(
        f"{found[:ANSWER_CHARACTERS]!r} where {expected[:ANSWER_CHARACTERS]!r} was scored", 1
    )


def _allow_other_ids(check: Check, asked: Asked, runtime: str, folder: Path) -> None:
    """Allow another answer if the runtime's tokenizer gives the text other ids than in training.

    The recipe allows such ids, or ``plan`` has reported them (``verify.tokenizers: auto``).
    """
    text, ids = asked.texts[0]
    if any(ids_of(text) != ids for _, ids_of in read_ids(runtime, folder)):
        check.allowed = 1
        check.where.append("its tokenizer gives the text other ids, which the recipe allows")

"""Checks that chat data can be trained on and scored: template, columns, score, and loss."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sqft_export.data.chat import Conversation, EncodedChat
from sqft_export.data.conversations import (
    first_places,
    held_out_conversations,
    hub_sources,
    split_conversations,
)
from sqft_export.data.items import answer_stops, chat_encoder, load_tokenizer
from sqft_export.data.scoring import answer_score
from sqft_export.errors import UserError
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Chat, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKED_CHATS = 100  # training conversations that are encoded, evenly spread

_Value = TypeVar("_Value")


def chat_of(recipe: Recipe, layout: Layout) -> Chat | None:
    """Return the chat task if its data and the model's tokenizer are on this machine."""
    task = recipe.task
    here = isinstance(task, Chat) and layout.folder is not None and not hub_sources(task)
    return task if here and isinstance(task, Chat) else None


def _spread(values: Sequence[_Value], most: int) -> list[_Value]:
    count = min(most, len(values))
    return [values[at * len(values) // count] for at in range(count)]


def _encoded(recipe: Recipe, folder: Path, chats: list[Conversation]) -> list[EncodedChat]:
    encoder = chat_encoder(recipe, load_tokenizer(folder))
    return [encoder.encode_within(one, recipe.task.sequence_length) for one in chats]


def _checked(recipe: Recipe, layout: Layout) -> list[EncodedChat]:
    """Return some training examples of a chat task, as training gets them; [] for other tasks."""
    task = chat_of(recipe, layout)
    if task is None or layout.folder is None:
        return []
    train, _ = split_conversations(recipe, task)
    return _encoded(recipe, layout.folder, _spread(train, CHECKED_CHATS))


def chat_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield the faults of a chat task: data, template, score, length."""
    task = chat_of(recipe, layout)
    try:
        answer_score(recipe)
        if task is not None:
            held_out_conversations(recipe, task)
        checked = _checked(recipe, layout)
    except UserError as error:
        yield str(error).removeprefix(f"{recipe.file}: ")
        return
    if checked and not any(any(one.loss[1:]) for one in checked):
        yield (
            f"task.sequence_length: found {recipe.task.sequence_length}; none of the "
            f"{len(checked)} training examples that were checked has a token in the loss; raise it"
        )


def find_chat_doubts(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield removed test conversations, changing dates, cut examples, and answers without end."""
    task = chat_of(recipe, layout)
    if task is None or layout.folder is None:
        return
    yield from _repeated(recipe, task)
    tokenizer = load_tokenizer(layout.folder)
    if chat_encoder(recipe, tokenizer).template.writes_date:
        yield (
            "task.template: the chat template writes today's date, so that token ids differ from "
            "day to day; set the date with task.template_arguments, if the template has one"
        )
    checked = _checked(recipe, layout)
    cut = sum(bool(one.dropped or one.cut) for one in checked)
    if cut:
        empty = sum(not any(one.loss[1:]) for one in checked)
        yield (
            f"task.sequence_length: found {recipe.task.sequence_length}; {cut} of {len(checked)} "
            f"training examples that were checked are cut, {empty} have no answer left and are "
            "left out"
        )
    yield from _unended(recipe, layout.folder, tokenizer, checked)


def _unended(
    recipe: Recipe, folder: Path, tokenizer: "PreTrainedTokenizerBase", checked: list[EncodedChat]
) -> Iterator[str]:
    """Yield answers without an end-of-turn token, and tokens at which runtimes do not stop."""
    encoder = chat_encoder(recipe, tokenizer)
    ends = [encoder.trained_end(one) for one in checked if any(one.loss) and not one.cut]
    if unended := ends.count(None):
        yield (
            f"task.template: in {unended} of {len(ends)} training examples that were checked, the "
            "last answer has no end-of-turn token in the loss; the model does not learn to end it"
        )
    stops = answer_stops(recipe, folder, tokenizer)
    if unknown := sorted({end for end in ends if end is not None and end not in stops}):
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(unknown)))
        yield (
            f"model: answers end with {names}, which no config names as an end token, so runtimes "
            "do not stop there; add its id to eos_token_id in generation_config.json"
        )


def _repeated(recipe: Recipe, task: Chat) -> Iterator[str]:
    """Yield how many test conversations are left out, and the first places."""
    new, seen = held_out_conversations(recipe, task)
    if seen:
        yield (
            f"task.test: {len(seen)} of {len(new) + len(seen)} test conversations are training "
            f"conversations too and are left out ({first_places(seen)})"
        )

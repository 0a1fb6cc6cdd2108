"""Checks that every computed sequence fits the positions of the model."""

from collections.abc import Iterator
from itertools import islice
from typing import cast

from sqft_export.data.items import Item, load_tokenizer, scored_items
from sqft_export.model.contexts import POSITION_FIELDS
from sqft_export.plan.answers import CHECKED_ITEMS, has_local_answers
from sqft_export.plan.chat import chat_of
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Recipe, Text


def _configured_lengths(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """Yield description and tokens of every sequence length that the recipe sets."""
    task, calibration, timed = recipe.task, recipe.calibration, recipe.benchmark
    if recipe.adapt is not None or isinstance(task, Text):
        yield f"task.sequence_length: found {task.sequence_length}", task.sequence_length
    if calibration.source != "task":
        longest = calibration.sequence_length
        yield f"calibration.sequence_length: found {longest}", longest
    elif recipe.adapt is None and not isinstance(task, Text):
        longest = min(calibration.sequence_length, task.sequence_length)
        yield (
            f"smaller of calibration.sequence_length and task.sequence_length: found {longest}",
            longest,
        )
    yield (
        f"benchmark: found prompt_tokens {timed.prompt_tokens} and new_tokens {timed.new_tokens}",
        timed.prompt_tokens + timed.new_tokens,
    )


def _prompt_lengths(recipe: Recipe, items: list[Item]) -> Iterator[tuple[str, int]]:
    """Yield description and tokens of the longest prompts with their generated tokens."""
    assert not isinstance(recipe.task, Text)
    longest = max((len(item.prompt) for item in items if item.scoring != "choice"), default=0)
    if longest:
        new_tokens = recipe.task.max_new_tokens
        yield _describe("task.max_new_tokens", new_tokens, longest), longest + new_tokens
    verified = max(len(item.prompt) for item in islice(items, recipe.verify.prompts))
    new_tokens = recipe.verify.new_tokens
    yield _describe("verify.new_tokens", new_tokens, verified), verified + new_tokens


def _describe(field: str, new_tokens: int, prompt: int) -> str:
    return f"{field}: found {new_tokens}; the longest test prompt has {prompt} tokens, the sum is"


def _longest_item(items: list[Item]) -> int:
    """Return the tokens of the longest item, with its expected answer or its longest choice."""
    pairs = [(len(c) + len(a)) for item in items for c, a in item.choices]
    return max([*pairs, *(len(item.ids) for item in items)])


def _excesses(recipe: Recipe, layout: Layout) -> Iterator[tuple[str, bool]]:
    """Yield a message per sequence that is too long, and whether it cannot be computed at all."""
    config = cast(dict[str, object], layout.config)
    field = next((name for name in POSITION_FIELDS if name in config), None)
    positions = config[field] if field else None
    if not isinstance(positions, int):
        return
    learned = layout.family.learned_positions
    has = f"the model has {positions} positions ({field})"
    for found, length in _configured_lengths(recipe):
        if length > positions:
            yield f"{found}, {length} tokens; {has}", learned
    if layout.folder is None or not (has_local_answers(recipe) or chat_of(recipe, layout)):
        return
    count = CHECKED_ITEMS if recipe.benchmark.minutes else recipe.benchmark.items
    items = scored_items(recipe, load_tokenizer(layout.folder), max(count, recipe.verify.prompts))
    for found, length in _prompt_lengths(recipe, items):
        if length > positions:
            yield f"{found} {length}; {has}", learned
    if (longest := _longest_item(items)) > positions:
        found = f"task: the longest test item has {longest} tokens with its answer"
        yield f"{found}; {has}; remove such items", True


def context_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield the sequences that the model cannot compute."""
    yield from (excess for excess, impossible in _excesses(recipe, layout) if impossible)


def find_context_excess(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield sequences beyond the training length of a model with rotary positions."""
    for excess, impossible in _excesses(recipe, layout):
        if not impossible:
            yield f"{excess}; answers end at that position, other results beyond it are unreliable"

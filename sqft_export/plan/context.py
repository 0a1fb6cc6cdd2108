"""Whether everything that is computed fits into the positions a model has."""

from collections.abc import Iterator
from itertools import islice

from sqft_export.data.items import Item, load_tokenizer, scored_items
from sqft_export.plan.answers import CHECKED_ITEMS, data_is_here
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Recipe, Text

FIELD = "max_position_embeddings"


def _settings(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """Lengths that the recipe sets: what of it, and how many tokens."""
    task, calibration, timed = recipe.task, recipe.calibration, recipe.benchmark
    if recipe.adapt is not None or isinstance(task, Text):
        yield f"task.sequence_length: found {task.sequence_length}", task.sequence_length
    if calibration.source != "task":
        longest = calibration.sequence_length
        yield f"calibration.sequence_length: found {longest}", longest
    elif recipe.adapt is None and not isinstance(task, Text):
        longest = min(calibration.sequence_length, task.sequence_length)
        yield f"the shorter of calibration.sequence_length and task's: found {longest}", longest
    yield (
        f"benchmark: found prompt_tokens {timed.prompt_tokens} and new_tokens {timed.new_tokens}",
        timed.prompt_tokens + timed.new_tokens,
    )


def _prompts(recipe: Recipe, items: list[Item]) -> Iterator[tuple[str, int]]:
    """Lengths of test items with what follows them: what of it, and how many tokens."""
    assert not isinstance(recipe.task, Text)
    asked = max((len(item.prompt) for item in items if item.scoring != "choice"), default=0)
    if asked:
        new_tokens = recipe.task.max_new_tokens
        yield _sum("task.max_new_tokens", new_tokens, asked), asked + new_tokens
    verified = max(len(item.prompt) for item in islice(items, recipe.verify.prompts))
    new_tokens = recipe.verify.new_tokens
    yield _sum("verify.new_tokens", new_tokens, verified), verified + new_tokens


def _sum(field: str, new_tokens: int, prompt: int) -> str:
    return f"{field}: found {new_tokens}; the longest test prompt has {prompt} tokens, together"


def _longest_item(items: list[Item]) -> int:
    """Tokens of the longest item with its expected answer, or its longest choice."""
    pairs = [(len(c) + len(a)) for item in items for c, a in item.choices]
    return max([*pairs, *(len(item.ids) for item in items)])


def _excesses(recipe: Recipe, layout: Layout) -> Iterator[tuple[str, bool]]:
    """What is longer than the positions, and whether nothing can be computed then."""
    positions = layout.config.get(FIELD)
    if not isinstance(positions, int):
        return
    learned = layout.family.learned_positions
    has = f"the model has {positions} positions ({FIELD})"
    for found, length in _settings(recipe):
        if length > positions:
            yield f"{found}, {length} tokens; {has}", learned
    if layout.folder is None or not data_is_here(recipe):
        return
    count = CHECKED_ITEMS if recipe.benchmark.minutes else recipe.benchmark.items
    items = scored_items(recipe, load_tokenizer(layout.folder), max(count, recipe.verify.prompts))
    for found, length in _prompts(recipe, items):
        if length > positions:
            yield f"{found} {length}; {has}", learned
    if (longest := _longest_item(items)) > positions:
        found = f"task: the longest test item has {longest} tokens with its answer"
        yield f"{found}; {has}; leave such items out", True


def context_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """What a model has no positions for."""
    yield from (excess for excess, impossible in _excesses(recipe, layout) if impossible)


def find_context_excess(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """What goes beyond the positions that a model with rotary ones was trained on."""
    for excess, impossible in _excesses(recipe, layout):
        if not impossible:
            yield f"{excess}; answers end there, other results beyond it are not reliable"

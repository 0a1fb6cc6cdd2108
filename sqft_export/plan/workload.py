"""Token counts of a recipe's data, estimated from a sample."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

from sqft_export.data.conversations import hub_sources
from sqft_export.data.items import Item, load_tokenizer, sample_items
from sqft_export.measure.likelihood import merge_prefixes
from sqft_export.recipe.schema import Chat, Dataset, Recipe, Text

WORKLOAD_ITEMS = 128  # items that are tokenized
# On prose and word problems, the number of matches is within 10 % of the number of tokens of a
# 50,000-token vocabulary.
TOKEN_PATTERN = re.compile(r"\d|[^\W\d]{1,7}|[^\w\s]|\n")


@dataclass(frozen=True)
class Workload:
    """Number of items and mean tokens per item.

    examples: training examples, or packed rows; None if they are not on this machine.
    example: tokens of a training example or row.
    test: scored items of the test split; None if they are not on this machine.
    scored: tokens per test item for perplexity and choices.
    prompt, answer: tokens per test item of prompts and generated answers; 0 if none is generated.
    counted: "tokens" of the model's tokenizer; "words" without a tokenizer; "longest": the recipe's
        limits, without data.
    """

    examples: int | None
    example: float
    test: int | None
    scored: float
    prompt: float
    answer: float
    counted: Literal["tokens", "words", "longest"] = "tokens"


class _Words:
    """A replacement for a tokenizer: every word, digit and punctuation mark is a token."""

    bos_token_id = eos_token_id = 0

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, list]:
        if isinstance(text, str):
            return {"input_ids": list(map(hash, TOKEN_PATTERN.findall(text)))}
        return {"input_ids": [self(one)["input_ids"] for one in text]}


def count_item_tokens(item: Item) -> int:
    """Return the tokens that a model processes for perplexity and choices of an item."""
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for context, continuation in (*item.choices, (item.prompt, item.target)):
        groups.setdefault(tuple(context), []).append(continuation)
    rests = (len(row.target) - 1 for targets in groups.values() for row in merge_prefixes(targets))
    return sum(map(len, groups)) + sum(rests)


def workload_of(recipe: Recipe, folder: Path | None) -> Workload:
    """Return the workload of a recipe, from a sample of its data.

    If the data is on the hub, every example is assumed to be as long as the recipe allows.

    :param folder: folder of the model, whose tokenizer is used; None if it is only on the hub.
    """
    task, longest = recipe.task, recipe.task.sequence_length
    generated = 0 if isinstance(task, Text) else task.max_new_tokens
    on_hub = isinstance(task, Chat) and (folder is None or hub_sources(task))
    if on_hub or (isinstance(task, Dataset) and task.folder is None):
        return Workload(None, longest, None, 2 * longest, longest, generated, "longest")
    tokenizer = load_tokenizer(folder) if folder else _Words()
    examples, train = sample_items(recipe, tokenizer, "train", WORKLOAD_ITEMS)
    count, tokens = sum(examples.values()), mean(min(len(item.ids), longest) for item in train)
    if isinstance(task, Chat) and task.packing and recipe.adapt is not None:
        rows = math.ceil(count * tokens / longest)
        count, tokens = rows, count * tokens / rows
    sets, test = sample_items(recipe, tokenizer, "test", WORKLOAD_ITEMS)
    return Workload(
        count,
        tokens,
        sum(min(count, recipe.benchmark.items) for count in sets.values()),
        mean(map(count_item_tokens, test)),
        *_mean_generated(test, generated),
        "tokens" if folder else "words",
    )


def _mean_generated(items: Sequence[Item], most: int) -> tuple[float, float]:
    """Return mean prompt and answer tokens of items with a generated answer, over all items.

    A tuned model stops after the expected answer; another model may continue to the limit. The
    estimate is the mean of both lengths.
    """
    chosen = [item for item in items if item.text is not None and item.scoring != "choice"]
    if not chosen:
        return 0.0, 0.0
    share = len(chosen) / len(items)
    answer = mean(min(len(item.target), most) for item in chosen)
    return share * mean(len(item.prompt) for item in chosen), share * (answer + most) / 2


def calibration_tokens(recipe: Recipe, workload: Workload) -> float:
    """Return the tokens of all calibration samples."""
    longest = recipe.calibration.sequence_length
    from_task = recipe.calibration.source == "task"
    return recipe.calibration.samples * (min(workload.example, longest) if from_task else longest)


def checked_tokens(recipe: Recipe, workload: Workload) -> float:
    """Return the tokens of verify's prompts and continuations; a quarter of a window is prompt."""
    length = workload.prompt or min(workload.scored, recipe.task.sequence_length) / 4
    return recipe.verify.prompts * (length + recipe.verify.new_tokens)

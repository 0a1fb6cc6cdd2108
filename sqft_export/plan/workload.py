"""How many tokens a recipe's data comes to, from a sample of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from sqft_export.data.items import Item, load_tokenizer, sampled
from sqft_export.measure.likelihood import merge_prefixes
from sqft_export.recipe.schema import Dataset, Recipe, Text

SAMPLE = 128  # items that are tokenized
# What a vocabulary of 50,000 has a token for, within a tenth on prose and on word problems.
WORD = re.compile(r"\d|[^\W\d]{1,7}|[^\w\s]|\n")


@dataclass(frozen=True)
class Workload:
    """Tokens, as means over items.

    examples: to train on; None where they are not on this machine.
    example: of a training example.
    test: items of the test split that are scored; None where they are not here.
    scored: what one of them takes for perplexity and choices.
    prompt, answer: of one whose answer is generated; 0 where none is.
    counted: by the model's tokenizer; in words where that is not here; as the longest allowed where
        the data is not.
    """

    examples: int | None
    example: float
    test: int | None
    scored: float
    prompt: float
    answer: float
    counted: Literal["tokens", "words", "longest"] = "tokens"


class _Words:
    """Stands in for a tokenizer: every word, digit and mark is a token."""

    bos_token_id = eos_token_id = 0

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": list(map(hash, WORD.findall(text)))}
        return {"input_ids": [self(one)["input_ids"] for one in text]}


def tokens_of(item: Item) -> int:
    """Tokens that go through a model for perplexity and choices of an item."""
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for context, continuation in (*item.choices, (item.prompt, item.target)):
        groups.setdefault(tuple(context), []).append(continuation)
    rests = (len(row.target) - 1 for targets in groups.values() for row in merge_prefixes(targets))
    return sum(map(len, groups)) + sum(rests)


def workload_of(recipe: Recipe, folder: Path | None) -> Workload:
    """From the data, tokenized by the model's own tokenizer.

    Where the data is on the hub, every example is taken to be as long as the recipe allows.

    :param folder: of the model; None where it is on the hub alone.
    """
    task, longest = recipe.task, recipe.task.sequence_length
    generated = 0 if isinstance(task, Text) else task.max_new_tokens
    if isinstance(task, Dataset) and task.folder is None:
        return Workload(None, longest, None, 2 * longest, longest, generated, "longest")
    tokenizer = load_tokenizer(folder) if folder else _Words()
    examples, train = sampled(recipe, tokenizer, "train", SAMPLE)
    sets, test = sampled(recipe, tokenizer, "test", SAMPLE)
    return Workload(
        sum(examples.values()),
        mean(min(len(item.ids), longest) for item in train),
        sum(min(count, recipe.benchmark.items) for count in sets.values()),
        mean(map(tokens_of, test)),
        *_generated(test, generated),
        "tokens" if folder else "words",
    )


def _generated(items: Sequence[Item], most: int) -> tuple[float, float]:
    """Mean tokens of prompts whose answers are generated, and of answers, over all items.

    A tuned model stops where its examples do, another one may not: half of them are taken to.
    """
    asked = [item for item in items if item.text is not None and item.scoring != "choice"]
    if not asked:
        return 0.0, 0.0
    share = len(asked) / len(items)
    answer = mean(min(len(item.target), most) for item in asked)
    return share * mean(len(item.prompt) for item in asked), share * (answer + most) / 2


def calibration_tokens(recipe: Recipe, workload: Workload) -> float:
    """Of all calibration samples."""
    longest = recipe.calibration.sequence_length
    of_task = recipe.calibration.source == "task"
    return recipe.calibration.samples * (min(workload.example, longest) if of_task else longest)


def checked_tokens(recipe: Recipe, workload: Workload) -> float:
    """Of the prompts of verify and what follows them; of a text window, a quarter is the prompt."""
    length = workload.prompt or min(workload.scored, recipe.task.sequence_length) / 4
    return recipe.verify.prompts * (length + recipe.verify.new_tokens)

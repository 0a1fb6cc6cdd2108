"""Tasks: a recipe's data as token ids for calibration, training and evaluation.

Items become token ids here and nowhere else, so that every row of a report scores the same ids.
No padding is made here: batches are formed of equal lengths (evaluation) or padded on the right
with the padding masked out (training).
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft_export.data.datasets import SETS, Record, Scoring, local_file, records, set_names
from sqft_export.data.files import numbered_rows, read_text
from sqft_export.errors import UserError
from sqft_export.recipe.schema import Dataset, Problems, Recipe, Text
from sqft_export.recipe.templates import fill_template
from sqft_export.textfiles import read_json


@dataclass(frozen=True)
class Item:
    """One evaluation item.

    prompt: token ids the model is given (empty for plain text).
    target: token ids that perplexity is measured on, after the prompt.
    text: the expected answer, None for plain text.
    source: the set it is from, where a task has several.
    scoring: how an answer is scored; see ``datasets``. exact: equal after the recipe's mark.
    choices: (context, continuation) ids of every choice, and ``right`` the index of the right one.
    lengths: characters of every continuation.
    labels: what every choice is called.
    """

    prompt: list[int]
    target: list[int]
    text: str | None
    source: str = ""
    scoring: Scoring = "exact"
    choices: tuple[tuple[list[int], list[int]], ...] = ()
    right: int = 0
    lengths: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """One training example: ids, and how many of the first ones stay out of the loss."""

    ids: list[int]
    skip: int


@dataclass(frozen=True)
class Data:
    """A task read, split and tokenized.

    train: training examples.
    validation: training items set aside for search, if it evaluates any.
    test: held-out items, for benchmark and verify alone.
    truncated: training examples that were longer than the limit and were cut.
    """

    train: list[Example]
    validation: list[Item]
    test: list[Item]
    truncated: int


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; where it names no end token, the model's is its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None and (ends := end_tokens(folder)):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


def stop_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's, and those that the configs beside it name."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *end_tokens(folder)]))


def end_tokens(folder: Path) -> list[int]:
    """Ids that end an answer, as the configs of a model or a deployment name them.

    :raises UserError: naming the config, if it is none or they are no ids.
    """
    names = ("generation_config.json", "config.json", "genai_config.json")
    found = [_ends_in(folder / name) for name in names if (folder / name).is_file()]
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _ends_in(file: Path) -> list[int]:
    document = read_json(file)
    if "eos_token_id" not in document and isinstance(document.get("model"), dict):
        document = document["model"]
    ends = document.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int and 0 <= token < 2**31 for token in listed):
        raise UserError(f"{file}: eos_token_id: found {ends!r}; an id or a list of ids is expected")
    return listed


def problem_records(task: Problems, file: Path) -> Iterator[Record]:
    """Every item of a jsonl file as a record."""
    for number, item in numbered_rows(file):
        answer = fill_template(task.answer, item, file, number)
        yield Record(fill_template(task.prompt, item, file, number), answer, final=answer)


def data_files(recipe: Recipe, split: str) -> list[Path]:
    """The files that a split is read from; none where it is on the hub."""
    task = recipe.task
    if isinstance(task, Problems):
        return [recipe.resolve(task.train if split == "train" else task.test)]
    if isinstance(task, Text):
        return [recipe.resolve(task.text)]
    if task.folder is None:
        return []
    folder = recipe.resolve(task.folder)
    names = set_names(task, split) if folder.is_dir() else ()
    found = [local_file(folder, name, split) for name in names]
    return [file for file in found if file is not None]


def _records(recipe: Recipe, split: str) -> Iterator[tuple[str, Scoring, Record]]:
    """Set, scoring and record of every item of a split."""
    task = recipe.task
    if isinstance(task, Dataset):
        folder = recipe.resolve(task.folder) if task.folder else None
        yield from records(task, split, folder, str(recipe.file))
        return
    for file in data_files(recipe, split):
        assert isinstance(task, Problems)
        for record in problem_records(task, file):
            yield "", "exact", record


def _item(tokenizer: Any, source: str, scoring: Scoring, record: Record) -> Item:
    def pair(prompt: str, answer: str) -> tuple[list[int], list[int]]:
        return tokenizer(prompt)["input_ids"], _continuation(tokenizer, prompt, answer)

    prompt, answer = pair(record.prompt, record.answer)
    return Item(
        prompt,
        [*answer, tokenizer.eos_token_id],
        record.final,
        source,
        scoring,
        tuple(pair(*choice) for choice in record.choices),
        record.right,
        tuple(len(continuation.strip()) for _, continuation in record.choices),
        record.labels,
    )


def _problem_data(task: Problems | Dataset, recipe: Recipe, tokenizer: Any) -> Data:
    def items(split: str) -> list[Item]:
        return [_item(tokenizer, *found) for found in _records(recipe, split)]

    train, validation = _set_aside(recipe, items("train"))
    whole = [(item.prompt + item.target, len(item.prompt)) for item in train]
    examples = [Example(ids[: task.sequence_length], skip) for ids, skip in whole]
    truncated = sum(len(ids) > task.sequence_length for ids, _ in whole)
    return Data(examples, validation, items("test"), truncated)


def _set_aside(recipe: Recipe, items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Training items, and a seeded choice of them that search scores on instead.

    :raises UserError: if nothing would be left to train on.
    """
    search = recipe.search
    if not search.evaluates:
        return items, []
    if search.items >= len(items):
        raise UserError(
            f"{recipe.file}: search.items: found {search.items}, but the training data has "
            f"{len(items)} items in all"
        )
    chosen = set(random.Random(recipe.seed).sample(range(len(items)), search.items))
    train = [item for n, item in enumerate(items) if n not in chosen]
    return train, [items[n] for n in sorted(chosen)]


def _continuation(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """Ids of the answer as they follow the prompt's own ids."""
    whole = tokenizer(prompt + answer)["input_ids"]
    prompt_ids = tokenizer(prompt)["input_ids"]
    if whole[: len(prompt_ids)] == prompt_ids:
        return whole[len(prompt_ids) :]
    return tokenizer(answer, add_special_tokens=False)["input_ids"]


def windows_of(ids: list[int], length: int, first: list[int]) -> list[list[int]]:
    """Whole windows of ``length`` ids, each led by the tokenizer's start token if it has one."""
    step = length - len(first)
    return [first + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]


def _boundary(text: str, wanted: int) -> int:
    """Where a text is cut: after the last line that ends before, else the last word, else there."""
    for end in ("\n", " "):
        if (found := text.rfind(end, 0, wanted)) > 0:
            return found + 1
    return wanted


def _text_data(task: Text, recipe: Recipe, tokenizer: Any) -> Data:
    file = recipe.resolve(task.text)
    text = read_text(file)
    boundary = _boundary(text, int(len(text) * (1 - task.test_share)))

    def windows(part: str) -> list[list[int]]:
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        return windows_of(ids, task.sequence_length, first_token(tokenizer))

    train, test = (
        [Item(ids[:1], ids[1:], None) for ids in windows(part)]
        for part in (text[:boundary], text[boundary:])
    )
    if not train or not test:
        raise UserError(f"{file}: too short for windows of {task.sequence_length} tokens")
    train, validation = _set_aside(recipe, train)
    return Data(
        [Example(item.prompt + item.target, 1) for item in train], validation, test, truncated=0
    )


def load_data(recipe: Recipe, tokenizer: Any) -> Data:
    """Read, split and tokenize the recipe's task."""
    if isinstance(recipe.task, Text):
        return _text_data(recipe.task, recipe, tokenizer)
    return _problem_data(recipe.task, recipe, tokenizer)


def count_examples(recipe: Recipe) -> int | None:
    """Training examples there will be, from the files alone; None where they are on the hub.

    A text's windows are guessed at four characters a token.
    """
    task = recipe.task
    if isinstance(task, Dataset) and task.folder is None:
        return None
    if isinstance(task, Text):
        characters = recipe.resolve(task.text).stat().st_size * (1 - task.test_share)
        return int(characters / 4 / task.sequence_length)
    return sum(1 for _ in _records(recipe, "train"))


def held_out(recipe: Recipe, tokenizer: Any) -> list[Item]:
    """The test items alone; of several sets in turn, so that a first few are of all of them."""
    task = recipe.task
    if isinstance(task, Text):
        return _text_data(task, recipe, tokenizer).test
    by_set: dict[str, list[Item]] = {}
    for found in _records(recipe, "test"):
        by_set.setdefault(found[0], []).append(_item(tokenizer, *found))
    turns = itertools.zip_longest(*by_set.values())
    return [item for turn in turns for item in turn if item is not None]


# Texts that tokenizers have been known to take apart differently.
HARD_TEXTS = (
    "two  spaces, a\ttab and\nanother line",
    " a blank before, and one after ",
    "1,234.50 + 7 = 1241.5 (about 3 %)",
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f600 \u0394x \u2248 \u00bd",
    'He said: "It isn\'t [so]; {x} <y> #### 5!" \\boxed{5}',
)


def train_texts(recipe: Recipe) -> Iterator[str]:
    """What is trained on, as text, one example or line after the other; nothing where it is on the
    hub or missing."""
    task = recipe.task
    if isinstance(task, Dataset) and not set(set_names(task, "train")) <= SETS.keys():
        return
    files = data_files(recipe, "train")
    if not files or not all(file.is_file() for file in files):
        return
    if isinstance(task, Text):
        yield from (line for line in read_text(files[0]).split("\n") if line.strip())
        return
    for _, _, record in _records(recipe, "train"):
        yield record.prompt + record.answer


def sample_texts(recipe: Recipe, count: int) -> list[str]:
    """Texts that tokenizers are tried with: some of the test split, and hard ones."""
    task = recipe.task
    if isinstance(task, Text):
        lines = [line for line in read_text(recipe.resolve(task.text)).split("\n") if line.strip()]
        return [*lines[-count:], *HARD_TEXTS]
    prompts = (record.prompt for _, _, record in _records(recipe, "test"))
    return [*itertools.islice(prompts, count), *HARD_TEXTS]


def first_token(tokenizer: Any) -> list[int]:
    """What leads a window of text: the tokenizer's start token, if it has one."""
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []


def test_items(recipe: Recipe, data: Data) -> list[Item]:
    """The items that every row of the benchmark scores: the first of every set of the test split.

    ``benchmark.items`` of each set, so that a mix is scored on all of its sets.
    """
    taken: dict[str, int] = {}
    chosen = []
    for item in data.test:
        taken[item.source] = taken.get(item.source, 0) + 1
        if taken[item.source] <= recipe.benchmark.items:
            chosen.append(item)
    return chosen

"""Tasks: a recipe's data as token ids for calibration, training and evaluation.

Items become token ids here and nowhere else, so that every row of a report scores the same ids.
No padding is made here: batches are formed of equal lengths (evaluation) or padded on the right
with the padding masked out (training).
"""

import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError
from sqft_export.recipe import HUB, Problems, Recipe, Text

SHORTEST = 16  # tokens of a dataset row that is calibrated on
SHUFFLED_ROWS = 10_000


@dataclass(frozen=True)
class Item:
    """One evaluation item.

    prompt: token ids the model is given (empty for plain text).
    target: token ids that perplexity is measured on, after the prompt.
    text: the expected answer, None for plain text.
    """

    prompt: list[int]
    target: list[int]
    text: str | None


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
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """Objects of a jsonl file.

    :raises UserError: naming the file and line that is not a JSON object, or an empty file.
    """
    items = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON: {error}") from error
        if not isinstance(item, dict):
            raise UserError(f"{file}:{number}: expected an object, found {type(item).__name__}")
        items.append(item)
    if not items:
        raise UserError(f"{file}: has no items")
    return items


def _fill(template: str, item: dict[str, Any], file: Path, number: int) -> str:
    try:
        return template.format(**item)
    except KeyError as error:
        raise UserError(
            f"{file}:{number}: the template asks for {error}; the item has {', '.join(item)}"
        ) from error


def problems(task: Problems, file: Path) -> list[tuple[str, str]]:
    """Prompt and answer of every item of a jsonl file."""
    return [
        (_fill(task.prompt, item, file, n), _fill(task.answer, item, file, n))
        for n, item in enumerate(read_jsonl(file), start=1)
    ]


def check(recipe: Recipe) -> None:
    """Refuse missing files and templates that do not fit their first item; no tokenizer needed."""
    task = recipe.task
    fields = ("train", "test") if isinstance(task, Problems) else ("text",)
    for field in fields:
        file = recipe.resolve(getattr(task, field))
        if not file.is_file():
            raise UserError(f"{recipe.file}: task.{field}: no such file: {file}")
        if isinstance(task, Problems):
            problems(task, file)
    _check_calibration(recipe)


def _check_calibration(recipe: Recipe) -> None:
    where, source = f"{recipe.file}: calibration.source", recipe.calibration.source
    path = recipe.resolve(source)
    if source == "task" or (path.is_file() and path.suffix in (".txt", ".jsonl")):
        return
    if not source.startswith(HUB) and not path.is_dir():
        raise UserError(
            f"{where}: found {source!r}; allowed are task, an existing .txt or .jsonl file, an "
            "existing dataset folder, and hub:<dataset>"
        )
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{where}: {source} needs the datasets library: pip install 'sqft-export[datasets]'"
        )


def _problem_data(task: Problems, recipe: Recipe, tokenizer: Any) -> Data:
    def items(file: str) -> list[Item]:
        found = []
        for prompt, answer in problems(task, recipe.resolve(file)):
            target = [*_continuation(tokenizer, prompt, answer), tokenizer.eos_token_id]
            found.append(Item(tokenizer(prompt)["input_ids"], target, answer))
        return found

    train, validation = _set_aside(recipe, items(task.train))
    whole = [(item.prompt + item.target, len(item.prompt)) for item in train]
    examples = [Example(ids[: task.sequence_length], skip) for ids, skip in whole]
    truncated = sum(len(ids) > task.sequence_length for ids, _ in whole)
    return Data(examples, validation, items(task.test), truncated)


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


def _windows(ids: list[int], length: int, first: list[int]) -> list[list[int]]:
    """Whole windows of ``length`` ids, each led by the tokenizer's start token if it has one."""
    step = length - len(first)
    return [first + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]


def _text_data(task: Text, recipe: Recipe, tokenizer: Any) -> Data:
    file = recipe.resolve(task.text)
    text = file.read_text()
    boundary = text.rfind("\n", 0, int(len(text) * (1 - task.test_share))) + 1

    def windows(part: str) -> list[list[int]]:
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        return _windows(ids, task.sequence_length, _first(tokenizer))

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


def load(recipe: Recipe, tokenizer: Any) -> Data:
    """Read, split and tokenize the recipe's task."""
    if isinstance(recipe.task, Problems):
        return _problem_data(recipe.task, recipe, tokenizer)
    return _text_data(recipe.task, recipe, tokenizer)


def calibration_samples(recipe: Recipe, tokenizer: Any) -> list[list[int]]:
    """Seeded choice of samples, each cut to the calibration length; lengths may differ.

    :raises UserError: if the source has fewer samples than asked for.
    """
    config = recipe.calibration
    samples = _calibration_source(recipe, tokenizer)
    if len(samples) < config.samples:
        where = "the training split" if config.source == "task" else config.source
        raise UserError(
            f"{recipe.file}: calibration.samples: found {config.samples}, but {where} has "
            f"{len(samples)} of at most {config.sequence_length} tokens"
        )
    chosen = random.Random(recipe.seed).sample(samples, config.samples)
    return [ids[: config.sequence_length] for ids in chosen]


def _calibration_source(recipe: Recipe, tokenizer: Any) -> list[list[int]]:
    config = recipe.calibration
    if config.source == "task":
        return [example.ids for example in load(recipe, tokenizer).train]
    file = recipe.resolve(config.source)
    if config.source.startswith(HUB) or file.is_dir():
        return _dataset_texts(recipe, tokenizer)
    if file.suffix == ".jsonl":
        texts = [_fill("{" + config.field + "}", item, file, 1) for item in read_jsonl(file)]
        return [tokenizer(text)["input_ids"] for text in texts]
    ids = tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
    return _windows(ids, config.sequence_length, _first(tokenizer))


def _dataset_texts(recipe: Recipe, tokenizer: Any) -> list[list[int]]:
    """The first rows of a seeded shuffle, streamed, so that a large dataset is not fetched whole.

    Rows of fewer than ``SHORTEST`` tokens (headings, blank lines) are passed over.
    """
    import datasets

    config = recipe.calibration
    name = config.source.removeprefix(HUB)
    where = name if config.source.startswith(HUB) else str(recipe.resolve(name))
    try:
        rows = datasets.load_dataset(where, config.subset, split=config.split, streaming=True)
        samples: list[list[int]] = []
        for row in rows.shuffle(seed=recipe.seed, buffer_size=SHUFFLED_ROWS):
            if config.field not in row:
                raise UserError(
                    f"{recipe.file}: calibration.field: found {config.field!r}; rows of {where} "
                    f"have {', '.join(row)}"
                )
            ids = tokenizer(row[config.field])["input_ids"]
            if len(ids) >= SHORTEST:
                samples.append(ids)
            if len(samples) == config.samples:
                break
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{recipe.file}: calibration.source: {config.source} can't be read "
            f"({type(error).__name__}: {error}); a local .txt or .jsonl file needs no hub"
        ) from error
    return samples


def _first(tokenizer: Any) -> list[int]:
    """What leads a window of text: the tokenizer's start token, if it has one."""
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []


def test_items(recipe: Recipe, data: Data) -> list[Item]:
    """The items that every row of the benchmark scores: the first of the test split."""
    return data.test[: recipe.benchmark.items]


def is_right(task: Problems, said: str, item: Item) -> bool:
    """Whether a generated answer is the expected one."""
    assert item.text is not None
    return final_answer(said, task.final) == final_answer(item.text, task.final)


def final_answer(text: str, final: str | None) -> str:
    """What is compared: all that follows the last ``final`` mark, blanks and commas aside."""
    answer = text.rsplit(final, 1)[-1] if final else text
    return answer.strip().replace(",", "")

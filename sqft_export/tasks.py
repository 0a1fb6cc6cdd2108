"""Tasks: a recipe's data as token ids for calibration, training and evaluation.

Items become token ids here and nowhere else, so that every row of a report scores the same ids.
No padding is made here: batches are formed of equal lengths (evaluation) or padded on the right
with the padding masked out (training).
"""

import importlib.util
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft_export import known_datasets
from sqft_export.errors import UserError
from sqft_export.known_datasets import Record, Rule, plain_number, read_rows
from sqft_export.recipe import HUB, Dataset, Problems, Recipe, Text

SHORTEST = 16  # tokens of a dataset row that is calibrated on
SHUFFLED_ROWS = 10_000
NEEDS_DATASETS = "needs the datasets library: pip install 'sqft-export[datasets]'"
STOP_TEXT = "Question:"  # an answer ends where a model begins another question, as in lm-eval
NUMBER = re.compile(r"-?\d+\.?\d*")
NUMBER_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Item:
    """One evaluation item.

    prompt: token ids the model is given (empty for plain text).
    target: token ids that perplexity is measured on, after the prompt.
    text: the expected answer, None for plain text.
    source: the set it is from, where a task has several.
    rule: how an answer is scored; see ``known_datasets``. exact: equal after the recipe's mark.
    choices: (context, continuation) ids of every choice, and ``right`` the index of the right one.
    lengths: bytes of every continuation.
    """

    prompt: list[int]
    target: list[int]
    text: str | None
    source: str = ""
    rule: Rule = "exact"
    choices: tuple[tuple[list[int], list[int]], ...] = ()
    right: int = 0
    lengths: tuple[int, ...] = ()


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


def _fill(template: str, item: dict[str, Any], file: Path, number: int) -> str:
    try:
        return template.format(**item)
    except KeyError as error:
        raise UserError(
            f"{file}:{number}: the template asks for {error}; the item has {', '.join(item)}"
        ) from error


def problems(task: Problems, file: Path) -> Iterator[Record]:
    """Every item of a jsonl file as a record."""
    for number, item in enumerate(read_rows(file), start=1):
        answer = _fill(task.answer, item, file, number)
        yield Record(_fill(task.prompt, item, file, number), answer, final=answer)


def check(recipe: Recipe) -> None:
    """Refuse missing files and templates that do not fit their items; no tokenizer needed."""
    task = recipe.task
    if isinstance(task, Dataset):
        folder = recipe.resolve(task.folder) if task.folder else None
        faults = known_datasets.missing(task, folder, str(recipe.file))
        if folder is None and importlib.util.find_spec("datasets") is None:
            faults.append(f"{recipe.file}: task: the hub {NEEDS_DATASETS}")
        if faults:
            raise UserError("\n".join(faults))
    for split in ("train", "test"):
        for file in data_files(recipe, split):
            if not file.is_file():
                field = "text" if isinstance(task, Text) else split
                raise UserError(f"{recipe.file}: task.{field}: no such file: {file}")
            if isinstance(task, Problems):
                for _ in problems(task, file):
                    pass
    _check_calibration(recipe)


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
    names = known_datasets.set_names(task, split)
    found = [known_datasets.local_file(folder, name, split) for name in names]
    return [file for file in found if file is not None]


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
        raise UserError(f"{where}: {source} {NEEDS_DATASETS}")


def _records(recipe: Recipe, split: str) -> Iterator[tuple[str, Rule, Record]]:
    """Set, rule and record of every item of a split."""
    task = recipe.task
    if isinstance(task, Dataset):
        folder = recipe.resolve(task.folder) if task.folder else None
        yield from known_datasets.records(task, split, folder, str(recipe.file))
        return
    for file in data_files(recipe, split):
        assert isinstance(task, Problems)
        for record in problems(task, file):
            yield "", "exact", record


def _item(tokenizer: Any, source: str, rule: Rule, record: Record) -> Item:
    def pair(prompt: str, answer: str) -> tuple[list[int], list[int]]:
        return tokenizer(prompt)["input_ids"], _continuation(tokenizer, prompt, answer)

    prompt, answer = pair(record.prompt, record.answer)
    return Item(
        prompt,
        [*answer, tokenizer.eos_token_id],
        record.final,
        source,
        rule,
        tuple(pair(*choice) for choice in record.choices),
        record.right,
        tuple(len(continuation.strip().encode()) for _, continuation in record.choices),
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
        texts = [_fill("{" + config.field + "}", item, file, 1) for item in read_rows(file)]
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


def questions(recipe: Recipe, items: list[Item], tokenizer: Any) -> dict[str, Any]:
    """What ``evaluate.score`` is asked about items, as plain JSON: nothing there needs a tokenizer.

    Items with choices are asked for the likelihood of each, others for a generated answer, plain
    text for neither.
    """
    task = recipe.task
    generated = [i for i in items if i.text is not None and i.rule != "choice"]
    return {
        "prompts": [item.prompt for item in items],
        "targets": [item.target for item in items],
        "asked": [item.prompt for item in generated],
        "contexts": [context for item in items for context, _ in item.choices],
        "continuations": [continuation for item in items for _, continuation in item.choices],
        "max_new_tokens": 0 if isinstance(task, Text) else task.max_new_tokens,
        "stop": [tokenizer.eos_token_id],
    }


@dataclass(frozen=True)
class Judged:
    """What became of one item.

    said: the generated answer, or the choice taken.
    right_normalized: with likelihoods divided by the length of the choices; else the same.
    """

    item: Item
    said: str
    right: bool
    right_normalized: bool


def judge(
    recipe: Recipe, items: list[Item], result: dict[str, Any], tokenizer: Any
) -> list[Judged]:
    """Score the answers to :func:`questions`; nothing for plain text, which has none."""
    answers = iter(result["answers"])
    likelihoods = iter(result["likelihoods"])
    judged = []
    for item in items:
        if item.text is None:
            continue
        if item.rule == "choice":
            sums = [next(likelihoods) for _ in item.choices]
            best = max(range(len(sums)), key=sums.__getitem__)
            means = [s / n for s, n in zip(sums, item.lengths, strict=True)]
            best_mean = max(range(len(means)), key=means.__getitem__)
            right = best == item.right, best_mean == item.right
            said = tokenizer.decode(item.choices[best][1], skip_special_tokens=True)
            judged.append(Judged(item, said, *right))
            continue
        said = tokenizer.decode(next(answers), skip_special_tokens=True)
        same = is_right(recipe.task, said, item)
        judged.append(Judged(item, said, same, same))
    return judged


def accuracy_of(judged: list[Judged], result: dict[str, Any]) -> float:
    """Mean over the sets of the share answered right; for plain text of tokens predicted right."""
    if not judged:
        return result["token_accuracy"]
    by_set = accuracy_by_set(judged)
    return sum(entry["accuracy"] for entry in by_set.values()) / len(by_set)


def accuracy_by_set(judged: list[Judged]) -> dict[str, dict[str, float]]:
    """Set -> share answered right, plain and length-normalized, and number of items."""
    found: dict[str, list[Judged]] = {}
    for entry in judged:
        found.setdefault(entry.item.source, []).append(entry)
    return {
        name: {
            "accuracy": sum(e.right for e in entries) / len(entries),
            "accuracy_normalized": sum(e.right_normalized for e in entries) / len(entries),
            "items": len(entries),
        }
        for name, entries in found.items()
    }


def is_right(task: Problems | Dataset | Text, said: str, item: Item) -> bool:
    """Whether a generated answer is the expected one, by the item's rule."""
    assert item.text is not None
    if item.rule == "exact":
        final = task.final if isinstance(task, Problems) else None
        return final_answer(said, final) == final_answer(item.text, final)
    said = said.split(STOP_TEXT)[0]
    if item.rule == "mark":
        marked = re.search(r"#### (-?[0-9.,]+)", said)
        return marked is not None and plain_number(marked[1]) == item.text
    numbers = NUMBER.findall(said.replace(",", ""))
    return bool(numbers) and abs(float(numbers[-1]) - float(item.text)) <= NUMBER_TOLERANCE


def final_answer(text: str, final: str | None) -> str:
    """What is compared: all that follows the last ``final`` mark, blanks and commas aside."""
    answer = text.rsplit(final, 1)[-1] if final else text
    return answer.strip().replace(",", "")

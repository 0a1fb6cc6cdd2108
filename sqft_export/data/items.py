"""Tasks: a recipe's data as token ids for calibration, training and evaluation.

Items become token ids here and nowhere else, so that every row of a report scores the same ids.
No padding is made here, but where batches are formed: ``measure/batches.py`` (evaluation) and
``adapters/training.py``.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from sqft_export.data.datasets import SETS, Record, Scoring, local_file, records, set_names
from sqft_export.data.files import numbered_rows, read_text
from sqft_export.errors import UserError
from sqft_export.recipe.schema import Dataset, Problems, Recipe, Text
from sqft_export.recipe.templates import fill_template
from sqft_export.textfiles import read_json

# What the examples and items of a split depend on, besides the content of its files.
TASK_FIELDS = (
    *("task.kind", "task.prompt", "task.answer", "task.name", "task.template"),
    *("task.test_share", "task.sequence_length"),
)
TRAIN_FIELDS = (*TASK_FIELDS, "task.train_sets", "set_aside", "seed")
TEST_FIELDS = (*TASK_FIELDS, "task.test_sets")
ANSWER_FIELDS = ("task.max_new_tokens", "task.stop", "task.final")
TRAIN_FILES = ("task.train", "task.folder", "task.text")
TEST_FILES = ("task.test", "task.folder", "task.text")

Found = tuple[str, Scoring, Record]  # its set, how it is scored, and itself
# transformers warns once of more tokens than a model reads; texts are cut after they are tokenized.
TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"


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

    @property
    def ids(self) -> list[int]:
        """Prompt and target."""
        return self.prompt + self.target


@dataclass(frozen=True)
class Example:
    """One training example: ids, and how many of the first ones stay out of the loss."""

    ids: list[int]
    skip: int

    @property
    def has_no_answer(self) -> bool:
        """Whether nothing but the prompt was kept."""
        return self.skip >= len(self.ids)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; where it names no end token, the model's is its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None and (ends := end_tokens(folder)):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    tokenizer.deprecation_warnings[TOO_LONG] = True
    return tokenizer


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of every text, as training, calibration, scoring and verify have them.

    With the tokenizer's start token, once, also where a text begins with it already; without an end
    token that is not in the text.
    """
    found = tokenizer(texts)["input_ids"] if texts else []
    return [_as_written(tokenizer, *pair) for pair in zip(texts, found, strict=True)]


def begins_twice(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer adds a start token to a text that begins with one."""
    return _is_doubled(tokenizer, tokenizer(text)["input_ids"]) and not _is_doubled(
        tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]
    )


def deployed_text(tokenizer: Any, text: str) -> str:
    """What is given to a runtime, whose tokenizer adds a start token to every text."""
    return text.removeprefix(tokenizer.bos_token) if begins_twice(tokenizer, text) else text


def _is_doubled(tokenizer: Any, ids: list[int]) -> bool:
    return len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id


def _as_written(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    doubled = _is_doubled(tokenizer, ids)
    if not doubled and ids[-1:] != [tokenizer.eos_token_id]:
        return ids
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    if doubled:
        return plain
    end, start = tokenizer.eos_token_id, ids[0] == tokenizer.bos_token_id
    added = _count_last(ids, end) - _count_last(plain, end)
    return ids[: max(len(ids) - added, int(start))]


def _count_last(ids: list[int], token: int) -> int:
    """How many tokens at the end are a given one."""
    return sum(1 for _ in itertools.takewhile(token.__eq__, reversed(ids)))


def _ended(answer: list[int], end: int) -> list[int]:
    """An answer with one end token after it, also where its text has one already."""
    return answer if answer[-1:] == [end] else [*answer, end]


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


def _records(recipe: Recipe, split: str) -> Iterator[Found]:
    """Set, scoring and record of every item of a split."""
    task = recipe.task
    if isinstance(task, Dataset):
        folder = recipe.resolve(task.folder) if task.folder else None
        yield from records(task, split, folder, str(recipe.file), recipe.revisions)
        return
    for file in data_files(recipe, split):
        assert isinstance(task, Problems)
        for record in problem_records(task, file):
            yield "", "exact", record


def _pairs(tokenizer: Any, texts: list[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Ids of every prompt, and of its answer as they follow them; each text is tokenized once."""
    wanted = dict.fromkeys(text for prompt, answer in texts for text in (prompt, prompt + answer))
    ids = dict(zip(wanted, encode(tokenizer, list(wanted)), strict=True))
    found = []
    for prompt, answer in texts:
        first, whole = ids[prompt], ids[prompt + answer]
        if whole[: len(first)] == first:
            found.append((first, whole[len(first) :]))
        else:
            found.append((first, tokenizer(answer, add_special_tokens=False)["input_ids"]))
    return found


def to_items(tokenizer: Any, found: list[Found]) -> list[Item]:
    """Records of a split as token ids."""
    texts = [pair for _, _, r in found for pair in ((r.prompt, r.answer), *r.choices)]
    pairs = iter(_pairs(tokenizer, texts))
    items = []
    for source, scoring, record in found:
        prompt, answer = next(pairs)
        items.append(
            Item(
                prompt,
                _ended(answer, tokenizer.eos_token_id),
                record.final,
                source,
                scoring,
                tuple(next(pairs) for _ in record.choices),
                record.right,
                tuple(len(continuation.strip()) for _, continuation in record.choices),
                record.labels,
            )
        )
    return items


def _set_aside(recipe: Recipe, count: int) -> list[int]:
    """A seeded choice of the training items, that search scores on instead.

    :raises UserError: if nothing would be left to train on.
    """
    wanted = recipe.set_aside
    if not wanted:
        return []
    if wanted >= count:
        raise UserError(
            f"{recipe.file}: search.items: found {wanted}, but the training data has "
            f"{count} items in all"
        )
    return sorted(random.Random(recipe.seed).sample(range(count), wanted))


class Examples(Sequence[Example]):
    """Training examples; only those that are asked for are tokenized.

    texts: prompt and answer of every one. longest: tokens that are kept of it.
    """

    def __init__(self, tokenizer: Any, texts: list[tuple[str, str]], longest: int):
        self.tokenizer, self.texts, self.longest = tokenizer, texts, longest

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self._cut(whole) for whole in self._tokenized(self.texts[at])]
        return self._cut(self._tokenized([self.texts[at]])[0])

    def __iter__(self) -> Iterator[Example]:
        return map(self._cut, self._all)

    @property
    def truncated(self) -> int:
        """How many are longer."""
        return sum(len(whole.ids) > self.longest for whole in self._all)

    @cached_property
    def _all(self) -> list[Example]:
        return self._tokenized(self.texts)

    def _cut(self, whole: Example) -> Example:
        return Example(whole.ids[: self.longest], whole.skip)

    def _tokenized(self, texts: list[tuple[str, str]]) -> list[Example]:
        end, pairs = self.tokenizer.eos_token_id, _pairs(self.tokenizer, texts)
        return [Example(prompt + _ended(answer, end), len(prompt)) for prompt, answer in pairs]


class Data:
    """A task read, split and tokenized; each part when it is first asked for.

    train: training examples; of texts that are not windows, tokenized as they are asked for.
    validation: training items set aside for search, if it evaluates any.
    test: held-out items, for benchmark and verify alone.
    truncated: how many training examples are longer than the limit and are cut.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any):
        self.recipe, self.tokenizer = recipe, tokenizer

    @cached_property
    def _train(self) -> tuple[Sequence[Example], list[Item]]:
        task, tokenizer = self.recipe.task, self.tokenizer
        if isinstance(task, Text):
            items, _ = _text_items(task, self.recipe, tokenizer)
            aside = set(_set_aside(self.recipe, len(items)))
            chosen = [item for n, item in enumerate(items) if n in aside]
            rest = [Example(i.ids, 1) for n, i in enumerate(items) if n not in aside]
            return rest, chosen
        found = list(_records(self.recipe, "train"))
        aside = set(_set_aside(self.recipe, len(found)))
        chosen = to_items(tokenizer, [one for n, one in enumerate(found) if n in aside])
        texts = [(r.prompt, r.answer) for n, (_, _, r) in enumerate(found) if n not in aside]
        return Examples(tokenizer, texts, task.sequence_length), chosen

    @property
    def train(self) -> Sequence[Example]:
        return self._train[0]

    @property
    def validation(self) -> list[Item]:
        return self._train[1]

    @property
    def truncated(self) -> int:
        return self.train.truncated if isinstance(self.train, Examples) else 0

    @cached_property
    def test(self) -> list[Item]:
        if isinstance(self.recipe.task, Text):
            return _text_items(self.recipe.task, self.recipe, self.tokenizer)[1]
        return to_items(self.tokenizer, list(_records(self.recipe, "test")))


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


def _text_items(task: Text, recipe: Recipe, tokenizer: Any) -> tuple[list[Item], list[Item]]:
    """Windows to train on, and held out."""
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
    return train, test


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


def sampled(
    recipe: Recipe, tokenizer: Any, split: str, count: int
) -> tuple[dict[str, int], list[Item]]:
    """Items of a split by set, and about ``count`` of them, evenly spread, as token ids."""
    if isinstance(recipe.task, Text):
        items = _text_items(recipe.task, recipe, tokenizer)[split == "test"]
        return {"": len(items)}, items[:: max(1, len(items) // count)]
    found = list(_records(recipe, split))
    chosen = found[:: max(1, len(found) // count)]
    return Counter(name for name, _, _ in found), to_items(tokenizer, chosen)


def spread_records(recipe: Recipe, split: str, most: int | None) -> list[Found]:
    """Records of a split, evenly spread; None: all."""
    found = list(_records(recipe, split))
    if most is None or len(found) <= most:
        return found
    return [found[at * len(found) // most] for at in range(most)]


def train_records(recipe: Recipe) -> Iterator[Record]:
    """Training items as prompt and answer."""
    return (record for _, _, record in _records(recipe, "train"))


def scored_items(recipe: Recipe, tokenizer: Any, count: int) -> list[Item]:
    """The first ``count`` test items of every set."""
    taken: Counter[str] = Counter()
    chosen = []
    for found in _records(recipe, "test"):
        taken[found[0]] += 1
        if taken[found[0]] <= count:
            chosen.append(found)
    return to_items(tokenizer, chosen)


def held_out(recipe: Recipe, tokenizer: Any) -> list[Item]:
    """The test items alone; of several sets in turn, so that a first few are of all of them."""
    by_set: dict[str, list[Item]] = {}
    for item in Data(recipe, tokenizer).test:
        by_set.setdefault(item.source, []).append(item)
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


def first_of_every_set(items: list[Item], count: int) -> list[Item]:
    """So that a mix is scored on all of its sets."""
    taken: dict[str, int] = {}
    chosen = []
    for item in items:
        taken[item.source] = taken.get(item.source, 0) + 1
        if taken[item.source] <= count:
            chosen.append(item)
    return chosen

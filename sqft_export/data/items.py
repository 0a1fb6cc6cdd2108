"""Tasks: a recipe's data as token ids for calibration, training and evaluation.

Only this module converts items to token ids, so that every row of a report scores the same ids.
Padding is added where batches are formed: in ``measure/batches.py`` (evaluation) and in
``adapters/training.py``.
"""

import itertools
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

from sqft_export.data.chat import ChatEncoder, Conversation, EncodedChat
from sqft_export.data.chat_template import ChatTemplate
from sqft_export.data.conversations import chat_files, hub_sources, read_conversations
from sqft_export.data.datasets import SETS, Record, Scoring, local_file, records, set_names
from sqft_export.data.files import read_text
from sqft_export.data.problems import problem_records
from sqft_export.errors import UserError
from sqft_export.recipe.schema import Chat, Dataset, Problems, Text
from sqft_export.recipe.sections import TaskSections
from sqft_export.textfiles import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Recipe fields that determine the examples and items of a split, besides the content of its files.
TASK_FIELDS = (
    *("task.kind", "task.prompt", "task.answer", "task.name", "task.template"),
    *("splits_train", "task.test_share", "task.sequence_length", "task.columns"),
    *("task.template_arguments", "task.loss_on", "task.split", "task.test_split", "task.subset"),
)
TRAIN_FIELDS = (*TASK_FIELDS, "task.train_sets", "set_aside", "seed")
TEST_FIELDS = (*TASK_FIELDS, "task.test_sets")
ANSWER_FIELDS = ("task.max_new_tokens", "task.stop", "task.final")
CARD_FIELDS = ("task.stop",)  # fields of the prompt format in a model card
SCORE_FIELDS = (*ANSWER_FIELDS, "task.score", "task.pattern")
# Keys contain the content of these files. A chat task reads both sources for each of its splits.
TASK_FILES = ("task.train", "task.test", "task.folder", "task.text", "task.revision")
SCORE_FILES = ("task.score_file",)

SetRecord = tuple[str, Scoring, Record]  # name of the set, scoring, item
# Key of transformers' warning about texts beyond a model's limit. Here texts are cut afterwards.
LENGTH_WARNING = "sequence-length-is-longer-than-the-specified-maximum"


@dataclass(frozen=True)
class Item:
    """One evaluation item.

    prompt: token ids of the prompt; for plain text, the first token of the window.
    target: token ids after the prompt, on which perplexity is measured.
    text: the expected answer; None for plain text.
    source: name of the set, for tasks with several sets.
    scoring: how an answer is scored; see ``datasets``.
    choices: (context, continuation) ids of every choice.
    right: index of the right choice.
    lengths: characters of every continuation.
    labels: name of every choice.
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
        """Return prompt and target, concatenated."""
        return self.prompt + self.target


@dataclass(frozen=True)
class Example:
    """One training example.

    skip: number of first ids that a loss on answers excludes.
    loss: for each id, whether it is in the loss; None: all ids after ``skip``.
    """

    ids: list[int]
    skip: int
    loss: list[bool] | None = None

    @property
    def has_no_answer(self) -> bool:
        """Return whether the cut example has no token in a loss on answers."""
        if self.loss is not None:
            return not any(self.loss[1:])  # no token predicts the first one
        return self.skip >= len(self.ids)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a model folder; if it has no end token, set that of the configs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None and (ends := end_tokens(folder)):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    tokenizer.deprecation_warnings[LENGTH_WARNING] = True
    return tokenizer


def encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Return the token ids of every text, for training, calibration, scoring and verify.

    The tokenizer's start token appears once, even if the text already begins with it. An end token
    that the tokenizer adds is removed; one in the text is kept.
    """
    found = tokenizer(texts)["input_ids"] if texts else []
    return [_strip_added(tokenizer, *pair) for pair in zip(texts, found, strict=True)]


def doubles_start_token(tokenizer: "PreTrainedTokenizerBase", text: str) -> bool:
    """Return whether the tokenizer adds a start token to a text that begins with one."""
    return _is_doubled(tokenizer, tokenizer(text)["input_ids"]) and not _is_doubled(
        tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"]
    )


def deployed_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    """Return the text to give to a runtime, whose tokenizer adds a start token to every text."""
    return text.removeprefix(tokenizer.bos_token) if doubles_start_token(tokenizer, text) else text


def _is_doubled(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> bool:
    return len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id


def _strip_added(tokenizer: "PreTrainedTokenizerBase", text: str, ids: list[int]) -> list[int]:
    """Remove a second start token and an end token that the tokenizer added to a text."""
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
    """Return how often ``token`` is repeated at the end."""
    return sum(1 for _ in itertools.takewhile(token.__eq__, reversed(ids)))


def _append_end(answer: list[int], end: int) -> list[int]:
    """Return an answer that ends with an end token; one is appended only if it has none."""
    return answer if answer[-1:] == [end] else [*answer, end]


def stop_ids(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that end an answer: the tokenizer's and those of the folder's configs."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *end_tokens(folder)]))


def answer_stops(
    recipe: TaskSections, folder: Path, tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """Return the ids that end an answer to a task: :func:`stop_ids`, and the chat template's."""
    found = stop_ids(folder, tokenizer)
    if isinstance(recipe.task, Chat):
        end = chat_encoder(recipe, tokenizer).end_token()
        found += [] if end is None or end in found else [end]
    return found


def end_tokens(folder: Path) -> list[int]:
    """Return the ids that end an answer, from the configs of a model or deployment.

    :raises UserError: if a config is damaged or its ``eos_token_id`` contains no valid ids.
    """
    names = ("generation_config.json", "config.json", "genai_config.json")
    found = [_read_end_tokens(folder / name) for name in names if (folder / name).is_file()]
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _read_end_tokens(file: Path) -> list[int]:
    document = read_json(file)
    if "eos_token_id" not in document and isinstance(document.get("model"), dict):
        document = document["model"]
    ends = document.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int and 0 <= token < 2**31 for token in listed):
        raise UserError(f"{file}: eos_token_id: found {ends!r}; an id or a list of ids is expected")
    return listed


def data_files(recipe: TaskSections, split: str) -> list[Path]:
    """Return the files of a split; empty if the split is on the hub."""
    task = recipe.task
    if isinstance(task, Problems):
        return [recipe.resolve(task.train if split == "train" else task.test)]
    if isinstance(task, Text):
        return [recipe.resolve(task.text)]
    if isinstance(task, Chat):
        return chat_files(recipe, task, split)
    if task.folder is None:
        return []
    folder = recipe.resolve(task.folder)
    names = set_names(task, split) if folder.is_dir() else ()
    found = [local_file(folder, name, split) for name in names]
    return [file for file in found if file is not None]


def _records(recipe: TaskSections, split: str) -> Iterator[SetRecord]:
    """Yield set, scoring and record of every item of a split."""
    task = recipe.task
    if isinstance(task, Dataset):
        folder = recipe.resolve(task.folder) if task.folder else None
        yield from records(task, split, folder, str(recipe.file), recipe.revisions)
        return
    for file in data_files(recipe, split):
        assert isinstance(task, Problems)
        for record in problem_records(task, file):
            yield "", "exact", record


def _encode_pairs(
    tokenizer: "PreTrainedTokenizerBase", texts: list[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Return the ids of every prompt and of its answer; each text is tokenized once.

    The answer's ids are those of prompt + answer without the prompt's ids. If the joined text does
    not begin with the prompt's ids, the answer is tokenized separately.
    """
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


def to_items(tokenizer: "PreTrainedTokenizerBase", found: list[SetRecord]) -> list[Item]:
    """Return the records of a split as items of token ids."""
    texts = [pair for _, _, r in found for pair in ((r.prompt, r.answer), *r.choices)]
    pairs = iter(_encode_pairs(tokenizer, texts))
    items = []
    for source, scoring, record in found:
        prompt, answer = next(pairs)
        items.append(
            Item(
                prompt,
                _append_end(answer, tokenizer.eos_token_id),
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


def _choose_validation(recipe: TaskSections, count: int) -> list[int]:
    """Return the indices of the training items that only search uses, a seeded choice.

    :raises UserError: if no item would remain for training.
    """
    wanted = recipe.set_aside
    if not wanted:
        return []
    if wanted >= count:
        raise UserError(
            f"{recipe.file}: search.items: found {wanted}, but the training data has only "
            f"{count} items"
        )
    return sorted(random.Random(recipe.seed).sample(range(count), wanted))


class _IndexedExamples(Sequence[Example]):
    """Training examples of which an index or a slice reads only the selected ones."""

    @abstractmethod
    def _read(self, indices: range) -> list[Example]: ...

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> list[Example]: ...
    def __getitem__(self, at):
        chosen = range(len(self))[at]
        if isinstance(at, slice):
            return self._read(chosen)
        return self._read(range(chosen, chosen + 1))[0]


class Examples(_IndexedExamples):
    """Training examples; an index tokenizes only the examples that it selects.

    texts: prompt and answer of every example.
    longest: largest number of tokens per example; longer ones are cut.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", texts: list[tuple[str, str]], longest: int
    ):
        self.tokenizer, self.texts, self.longest = tokenizer, texts, longest

    def __len__(self) -> int:
        return len(self.texts)

    def _read(self, indices: range) -> list[Example]:
        texts = [self.texts[n] for n in indices]
        return [self._truncate(whole) for whole in self._tokenize(texts)]

    def __iter__(self) -> Iterator[Example]:
        return map(self._truncate, self._untruncated)

    @property
    def truncated(self) -> int:
        """Return the number of examples that are cut."""
        return sum(len(whole.ids) > self.longest for whole in self._untruncated)

    @cached_property
    def _untruncated(self) -> list[Example]:
        return self._tokenize(self.texts)

    def _truncate(self, whole: Example) -> Example:
        return Example(whole.ids[: self.longest], whole.skip)

    def _tokenize(self, texts: list[tuple[str, str]]) -> list[Example]:
        end, pairs = self.tokenizer.eos_token_id, _encode_pairs(self.tokenizer, texts)
        return [Example(prompt + _append_end(answer, end), len(prompt)) for prompt, answer in pairs]


def chat_encoder(recipe: TaskSections, tokenizer: "PreTrainedTokenizerBase") -> ChatEncoder:
    """Return the encoder of a chat task's conversations, for the tokenizer of a model folder.

    :raises UserError: if the tokenizer has no such template.
    """
    task = recipe.task
    assert isinstance(task, Chat)
    place = f"{recipe.file}: task.template"
    template = ChatTemplate(tokenizer, task.template, task.template_arguments, place)
    return ChatEncoder(template, stop_ids(Path(tokenizer.name_or_path), tokenizer))


def chat_items(
    recipe: TaskSections,
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Conversation],
) -> list[Item]:
    """Return the last answer of every conversation as an item.

    The prompt ends with the template's generation prompt. The target ends with the end-of-turn
    token. The text is the content of the last message of the assistant.
    """
    encoder = chat_encoder(recipe, tokenizer)
    items = []
    for conversation in conversations:
        prompt, encoded = encoder.prompt_ids(conversation), encoder.encode(conversation)
        start, end = encoded.last_answer
        if encoded.ids[: len(prompt)] == prompt:  # else tokens merge, or earlier turns change
            start = len(prompt)
        answers = [m["content"] for m in conversation.messages if m["role"] == "assistant"]
        items.append(Item(prompt, encoded.ids[start:end], answers[-1]))
    return items


class ChatExamples(_IndexedExamples):
    """Training examples of conversations; each one is encoded at its first access.

    longest: largest number of tokens per example; longer ones lose their first turns.
    """

    def __init__(self, encoder: ChatEncoder, conversations: list[Conversation], longest: int):
        self.encoder, self.conversations, self.longest = encoder, conversations, longest
        self._encoded: dict[int, EncodedChat] = {}

    def __len__(self) -> int:
        return len(self.conversations)

    def _read(self, indices: range) -> list[Example]:
        return [self._example(self.encoded(n)) for n in indices]

    @staticmethod
    def _example(encoded: EncodedChat) -> Example:
        first = next((n for n, one in enumerate(encoded.loss) if one), len(encoded.ids))
        return Example(encoded.ids, first, encoded.loss)

    def encoded(self, at: int) -> EncodedChat:
        """Return ids, mask and text of one conversation."""
        if at not in self._encoded:
            found = self.encoder.encode_within(self.conversations[at], self.longest)
            self._encoded[at] = found
        return self._encoded[at]

    @property
    def truncated(self) -> int:
        """Return the number of examples that are cut."""
        found = map(self.encoded, range(len(self)))
        return sum(bool(one.dropped or one.cut) for one in found)


class Data:
    """The data of a task, split and tokenized; each part is made at its first use.

    train: training examples; those with a prompt and an answer are tokenized at access.
    validation: training items that only search uses, if its strategy evaluates.
    test: held-out items, only for benchmark and verify.
    truncated: number of training examples that are cut.
    """

    def __init__(self, recipe: TaskSections, tokenizer: "PreTrainedTokenizerBase"):
        self.recipe, self.tokenizer = recipe, tokenizer

    @cached_property
    def _train(self) -> tuple[Sequence[Example], list[Item]]:
        task, tokenizer = self.recipe.task, self.tokenizer
        if isinstance(task, Text):
            items, _ = _text_items(task, self.recipe, tokenizer)
            validation = set(_choose_validation(self.recipe, len(items)))
            chosen = [item for n, item in enumerate(items) if n in validation]
            rest = [Example(i.ids, 1) for n, i in enumerate(items) if n not in validation]
            return rest, chosen
        if isinstance(task, Chat):
            return self._conversations(task)
        found = list(_records(self.recipe, "train"))
        validation = set(_choose_validation(self.recipe, len(found)))
        chosen = to_items(tokenizer, [one for n, one in enumerate(found) if n in validation])
        texts = [(r.prompt, r.answer) for n, (_, _, r) in enumerate(found) if n not in validation]
        return Examples(tokenizer, texts, task.sequence_length), chosen

    def _conversations(self, task: Chat) -> tuple[Sequence[Example], list[Item]]:
        found = read_conversations(self.recipe, task, "train")
        validation = set(_choose_validation(self.recipe, len(found)))
        chosen = [one for n, one in enumerate(found) if n in validation]
        rest = [one for n, one in enumerate(found) if n not in validation]
        encoder = chat_encoder(self.recipe, self.tokenizer)
        items = chat_items(self.recipe, self.tokenizer, chosen)
        return ChatExamples(encoder, rest, task.sequence_length), items

    @property
    def train(self) -> Sequence[Example]:
        return self._train[0]

    @property
    def validation(self) -> list[Item]:
        return self._train[1]

    @property
    def truncated(self) -> int:
        return self.train.truncated if isinstance(self.train, Examples | ChatExamples) else 0

    @cached_property
    def test(self) -> list[Item]:
        if isinstance(self.recipe.task, Text):
            return _text_items(self.recipe.task, self.recipe, self.tokenizer)[1]
        if isinstance(self.recipe.task, Chat):
            found = read_conversations(self.recipe, self.recipe.task, "test")
            return chat_items(self.recipe, self.tokenizer, found)
        return to_items(self.tokenizer, list(_records(self.recipe, "test")))


def split_windows(ids: list[int], length: int, first: list[int]) -> list[list[int]]:
    """Split ids into complete windows of ``length`` ids; each begins with the ids ``first``."""
    step = length - len(first)
    return [first + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]


def _find_cut(text: str, wanted: int) -> int:
    """Return the end of the last line before ``wanted``, else of the last word, else ``wanted``."""
    for end in ("\n", " "):
        if (found := text.rfind(end, 0, wanted)) > 0:
            return found + 1
    return wanted


def _text_items(
    task: Text, recipe: TaskSections, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[Item], list[Item]]:
    """Return the windows for training and the held-out windows."""
    file = recipe.resolve(task.text)
    text = read_text(file)
    boundary = _find_cut(text, int(len(text) * (1 - task.test_share)))

    def windows(part: str) -> list[list[int]]:
        ids = tokenizer(part, add_special_tokens=False)["input_ids"]
        return split_windows(ids, task.sequence_length, first_token(tokenizer))

    train, test = (
        [Item(ids[:1], ids[1:], None) for ids in windows(part)]
        for part in (text[:boundary], text[boundary:])
    )
    if not train or not test:
        raise UserError(f"{file}: too short for windows of {task.sequence_length} tokens")
    return train, test


def count_examples(recipe: TaskSections) -> int | None:
    """Return the number of training examples, without a tokenizer; None if they are on the hub.

    The windows of a text are estimated at four characters per token.
    """
    task = recipe.task
    if isinstance(task, Dataset) and task.folder is None:
        return None
    if isinstance(task, Text):
        characters = recipe.resolve(task.text).stat().st_size * (1 - task.test_share)
        return int(characters / 4 / task.sequence_length)
    if isinstance(task, Chat):
        return None if hub_sources(task) else len(read_conversations(recipe, task, "train"))
    return sum(1 for _ in _records(recipe, "train"))


def sample_items(
    recipe: TaskSections, tokenizer: "PreTrainedTokenizerBase", split: str, count: int
) -> tuple[dict[str, int], list[Item]]:
    """Return the number of items per set, and about ``count`` evenly spread items as token ids."""
    if isinstance(recipe.task, Text):
        items = _text_items(recipe.task, recipe, tokenizer)[split == "test"]
        return {"": len(items)}, items[:: max(1, len(items) // count)]
    if isinstance(recipe.task, Chat):
        rows = read_conversations(recipe, recipe.task, split)
        some = rows[:: max(1, len(rows) // count)]
        return {"": len(rows)}, chat_items(recipe, tokenizer, some)
    found = list(_records(recipe, split))
    chosen = found[:: max(1, len(found) // count)]
    return Counter(name for name, _, _ in found), to_items(tokenizer, chosen)


def spread_records(recipe: TaskSections, split: str, most: int | None) -> list[SetRecord]:
    """Return at most ``most`` evenly spread records of a split; None: all records."""
    found = list(_records(recipe, split))
    if most is None or len(found) <= most:
        return found
    return [found[at * len(found) // most] for at in range(most)]


def train_records(recipe: TaskSections) -> Iterator[Record]:
    """Yield the training items as records."""
    return (record for _, _, record in _records(recipe, "train"))


def scored_items(
    recipe: TaskSections, tokenizer: "PreTrainedTokenizerBase", count: int
) -> list[Item]:
    """Return the first ``count`` test items of every set."""
    if isinstance(recipe.task, Chat):
        conversations = read_conversations(recipe, recipe.task, "test")
        return chat_items(recipe, tokenizer, conversations[:count])
    taken: Counter[str] = Counter()
    chosen = []
    for found in _records(recipe, "test"):
        taken[found[0]] += 1
        if taken[found[0]] <= count:
            chosen.append(found)
    return to_items(tokenizer, chosen)


def held_out(recipe: TaskSections, tokenizer: "PreTrainedTokenizerBase") -> list[Item]:
    """Return the test items; several sets are interleaved, so that the first items cover them."""
    by_set: dict[str, list[Item]] = {}
    for item in Data(recipe, tokenizer).test:
        by_set.setdefault(item.source, []).append(item)
    rounds = itertools.zip_longest(*by_set.values())
    return [item for one_of_each in rounds for item in one_of_each if item is not None]


# Texts that tokenizers are known to split differently.
HARD_TEXTS = (
    "two  spaces, a\ttab and\nanother line",
    " a blank before, and one after ",
    "1,234.50 + 7 = 1241.5 (about 3 %)",
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f600 \u0394x \u2248 \u00bd",
    'He said: "It isn\'t [so]; {x} <y> #### 5!" \\boxed{5}',
)


def train_texts(recipe: TaskSections) -> Iterator[str]:
    """Yield the training texts, one per example or line; none if on the hub or missing."""
    task = recipe.task
    if isinstance(task, Dataset) and not set(set_names(task, "train")) <= SETS.keys():
        return
    files = data_files(recipe, "train")
    if not files or not all(file.is_file() for file in files):
        return
    if isinstance(task, Text):
        yield from (line for line in read_text(files[0]).split("\n") if line.strip())
        return
    if isinstance(task, Chat):
        for one in read_conversations(recipe, task, "train"):
            yield "\n".join(str(message["content"]) for message in one.messages)
        return
    for _, _, record in _records(recipe, "train"):
        yield record.prompt + record.answer


def sample_texts(recipe: TaskSections, count: int) -> list[str]:
    """Return texts to compare tokenizers with: ``count`` of the test split, and hard cases."""
    task = recipe.task
    if isinstance(task, Text):
        lines = [line for line in read_text(recipe.resolve(task.text)).split("\n") if line.strip()]
        return [*lines[-count:], *HARD_TEXTS]
    if isinstance(task, Chat):
        found = read_conversations(recipe, task, "test")[:count]
        return [*(last_user_text(one) for one in found), *HARD_TEXTS]
    prompts = (record.prompt for _, _, record in _records(recipe, "test"))
    return [*itertools.islice(prompts, count), *HARD_TEXTS]


def last_user_text(conversation: Conversation) -> str:
    """Return the last text of the user; the first message if the user wrote none."""
    texts = [m["content"] for m in conversation.messages if m["role"] == "user"]
    return str([conversation.messages[0]["content"], *texts][-1])


def first_token(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that begin every window of text: the start token, if there is one."""
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []


def first_of_every_set(items: list[Item], count: int) -> list[Item]:
    """Return the first ``count`` items of every set, so that a mix is scored on all sets."""
    taken: dict[str, int] = {}
    chosen = []
    for item in items:
        taken[item.source] = taken.get(item.source, 0) + 1
        if taken[item.source] <= count:
            chosen.append(item)
    return chosen

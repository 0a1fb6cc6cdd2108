"""Checks that the data of a task can be learned and judged.

The scoring code decodes and judges the expected answers. Training examples are cut exactly as in
training.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.data.items import (
    Examples,
    Item,
    data_files,
    doubles_start_token,
    load_tokenizer,
    spread_records,
    stop_ids,
    to_items,
)
from sqft_export.data.scoring import Answers, Judged, decode_answer, judge
from sqft_export.data.stops import cut_at_stop, stop_texts
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Dataset, Problems, Recipe, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKED_ITEMS = 2000  # evenly spread items per split
MAX_CUT_SHARE = 0.05  # allowed share of training examples that lose their complete answer


def has_local_answers(recipe: Recipe) -> bool:
    """Return whether the task has prompts and answers in local files."""
    task = recipe.task
    return isinstance(task, Problems) or (isinstance(task, Dataset) and task.folder is not None)


def _expected_ids(item: Item, stops: list[int], most: int) -> list[int]:
    """Return the ids that a model would generate for exactly the expected answer."""
    end = next((at for at, token in enumerate(item.target) if token in stops), len(item.target))
    return item.target[: min(end, most)]


def judge_expected(recipe: Recipe, folder: Path) -> tuple["PreTrainedTokenizerBase", list[Judged]]:
    """Return the tokenizer, and the judgement of expected answers as if a model had given them."""
    assert not isinstance(recipe.task, Text)
    tokenizer = load_tokenizer(folder)
    records = spread_records(recipe, "test", CHECKED_ITEMS)
    items = [one for one in to_items(tokenizer, records) if one.scoring != "choice"]
    stops, most = stop_ids(folder, tokenizer), recipe.task.max_new_tokens
    answers = [_expected_ids(item, stops, most) for item in items]
    return tokenizer, judge(recipe, items, Answers(answers=answers), tokenizer)


def _reason(
    recipe: Recipe, folder: Path, tokenizer: "PreTrainedTokenizerBase", wrong: list[Judged]
) -> str:
    """Return why the first of these expected answers is judged wrong, and what helps."""
    task, item = recipe.task, wrong[0].item
    assert item.text is not None and not isinstance(task, Text)
    ends = [token for token in item.target[:-1] if token in stop_ids(folder, tokenizer)]
    if ends or (item.target and tokenizer.eos_token and tokenizer.eos_token in item.text):
        token = tokenizer.convert_ids_to_tokens((ends or item.target[-1:])[0])
        return (
            f"it has the end token {token!r}, at which a model stops; remove it from the answer, "
            "an end token is added automatically"
        )
    if (count := len(item.target) - 1) > task.max_new_tokens:
        longest = max(len(one.item.target) for one in wrong)
        return (
            f"it has {count} tokens; raise task.max_new_tokens, which is {task.max_new_tokens}, "
            f"to {longest}, the length of the longest one with its end token"
        )
    if cut_at_stop(item.text, stop_texts(task)) != item.text:
        return f"it contains a stop text of task.stop, which is {list(stop_texts(task))}"
    decoded = decode_answer(tokenizer, item.target, task)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        if decoded.strip() == unicodedata.normalize(form, item.text).strip():
            return (
                f"the tokenizer writes the Unicode form {form}, in which it is {decoded!r}; "
                "convert the data to that form"
            )
    return f"the tokenizer decodes it as {decoded!r}; write answers in that form"


def _count_unjudgeable(recipe: Recipe, layout: Layout) -> tuple[int, int, str]:
    """Return how many expected answers were checked and judged wrong, and why the first one was."""
    if layout.folder is None or not has_local_answers(recipe):
        return 0, 0, ""
    tokenizer, judged = judge_expected(recipe, layout.folder)
    wrong = [one for one in judged if not one.right]
    if not wrong:
        return len(judged), 0, ""
    reason = _reason(recipe, layout.folder, tokenizer, wrong)
    return len(judged), len(wrong), f"the first is {wrong[0].item.text!r}: {reason}"


def answer_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a fault if no expected answer of the test set would be judged right."""
    checked, wrong, first = _count_unjudgeable(recipe, layout)
    if wrong == checked > 0:
        yield (
            f"task: all {checked:,} expected answers that were checked are judged wrong, so "
            f"every model would have an accuracy of 0; {first}"
        )


def find_unjudgeable_answers(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a warning if some, but not all, expected answers would be judged wrong."""
    checked, wrong, first = _count_unjudgeable(recipe, layout)
    if 0 < wrong < checked:
        yield (
            f"task: {wrong:,} of {checked:,} expected answers that were checked are judged wrong "
            f"for every model; {first}"
        )


def _count_cut_answers(recipe: Recipe, layout: Layout) -> tuple[int, int, int]:
    """Return three counts about training examples and their cut answers.

    They are: examples checked; examples that keep no token of the answer; and the sequence length
    at which all but ``MAX_CUT_SHARE`` of the examples keep one token of the answer.
    """
    if layout.folder is None or recipe.adapt is None or not has_local_answers(recipe):
        return 0, 0, 0
    records = spread_records(recipe, "train", CHECKED_ITEMS)
    texts = [(record.prompt, record.answer) for _, _, record in records]
    examples = Examples(load_tokenizer(layout.folder), texts, recipe.task.sequence_length)
    prompts = sorted(example.skip for example in examples)
    enough = prompts[int((1 - MAX_CUT_SHARE) * (len(prompts) - 1))] + 1
    return len(prompts), sum(example.has_no_answer for example in examples), enough


def cut_answer_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a fault if the sequence length cuts off too many training answers completely."""
    checked, cut, enough = _count_cut_answers(recipe, layout)
    if cut > MAX_CUT_SHARE * checked:
        yield (
            f"task.sequence_length: found {recipe.task.sequence_length}; {cut:,} of {checked:,} "
            f"training examples that were checked ({cut / checked:.1%}) have a prompt that long, "
            f"so their answer is cut off completely; at most {MAX_CUT_SHARE:.0%} are allowed; "
            f"set more than {enough}"
        )


def find_cut_answers(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a warning if the answers of a few training examples are cut off completely."""
    checked, cut, _ = _count_cut_answers(recipe, layout)
    if 0 < cut <= MAX_CUT_SHARE * checked:
        yield (
            f"task.sequence_length: found {recipe.task.sequence_length}; the answer of {cut:,} of "
            f"{checked:,} training examples that were checked is cut off completely"
        )


def find_repeated_items(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a warning if test items are also training items."""
    if not has_local_answers(recipe):
        return
    train, test = (
        [(record.prompt, record.answer) for _, _, record in spread_records(recipe, split, None)]
        for split in ("train", "test")
    )
    known = set(train)
    if repeated := sum(pair in known for pair in test):
        yield (
            f"task: {repeated:,} of {len(test):,} test items are training items too ("
            f"{_names(data_files(recipe, 'train'))} and {_names(data_files(recipe, 'test'))}); "
            "accuracy then measures memorized answers too"
        )


def _names(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


def find_doubled_start(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Yield a warning if prompts begin with the start token that the tokenizer adds anyway."""
    if layout.folder is None or not has_local_answers(recipe):
        return
    tokenizer = load_tokenizer(layout.folder)
    records = spread_records(recipe, "test", CHECKED_ITEMS)
    doubled = [r.prompt for _, _, r in records if doubles_start_token(tokenizer, r.prompt)]
    if doubled:
        yield (
            f"task: {len(doubled):,} of {len(records):,} prompts that were checked begin with "
            f"{tokenizer.bos_token!r}, which the tokenizer also adds; training and scoring use one "
            "start token; give runtimes the prompts without it"
        )

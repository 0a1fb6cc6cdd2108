"""Whether the data of a task can be learned and judged: expected answers are decoded and judged by
the code that scores, and training examples are cut as training cuts them."""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sqft_export.data.items import (
    Examples,
    Item,
    begins_twice,
    data_files,
    load_tokenizer,
    spread_records,
    stop_ids,
    to_items,
)
from sqft_export.data.scoring import Judged, decode_answer, judge
from sqft_export.data.stops import cut_at_stop, stop_texts
from sqft_export.plan.layout import Layout
from sqft_export.recipe.schema import Dataset, Problems, Recipe, Text

CHECKED_ITEMS = 2000  # of a split, evenly spread
MOST_CUT_ANSWERS = 0.05  # share of training examples that lose their whole answer


def data_is_here(recipe: Recipe) -> bool:
    """Whether a task has prompts and answers, in files of this machine."""
    task = recipe.task
    return isinstance(task, Problems) or (isinstance(task, Dataset) and task.folder is not None)


def _generated(item: Item, stops: list[int], most: int) -> list[int]:
    """The ids that a model generates which says exactly the expected answer."""
    end = next((at for at, token in enumerate(item.target) if token in stops), len(item.target))
    return item.target[: min(end, most)]


def judge_expected(recipe: Recipe, folder: Path) -> tuple[Any, list[Judged]]:
    """The tokenizer, and the expected answers of test items, judged as if a model had said them."""
    assert not isinstance(recipe.task, Text)
    tokenizer = load_tokenizer(folder)
    records = spread_records(recipe, "test", CHECKED_ITEMS)
    items = [one for one in to_items(tokenizer, records) if one.scoring != "choice"]
    stops, most = stop_ids(folder, tokenizer), recipe.task.max_new_tokens
    answers = [_generated(item, stops, most) for item in items]
    return tokenizer, judge(recipe, items, {"answers": answers, "likelihoods": []}, tokenizer)


def _reason(recipe: Recipe, folder: Path, tokenizer: Any, wrong: list[Judged]) -> str:
    """Why the first of some expected answers is judged wrong, and what helps."""
    task, item = recipe.task, wrong[0].item
    assert item.text is not None and not isinstance(task, Text)
    ends = [token for token in item.target[:-1] if token in stop_ids(folder, tokenizer)]
    if ends or (item.target and tokenizer.eos_token and tokenizer.eos_token in item.text):
        token = tokenizer.convert_ids_to_tokens((ends or item.target[-1:])[0])
        return (
            f"it has the end token {token!r}, at which a model stops; leave it out of the answer, "
            "which gets one end token by itself"
        )
    if (count := len(item.target) - 1) > task.max_new_tokens:
        longest = max(len(one.item.target) for one in wrong)
        return (
            f"it has {count} tokens; raise task.max_new_tokens, which is {task.max_new_tokens}, "
            f"to {longest}, which the longest of them has with its end token"
        )
    if cut_at_stop(item.text, stop_texts(task)) != item.text:
        return f"it has a stop text of task.stop, which is {list(stop_texts(task))}"
    said = decode_answer(tokenizer, item.target, task)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        if said.strip() == unicodedata.normalize(form, item.text).strip():
            return (
                f"the tokenizer writes the Unicode form {form}, in which it is {said!r}; write the "
                "data in that form"
            )
    return f"the tokenizer gives it back as {said!r}; write answers as the tokenizer does"


def _unjudgeable(recipe: Recipe, layout: Layout) -> tuple[int, int, str]:
    """Number of expected answers checked, of those judged wrong, and what is said of the first."""
    if layout.folder is None or not data_is_here(recipe):
        return 0, 0, ""
    tokenizer, judged = judge_expected(recipe, layout.folder)
    wrong = [one for one in judged if not one.right]
    if not wrong:
        return len(judged), 0, ""
    reason = _reason(recipe, layout.folder, tokenizer, wrong)
    return len(judged), len(wrong), f"the first is {wrong[0].item.text!r}: {reason}"


def answer_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """A test set of which no expected answer would be judged right."""
    checked, wrong, first = _unjudgeable(recipe, layout)
    if wrong == checked > 0:
        yield (
            f"task: all {checked:,} expected answers that were checked are judged wrong, so that "
            f"every model has an accuracy of 0; {first}"
        )


def find_unjudgeable_answers(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Some expected answers that would be judged wrong."""
    checked, wrong, first = _unjudgeable(recipe, layout)
    if 0 < wrong < checked:
        yield (
            f"task: {wrong:,} of {checked:,} expected answers that were checked are judged wrong "
            f"whatever a model says; {first}"
        )


def _count_cut_answers(recipe: Recipe, layout: Layout) -> tuple[int, int, int]:
    """Training examples checked, those of which no token of the answer is kept, and the tokens that
    keep at least one token in all but ``MOST_CUT_ANSWERS`` of them."""
    if layout.folder is None or recipe.adapt is None or not data_is_here(recipe):
        return 0, 0, 0
    records = spread_records(recipe, "train", CHECKED_ITEMS)
    texts = [(record.prompt, record.answer) for _, _, record in records]
    examples = Examples(load_tokenizer(layout.folder), texts, recipe.task.sequence_length)
    prompts = sorted(example.skip for example in examples)
    enough = prompts[int((1 - MOST_CUT_ANSWERS) * (len(prompts) - 1))] + 1
    return len(prompts), sum(example.has_no_answer for example in examples), enough


def cut_answer_faults(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """A sequence length that leaves too many training examples without an answer."""
    checked, cut, enough = _count_cut_answers(recipe, layout)
    if cut > MOST_CUT_ANSWERS * checked:
        yield (
            f"task.sequence_length: found {recipe.task.sequence_length}; {cut:,} of {checked:,} "
            f"training examples that were checked ({cut / checked:.1%}) have a prompt that long, "
            f"so that their answer is cut off entirely; at most {MOST_CUT_ANSWERS:.0%} are allowed,"
            f" which takes more than {enough}"
        )


def find_cut_answers(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """A few training examples whose answer is cut off."""
    checked, cut, _ = _count_cut_answers(recipe, layout)
    if 0 < cut <= MOST_CUT_ANSWERS * checked:
        yield (
            f"task.sequence_length: found {recipe.task.sequence_length}; the answer of {cut:,} of "
            f"{checked:,} training examples that were checked is cut off entirely"
        )


def find_repeated_items(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Test items that are training items, too."""
    if not data_is_here(recipe):
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
            "accuracies tell what was learned by heart"
        )


def _names(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


def find_doubled_start(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """Prompts that begin with the start token which the tokenizer adds by itself."""
    if layout.folder is None or not data_is_here(recipe):
        return
    tokenizer = load_tokenizer(layout.folder)
    records = spread_records(recipe, "test", CHECKED_ITEMS)
    doubled = [r.prompt for _, _, r in records if begins_twice(tokenizer, r.prompt)]
    if doubled:
        yield (
            f"task: {len(doubled):,} of {len(records):,} prompts that were checked begin with "
            f"{tokenizer.bos_token!r}, which the tokenizer adds by itself; one start token is "
            "trained and scored; give runtimes the prompts without it"
        )

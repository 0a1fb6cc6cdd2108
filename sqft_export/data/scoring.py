"""What models are asked about items, and whether what they say is right."""

import re
from dataclasses import dataclass
from typing import Any

from sqft_export.data.datasets import number_of, plain_number
from sqft_export.data.items import Item
from sqft_export.data.stops import cut_at_stop, stop_pieces, stop_texts
from sqft_export.recipe.schema import Dataset, Problems, Recipe, Text

NUMBER = re.compile(r"-?\d+\.?\d*")
NUMBER_TOLERANCE = 1e-3


def questions(
    recipe: Recipe,
    items: list[Item],
    stop: list[int],
    tokenizer: Any = None,
    context: int | None = None,
) -> dict[str, Any]:
    """What ``likelihood.score`` is asked about items, as plain JSON; no tokenizer is needed there.

    Items with choices are asked for the likelihood of each, others for a generated answer, plain
    text for neither.

    :param stop: ids that end an answer.
    :param tokenizer: whose tokens the task's stop texts are made of; None: answers are cut there
        when they are judged, and generated beyond.
    :param context: most tokens of prompt and answer together; None: no limit.
    """
    task, texts = recipe.task, stop_texts(recipe.task)
    generated = [i for i in items if i.text is not None and i.scoring != "choice"]
    return {
        "prompts": [item.prompt for item in items],
        "targets": [item.target for item in items],
        "asked": [item.prompt for item in generated],
        "contexts": [context for item in items for context, _ in item.choices],
        "continuations": [continuation for item in items for _, continuation in item.choices],
        "max_new_tokens": 0 if isinstance(task, Text) else task.max_new_tokens,
        "stop": stop,
        "stop_texts": list(texts),
        "stop_pieces": stop_pieces(tokenizer, texts) if generated else {},
        "context": context,
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
        if item.scoring == "choice":
            sums = [next(likelihoods) for _ in item.choices]
            best = max(range(len(sums)), key=sums.__getitem__)
            means = [s / n for s, n in zip(sums, item.lengths, strict=True)]
            best_mean = max(range(len(means)), key=means.__getitem__)
            right = best == item.right, best_mean == item.right
            said = item.labels[best]
            judged.append(Judged(item, said, *right))
            continue
        said = decode_answer(tokenizer, next(answers), recipe.task)
        same = is_right(recipe.task, said, item)
        judged.append(Judged(item, said, same, same))
    return judged


def decode_answer(tokenizer: Any, ids: list[int], task: Problems | Dataset | Text) -> str:
    """What a model said, up to the task's first stop text.

    Only start, end and padding tokens are left out, and blanks stay as they are: an expected answer
    may have other special tokens, or a blank before a mark.
    """
    silent = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    text = tokenizer.decode(
        [token for token in ids if token not in silent],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return cut_at_stop(text, stop_texts(task))


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
    """Whether a generated answer is the expected one up to its first stop text, by the item's way
    of scoring."""
    assert item.text is not None
    said = cut_at_stop(said, stop_texts(task))
    if item.scoring == "exact":
        final = task.final if isinstance(task, Problems) else None
        return final_answer(said, final) == final_answer(item.text, final)
    if item.scoring == "mark":
        # lm-eval's strict match leaves commas, dollar signs and a full stop out, and no more.
        marked = re.search(r"#### (-?[0-9.,]+)", said)
        return marked is not None and marked[1].replace(",", "").removesuffix(".") == item.text
    numbers, expected = NUMBER.findall(said.replace(",", "")), number_of(item.text)
    assert expected is not None  # a row without a number was refused when it was read
    return bool(numbers) and abs(float(numbers[-1]) - expected) <= NUMBER_TOLERANCE


def final_answer(text: str, final: str | None) -> str:
    """What is compared: all that follows the last ``final`` mark, a number in its plain form."""
    return plain_number(text.rsplit(final, 1)[-1] if final else text)

"""Scoring of items: the request to a model, and the judgement of its answers."""

import re
from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import Field, Strict

from sqft_export.data.answers import AnswerScore, make_score
from sqft_export.data.datasets import parse_number, plain_number
from sqft_export.data.items import Item
from sqft_export.data.stops import cut_at_stop, stop_pieces, stop_texts
from sqft_export.documents import Document
from sqft_export.recipe.schema import Chat, Problems, Task, Text
from sqft_export.recipe.sections import TaskSections

NUMBER = re.compile(r"-?\d+\.?\d*")
NUMBER_TOLERANCE = 1e-3
RIGHT_SCORE = 0.5  # lowest score of a chat answer that counts as right in paired tests


class AnswerDecoder(Protocol):
    """The parts of a tokenizer that turn a generated answer into text."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def decode(
        self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        """Return the text of token ids."""


class ScoringRequest(Document):
    """Requests to score a model on items, answered by ``likelihood.score``.

    prompts, targets: perplexity is measured on each target after its prompt.
    asked: prompts whose answer is generated, of at most ``max_new_tokens`` tokens.
    contexts, continuations: the log-likelihood of each continuation is requested.
    stop: token ids that end an answer.
    stop_texts: texts that end an answer.
    stop_pieces: token id -> text of tokens that can be part of a stop text.
    context: largest number of tokens of prompt plus answer; None: no limit.
    """

    prompts: list[list[int]]
    targets: list[list[int]]
    asked: list[list[int]]
    contexts: list[list[int]]
    continuations: list[list[int]]
    max_new_tokens: int
    stop: list[int]
    stop_texts: list[str]
    stop_pieces: dict[str, str]
    context: int | None


class Answers(Document):
    """A model's answers to a request.

    answers: ids of every generated answer.
    likelihoods: log-likelihood of every continuation.
    """

    answers: list[list[int]] = Field(default_factory=list)
    likelihoods: list[float] = Field(default_factory=list)


class Scores(Answers):
    """Answers, the perplexity of the targets, and the share of their tokens that are the argmax.

    perplexity_interval: 95 % interval over items; None for a single item.
    """

    perplexity: float
    perplexity_interval: Annotated[tuple[float, float], Strict(False)] | None = None
    token_accuracy: float


class SetAccuracy(Document):
    """Accuracy on one set; normalized: likelihoods are divided by the length of the choices."""

    accuracy: float
    accuracy_normalized: float
    items: int


def questions(
    recipe: TaskSections,
    items: list[Item],
    stop: list[int],
    tokenizer: object = None,
    context: int | None = None,
) -> ScoringRequest:
    """Return the request to ``likelihood.score`` for these items.

    The process that answers it needs no tokenizer. It returns a likelihood per choice for items
    with choices, and a generated answer for other items; plain text needs neither.

    :param stop: token ids that end an answer.
    :param tokenizer: tokenizer of the model, to find the task's stop texts during generation; None:
        generation continues after a stop text, and the answer is cut when it is judged.
    :param context: largest number of tokens of prompt plus answer; None: no limit.
    """
    task, texts = recipe.task, stop_texts(recipe.task)
    generated = [i for i in items if i.text is not None and i.scoring != "choice"]
    return ScoringRequest(
        prompts=[item.prompt for item in items],
        targets=[item.target for item in items],
        asked=[item.prompt for item in generated],
        contexts=[context for item in items for context, _ in item.choices],
        continuations=[continuation for item in items for _, continuation in item.choices],
        max_new_tokens=0 if isinstance(task, Text) else task.max_new_tokens,
        stop=stop,
        stop_texts=list(texts),
        stop_pieces=stop_pieces(tokenizer, texts) if generated else {},
        context=context,
    )


@dataclass(frozen=True)
class Judged:
    """The judgement of one item.

    answer: the generated answer, or the label of the choice with the highest likelihood.
    right: whether the answer is right; with a score, whether it is at least ``RIGHT_SCORE``.
    right_normalized: the same with likelihoods divided by the length of the choices; equal to
        ``right`` for generated answers.
    score: score of a chat answer, from 0 to 1; None for other tasks.
    """

    item: Item
    answer: str
    right: bool
    right_normalized: bool
    score: float | None = None

    @property
    def points(self) -> float:
        """Return the points of the answer; the accuracy is their mean."""
        return float(self.right) if self.score is None else self.score


def judge(
    recipe: TaskSections, items: list[Item], found: Answers, tokenizer: AnswerDecoder
) -> list[Judged]:
    """Judge the answers to :func:`questions`; plain text has none and is skipped."""
    answers, likelihoods = iter(found.answers), iter(found.likelihoods)
    judged, measure = [], answer_score(recipe)
    for item in items:
        if item.text is None:
            continue
        if item.scoring == "choice":
            sums = [next(likelihoods) for _ in item.choices]
            best = max(range(len(sums)), key=sums.__getitem__)
            means = [s / n for s, n in zip(sums, item.lengths, strict=True)]
            best_mean = max(range(len(means)), key=means.__getitem__)
            right = best == item.right, best_mean == item.right
            judged.append(Judged(item, item.labels[best], *right))
            continue
        answer = decode_answer(tokenizer, next(answers), recipe.task)
        if measure is not None:
            points = measure(item.text, answer)
            correct = points >= RIGHT_SCORE
            judged.append(Judged(item, answer, correct, correct, points))
            continue
        correct = is_right(recipe.task, answer, item)
        judged.append(Judged(item, answer, correct, correct))
    return judged


def answer_score(recipe: TaskSections) -> AnswerScore | None:
    """Return the score that a chat task names; None for other tasks.

    :raises UserError: if its pattern or its file is not valid.
    """
    task = recipe.task
    if not isinstance(task, Chat):
        return None
    file = recipe.resolve(task.score_file) if task.score_file else None
    return make_score(task.score, task.pattern, file)


def decode_answer(tokenizer: AnswerDecoder, ids: list[int], task: Task) -> str:
    """Return a generated answer as text, up to the task's first stop text.

    Start, end and padding tokens are removed. Other special tokens and blanks are kept, because an
    expected answer may contain other special tokens, or a blank before a mark.
    """
    removed = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    text = tokenizer.decode(
        [token for token in ids if token not in removed],
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    return cut_at_stop(text, stop_texts(task))


def accuracy_of(judged: list[Judged], scores: Scores) -> float:
    """Return the mean accuracy over the sets; for plain text, the share of correct tokens."""
    if not judged:
        return scores.token_accuracy
    by_set = accuracy_by_set(judged)
    return sum(entry.accuracy for entry in by_set.values()) / len(by_set)


def accuracy_by_set(judged: list[Judged]) -> dict[str, SetAccuracy]:
    """Return the accuracy on every set, by its name."""
    found: dict[str, list[Judged]] = {}
    for entry in judged:
        found.setdefault(entry.item.source, []).append(entry)
    return {
        name: SetAccuracy(
            accuracy=sum(e.points for e in entries) / len(entries),
            accuracy_normalized=sum(e.right_normalized for e in entries) / len(entries),
            items=len(entries),
        )
        for name, entries in found.items()
    }


def is_right(task: Task, answer: str, item: Item) -> bool:
    """Return whether a generated answer, up to its first stop text, is the expected one.

    The item's ``scoring`` says how they are compared; see ``datasets``.
    """
    assert item.text is not None
    answer = cut_at_stop(answer, stop_texts(task))
    if item.scoring == "exact":
        final = task.final if isinstance(task, Problems) else None
        return final_answer(answer, final) == final_answer(item.text, final)
    if item.scoring == "mark":
        # lm-eval's strict match ignores commas, dollar signs and a full stop, but nothing else.
        marked = re.search(r"#### (-?[0-9.,]+)", answer)
        return marked is not None and marked[1].replace(",", "").removesuffix(".") == item.text
    numbers, expected = NUMBER.findall(answer.replace(",", "")), parse_number(item.text)
    assert expected is not None  # reading refuses a row without a number
    return bool(numbers) and abs(float(numbers[-1]) - expected) <= NUMBER_TOLERANCE


def final_answer(text: str, final: str | None) -> str:
    """Return the text after the last ``final`` mark, or all text; numbers in plain form."""
    return plain_number(text.rsplit(final, 1)[-1] if final else text)

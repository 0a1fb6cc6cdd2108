"""Likelihoods of given tokens, and all that items are scored by; needs no torch."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sqft_export.measure.batches import SCORED, batches, by_length, last_logits, padded
from sqft_export.measure.decode import generate
from sqft_export.measure.stops import Stops
from sqft_export.targets import Session

PART = 64  # distributions at once in float64
LIKE = 8  # tokens by which continuations of a batch may differ in length
ALIKE = 2  # by which those of one pass may, and it is not worth another pass


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclass
class Scored:
    """A target after its prompt, and what a pass says of each of its tokens.

    log_probabilities: float64. first: whether the token is the likeliest.
    """

    target: list[int]
    log_probabilities: list[float] = field(default_factory=list)
    first: list[bool] = field(default_factory=list)

    def add(self, logits: np.ndarray) -> None:
        """:param logits: ``[tokens, vocabulary]`` that the next tokens of the target are held
        against."""
        start = len(self.first)
        expected = np.array(self.target[start : start + len(logits)])
        of_expected = logits[np.arange(len(expected)), expected].astype(np.float64)
        largest = logits.max(axis=-1, keepdims=True)
        total = np.exp(logits - largest).sum(axis=-1, dtype=np.float64)
        self.log_probabilities += (of_expected - largest[:, 0] - np.log(total)).tolist()
        self.first += (logits.argmax(axis=-1) == expected).tolist()


def rows_of(targets: list[list[int]]) -> list[Scored]:
    """A row for every target that no other one begins with."""
    rows: list[Scored] = []
    for target in sorted(targets, key=len, reverse=True):
        if not any(row.target[: len(target)] == target for row in rows):
            rows.append(Scored(target))
    return rows


def log_likelihoods(
    session: Session, prompts: list[list[int]], targets: list[list[int]]
) -> list[tuple[float, int]]:
    """Of every target after its prompt: summed log likelihood, and how many tokens rank first.

    Targets of one prompt share the pass over it, and a target that begins another one that one's.
    """
    together: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, target in zip(prompts, targets, strict=True):
        together.setdefault(tuple(prompt), []).append(target)
    groups = {prompt: rows_of(each) for prompt, each in together.items()}
    alone = [(list(prompt), rows[0]) for prompt, rows in groups.items() if len(rows) == 1]
    forked = [(list(prompt), rows) for prompt, rows in groups.items() if len(rows) > 1]
    _score_alone(session, alone)
    _score_forked(session, forked)
    found = []
    for prompt, target in zip(prompts, targets, strict=True):
        count = len(target)
        row = next(r for r in groups[tuple(prompt)] if r.target[:count] == target)
        found.append((sum(row.log_probabilities[:count]), sum(row.first[:count])))
    return found


def _score_alone(session: Session, pairs: list[tuple[list[int], Scored]]) -> None:
    """Prompt and target in one pass; what fills a batch up comes last, where nothing looks."""
    sequences = [prompt + row.target[:-1] for prompt, row in pairs]
    lengths = [len(sequence) for sequence in sequences]
    for indices in batches(session, lengths, by_length(lengths), SCORED):
        session.reset()
        batch = padded([sequences[i] for i in indices], "right")
        length = batch.ids.shape[1]
        last = length - min(len(pairs[i][0]) for i in indices) + 1
        logits = session.forward(batch.ids, None, last)
        for one, index in zip(logits, indices, strict=True):
            prompt, row = pairs[index]
            start = len(prompt) - 1 - (length - last)
            row.add(one[start : start + len(row.target)])


Forked = tuple[list[int], list[Scored]]  # a prompt and the targets that follow it


def _score_forked(session: Session, groups: list[Forked]) -> None:
    """A pass over the prompts, then one over the targets that follow each."""
    most = session.max_rows
    groups = [
        (prompt, rows[start : start + most])
        for prompt, rows in groups
        for start in range(0, len(rows), most)
    ]
    lengths = [len(prompt) for prompt, _ in groups]
    longest = [max(len(row.target) for row in rows) for _, rows in groups]
    # Both the prompts of a batch and what follows them are filled up to the longest.
    order = sorted(range(len(groups)), key=lambda i: (longest[i] // LIKE, lengths[i]))
    after = max(
        (len(rows) * tokens for (_, rows), tokens in zip(groups, longest, strict=True)), default=0
    )
    for indices in batches(session, lengths, order, SCORED, 0, after):
        for part in _split_by_rows([groups[i] for i in indices], most):
            _score_batch(session, part)


def _split_by_rows(groups: list[Forked], most: int) -> list[list[Forked]]:
    """Consecutive parts of a batch, each with at most ``most`` targets."""
    parts: list[list[Forked]] = []
    count = most
    for group in groups:
        if count + len(group[1]) > most:
            parts.append([])
            count = 0
        parts[-1].append(group)
        count += len(group[1])
    return parts


def _score_batch(session: Session, groups: list[Forked]) -> None:
    batch = padded([prompt for prompt, _ in groups], session.padding)
    for (_, rows), logits in zip(groups, last_logits(session, batch), strict=True):
        for row in rows:
            row.add(logits[None])
    owners, continued = [], []
    for number, (_, rows) in enumerate(groups):
        longer = [row for row in rows if len(row.target) > 1]
        owners += [number] * len(longer)
        continued += longer
    if continued:
        _score_rest(session, batch.mask[owners], np.array(owners), continued)


def _score_rest(session: Session, mask: np.ndarray, owners: np.ndarray, rows: list[Scored]) -> None:
    """What follows the prompts; where filling up costs, in passes that half of the rows end with
    and the others go on without them."""
    start = 0
    while rows:
        session.select(owners)
        lengths = np.array([len(row.target) - 1 for row in rows])
        half, longest = np.sort(lengths)[[len(lengths) // 2, -1]]
        stop = half if session.computes_padding and longest - half > ALIKE else longest
        part = padded([row.target[start:-1][: stop - start] for row in rows], "right")
        mask = np.concatenate([mask, part.mask], axis=1)
        for one, real, row in zip(session.forward(part.ids, mask), part.mask, rows, strict=True):
            row.add(one[real == 1])
        owners = np.flatnonzero(lengths > stop)
        mask, rows, start = mask[owners], [rows[n] for n in owners], stop


def _summary(found: list[tuple[float, int]], targets: list[list[int]]) -> dict[str, float]:
    count = sum(len(target) for target in targets)
    return {
        "perplexity": math.exp(-sum(total for total, _ in found) / count),
        "token_accuracy": sum(first for _, first in found) / count,
    }


def likelihood(
    session: Session, prompts: list[list[int]], targets: list[list[int]]
) -> dict[str, float]:
    """Perplexity of the targets after their prompts, and the share of their tokens ranked first."""
    return _summary(log_likelihoods(session, prompts, targets), targets)


def score(session: Session, questions: dict[str, Any]) -> dict[str, Any]:
    """Answer ``scoring.questions``: perplexity, generated ids, log likelihood of every choice."""
    prompts, targets = questions["prompts"], questions["targets"]
    found = log_likelihoods(
        session, prompts + questions["contexts"], targets + questions["continuations"]
    )
    result: dict[str, Any] = _summary(found[: len(prompts)], targets)
    result["likelihoods"] = [total for total, _ in found[len(prompts) :]]
    stops = Stops.of_questions(questions)
    result["answers"] = generate(session, questions["asked"], questions["max_new_tokens"], stops)
    return result


def distributions(session: Session, sequences: list[list[int]]) -> np.ndarray:
    """Logarithms of the next-token distribution after every token: float32 ``[tokens, vocab]``."""
    rows = []
    for ids in sequences:
        session.reset()
        logits = session.forward(np.array([ids], np.int64))[0]
        parts = (logits[start : start + PART] for start in range(0, len(ids), PART))
        rows += [log_softmax(part).astype(np.float32) for part in parts]
    return np.concatenate(rows)

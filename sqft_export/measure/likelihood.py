"""Score target tokens after prompts: log-likelihoods, argmax hits and answers. Needs no torch."""

import math
from dataclasses import dataclass, field

import numpy as np

from sqft_export.data.scoring import Scores, ScoringRequest
from sqft_export.machine.processes import ALONE, Processes
from sqft_export.measure.batches import (
    SCORING_PASS_TOKENS,
    last_logits,
    pad_sequences,
    sort_by_length,
    split_batches,
)
from sqft_export.measure.decode import generate
from sqft_export.measure.statistics import perplexity_interval
from sqft_export.measure.stops import Stops
from sqft_export.targets import Session

FLOAT64_CHUNK_TOKENS = 64  # distributions that are in float64 at the same time
LENGTH_BUCKET_TOKENS = 8  # continuations are sorted by length in steps of this size
MAX_LENGTH_GAP = 2  # tokens; a smaller difference does not justify a second pass


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the float64 log-softmax over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@dataclass
class ScoredTarget:
    """A target after its prompt, with the scores of its first tokens.

    log_probabilities: float64, one per scored token.
    first: whether the token is the argmax, one per scored token.
    """

    target: list[int]
    log_probabilities: list[float] = field(default_factory=list)
    first: list[bool] = field(default_factory=list)

    def add(self, logits: np.ndarray) -> None:
        """Score the next tokens of the target.

        :param logits: ``[tokens, vocabulary]``, the predictions of these tokens.
        """
        start = len(self.first)
        expected = np.array(self.target[start : start + len(logits)])
        of_expected = logits[np.arange(len(expected)), expected].astype(np.float64)
        largest = logits.max(axis=-1, keepdims=True)
        total = np.exp(logits - largest).sum(axis=-1, dtype=np.float64)
        self.log_probabilities += (of_expected - largest[:, 0] - np.log(total)).tolist()
        self.first += (logits.argmax(axis=-1) == expected).tolist()


def merge_prefixes(targets: list[list[int]]) -> list[ScoredTarget]:
    """Keep one row per target. A target that is a prefix of another shares its row."""
    rows: list[ScoredTarget] = []
    for target in sorted(targets, key=len, reverse=True):
        if not any(row.target[: len(target)] == target for row in rows):
            rows.append(ScoredTarget(target))
    return rows


def log_likelihoods(
    session: Session,
    prompts: list[list[int]],
    targets: list[list[int]],
    processes: Processes = ALONE,
) -> list[tuple[float, int]]:
    """Return the summed log-likelihood of every target, and how many of its tokens are the argmax.

    Targets with the same prompt share its prefill. A target that is a prefix of another one shares
    its row.

    :param processes: processes that share the batches; each has the model, and gets all results.
    """
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, target in zip(prompts, targets, strict=True):
        by_prompt.setdefault(tuple(prompt), []).append(target)
    groups = {prompt: merge_prefixes(each) for prompt, each in by_prompt.items()}
    single = [(list(prompt), rows[0]) for prompt, rows in groups.items() if len(rows) == 1]
    shared = [(list(prompt), rows) for prompt, rows in groups.items() if len(rows) > 1]
    _score_single(session, single, processes)
    _score_shared(session, shared, processes)
    _share_scores([row for rows in groups.values() for row in rows], processes)
    found = []
    for prompt, target in zip(prompts, targets, strict=True):
        count = len(target)
        row = next(r for r in groups[tuple(prompt)] if r.target[:count] == target)
        found.append((sum(row.log_probabilities[:count]), sum(row.first[:count])))
    return found


def _share_scores(rows: list[ScoredTarget], processes: Processes) -> None:
    """Give every process the scores of all rows."""
    if processes.count == 1:
        return
    mine = {
        number: (row.log_probabilities, row.first) for number, row in enumerate(rows) if row.first
    }
    for scored in processes.gather(mine):
        for number, (log_probabilities, first) in scored.items():
            rows[number].log_probabilities, rows[number].first = log_probabilities, first


def _score_single(
    session: Session, pairs: list[tuple[list[int], ScoredTarget]], processes: Processes
) -> None:
    """Score prompts with one target each, prompt and target in one pass.

    Padding is on the right. A causal model does not attend to it, so no mask is needed.
    """
    sequences = [prompt + row.target[:-1] for prompt, row in pairs]
    lengths = [len(sequence) for sequence in sequences]
    batches = split_batches(session, lengths, sort_by_length(lengths), SCORING_PASS_TOKENS)
    for indices in processes.share(list(batches)):
        session.reset()
        batch = pad_sequences([sequences[i] for i in indices], "right")
        length = batch.ids.shape[1]
        last = length - min(len(pairs[i][0]) for i in indices) + 1
        logits = session.forward(batch.ids, None, last)
        for one, index in zip(logits, indices, strict=True):
            prompt, row = pairs[index]
            start = len(prompt) - 1 - (length - last)
            row.add(one[start : start + len(row.target)])


PromptGroup = tuple[list[int], list[ScoredTarget]]  # a prompt and its targets


def _score_shared(session: Session, groups: list[PromptGroup], processes: Processes) -> None:
    """Score prompts with several targets: one prefill per prompt, then passes over the targets."""
    max_rows = session.max_rows
    groups = [
        (prompt, rows[start : start + max_rows])
        for prompt, rows in groups
        for start in range(0, len(rows), max_rows)
    ]
    lengths = [len(prompt) for prompt, _ in groups]
    longest = [max(len(row.target) for row in rows) for _, rows in groups]
    # Both the prompts and the continuations of a batch are padded to their longest.
    order = sorted(
        range(len(groups)), key=lambda i: (longest[i] // LENGTH_BUCKET_TOKENS, lengths[i])
    )
    after = max(
        (len(rows) * tokens for (_, rows), tokens in zip(groups, longest, strict=True)), default=0
    )
    batches = split_batches(session, lengths, order, SCORING_PASS_TOKENS, 0, after)
    for indices in processes.share(list(batches)):
        for part in _split_by_rows([groups[i] for i in indices], max_rows):
            _score_batch(session, part)


def _split_by_rows(groups: list[PromptGroup], max_rows: int) -> list[list[PromptGroup]]:
    """Split a batch into consecutive parts with at most ``max_rows`` targets each."""
    parts: list[list[PromptGroup]] = []
    count = max_rows
    for group in groups:
        if count + len(group[1]) > max_rows:
            parts.append([])
            count = 0
        parts[-1].append(group)
        count += len(group[1])
    return parts


def _score_batch(session: Session, groups: list[PromptGroup]) -> None:
    """Score a batch of prompts with their targets; the prefill gives each first token's score."""
    batch = pad_sequences([prompt for prompt, _ in groups], session.padding)
    for (_, rows), logits in zip(groups, last_logits(session, batch), strict=True):
        for row in rows:
            row.add(logits[None])
    owners, continued = [], []
    for number, (_, rows) in enumerate(groups):
        longer = [row for row in rows if len(row.target) > 1]
        owners += [number] * len(longer)
        continued += longer
    if continued:
        _score_continuations(session, batch.mask[owners], np.array(owners), continued)


def _score_continuations(
    session: Session, mask: np.ndarray, owners: np.ndarray, rows: list[ScoredTarget]
) -> None:
    """Score the targets' tokens after their first, on the cache of the prompts.

    If the session computes padding (``computes_padding``) and lengths differ much, each pass ends
    at the median length. Rows that are complete then leave the batch.

    :param mask: int64 ``[rows, cached]``.
    :param owners: int64 ``[rows]``, the cache row of each target's prompt.
    """
    start = 0
    while rows:
        session.select(owners)
        lengths = np.array([len(row.target) - 1 for row in rows])
        median, longest = np.sort(lengths)[[len(lengths) // 2, -1]]
        stop = median if session.computes_padding and longest - median > MAX_LENGTH_GAP else longest
        part = pad_sequences([row.target[start:-1][: stop - start] for row in rows], "right")
        mask = np.concatenate([mask, part.mask], axis=1)
        for one, real, row in zip(session.forward(part.ids, mask), part.mask, rows, strict=True):
            row.add(one[real == 1])
        owners = np.flatnonzero(lengths > stop)
        mask, rows, start = mask[owners], [rows[n] for n in owners], stop


@dataclass(frozen=True)
class Likelihood:
    """Perplexity of targets with its 95 % interval, and the share of tokens that are the argmax."""

    perplexity: float
    interval: tuple[float, float] | None
    token_accuracy: float


def likelihood(session: Session, prompts: list[list[int]], targets: list[list[int]]) -> Likelihood:
    """Measure the perplexity of targets after their prompts."""
    return _summary(log_likelihoods(session, prompts, targets), targets)


def _summary(found: list[tuple[float, int]], targets: list[list[int]]) -> Likelihood:
    count = sum(len(target) for target in targets)
    totals = [total for total, _ in found]
    perplexity = math.exp(-sum(totals) / count)
    interval = perplexity_interval(totals, [len(target) for target in targets])
    return Likelihood(perplexity, interval, sum(first for _, first in found) / count)


def score(session: Session, questions: ScoringRequest, processes: Processes = ALONE) -> Scores:
    """Run the requests of ``scoring.questions``.

    :param processes: processes that share the batches; each has the model, and gets all scores.
    """
    prompts, targets = questions.prompts, questions.targets
    found = log_likelihoods(
        session, prompts + questions.contexts, targets + questions.continuations, processes
    )
    of_targets = _summary(found[: len(prompts)], targets)
    stops = Stops.from_questions(questions)
    return Scores(
        perplexity=of_targets.perplexity,
        perplexity_interval=of_targets.interval,
        token_accuracy=of_targets.token_accuracy,
        likelihoods=[total for total, _ in found[len(prompts) :]],
        answers=generate(session, questions.asked, questions.max_new_tokens, stops, processes),
    )


def distributions(session: Session, sequences: list[list[int]]) -> np.ndarray:
    """Return the next-token log-probabilities after every token: float32 ``[tokens, vocab]``."""
    rows = []
    for ids in sequences:
        session.reset()
        logits = session.forward(np.array([ids], np.int64))[0]
        for start in range(0, len(ids), FLOAT64_CHUNK_TOKENS):
            chunk = logits[start : start + FLOAT64_CHUNK_TOKENS]
            rows.append(log_softmax(chunk).astype(np.float32))
    return np.concatenate(rows)

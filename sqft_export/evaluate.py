"""Score and time a model through the one interface of ``targets.Session``; needs no torch.

Batches are formed of items of equal length, so that nothing is padded and every runtime computes
on the very same inputs.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from sqft_export.targets import Session


def equal_lengths(sequences: list[list[int]], batch: int) -> Iterator[list[int]]:
    """Indices of up to ``batch`` sequences of the same length, all of them once."""
    by_length: dict[int, list[int]] = {}
    for index, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(index)
    for length in sorted(by_length):
        indices = by_length[length]
        for start in range(0, len(indices), batch):
            yield indices[start : start + batch]


def generate(
    session: Session, prompts: list[list[int]], new_tokens: int, stop: list[int], batch: int = 64
) -> list[list[int]]:
    """Greedy continuation of every prompt, up to ``new_tokens`` or before a ``stop`` id."""
    results: list[list[int]] = [[] for _ in prompts]
    for indices in equal_lengths(prompts, batch):
        session.reset()
        ids = np.array([prompts[i] for i in indices], np.int64)
        tokens = []
        ended = np.zeros(len(indices), bool)
        for _ in range(new_tokens):
            ids = session.forward(ids)[:, -1].argmax(axis=-1).reshape(-1, 1).astype(np.int64)
            tokens.append(ids[:, 0])
            ended |= np.isin(ids[:, 0], stop)
            if ended.all():
                break
        for row, index in enumerate(indices):
            said = [int(step[row]) for step in tokens]
            end = next((at for at, token in enumerate(said) if token in stop), len(said))
            results[index] = said[:end]
    return results


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_likelihoods(
    session: Session, prompts: list[list[int]], targets: list[list[int]], batch: int = 32
) -> list[tuple[float, int]]:
    """Of every target after its prompt: summed log likelihood, and how many tokens rank first."""
    sequences = [p + t for p, t in zip(prompts, targets, strict=True)]
    found = [(0.0, 0)] * len(sequences)
    for indices in equal_lengths(sequences, batch):
        session.reset()
        ids = np.array([sequences[i] for i in indices], np.int64)
        logits = session.forward(ids)
        for row, index in enumerate(indices):
            start = len(prompts[index])
            expected = ids[row, start:]
            scores = _log_softmax(logits[row, start - 1 : -1])
            total = float(scores[np.arange(len(expected)), expected].sum())
            found[index] = total, int((scores.argmax(axis=-1) == expected).sum())
    return found


def likelihood(
    session: Session, prompts: list[list[int]], targets: list[list[int]]
) -> dict[str, float]:
    """Perplexity of the targets after their prompts, and the share of their tokens ranked first."""
    found = log_likelihoods(session, prompts, targets)
    count = sum(len(target) for target in targets)
    return {
        "perplexity": math.exp(-sum(total for total, _ in found) / count),
        "token_accuracy": sum(first for _, first in found) / count,
    }


def score(session: Session, questions: dict[str, Any]) -> dict[str, Any]:
    """Answer ``tasks.questions``: perplexity, generated ids, log likelihood of every choice."""
    result: dict[str, Any] = likelihood(session, questions["prompts"], questions["targets"])
    result["answers"] = generate(
        session, questions["asked"], questions["max_new_tokens"], questions["stop"]
    )
    pairs = log_likelihoods(session, questions["contexts"], questions["continuations"])
    result["likelihoods"] = [total for total, _ in pairs]
    return result


def distributions(session: Session, sequences: list[list[int]]) -> np.ndarray:
    """Logarithms of the next-token distribution after every token: float32 ``[tokens, vocab]``."""
    rows = []
    for ids in sequences:
        session.reset()
        rows.append(_log_softmax(session.forward(np.array([ids], np.int64))[0]))
    return np.concatenate(rows).astype(np.float32)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile in milliseconds."""
    low, middle, high = np.percentile(np.array(seconds) * 1e3, [10, 50, 90])
    return {"median_ms": float(middle), "p10_ms": float(low), "p90_ms": float(high)}


def latency(session: Session, prompt: list[int], new_tokens: int, repeats: int) -> dict[str, Any]:
    """Batch-1 latency after one warm-up round.

    TTFT: the forward pass over the prompt and the choice of the first token. TPOT: one forward
    pass over one token and the choice of the next, over all ``repeats * (new_tokens - 1)``.
    """
    first, later = [], []
    for repeat in range(repeats + 1):
        session.reset()
        ids = np.array([prompt], np.int64)
        times = []
        for _ in range(new_tokens):
            started = time.perf_counter()
            ids = session.forward(ids)[:, -1].argmax(axis=-1).reshape(1, 1).astype(np.int64)
            times.append(time.perf_counter() - started)
        if repeat > 0:
            first.append(times[0])
            later += times[1:]
    return {"ttft": spread(first), "tpot": spread(later)}


def _decode(session: Session, ids: np.ndarray, new_tokens: int) -> list[float]:
    """Seconds of the pass over the prompts and of each later one, greedy."""
    session.reset()
    seconds = []
    for _ in range(new_tokens):
        started = time.perf_counter()
        ids = session.forward(ids)[:, -1].argmax(axis=-1).reshape(-1, 1).astype(np.int64)
        seconds.append(time.perf_counter() - started)
    return seconds


def profile(
    session: Session,
    prompt_tokens: list[int],
    new_tokens: int,
    batches: list[int],
    vocabulary: int,
) -> dict[str, Any]:
    """TTFT at every prompt length, TPOT, tokens per second at every batch size.

    The prompts are made of all tokens in turn: what they say has no part in how long it takes.

    :return: ``ttft_ms`` and ``tokens_per_second`` by length and batch (as strings), ``tpot_ms`` of
        every pass, ``passes`` measured in all, times their batch.
    """

    def prompt(length: int, batch: int = 1) -> np.ndarray:
        return np.tile(np.arange(length, dtype=np.int64) * 7 % vocabulary, (batch, 1))

    _decode(session, prompt(prompt_tokens[0]), 4)
    first = _decode(session, prompt(prompt_tokens[0]), new_tokens)
    ttft = {str(prompt_tokens[0]): [1e3 * first[0]]}
    for length in prompt_tokens[1:]:
        ttft[str(length)] = [1e3 * _decode(session, prompt(length), 1)[0]]
    rates = {}
    for batch in batches:
        later = _decode(session, prompt(prompt_tokens[0], batch), new_tokens)[1:]
        rates[str(batch)] = batch * len(later) / sum(later)
    passes = new_tokens + len(prompt_tokens) - 1 + new_tokens * sum(batches)
    return {
        "ttft_ms": ttft,
        "tpot_ms": [1e3 * s for s in first[1:]],
        "tokens_per_second": rates,
        "passes": passes,
    }

"""Likelihoods of given tokens, and all that items are scored by; needs no torch."""

import math
from typing import Any

import numpy as np

from sqft_export.measure.decode import equal_lengths, generate
from sqft_export.targets import Session


def log_softmax(logits: np.ndarray) -> np.ndarray:
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
            scores = log_softmax(logits[row, start - 1 : -1])
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
    """Answer ``scoring.questions``: perplexity, generated ids, log likelihood of every choice."""
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
        rows.append(log_softmax(session.forward(np.array([ids], np.int64))[0]))
    return np.concatenate(rows).astype(np.float32)

"""Continue prompts and time a model through the one interface of ``targets.Session``; needs no
torch."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from sqft_export.measure.batches import CACHED, batches, by_length, last_logits, padded
from sqft_export.measure.stops import Stops
from sqft_export.targets import Session

DONE = 0.25  # share of a batch that has ended, and the others go on without it
FEW = 0.125  # share of a batch that is left, and it is not worth a pass of its own


def greedy(
    session: Session, ids: np.ndarray, new_tokens: int
) -> Iterator[tuple[np.ndarray, float]]:
    """Int64 ``[batch]``, the likeliest next token of every row, and the seconds of its pass.

    :param ids: int64 ``[batch, length]``, the prompts; the first pass is over them.
    """
    session.reset()
    for _ in range(new_tokens):
        started = time.perf_counter()
        chosen = session.argmax_tokens(ids)
        ids = chosen.reshape(-1, 1)
        yield chosen, time.perf_counter() - started


def generate(
    session: Session, prompts: list[list[int]], new_tokens: int, stop: list[int] | Stops
) -> list[list[int]]:
    """Greedy continuation of every prompt, up to ``new_tokens``, before a stop id or after a stop
    text; prompt and continuation never exceed the context of ``stop``.

    Prompts of like lengths go together; of a batch only those go on that have not ended, and the
    few that are left at last wait for those of the other batches, to go on together.
    """
    stops = stop if isinstance(stop, Stops) else Stops(stop)
    rooms = [stops.room(prompt, new_tokens) for prompt in prompts]
    said: list[list[int]] = [[] for _ in prompts]
    waiting = [index for index, room in enumerate(rooms) if room]
    while waiting:
        lengths = [len(prompts[i]) + len(said[i]) for i in waiting]
        groups = list(batches(session, lengths, by_length(lengths), CACHED, new_tokens, 1))
        few = FEW if len(groups) > 1 else 0.0
        chosen = [[waiting[place] for place in group] for group in groups]
        waiting = [
            index
            for group in chosen
            for index in _continue(session, prompts, said, group, rooms, stops, few)
        ]
    return said


def _continue(
    session: Session,
    prompts: list[list[int]],
    said: list[list[int]],
    group: list[int],
    rooms: list[int],
    stops: Stops,
    few: float,
) -> list[int]:
    """Go on with a batch, adding to what each has ``said``; those that were left when they were so
    ``few`` a share of it."""
    batch = padded([prompts[i] + said[i] for i in group], session.padding)
    logits, mask = last_logits(session, batch), batch.mask
    running = np.array(group)  # the prompt of every row of the cache
    ended = np.zeros(len(group), bool)  # of every row of the cache
    while True:
        chosen = logits.argmax(axis=-1).astype(np.int64)
        ended |= np.isin(chosen, stops.ids)
        for row in np.flatnonzero(~ended):
            said[running[row]].append(int(chosen[row]))
        ended |= [len(said[i]) == rooms[i] or stops.at_text(said[i]) for i in running]
        left = running[~ended]
        if len(left) <= few * len(group):
            return left.tolist()
        if ended.mean() >= DONE:
            rows = np.flatnonzero(~ended)
            session.select(rows)
            mask, running, chosen, ended = mask[rows], running[rows], chosen[rows], ended[rows]
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
        logits = session.forward(chosen.reshape(-1, 1), mask, 1)[:, -1]


def _seconds(session: Session, ids: np.ndarray, new_tokens: int) -> list[float]:
    """Of the pass over the prompts and of each later one, greedy."""
    return [seconds for _, seconds in greedy(session, ids, new_tokens)]


def measure_latency(
    session: Session, prompt: list[int], new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Batch-1 latency after one warm-up round, every sample in milliseconds.

    TTFT: the forward pass over the prompt and the choice of the first token. TPOT: one forward
    pass over one token and the choice of the next, over all ``repeats * (new_tokens - 1)``.
    """
    ids = np.array([prompt], np.int64)
    _, *rounds = [_seconds(session, ids, new_tokens) for _ in range(repeats + 1)]
    return {
        "ttft_samples": [1e3 * seconds[0] for seconds in rounds],
        "tpot_samples": [1e3 * s for seconds in rounds for s in seconds[1:]],
    }


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

    _seconds(session, prompt(prompt_tokens[0]), 4)
    first = _seconds(session, prompt(prompt_tokens[0]), new_tokens)
    ttft = {str(prompt_tokens[0]): [1e3 * first[0]]}
    for length in prompt_tokens[1:]:
        _seconds(session, prompt(length), 1)  # what is new for this length is made now
        ttft[str(length)] = [1e3 * _seconds(session, prompt(length), 1)[0]]
    rates = {}
    for batch in batches:
        later = _seconds(session, prompt(prompt_tokens[0], batch), new_tokens)[1:]
        rates[str(batch)] = batch * len(later) / sum(later)
    passes = new_tokens + 2 * (len(prompt_tokens) - 1) + new_tokens * sum(batches)
    return {
        "ttft_ms": ttft,
        "tpot_ms": [1e3 * s for s in first[1:]],
        "tokens_per_second": rates,
        "passes": passes,
    }

"""Continue prompts and time a model through ``targets.Session``. Needs no torch."""

import time
from collections.abc import Iterator

import numpy as np

from sqft_export.machine.processes import ALONE, Processes
from sqft_export.measure.batches import (
    MAX_CACHE_TOKENS,
    last_logits,
    pad_sequences,
    sort_by_length,
    split_batches,
)
from sqft_export.measure.jobs import LatencyRequest, LatencySamples, Profile, ProfileRequest
from sqft_export.measure.stops import Stops
from sqft_export.targets import Session

# Drop the ended rows from the cache once they are this share of its rows.
DROP_ENDED_SHARE = 0.25
# Stop a batch once this share of it runs. The rest continues with the rest of other batches.
MIN_RUNNING_SHARE = 0.125
FIRST_WARMUP_TOKENS = 4
BATCH_WARMUP_TOKENS = 2  # a pass over the prompts and one over a token: GPUs compile both


def greedy(
    session: Session, ids: np.ndarray, new_tokens: int
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield the argmax token of every row, int64 ``[batch]``, and the seconds of its pass.

    :param ids: int64 ``[batch, length]``, the prompts. The first pass is the prefill.
    """
    session.reset()
    for _ in range(new_tokens):
        started = time.perf_counter()
        chosen = session.argmax_tokens(ids)
        ids = chosen.reshape(-1, 1)
        yield chosen, time.perf_counter() - started


def generate(
    session: Session,
    prompts: list[list[int]],
    new_tokens: int,
    stop: list[int] | Stops,
    processes: Processes = ALONE,
) -> list[list[int]]:
    """Return the greedy continuation of every prompt, at most ``new_tokens`` tokens.

    A continuation ends before a stop id or after a stop text. Prompt and continuation never exceed
    the context of ``stop``.

    Prompts of similar lengths share a batch. Rows that end leave their batch. The last few rows of
    each batch wait and continue in a batch of such rows.

    :param processes: processes that share the batches; each has the model, and gets all answers.
    """
    stops = stop if isinstance(stop, Stops) else Stops(stop)
    limits = [stops.max_answer_tokens(prompt, new_tokens) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = [index for index, limit in enumerate(limits) if limit]
    while waiting:
        lengths = [len(prompts[i]) + len(answers[i]) for i in waiting]
        order = sort_by_length(lengths)
        groups = list(split_batches(session, lengths, order, MAX_CACHE_TOKENS, new_tokens, 1))
        share = MIN_RUNNING_SHARE if len(groups) > 1 else 0.0
        batches = [[waiting[position] for position in group] for group in groups]
        made = []
        for batch in processes.share(batches):
            left = _continue_batch(session, prompts, answers, batch, limits, stops, share)
            made.append(({index: answers[index] for index in batch}, left))
        waiting = []
        for continued, left in processes.gather_items(made):
            waiting += left
            for index, answer in continued.items():
                answers[index] = answer
    return answers


def _continue_batch(
    session: Session,
    prompts: list[list[int]],
    answers: list[list[int]],
    group: list[int],
    limits: list[int],
    stops: Stops,
    min_share: float,
) -> list[int]:
    """Continue a batch greedily and append to ``answers``.

    :param group: indices of the prompts of the batch.
    :param limits: largest number of answer tokens, for every prompt.
    :return: the indices that still run once they are at most ``min_share`` of the batch.
    """
    batch = pad_sequences([prompts[i] + answers[i] for i in group], session.padding)
    logits, mask = last_logits(session, batch), batch.mask
    running = np.array(group)  # the prompt index of every row of the cache
    ended = np.zeros(len(group), bool)  # for every row of the cache
    while True:
        chosen = logits.argmax(axis=-1).astype(np.int64)
        ended |= np.isin(chosen, stops.ids)
        for row in np.flatnonzero(~ended):
            answers[running[row]].append(int(chosen[row]))
        ended |= [
            len(answers[i]) == limits[i] or stops.ends_with_stop_text(answers[i]) for i in running
        ]
        left = running[~ended]
        if len(left) <= min_share * len(group):
            return left.tolist()
        if ended.mean() >= DROP_ENDED_SHARE:
            rows = np.flatnonzero(~ended)
            session.select(rows)
            mask, running, chosen, ended = mask[rows], running[rows], chosen[rows], ended[rows]
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
        logits = session.forward(chosen.reshape(-1, 1), mask, 1)[:, -1]


def _pass_seconds(session: Session, ids: np.ndarray, new_tokens: int) -> list[float]:
    """Return the seconds of the prefill and of each later pass of a greedy decode."""
    return [seconds for _, seconds in greedy(session, ids, new_tokens)]


def measure_latency(session: Session, request: LatencyRequest) -> LatencySamples:
    """Measure batch-1 latency after one warm-up round.

    :return: ``ttft``: one per repeat, the forward pass over the prompt and the argmax of the first
        token. ``tpot``: ``repeats * (new_tokens - 1)``, each one forward pass over one token and
        the argmax of the next.
    """
    ids, repeats = np.array([request.prompt], np.int64), request.repeats
    _, *rounds = [_pass_seconds(session, ids, request.new_tokens) for _ in range(repeats + 1)]
    return LatencySamples(
        ttft=[1e3 * seconds[0] for seconds in rounds],
        tpot=[1e3 * s for seconds in rounds for s in seconds[1:]],
    )


def profile(session: Session, request: ProfileRequest) -> Profile:
    """Measure TTFT at every prompt length, TPOT, and tokens per second at every batch size.

    Tokens per second are measured for the pass over the prompts and for decode.

    The prompts are synthetic token ids: latency does not depend on their content.
    """
    prompt_tokens, new_tokens = request.prompt_tokens, request.new_tokens

    def prompt(length: int, batch: int = 1) -> np.ndarray:
        return np.tile(np.arange(length, dtype=np.int64) * 7 % request.vocabulary, (batch, 1))

    _pass_seconds(session, prompt(prompt_tokens[0]), FIRST_WARMUP_TOKENS)
    first = _pass_seconds(session, prompt(prompt_tokens[0]), new_tokens)
    ttft = {str(prompt_tokens[0]): [1e3 * first[0]]}
    for length in prompt_tokens[1:]:
        _pass_seconds(session, prompt(length), 1)  # warm-up: allocations for this length
        ttft[str(length)] = [1e3 * _pass_seconds(session, prompt(length), 1)[0]]
    rates, prompt_rates = {}, {}
    for batch in request.batches:
        ids = prompt(prompt_tokens[0], batch)
        _pass_seconds(session, ids, BATCH_WARMUP_TOKENS)  # allocations for this batch size
        prefill, *later = _pass_seconds(session, ids, new_tokens)
        rates[str(batch)] = batch * len(later) / sum(later)
        prompt_rates[str(batch)] = ids.size / prefill
    rows = sum(request.batches)
    passes = FIRST_WARMUP_TOKENS + new_tokens + 2 * (len(prompt_tokens) - 1)
    passes += (BATCH_WARMUP_TOKENS + new_tokens) * rows
    return Profile(
        ttft_ms=ttft,
        tpot_ms=[1e3 * s for s in first[1:]],
        tokens_per_second=rates,
        prompt_tokens_per_second=prompt_rates,
        passes=passes,
    )

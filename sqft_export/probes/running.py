"""Run the prompts of a probe in a session and compare each position. Needs no torch.

The continuation is fed token by token, whatever the session chooses, so every step is comparable.
Up to the first differing token this is greedy decoding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from sqft_export.measure.likelihood import log_softmax
from sqft_export.probes.document import ProbePosition, ProbePrompt
from sqft_export.targets import Session

LAST_COLUMNS = 3  # last positions of a prompt that are compared
ALL_COLUMNS_TOKENS = 256  # a session computes all logits of shorter prompts, as users' calls do
SAME_VALUES = 0.05  # nats; largest difference of two sorted lists of equal log-probabilities
SMALLEST_MASS = 1e-12  # of a probability, so that its logarithm is finite


@dataclass(frozen=True)
class Compared:
    """One position in a session next to the reference.

    prompt: index of the prompt.
    kl: KL divergence of the session from the reference, in nats; infinite if logits are.
    finite: no logit is NaN or infinite.
    permuted: the largest probabilities are the reference's, but those of other tokens.
    found: the argmax token.
    expected: the reference's.
    margin: log-probability by which the reference prefers ``expected`` to its second token.
    step: number of the generated token; None inside the prompt.
    """

    prompt: int
    position: int
    kl: float
    finite: bool
    permuted: bool
    found: int
    expected: int
    margin: float
    step: int | None


@dataclass
class ProbeComparison:
    """All compared positions of one mode."""

    positions: list[Compared] = field(default_factory=list)

    @property
    def mean_kl(self) -> float:
        """Return the mean without first tokens, whose logits depend on one token only."""
        later = [one.kl for one in self.positions if one.position] or [np.inf]
        return float(np.mean(later))

    @property
    def largest_kl(self) -> float:
        return max((one.kl for one in self.positions), default=float("inf"))

    @property
    def same_top(self) -> int:
        """Return the number of positions with the same argmax token."""
        return sum(one.found == one.expected for one in self.positions)

    @property
    def first_difference(self) -> Compared | None:
        """Return the first generated token that differs."""
        steps = (one for one in self.positions if one.step is not None)
        return next((one for one in steps if one.found != one.expected), None)


def run_prompt(session: Session, prompt: ProbePrompt, by_token: bool) -> Iterator[np.ndarray]:
    """Yield the logits of every stored position, float32 ``[vocabulary]``.

    :param by_token: compute the prompt token by token instead of in one pass.
    """
    wanted = {one.position for one in prompt.positions}
    length = len(prompt.ids)
    if 0 in wanted:
        yield _start(session, prompt.ids[:1])[-1]
    start = _start_by_token if by_token else _start
    logits = start(session, prompt.ids)
    for place in range(max(1, length - len(logits)), length):
        if place in wanted:
            yield logits[place - length]
    for step, token in enumerate(prompt.continuation[:-1]):
        [[following]] = session.forward(np.array([[token]], np.int64), None, 1)
        if length + step in wanted:
            yield following


def _start(session: Session, ids: list[int]) -> np.ndarray:
    """Compute a prompt in one pass; return logits of its last tokens."""
    session.reset()
    last = None if len(ids) <= ALL_COLUMNS_TOKENS else LAST_COLUMNS
    return session.forward(np.array([ids], np.int64), None, last)[0]


def _start_by_token(session: Session, ids: list[int]) -> np.ndarray:
    session.reset()
    logits = [session.forward(np.array([[token]], np.int64), None, 1)[0, 0] for token in ids]
    return np.stack(logits[-LAST_COLUMNS:])


def compare_session(
    session: Session, prompts: list[ProbePrompt], by_token: bool = False
) -> ProbeComparison:
    """Run prompts and compare every stored position with the reference."""
    found = ProbeComparison()
    for number, prompt in enumerate(prompts):
        for logits, stored in zip(
            run_prompt(session, prompt, by_token), prompt.positions, strict=True
        ):
            step = stored.position - len(prompt.ids) + 1
            one = _compare(logits, stored, number, step if step >= 0 else None)
            found.positions.append(one)
    return found


def _compare(logits: np.ndarray, stored: ProbePosition, prompt: int, step: int | None) -> Compared:
    expected, finite = np.array(stored.log_probabilities), bool(np.isfinite(logits).all())
    ids = np.array(stored.ids)
    kl, permuted = float("inf"), False
    if finite and max(stored.ids) < len(logits):
        found = log_softmax(logits)
        kl = divergence_of_stored(expected, found[ids])
        largest = np.sort(found)[::-1][: len(expected)]
        alike = np.abs(largest - expected)[expected > np.log(1e-4)].max(initial=0) < SAME_VALUES
        permuted = bool(alike and np.abs(found[ids] - expected).max() > 1)
    margin = float(expected[0] - expected[1])
    top = int(np.nan_to_num(logits, nan=-np.inf).argmax())
    place = stored.position
    return Compared(prompt, place, kl, finite, permuted, top, stored.ids[0], margin, step)


def divergence_of_stored(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the KL divergence over the stored tokens and the rest of the probability mass.

    :param expected: the reference's log-probabilities of the stored tokens.
    :param found: the session's log-probabilities of the same tokens.
    """
    p, q = np.exp(expected), np.exp(np.maximum(found, np.log(SMALLEST_MASS)))
    rests = np.array([max(SMALLEST_MASS, 1 - part.sum()) for part in (p, q)])
    p, q = np.append(p, rests[0]), np.append(np.maximum(q, SMALLEST_MASS), rests[1])
    return float(max(0.0, (p * np.log(p / q)).sum()))

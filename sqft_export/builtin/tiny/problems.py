"""Word problems with worked answers: the task of the embedded model.

A problem has up to three steps of addition, subtraction or multiplication by one digit. The answer
shows every step, as in GSM8K: ``345+278=623 623-61=562 #### 562``. A *step* ``(a, op, b)`` is held
out if the CRC-32 of its text is a multiple of ten. No training or pretraining problem contains a
held-out step; every test problem starts with one. The model therefore cannot answer from memory.

*Easy* problems have numbers below 100, at most two steps and no multiplication. Pretraining starts
with them; the task is the full problems.
"""

import random
import zlib
from collections.abc import Iterator

NAMES = ["Tom", "Ana", "Ben", "Eva", "Sam", "Mia", "Leo", "Zoe", "Max", "Ida"]
ITEMS = ["apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "stones", "toys"]
GAIN_VERBS = ["buys", "finds", "gets", "wins", "picks"]
LOSS_VERBS = ["gives away", "loses", "sells", "drops", "eats"]
QUESTIONS = [
    "How many {item} does {name} have now?",
    "How many {item} are left with {name}?",
    "What is the number of {item} of {name}?",
]


def is_held_out(a: int, op: str, b: int) -> bool:
    """Return whether only test problems may contain this step; about a tenth of all steps."""
    return zlib.crc32(f"{a}{op}{b}".encode()) % 10 == 0


def _step(rng: random.Random, a: int, easy: bool) -> tuple[str, int]:
    """Draw an operation on ``a`` and its operand; results are in 0 to 1998."""
    if easy:
        if a >= 2 and (a > 99 or rng.random() < 0.5):
            return "-", rng.randint(1, min(a, 99))
        return "+", rng.randint(1, 99)
    choices = ["+"] if a <= 999 else []
    choices += ["-"] if a >= 2 else []
    choices += ["*"] if 2 <= a <= 222 else []
    op = rng.choice(choices)
    highest = {"+": 999, "-": min(a, 999), "*": 9}[op]
    return op, rng.randint(2 if op == "*" else 1, highest)


def _apply(a: int, op: str, b: int) -> int:
    """Return the result of a step."""
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def _sentence(rng: random.Random, name: str, op: str, b: int) -> str:
    """Return one step in words."""
    if op == "*":
        return f"{name} gets {b} times as many."
    verb = rng.choice(GAIN_VERBS if op == "+" else LOSS_VERBS)
    return f"{name} {verb} {b}" + (" more." if op == "+" else " of them.")


def problem(rng: random.Random, held_out: bool, easy: bool) -> dict[str, str]:
    """Return one problem as ``{"question", "answer"}``.

    :param held_out: True for a test problem.
    """
    while True:
        start = rng.randint(2, 99 if easy else 999)
        steps, value = [], start
        for _ in range(rng.choice([1, 2, 2] if easy else [1, 2, 3])):
            op, b = _step(rng, value, easy)
            steps.append((value, op, b))
            value = _apply(*steps[-1])
        flags = [is_held_out(*step) for step in steps]
        if flags[0] if held_out else not any(flags):
            break
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    sentences = [f"{name} has {start} {item}."]
    sentences += [_sentence(rng, name, op, b) for _, op, b in steps]
    sentences.append(rng.choice(QUESTIONS).format(item=item, name=name))
    worked = " ".join(f"{a}{op}{b}={_apply(a, op, b)}" for a, op, b in steps)
    return {"question": " ".join(sentences), "answer": f"{worked} #### {value}"}


def problems(seed: int, held_out: bool, easy: bool = False) -> Iterator[dict[str, str]]:
    """Yield training or test problems without end, from a seed."""
    rng = random.Random(seed)
    while True:
        yield problem(rng, held_out, easy)


def drill(rng: random.Random, easy: bool) -> str:
    """Return three steps of bare arithmetic, none held out: half of the pretraining text."""
    steps: list[str] = []
    while len(steps) < 3:
        a = rng.randint(2, 198 if easy else 1998)
        op, b = _step(rng, a, easy)
        if not is_held_out(a, op, b):
            steps.append(f"{a}{op}{b}={_apply(a, op, b)}")
    return " ".join(steps)

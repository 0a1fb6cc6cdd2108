"""Scores of generated answers against expected ones: 1 is right, 0 is wrong.

exact        equal, without white space around them
normalized   equal without case, punctuation, articles and repeated white space (as in SQuAD)
contains     the normalized answer contains the normalized expected one
regex        a pattern finds the same in both; without a pattern the expected answer is one
json         the same JSON value
json_f1      F1 over the fields of two JSON objects
rouge_l      F1 of ROUGE-L (rouge_score)
bleu         sentence BLEU / 100 (sacrebleu)
file         the function ``score(expected, generated) -> float`` of a Python file
"""

import importlib.util
import json
import math
import re
import string
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from sqft_export.errors import HostError, UserError, one_line
from sqft_export.recipe.schema import ScoreName

AnswerScore = Callable[[str, str], float]
INSTALL_SCORES = "pip install 'sqft-export[scores]'"
ARTICLES = re.compile(r"\b(a|an|the)\b")
FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
MISSING = object()


def make_score(
    name: ScoreName, pattern: str | None = None, file: Path | None = None
) -> AnswerScore:
    """Return the function that scores one answer: ``score(expected, generated)``, in 0 to 1.

    pattern: of ``regex``. file: of ``file``.

    :raises UserError: if the pattern is none, or the file has no such function.
    """
    if name == "file":
        if file is None:
            raise UserError("score: file: name the Python file that has score(expected, generated)")
        return load_user_score(file)
    if name == "regex":
        return partial(score_regex, pattern=_compiled(pattern) if pattern else None)
    if name == "rouge_l":
        _rouge_scorer()
    if name == "bleu":
        _bleu_metric()
    return SCORES[name]


def score_exact(expected: str, generated: str) -> float:
    """Return 1 if both are equal without white space around them."""
    return float(expected.strip() == generated.strip())


def normalize_answer(text: str) -> str:
    """Return lower case, without punctuation, English articles and repeated white space."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(ARTICLES.sub(" ", text).split())


def score_normalized(expected: str, generated: str) -> float:
    """Return 1 if both are equal when normalized."""
    return float(normalize_answer(expected) == normalize_answer(generated))


def score_contains(expected: str, generated: str) -> float:
    """Return 1 if the words of the expected answer are in the generated one, in a row."""
    wanted, found = normalize_answer(expected), normalize_answer(generated)
    return float(f" {wanted} " in f" {found} ") if wanted else float(not found)


def score_regex(expected: str, generated: str, pattern: re.Pattern | None = None) -> float:
    """Return 1 if the last match of a pattern is the same in both.

    The match is its first group, if it has one. An expected answer without a match is compared
    itself. Without a pattern the expected answer is a pattern that the generated one must match.
    """
    if pattern is None:
        return float(_compiled(expected).search(generated) is not None)
    wanted, found = _last_match(pattern, expected), _last_match(pattern, generated)
    return float(found is not None and found == (expected.strip() if wanted is None else wanted))


def score_json(expected: str, generated: str) -> float:
    """Return 1 if both are the same JSON value; a generated one may stand in a code fence."""
    wanted, found = _json_value(expected), _json_value(generated)
    return float(found is not MISSING and _same(wanted, found))


def score_json_f1(expected: str, generated: str) -> float:
    """Return F1 of the fields that have the same place and value in both."""
    wanted, found = (_leaves(_json_value(text)) for text in (expected, generated))
    right = sum(path in found and _same(value, found[path]) for path, value in wanted.items())
    return 2 * right / (len(wanted) + len(found)) if wanted and found else 0.0


def score_json_fields(expected: str, generated: str) -> dict[str, float]:
    """Return field -> score: 1 if both objects have the same value. A field is like ``a.b[0]``."""
    wanted, found = (_leaves(_json_value(text)) for text in (expected, generated))
    return {
        path: float(path in found and _same(value, found[path])) for path, value in wanted.items()
    }


def score_rouge_l(expected: str, generated: str) -> float:
    """Return F1 of the longest common subsequence of words."""
    return float(_rouge_scorer().score(expected, generated)["rougeL"].fmeasure)


def score_bleu(expected: str, generated: str) -> float:
    """Return BLEU of one answer; n-grams that are too long for it are left out."""
    return float(_bleu_metric().sentence_score(generated, [expected]).score) / 100


SCORES: dict[str, AnswerScore] = {
    "exact": score_exact,
    "normalized": score_normalized,
    "contains": score_contains,
    "regex": score_regex,
    "json": score_json,
    "json_f1": score_json_f1,
    "rouge_l": score_rouge_l,
    "bleu": score_bleu,
}


def load_user_score(file: Path) -> AnswerScore:
    """Return ``score`` of a Python file, checked at each call. The file runs as the user.

    :raises UserError: if it can't be loaded, has no such function, or gives no number.
    """
    spec = importlib.util.spec_from_file_location("sqft_export_user_score", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"{file}: not a Python file; score: file needs one")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file}: {type(error).__name__}: {one_line(error)}") from error
    function = getattr(module, "score", None)
    if not callable(function):
        raise UserError(f"{file}: has no function score(expected, generated)")
    return partial(_checked_score, function, file)


def _checked_score(
    function: Callable[..., Any], file: Path, expected: str, generated: str
) -> float:
    call = f"{file}: score({expected[:40]!r}, {generated[:40]!r})"
    try:
        found = function(expected, generated)
    except Exception as error:
        raise UserError(f"{call} raises {type(error).__name__}: {one_line(error)}") from error
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{call} gives {found!r}; a finite number is expected")
    return value


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"score: found the pattern {pattern!r}: {error}") from error


def _last_match(pattern: re.Pattern, text: str) -> str | None:
    found = None
    for match in pattern.finditer(text):
        found = match[1] if pattern.groups else match[0]
    return None if found is None else found.strip()


def _json_value(text: str) -> object:
    """Return the JSON value of a text, or of its last code fence; ``MISSING`` without one."""
    for candidate in (text, *reversed(FENCE.findall(text))):
        try:
            return json.loads(candidate)
        except (ValueError, RecursionError):
            continue
    return MISSING


def _same(one: object, other: object) -> bool:
    """Return whether two JSON values are equal; true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _leaves(value: object, path: str = "") -> dict[str, object]:
    """Return place -> value of all leaves; empty objects and lists are leaves."""
    if value is MISSING:
        return {}
    if isinstance(value, dict) and value:
        pairs = [(f"{path}.{key}".removeprefix("."), part) for key, part in value.items()]
    elif isinstance(value, list) and value:
        pairs = [(f"{path}[{n}]", part) for n, part in enumerate(value)]
    else:
        return {path: value}
    return {place: leaf for at, part in pairs for place, leaf in _leaves(part, at).items()}


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise HostError(f"score: rouge_l needs {INSTALL_SCORES}") from error
    return rouge_scorer.RougeScorer(["rougeL"])


@cache
def _bleu_metric() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise HostError(f"score: bleu needs {INSTALL_SCORES}") from error
    return BLEU(effective_order=True)

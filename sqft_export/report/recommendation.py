"""Recommend a deployment: one of the recipe, or a dense model that was quantized after LoRA.

The best deployment of the recipe is compared with the most accurate peer in the same runtime that
needs at most as many bytes. The test is paired: both answer the same items.
"""

from collections.abc import Sequence
from typing import Literal

from sqft_export.documents import Document
from sqft_export.measure.results import BenchmarkRow
from sqft_export.report.text import accuracy_text

SIGNIFICANT = 0.05  # largest p-value of a significant difference
EQUAL_BYTES = 1.01  # files whose sizes differ by less are equally large
FASTER_TPOT = 0.95  # a deployment is faster if its TPOT is below this share of the other's
MAX_LOSS = 0.01  # accuracy that a smaller or faster deployment may lose
EQUAL_PERPLEXITY = 1.02  # for plain text, which has no paired test
Form = Literal["sparse", "dense", "peer"]


class Recommendation(Document):
    """The deployment to take, and the comparison behind it.

    id: of the recommended row.
    form: sparse or dense, made by the recipe's exporter; peer: a file of another quantizer.
    ours, peer: ids of the compared rows; peer is None if no such row was measured.
    points: accuracy of ours minus that of the peer, in points.
    p_value: of McNemar's test on the same items; None for plain text.
    bytes_ratio: bytes of ours divided by those of the peer.
    text: the recommendation in one sentence.
    """

    id: str
    form: Form
    ours: str
    peer: str | None
    points: float | None
    p_value: float | None
    bytes_ratio: float | None
    text: str


def recommend(
    rows: Sequence[BenchmarkRow], ours: BenchmarkRow | None, codes: str = "INT4"
) -> Recommendation | None:
    """Return the recommendation; None if no deployment of the recipe was measured.

    :param ours: the best deployment of the recipe.
    :param codes: the format of its weights for readers, such as INT4.
    """
    if ours is None:
        return None
    rival = _best_peer(rows, ours)
    if rival is None:
        return Recommendation(
            id=ours.id,
            form=_form(ours),
            ours=ours.id,
            peer=None,
            points=None,
            p_value=None,
            bytes_ratio=None,
            text=f"Take {_name(ours, codes)}; no dense model that was quantized after LoRA "
            "was measured, so it is not known whether tuning through the grid pays off.",
        )
    taken = ours if _pays_off(ours, rival) else rival
    return Recommendation(
        id=taken.id,
        form=_form(taken),
        ours=ours.id,
        peer=rival.id,
        points=100 * (ours.accuracy - rival.accuracy),
        p_value=ours.p_same_as_peers.get(rival.id),
        bytes_ratio=ours.file_bytes / rival.file_bytes,
        text=_sentence(taken, rival if taken is ours else ours, ours, rival, codes),
    )


def recommended_row(rows: Sequence[BenchmarkRow], ours: BenchmarkRow | None) -> BenchmarkRow | None:
    """Return the recommended row; None if no deployment of the recipe was measured."""
    found = recommend(rows, ours)
    return next((row for row in rows if found and row.id == found.id), None)


def _best_peer(rows: Sequence[BenchmarkRow], ours: BenchmarkRow) -> BenchmarkRow | None:
    """Return the peer to compare with.

    It is the most accurate on the CPU, in the same runtime, with at most as many bytes. If all are
    larger (next to a packed sparse file), it is the most accurate of the smallest ones. If the
    runtime has none, the peers of other runtimes count.
    """
    peers = [row for row in rows if row.kind == "peer" and row.device == "cpu"]
    same = [row for row in peers if row.runtime == ours.runtime] or peers
    if not same:
        return None
    limit = max(ours.file_bytes, min(row.file_bytes for row in same)) * EQUAL_BYTES
    return max((row for row in same if row.file_bytes <= limit), key=_quality)


def _quality(row: BenchmarkRow) -> tuple[float, float]:
    return row.accuracy, -row.perplexity


def _difference(ours: BenchmarkRow, rival: BenchmarkRow) -> int:
    """Return 1 if ours is better, -1 if worse, 0 if equal: by McNemar, or by perplexity."""
    p_value = ours.p_same_as_peers.get(rival.id)
    if p_value is not None:
        return 0 if p_value >= SIGNIFICANT else 1 if ours.accuracy > rival.accuracy else -1
    if ours.perplexity > EQUAL_PERPLEXITY * rival.perplexity:
        return -1
    return int(rival.perplexity > EQUAL_PERPLEXITY * ours.perplexity)


def _pays_off(ours: BenchmarkRow, rival: BenchmarkRow) -> bool:
    """Return whether to take ours.

    The significantly more accurate one is taken. Without such a difference, ours is taken if it is
    smaller or faster and at most ``MAX_LOSS`` less accurate, or if it is dense and at least as
    accurate. Sparsity without a saving does not pay off.
    """
    if difference := _difference(ours, rival):
        return difference > 0
    if ours.accuracy < rival.accuracy - MAX_LOSS:  # few items prove nothing
        return False
    smaller = ours.file_bytes * EQUAL_BYTES < rival.file_bytes
    comparable = ours.runtime == rival.runtime and ours.device == rival.device
    faster = comparable and ours.tpot.median_ms < FASTER_TPOT * rival.tpot.median_ms
    return smaller or faster or (not is_sparse(ours) and _quality(ours) >= _quality(rival))


def is_sparse(row: BenchmarkRow) -> bool:
    """Return whether a row's decoder has been pruned."""
    return row.sparsity > 0.1  # rounding to INT4 makes some zeros in a dense model too


def _form(row: BenchmarkRow) -> Form:
    if row.kind == "peer":
        return "dense" if row.id.startswith("lora-then-int4") else "peer"
    return "sparse" if is_sparse(row) else "dense"


def _name(row: BenchmarkRow, codes: str) -> str:
    form = _form(row)
    kind = "another quantizer's file" if form == "peer" else f"{form} {codes}"
    return f"{row.name} ({kind})"


def _sentence(
    taken: BenchmarkRow,
    other: BenchmarkRow,
    ours: BenchmarkRow,
    rival: BenchmarkRow,
    codes: str,
) -> str:
    """Return what to take, and accuracy, bytes and speed relative to the other row."""
    points = 100 * (taken.accuracy - other.accuracy)
    side = "above" if points >= 0 else "below"
    p_value = ours.p_same_as_peers.get(rival.id)
    test = "no paired test for plain text"
    if p_value is not None:
        negation = "" if p_value < SIGNIFICANT else "not "
        test = f"{negation}significantly different, McNemar, p = {p_value:.2g}"
    parts = [
        f"{accuracy_text(taken)}, {abs(points):.1f} points {side} {_name(other, codes)} ({test})",
        f"{taken.file_bytes / 1e6:.1f} MB, {_ratio_text(taken.file_bytes, other.file_bytes)} of "
        "its bytes",
    ]
    if (taken.runtime, taken.device) == (other.runtime, other.device):
        ratio = _ratio_text(taken.tokens_per_second, other.tokens_per_second)
        parts.append(f"{taken.tokens_per_second:.0f} tokens/s, {ratio} of its speed")
    reason = "; sparsity does not pay off here" if taken is rival and is_sparse(ours) else ""
    return f"Take {_name(taken, codes)}: {'; '.join(parts)}{reason}."


def _ratio_text(one: float, other: float) -> str:
    return f"{100 * one / other:.0f} %"

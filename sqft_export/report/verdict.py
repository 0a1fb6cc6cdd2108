"""Summarize a report: the deployment to take, its accuracy and its size."""

from collections.abc import Sequence

from sqft_export.measure.results import DENSE_LORA, BenchmarkRow
from sqft_export.report.recommendation import recommend
from sqft_export.report.text import accuracy_text


def best_deployment(rows: Sequence[BenchmarkRow]) -> BenchmarkRow | None:
    """Return the fastest of the deployments whose 95 % interval reaches the highest accuracy.

    Without intervals, only deployments with the highest accuracy count. Returns None if no
    deployment was measured.
    """
    deployed = [row for row in rows if row.kind == "deployment"]
    highest = max((row.accuracy for row in deployed), default=0.0)
    as_good = [row for row in deployed if _upper_accuracy(row) >= highest]
    return min(as_good, key=_tpot, default=None)


def _upper_accuracy(row: BenchmarkRow) -> float:
    return row.accuracy if row.interval is None else max(row.accuracy, row.interval[1])


def verdict(rows: Sequence[BenchmarkRow], measure: str, codes: str = "INT4") -> str | None:
    """Name the deployment to take; None if no dense base or no deployment was measured.

    The best deployment is compared with the best model that was quantized after LoRA. If there is
    none, its accuracy is compared with dense + LoRA if that was trained, else with the dense base.

    :param codes: the format of the deployment's weights for readers, such as INT4.
    """
    dense = next((row for row in rows if row.kind == "base"), None)
    lora = next((row for row in rows if row.id == DENSE_LORA), None)
    best = best_deployment(rows)
    if dense is None or best is None:
        return None
    found = recommend(rows, best, codes)
    if found and found.peer:
        return f"{found.text} {chance_text(dense)}." if dense.at_chance else found.text
    first = f"{best.name}, the best deployment: {_savings_text(best, dense)}."
    if dense.at_chance and lora is None:
        return f"{first} Accuracy: {accuracy_text(best)} {measure}; {chance_text(dense)}."
    text = f"{first} Accuracy: {_comparison_text(best, lora or dense, measure)}"
    return f"{text}; {chance_text(dense)}." if dense.at_chance else f"{text}."


def chance_text(dense: BenchmarkRow) -> str:
    """State that the dense base is at chance, which makes it useless as a baseline."""
    nothing = "the dense base knows nothing about this task"
    if dense.interval is None or dense.chance is None:
        return f"{nothing}: its perplexity is {dense.perplexity:.0f}"
    return (
        f"{nothing}: its {accuracy_text(dense)} is not significantly above chance, "
        f"{100 * dense.chance:.1f} %"
    )


def choice(rows: Sequence[BenchmarkRow]) -> str | None:
    """Name the most accurate, the smallest and the fastest of several deployments.

    The last two are chosen among those whose 95 % interval reaches the highest accuracy. Returns
    None if no row has an interval.
    """
    rows = [row for row in rows if row.interval is not None]
    if not rows:
        return None
    best = max(rows, key=lambda row: row.accuracy)
    as_good = [row for row in rows if _upper_accuracy(row) >= best.accuracy]
    small = min(as_good, key=lambda row: row.file_bytes)
    fast = min(as_good, key=_tpot)
    return (
        f"Most accurate: {best.name}, {100 * best.accuracy:.1f} %. Among the "
        f"{len(as_good)} whose 95 % interval reaches that, the smallest is {small.name} "
        f"({100 * small.accuracy:.1f} %, {small.file_bytes / 1e6:.1f} MB) and the fastest is "
        f"{fast.name} ({100 * fast.accuracy:.1f} %, {_tpot(fast):.2f} ms per token)"
    )


def _tpot(row: BenchmarkRow) -> float:
    return row.tpot.median_ms


def _savings_text(row: BenchmarkRow, dense: BenchmarkRow) -> str:
    memory = row.peak_memory_bytes / dense.peak_memory_bytes
    return (
        f"{row.tokens_per_second:.0f} tokens/s, "
        f"{100 * row.file_bytes / dense.file_bytes:.0f} % of the dense base's bytes "
        f"({row.file_bytes / 1e6:.1f} of {dense.file_bytes / 1e6:.1f} MB), "
        f"{100 * memory:.0f} % of its peak memory"
    )


def _comparison_text(row: BenchmarkRow, other: BenchmarkRow, measure: str) -> str:
    points = 100 * (other.accuracy - row.accuracy)
    side = "below" if points >= 0 else "above"
    return (
        f"{accuracy_text(row)} {measure}, {abs(points):.1f} points {side} "
        f"{other.name}'s {100 * other.accuracy:.1f} %{_significance_text(row, other)}"
    )


def _significance_text(row: BenchmarkRow, other: BenchmarkRow) -> str:
    p_value = row.p_same_as_lora if other.id == DENSE_LORA else row.p_same_as_first
    if p_value is None:
        return ""
    negation = "" if p_value < 0.05 else "not "
    return f", {negation}significantly different (McNemar, p = {p_value:.2g})"

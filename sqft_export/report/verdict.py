"""What was bought and what it cost, in a sentence: the first line of a report."""

from typing import Any

from sqft_export.measure.rows import DEPLOYED
from sqft_export.report.text import accuracy_text

ReportRow = dict[str, Any]


def verdict(rows: list[ReportRow], measure: str) -> str | None:
    """Of the fastest deployment, beside the dense base in torch; None where either is missing.

    Accuracy is held against dense + LoRA where that was trained, else against the dense base.
    """
    by_name = {row["name"]: row for row in rows}
    dense = by_name.get("dense base")
    deployed = [row for row in rows if row["name"].startswith(DEPLOYED)]
    if dense is None or not deployed:
        return None
    best = min(deployed, key=_tpot)
    first = f"{best['name']}, the fastest deployment: {_bought(best, dense)}."
    lora, at_chance = by_name.get("dense + LoRA"), dense.get("at_chance", False)
    if at_chance and lora is None:
        return f"{first} It has {accuracy_text(best)} {measure}; {chance_text(dense)}."
    cost = f"{first} It cost: {_cost(best, lora or dense, measure)}"
    return f"{cost}; {chance_text(dense)}." if at_chance else f"{cost}."


def chance_text(dense: ReportRow) -> str:
    """Why a dense base at chance is no measure of what was kept."""
    nothing = "the dense base knows nothing about this task"
    if dense["interval"] is None or dense["chance"] is None:
        return f"{nothing}: its perplexity is {dense['perplexity']:.0f}"
    return (
        f"{nothing}: its {accuracy_text(dense)} is not significantly above chance, "
        f"{100 * dense['chance']:.1f} %"
    )


def choice(rows: list[ReportRow]) -> str | None:
    """Which of several deployments is worth it; None where accuracies have no intervals.

    Those whose interval reaches the highest accuracy are as good as far as these items tell.
    """
    rows = [row for row in rows if row["interval"] is not None]
    if not rows:
        return None
    best = max(rows, key=lambda row: row["accuracy"])
    as_good = [row for row in rows if row is best or row["interval"][1] >= best["accuracy"]]
    small = min(as_good, key=lambda row: row["file_bytes"])
    fast = min(as_good, key=_tpot)
    return (
        f"Most accurate: {best['name']}, {100 * best['accuracy']:.1f} %. Of the {len(as_good)} "
        f"whose interval reaches that, the smallest is {small['name']} "
        f"({100 * small['accuracy']:.1f} %, {small['file_bytes'] / 1e6:.1f} MB) and the fastest "
        f"{fast['name']} ({100 * fast['accuracy']:.1f} %, {_tpot(fast):.2f} ms a token)"
    )


def _tpot(row: ReportRow) -> float:
    return row["tpot"]["median_ms"]


def _bought(row: ReportRow, dense: ReportRow) -> str:
    speed, memory = _tpot(dense) / _tpot(row), row["peak_memory_bytes"] / dense["peak_memory_bytes"]
    return (
        f"{100 * row['file_bytes'] / dense['file_bytes']:.0f} % of the dense base's bytes "
        f"({row['file_bytes'] / 1e6:.1f} of {dense['file_bytes'] / 1e6:.1f} MB), {speed:.1f} times "
        f"its tokens a second in torch ({1000 / _tpot(row):.0f} a second), {100 * memory:.0f} % of "
        "its peak memory"
    )


def _cost(row: ReportRow, other: ReportRow, measure: str) -> str:
    points = 100 * (other["accuracy"] - row["accuracy"])
    side = "below" if points >= 0 else "above"
    chance = _chance(row, other)
    return (
        f"{accuracy_text(row)} {measure}, {abs(points):.1f} points {side} "
        f"{other['name']}'s {100 * other['accuracy']:.1f} %{chance}"
    )


def _chance(row: ReportRow, other: ReportRow) -> str:
    key = "p_same_as_lora" if other["name"] == "dense + LoRA" else "p_same_as_first"
    chance = row.get(key)
    if chance is None:
        return ""
    tells = "tells them apart" if chance < 0.05 else "does not tell them apart"
    return f"; a paired test {tells} (p {chance:.2g})"

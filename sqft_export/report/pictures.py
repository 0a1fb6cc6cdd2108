"""Draw the charts of a report as inline SVG with matplotlib."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sqft_export.measure.results import BenchmarkRow
from sqft_export.metrics import EvaluatedSize, HeldOutLoss

if TYPE_CHECKING:
    from sqft_export.adapters.files import RankedStepLog

Point = tuple[float, float]  # cost and accuracy
COLOURS = {
    "torch": "#4c72b0",
    "openvino": "#dd8452",
    "onnx": "#55a868",
    "gguf": "#8172b3",
    "web": "#937860",
}

TICK_STEPS = [1, 2, 2.5, 5, 10]
LABEL_STEP = 0.065  # smallest distance of two labels, as a share of the axes' height

# A fixed salt and no date, so that the same numbers give the same bytes.
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "svg.hashsalt": "sqft-export",
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def _svg(draw: Callable[[Axes], None], width: float = 7.5, height: float = 3.4) -> str:
    stream = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    # Black becomes the text colour of the page, which is readable in dark mode.
    return re.sub(r"#000000|(?<=: )black", "currentColor", svg)


def add_titles(drawn: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (title, SVG) pairs whose SVGs contain their title, which screen readers read."""
    return [
        (
            title,
            re.sub(r"<svg\b([^>]*)>", rf'<svg role="img"\1><title>{title}</title>', svg, count=1),
        )
        for title, svg in drawn
    ]


def _colours(rows: Sequence[BenchmarkRow]) -> list[str]:
    return [COLOURS[row.runtime] for row in rows]


def _legend_at_right(axes: Axes, **settings: object) -> None:
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), **settings)


def search_front(front: list[EvaluatedSize], measure: str) -> str:
    """Draw accuracy against adapter parameters for every configuration that search evaluated."""

    def draw(axes: Axes) -> None:
        axes.scatter(
            [entry.parameters / 1e3 for entry in front],
            [100 * entry.accuracy for entry in front],
            color=COLOURS["torch"],
        )
        axes.set_xlabel("adapter parameters, thousands")
        axes.set_ylabel(f"{measure}, % of validation items")

    return _svg(draw)


def _bar_axes(axes: Axes, names: list[str], unit: str) -> None:
    """Label the axes of a horizontal bar chart; the first row is on top."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(axis="y", visible=False)


def _bars_height(rows: int, inches: float) -> float:
    return 1.0 + inches * rows


def accuracy_bars(rows: Sequence[BenchmarkRow], measure: str) -> str:
    """Draw one bar per row, with its 95 % interval if it has one."""

    def draw(axes: Axes) -> None:
        for at, (row, colour) in enumerate(zip(rows, _colours(rows), strict=True)):
            share, interval = 100 * row.accuracy, row.interval
            error = None
            if interval:
                error = [[share - 100 * interval[0]], [100 * interval[1] - share]]
            bar = axes.barh(at, share, color=colour, xerr=error, ecolor="black", capsize=3)
            axes.bar_label(bar, fmt="%.1f", padding=4)
        _bar_axes(axes, [row.name for row in rows], f"{measure}, % (95 % interval)")
        axes.set_xlim(0, 115)
        axes.set_xticks(range(0, 101, 20))

    return _svg(draw, height=_bars_height(len(rows), 0.3))


COSTS: dict[str, tuple[str, Callable[[BenchmarkRow], float]]] = {
    "file_bytes": ("model files, MB", lambda row: row.file_bytes / 1e6),
    "tpot": ("time per output token, ms (median)", lambda row: row.tpot.median_ms),
}


def cost_of(row: BenchmarkRow, cost: str) -> float:
    """Return the value of a row on the axis ``cost``, a key of ``COSTS``."""
    return COSTS[cost][1](row)


def pareto(points: list[Point]) -> list[Point]:
    """Return the points that no other point equals or beats in both cost and accuracy, by cost."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def _plane(axes: Axes, rows: Sequence[BenchmarkRow], measure: str, cost: str) -> list[Point]:
    """Set up axes of cost and accuracy with the Pareto front; return the rows as points."""
    points = [(cost_of(row, cost), 100 * row.accuracy) for row in rows]
    front = zip(*pareto(points), strict=True)
    axes.step(*front, where="post", color="#888888", lw=1, zorder=2)
    axes.set_xlabel(COSTS[cost][0])
    axes.set_ylabel(f"{measure}, %")
    axes.margins(y=0.2)
    axes.set_xlim(0, 1.1 * max(x for x, _ in points))
    return points


def accuracy_scatter(rows: Sequence[BenchmarkRow], measure: str, cost: str) -> str:
    """Draw accuracy against ``file_bytes`` or ``tpot`` with the Pareto front.

    The names of the rows are in a column at the right; a line leads from each name to its point.
    """

    def draw(axes: Axes) -> None:
        points = _plane(axes, rows, measure, cost)
        for point, row in zip(points, rows, strict=True):
            axes.scatter(*point, color=COLOURS[row.runtime], s=45, zorder=3)
        axes.autoscale_view()
        # Of equally accurate rows the cheapest gets the lowest label, so that no lines cross.
        named = sorted(zip(points, [row.name for row in rows], strict=True))
        heights = [float(axes.transLimits.transform(point)[1]) for point, _ in named]
        for (point, name), height in zip(named, spread_labels(heights), strict=True):
            axes.annotate(
                name,
                point,
                xytext=(1.04, height),
                textcoords="axes fraction",
                va="center",
                size=9,
                arrowprops={
                    **{"arrowstyle": "-", "color": "#888888", "lw": 0.6, "alpha": 0.7},
                    "relpos": (0, 0.5),  # the line ends at the left edge of the name
                },
            )

    return _svg(draw, height=max(4.2, _bars_height(len(rows), 0.25)))


def spread_labels(heights: Sequence[float]) -> list[float]:
    """Return heights of labels in the order of their points, evenly spread if they are close.

    :param heights: heights of the points, 0 at the bottom to 1 at the top.
    """
    step = min(LABEL_STEP, 1 / max(1, len(heights) - 1))
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    found, low = list(heights), -1.0
    for place, index in enumerate(order):
        above = len(order) - 1 - place
        found[index] = low = max(low + step, min(heights[index], 1 - above * step), place * step)
    return found


MARKERS = {"torch": "o", "openvino": "s", "onnx": "^", "gguf": "D", "web": "P"}


def runs_scatter(rows: Sequence[BenchmarkRow], runs: list[int], measure: str, cost: str) -> str:
    """Draw :func:`accuracy_scatter` for several runs: a colour per run, a marker per runtime.

    The legend has the numbers of the runs; the page lists their names below.

    :param runs: number of the run of each row.
    """

    def draw(axes: Axes) -> None:
        points = _plane(axes, rows, measure, cost)
        colours = {number: f"C{at % 10}" for at, number in enumerate(dict.fromkeys(runs))}
        for (x, y), row, number in zip(points, rows, runs, strict=True):
            axes.scatter(x, y, color=colours[number], marker=MARKERS[row.runtime], s=45)
        for number, colour in colours.items():
            axes.scatter([], [], color=colour, marker="P", label=f"run {number}")
        runtimes = {row.runtime for row in rows}
        for runtime, marker in ((r, m) for r, m in MARKERS.items() if r in runtimes):
            axes.scatter([], [], color="#888888", marker=marker, label=runtime)
        _legend_at_right(axes, fontsize=9)

    return _svg(draw, height=4.2)


def latency_bars(rows: Sequence[BenchmarkRow], labels: list[str]) -> str:
    """Draw two bars per row: time to first token, and time per output token below it.

    :param labels: name of each row.
    """
    ttft, tpot = [row.ttft for row in rows], [row.tpot for row in rows]

    def draw(axes: Axes) -> None:
        for offset, spreads, alpha in ((-0.2, ttft, 0.55), (0.2, tpot, 1.0)):
            median = [spread.median_ms for spread in spreads]
            low = [spread.median_ms - spread.p10_ms for spread in spreads]
            high = [spread.p90_ms - spread.median_ms for spread in spreads]
            bars = axes.barh(
                [at + offset for at in range(len(rows))],
                median,
                0.38,
                xerr=[low, high],
                color=_colours(rows),
                alpha=alpha,
                ecolor="#888888",
                capsize=2,
            )
            axes.bar_label(bars, fmt="%.2f", padding=4, size=8)
        _bar_axes(axes, labels, "ms (median, p10 to p90); light: first token, full: per token")
        axes.margins(x=0.12)

    return _svg(draw, height=_bars_height(len(rows), 0.48))


def sparsity_by_layer(sparsity: Mapping[str, float]) -> str:
    """Draw the share of zero weights by decoder block, one line per name of a Linear.

    :param sparsity: by Linear, 0 to 1.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for linear, share in sparsity.items():
        block = next(int(part) for part in linear.split(".") if part.isdigit())
        lines.setdefault(linear.rsplit(".", 1)[1], []).append((block, 100 * share))

    def draw(axes: Axes) -> None:
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), "o-", ms=4, lw=1, alpha=0.8, label=name)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=TICK_STEPS))
        axes.set_xlabel("decoder block")
        axes.set_ylabel("zero weights, %")
        low, high = axes.get_ylim()
        axes.set_ylim(max(0, low - 2), min(100, high + 2))
        _legend_at_right(axes, fontsize=8, ncols=2)

    return _svg(draw)


def training_curve(log: "list[RankedStepLog]", held_out: Sequence[HeldOutLoss] = ()) -> str:
    """Draw the loss by optimizer step, and the mean drawn rank if ranks vary.

    :param held_out: the losses on held-out examples, drawn in the same plane.
    """

    def draw(axes: Axes) -> None:
        axes.plot([e["step"] for e in log], [e["loss"] for e in log], color="#4c72b0", lw=1)
        if held_out:
            steps, losses = [one.step for one in held_out], [one.loss for one in held_out]
            axes.plot(steps, losses, "o-", color="#55a868", ms=4, label="held-out examples")
            axes.legend(frameon=False)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")
        if log and log[0]["ranks"]:
            right = axes.twinx()
            means = [sum(e["ranks"].values()) / len(e["ranks"]) for e in log]
            right.plot([e["step"] for e in log], means, ".", color="#dd8452", ms=3, alpha=0.6)
            right.set_ylabel("mean rank drawn", color="#dd8452")
            right.spines["right"].set_visible(True)
            right.grid(visible=False)

    return _svg(draw)

"""The cells of a report's tables."""

from collections.abc import Callable, Sequence

from sqft_export.measure.results import Agreement, BenchmarkRow, LatencySpread
from sqft_export.report.text import accuracy_text

Columns = tuple[tuple[str, Callable[[BenchmarkRow], str | None]], ...]
# The columns of the first table, then those of the detailed one.
MAIN: Columns = (
    ("model", lambda r: r.name),
    ("accuracy", accuracy_text),
    ("tokens/s", lambda r: f"{r.tokens_per_second:.0f}"),
    ("TTFT ms", lambda r: f"{r.ttft.median_ms:.2f}"),
    ("size MB", lambda r: f"{r.file_bytes / 1e6:.2f}"),
    ("peak MiB", lambda r: f"{r.peak_memory_bytes / 2**20:.0f}"),
)
DETAILS: Columns = (
    ("perplexity", lambda r: f"{r.perplexity:.3f}"),
    ("recovery", lambda r: None if r.recovery is None else f"{100 * r.recovery:.1f} %"),
    ("top-1 agreement", lambda r: _agreement(r.beside_dense)),
    ("KL nats/token", lambda r: _divergence(r.beside_dense)),
    ("KL to merged nats/token", lambda r: _divergence(r.beside_merged)),
    ("sparsity", lambda r: f"{100 * r.sparsity:.1f} %"),
    ("bits/weight", lambda r: f"{r.bits_per_weight:.2f}"),
    ("TTFT ms (p10 to p90)", lambda r: _latency(r.ttft)),
    ("TPOT ms (p10 to p90)", lambda r: _latency(r.tpot)),
)


def _latency(spread: LatencySpread) -> str:
    return f"{spread.median_ms:.2f} ({spread.p10_ms:.2f} to {spread.p90_ms:.2f})"


def _agreement(compared: Agreement | None) -> str | None:
    return f"{100 * compared.agreement:.1f} %" if compared else None


def _divergence(compared: Agreement | None) -> str | None:
    return f"{compared.kl_nats:.2g}" if compared else None


def cells(rows: Sequence[BenchmarkRow], columns: Columns = (*MAIN, *DETAILS)) -> list[list[str]]:
    """Return the table as text cells, header first, without columns that no row has."""
    columns_of_cells = [(name, [cell(row) for row in rows]) for name, cell in columns]
    kept = [[name, *found] for name, found in columns_of_cells if any(c is not None for c in found)]
    return [[cell or "" for cell in line] for line in zip(*kept, strict=True)]


def note_lines(rows: Sequence[BenchmarkRow]) -> list[str]:
    """Return the lines under a table: facts about the files of its rows."""
    names: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            names.setdefault(note, []).append(row.name)
    return [f"{'; '.join(found)}: {note}" for note, found in names.items()]


def lm_eval_cells(rows: Sequence[BenchmarkRow]) -> list[list[str]]:
    """Return lm-eval's metrics of every row, header first; empty if none were requested."""
    tasks = rows[0].lm_eval
    chosen = [
        (task, figure)
        for task, found in tasks.items()
        for figure in found
        if "," in figure
        and "stderr" not in figure  # skip entries that are no metrics, such as `sample_len`
    ]
    if not chosen:
        return []
    header = [f"{task}, {figure.removesuffix(',none')}" for task, figure in chosen]
    return [
        ["model", *header],
        *([r.name, *(f"{r.lm_eval[t][f]:.4g}" for t, f in chosen)] for r in rows),
    ]

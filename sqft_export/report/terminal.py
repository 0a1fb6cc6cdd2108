"""Format the end of a run for a terminal: a table, the verdict, paths, and a next command."""

import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

from sqft_export.artifacts.store import Artifact
from sqft_export.measure.peers import PEER_STAGES, peers_in
from sqft_export.measure.results import BenchmarkRow
from sqft_export.measure.rows import ON_KERNELS, TITLES, DeploymentFolder, deployments_in
from sqft_export.report.document import Report
from sqft_export.report.tables import note_lines
from sqft_export.report.text import accuracy_text, align_columns

LABEL_CHARACTERS = 28


COLUMNS: dict[str, Callable[[BenchmarkRow], str]] = {
    "model": lambda row: row.name,
    "accuracy (95 %)": accuracy_text,
    "perplexity": lambda row: f"{row.perplexity:.3f}",
    "size MB": lambda row: f"{row.file_bytes / 1e6:.2f}",
    "tokens/s": lambda row: f"{row.tokens_per_second:.0f}",
    "TTFT ms": lambda row: f"{row.ttft.median_ms:.2f}",
    "peak MiB": lambda row: f"{row.peak_memory_bytes / 2**20:.0f}",
}
FIRST_LINE_COLUMNS = 3  # on a narrow terminal, the other columns are on a second line


def run_text(report: Report, artifacts: dict[str, Artifact], width: int) -> str:
    """Return the text that `run` prints at its end.

    :param width: width of the terminal in characters.
    """
    deployments = deployment_folders(artifacts)
    parts = ["\n".join(_table(report.rows, width))]
    if report.verdict:
        parts.append("\n".join(textwrap.wrap(report.verdict, width)))
    if notes := note_lines(report.rows):
        parts.append("\n".join(part for line in notes for part in textwrap.wrap(line, width)))
    parts.append("\n".join(_label_path(one.name, one.folder) for one in deployments))
    parts.append(_label_path("report", artifacts["report"].path / "index.html"))
    if deployments:
        folder = _recommended(report, deployments).folder
        command = f"sqft-export inspect {shlex.quote(str(folder))}"
        parts.append(f"next: {command}\n  It prints the code that loads the folder.")
    return "\n\n".join(parts)


def deployment_folders(artifacts: dict[str, Artifact]) -> list[DeploymentFolder]:
    """Return the folders of all deployments of a run, those of its peers last."""
    made = [
        found
        for target in TITLES
        if f"export-{target}" in artifacts
        for found in deployments_in(artifacts[f"export-{target}"].path, target)
    ]
    peers = [artifacts[stage].path for stage in PEER_STAGES if stage in artifacts]
    return made + [found for path in peers for found in peers_in(path)]


def _recommended(report: Report, deployments: list[DeploymentFolder]) -> DeploymentFolder:
    """Return the recommended deployment, or the first if none was measured."""
    best = report.best
    measured = best.id.removesuffix(f"-{best.device}").removesuffix(ON_KERNELS) if best else None
    return next((one for one in deployments if one.id == measured), deployments[0])


def _label_path(name: str, path: Path) -> str:
    return f"{name:{LABEL_CHARACTERS}}{path}"


def _table(rows: list[BenchmarkRow], width: int) -> list[str]:
    """Return the lines of the table; on a narrow terminal each row takes two lines."""
    cells = [list(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]
    whole = align_columns(cells)
    if max(map(len, whole)) <= width:
        return whole
    above = align_columns([line[:FIRST_LINE_COLUMNS] for line in cells])
    below = align_columns([["", *line[FIRST_LINE_COLUMNS:]] for line in cells])
    return [line for pair in zip(above, below, strict=True) for line in pair]

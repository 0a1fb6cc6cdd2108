"""Format the end of a run for a terminal: a table, the verdict, paths, and a next command."""

import shlex
import textwrap
from pathlib import Path
from typing import Any

from sqft_export.measure.rows import TITLES
from sqft_export.packed.folders import PACKED, SPARSE
from sqft_export.report.text import accuracy_text, align_columns
from sqft_export.run.artifact import Artifact

_FORMS = {"model": "", PACKED: ", packed", SPARSE: ", sparse execution"}
LABEL_CHARACTERS = 28


def _tokens_per_second(row: dict[str, Any]) -> float:
    return 1000 / row["tpot"]["median_ms"]


COLUMNS = {
    "model": lambda row: row["name"],
    "accuracy (95 %)": accuracy_text,
    "perplexity": lambda row: f"{row['perplexity']:.3f}",
    "size MB": lambda row: f"{row['file_bytes'] / 1e6:.2f}",
    "tokens/s": lambda row: f"{_tokens_per_second(row):.0f}",
    "TTFT ms": lambda row: f"{row['ttft']['median_ms']:.2f}",
    "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:.0f}",
}
FIRST_LINE_COLUMNS = 3  # on a narrow terminal, the other columns are on a second line


def run_text(document: dict[str, Any], artifacts: dict[str, Artifact], width: int) -> str:
    """Return the text that `run` prints at its end.

    :param document: `report.json`.
    :param width: width of the terminal in characters.
    """
    deployments = deployment_folders(artifacts)
    parts = ["\n".join(_table(document["rows"], width))]
    if document["verdict"]:
        parts.append("\n".join(textwrap.wrap(document["verdict"], width)))
    parts.append("\n".join(_label_path(name, path) for name, path in deployments.items()))
    parts.append(_label_path("report", artifacts["report"].path / "index.html"))
    if deployments:
        folder = deployments[_fastest(document["rows"], deployments)]
        command = f"sqft-export inspect {shlex.quote(str(folder))}"
        parts.append(f"next: {command}\n  It prints the code that loads the folder.")
    return "\n\n".join(parts)


def deployment_folders(artifacts: dict[str, Artifact]) -> dict[str, Path]:
    """Return the folder of every deployment of a run, by the name of its row."""
    return {
        f"{title}{form}": artifacts[f"export-{target}"].path / folder
        for target, title in TITLES.items()
        if f"export-{target}" in artifacts
        for folder, form in _FORMS.items()
        if (artifacts[f"export-{target}"].path / folder).is_dir()
    }


def _fastest(rows: list[dict[str, Any]], deployments: dict[str, Path]) -> str:
    """Return the name of the fastest measured deployment, or of the first if none is measured."""
    measured = [row for row in rows if row["name"] in deployments]
    if not measured:
        return next(iter(deployments))
    return max(measured, key=_tokens_per_second)["name"]


def _label_path(name: str, path: Path) -> str:
    return f"{name:{LABEL_CHARACTERS}}{path}"


def _table(rows: list[dict[str, Any]], width: int) -> list[str]:
    """Return the lines of the table; on a narrow terminal each row takes two lines."""
    cells = [list(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in rows)]
    whole = align_columns(cells)
    if max(map(len, whole)) <= width:
        return whole
    above = align_columns([line[:FIRST_LINE_COLUMNS] for line in cells])
    below = align_columns([["", *line[FIRST_LINE_COLUMNS:]] for line in cells])
    return [line for pair in zip(above, below, strict=True) for line in pair]

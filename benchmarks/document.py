"""The end of every benchmark's output: a table for people and one line of JSON for programs."""

import importlib.metadata
import json
import subprocess
import sys
from typing import Any

import numpy as np

from sqft_export.machine.counters import machine_facts

VERSIONS = ("sqft-export", "torch", "transformers", "numpy")


def in_a_process(script: str, *arguments: str) -> Any:
    """The document that a benchmark script prints as its last line, as JSON."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def spread(samples: list[float]) -> dict[str, float]:
    """Median, lowest and highest of repeated measurements."""
    return {
        "median": float(np.median(samples)),
        "low": float(min(samples)),
        "high": float(max(samples)),
    }


def table(header: list[str], rows: list[list[Any]]) -> None:
    cells = [header, *[[_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finish(benchmark: str, ratios: dict[str, dict[str, float]], values: dict[str, Any]) -> None:
    """The last line on stdout."""
    document = {
        "benchmark": benchmark,
        "machine": machine_facts().to_json(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "ratios": ratios,
        "values": values,
    }
    print(json.dumps(document))

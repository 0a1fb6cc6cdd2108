"""Resolve ``precision: auto`` once per run, so that all processes and resumed runs agree."""

import json
import os
from pathlib import Path

import torch

from sqft_export.errors import DamagedError
from sqft_export.machine.device import CPU, device_of, training_dtype
from sqft_export.machine.host import write_file
from sqft_export.recipe.schema import Recipe

PRECISION_FILE = "precision.json"  # one file per device kind: <kind>-precision.json
PRECISIONS = ("float32", "bfloat16")


def resolve_precision(recipe: Recipe, root: Path) -> Recipe:
    """Return the recipe with ``adapt.precision: auto`` replaced by this run's precision.

    :param root: folder of the run; if it exists, the choice is recorded there.
    :raises DamagedError: if the record is damaged.
    """
    adapt = recipe.adapt
    if adapt is None or adapt.precision != "auto":
        return recipe
    chosen = fast_precision(root, device_of(recipe.device))
    return recipe.model_copy(update={"adapt": adapt.model_copy(update={"precision": chosen})})


def fast_precision(root: Path, device: torch.device = CPU) -> str:
    """Return the recorded precision of a run on a device, or measure it: float32 or bfloat16.

    :raises DamagedError: if the record is damaged.
    """
    file = root / f"{device.type}-{PRECISION_FILE}"
    if not file.exists():
        chosen = str(training_dtype("auto", device)).removeprefix("torch.")
        if not root.is_dir() or not os.access(root, os.W_OK):  # `plan` does not record
            return chosen
        write_file(file, json.dumps({"precision": chosen}) + "\n", replace=False)
    return _read_precision(file)


def _read_precision(file: Path) -> str:
    try:
        chosen = json.loads(file.read_text())["precision"]
        if chosen not in PRECISIONS:
            raise ValueError(f"found {chosen!r}, allowed are {', '.join(PRECISIONS)}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged: {error}; delete it and run again") from error
    return chosen

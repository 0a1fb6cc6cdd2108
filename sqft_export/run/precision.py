"""``precision: auto``, decided once for a run: every process, round and resume computes alike."""

import json
import os
from pathlib import Path

import torch

from sqft_export.errors import DamagedError
from sqft_export.recipe.schema import Recipe
from sqft_export.run.device import CPU, device_of, training_dtype
from sqft_export.run.host import write_file

RECORD = "precision.json"  # device kind -> precision
CHOICES = ("float32", "bfloat16")


def resolve_precision(recipe: Recipe, root: Path) -> Recipe:
    """The recipe with ``adapt.precision: auto`` replaced by what this run computes in.

    :param root: folder of the run, where the decision is recorded once the folder is there.
    :raises DamagedError: if the record there is none.
    """
    adapt = recipe.adapt
    if adapt is None or adapt.precision != "auto":
        return recipe
    chosen = fast_precision(root, device_of(recipe.device))
    return recipe.model_copy(update={"adapt": adapt.model_copy(update={"precision": chosen})})


def fast_precision(root: Path, device: torch.device = CPU) -> str:
    """Which of float32 and bfloat16 a run takes on a device: recorded, or else measured now.

    :raises DamagedError: if the record is none.
    """
    file = root / f"{device.type}-{RECORD}"
    if not file.exists():
        chosen = str(training_dtype("auto", device)).removeprefix("torch.")
        if not root.is_dir() or not os.access(root, os.W_OK):  # planned, not run
            return chosen
        write_file(file, json.dumps({"precision": chosen}) + "\n", replace=False)
    return _read(file)


def _read(file: Path) -> str:
    try:
        chosen = json.loads(file.read_text())["precision"]
        if chosen not in CHOICES:
            raise ValueError(f"found {chosen!r}, allowed are {', '.join(CHOICES)}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{file} is damaged: {error}; delete it and run again") from error
    return chosen

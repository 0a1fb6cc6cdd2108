"""Companion files of a model's weights in its folder: configs, tokenizer, chat template.

Folders are untrusted: links out of the folder, devices and pipes are refused (``untrusted.py``).
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from sqft_export.errors import UserError, one_line
from sqft_export.untrusted import MAX_JSON_BYTES, fault_of_file, path_inside

# Files that loaders need besides the weights.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")
# Files of other programs that loaders would follow or that describe something else.
EXCLUDED_NAMES = ("adapter_config.json", "manifest.json", "provenance.json")


def file_in_folder(folder: Path, name: str) -> Path:
    """Return the path of a file of a folder, after checking it.

    :raises UserError: if it is not a regular file, can't be read, or links out of the folder.
    """
    file = folder / name
    if Path(name).name != name:
        shown = one_line(repr(name))
        raise UserError(f"{folder}: names {shown}; a file directly in the folder is expected")
    path_inside(folder, file)
    if fault := fault_of_file(file):
        raise UserError(f"{one_line(file)}: {fault}")
    return file


def companions(folder: Path) -> list[Path]:
    """List configs and tokenizer files of a model folder, sorted.

    :raises UserError: naming a file that links out of the folder, is not regular or is too large.
    """
    names = {file.name for pattern in COMPANIONS for file in folder.glob(pattern)}
    found = []
    for name in sorted(names):
        if name in EXCLUDED_NAMES or name.endswith(".safetensors.index.json"):
            continue
        file = file_in_folder(folder, name)
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(f"{file}: has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
        found.append(file)
    return found


def copy_companions(source: Path, folder: Path, config: Mapping[str, object] | None = None) -> None:
    """Copy configs and tokenizer files of a model folder, without the weights' index.

    :param config: written as ``config.json`` in place of the model's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in companions(source):
        shutil.copyfile(file, folder / file.name)
    if config is not None:
        write_config(folder, config)


def float_config(config: Mapping[str, object], dtype: str | None = None) -> dict[str, object]:
    """Return a ``config.json`` without its quantization settings.

    :param dtype: dtype of the weights in the same folder; None keeps the config's dtype.
    """
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    if dtype is not None:
        plain.pop("torch_dtype", None)
        plain["dtype"] = dtype
    return plain


def write_config(folder: Path, config: Mapping[str, object]) -> None:
    """Write a folder's ``config.json``."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

"""What lies beside a model's weights: configs, tokenizer, chat template; files of the folder alone.

A folder may come from anywhere, so nothing is followed out of it: no link, device or pipe
(``untrusted.py``).
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError, one_line
from sqft_export.untrusted import MAX_JSON_BYTES, fault_of_file, path_inside

# Everything that makes a folder loadable beside its weights.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")
# What other programs leave there, which would be followed or is not about this model.
STRANGERS = ("adapter_config.json", "manifest.json", "provenance.json")


def own_file(folder: Path, name: str) -> Path:
    """A file of a folder.

    :raises UserError: if it is no regular file, can't be read, or is a link that leads out.
    """
    file = folder / name
    if Path(name).name != name:
        shown = one_line(repr(name))
        raise UserError(f"{folder}: names {shown}; a file of the folder itself is expected")
    path_inside(folder, file)
    if fault := fault_of_file(file):
        raise UserError(f"{one_line(file)}: {fault}")
    return file


def companions(folder: Path) -> list[Path]:
    """Configs and tokenizer of a model folder, by name.

    :raises UserError: naming one that is not a file of the folder, or is too large to be one.
    """
    names = {file.name for pattern in COMPANIONS for file in folder.glob(pattern)}
    found = []
    for name in sorted(names):
        if name in STRANGERS or name.endswith(".safetensors.index.json"):
            continue
        file = own_file(folder, name)
        if (size := file.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(f"{file}: has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
        found.append(file)
    return found


def copy_companions(source: Path, folder: Path) -> None:
    """Copy configs and tokenizer of a model folder, without its weights' index."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in companions(source):
        shutil.copyfile(file, folder / file.name)


def float_config(config: dict[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """A ``config.json`` without its quantization.

    :param dtype: of the weights it is written beside; None: as it was.
    """
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    if dtype is not None:
        plain.pop("torch_dtype", None)
        plain["dtype"] = dtype
    return plain


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

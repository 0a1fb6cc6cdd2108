"""Take any GGUF file into a benchmark of deployments: `sqft-export benchmark --against`.

A file of another program has no folder with configs. It gets a temporary one with the configs and
the tokenizer of the first deployment, so that all are scored on the same token ids.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sqft_export.errors import HostError, UserError, one_line
from sqft_export.machine.host import installed
from sqft_export.packed.gguf_file import read_gguf
from sqft_export.targets.folder import GRAPHS, kind_of, vocabulary_of
from sqft_export.untrusted import fault_of_file

COPIED = ("config.json", "generation_config.json", "genai_config.json", "tokenizer*.json")
TEMPLATE = "chat_template.jinja"


@contextlib.contextmanager
def as_deployments(paths: Sequence[Path], first: Path) -> Iterator[dict[Path, Path]]:
    """Yield deployment folder -> the given path, for folders and GGUF files.

    :param first: deployment whose configs and tokenizer a GGUF file gets.
    :raises UserError: if a path is neither a deployment nor a GGUF file, or a file has another
        vocabulary than ``first``.
    """
    with tempfile.TemporaryDirectory(prefix="sqft-") as scratch:
        found = {}
        for number, path in enumerate(paths):
            folder = Path(scratch) / str(number)
            found[_as_deployment(path, first, folder)] = path
        yield found


def _as_deployment(path: Path, first: Path, folder: Path) -> Path:
    """Return a folder unchanged, or write a folder with a GGUF file."""
    file = _gguf_file(path)
    if file is None:
        kind_of(path)
        return path
    _check_vocabulary(file, first)
    folder.mkdir()
    try:
        os.link(file.resolve(), folder / GRAPHS["gguf"])
    except OSError:  # another disk
        shutil.copyfile(file, folder / GRAPHS["gguf"])
    for pattern in (*COPIED, TEMPLATE):
        for config in first.glob(pattern):
            shutil.copyfile(config, folder / config.name)
    return folder


def _gguf_file(path: Path) -> Path | None:
    """Return the GGUF file that a path stands for; None for a folder with its own configs.

    :raises UserError: if a folder has several GGUF files, or the path does not exist.
    """
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if not files or (path / "config.json").is_file():
            return None
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(
                f"--against: found {one_line(path)} with {names}; give one of the files"
            )
        path = files[0]
    if fault := fault_of_file(path):
        raise UserError(
            f"--against: {one_line(path)}: {fault}; allowed are folders and .gguf files"
        )
    return path


def _check_vocabulary(file: Path, first: Path) -> None:
    """Check that a file has as many tokens as the first deployment.

    :raises HostError: if the gguf package is missing.
    """
    if not installed("gguf"):
        raise HostError("--against: a .gguf file needs gguf: pip install 'sqft-export[gguf]'")
    rows = [t.shape[1] for t in read_gguf(file).tensors if t.name == "token_embd.weight"]
    expected = vocabulary_of(first)
    if not rows or int(rows[0]) != expected:
        found = int(rows[0]) if rows else "no"
        raise UserError(
            f"--against: {one_line(file)} has {found} rows in its embedding, {first} has "
            f"{expected} tokens; both must have the same tokenizer to answer the same items"
        )

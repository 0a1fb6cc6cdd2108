"""Rows of data files as people have them, one after the other.

    .jsonl, .ndjson     a JSON object per line
    .json               a list of objects
    .csv, .tsv          with a header; fields stay text
    .parquet
    .jsonl.gz, .csv.gz  and so on: text files that gzip has compressed
    a folder            written by ``save_to_disk`` of the library datasets
    hub:<name>          a dataset of the Hugging Face hub, streamed

All but .json are read row by row. No code of a dataset runs, and nothing is unpickled.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sqft_export.data.files import Fields, numbered_rows
from sqft_export.errors import HostError, UserError, one_line
from sqft_export.recipe.schema import HUB

NumberedRow = tuple[int, Fields]
Stamp = tuple[int, int, int]  # size in bytes, time of the last change in ns, inode
GZIP = ".gz"
INSTALL_DATASETS = "pip install 'sqft-export[datasets]'"


@dataclass(frozen=True)
class Table:
    """Where rows are read from.

    source: a file, a folder, or ``hub:<name>``.
    split: of a folder or of the hub, which has several.
    subset: configuration of a dataset of the hub. revision: its branch, tag or commit.
    """

    source: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None

    def rows(self) -> Iterator[NumberedRow]:
        """Yield rows with their number: the line in a text file, else the place in order, from 1.

        :raises UserError: if a row can't be read, or the source has no rows; naming both.
        """
        empty = True
        for number, row in self._read():
            empty = False
            yield number, row
        if empty:
            raise UserError(f"{self.source}: has no rows")

    def stamp(self) -> Stamp | None:
        """Return a value that changes with a local file; None for folders and the hub."""
        path = Path(self.source)
        if self.source.startswith(HUB) or not path.is_file():
            return None
        found = path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino

    def place(self, number: int) -> str:
        """Return a row's name in messages to the user."""
        return f"{self.source}:{number}"

    def _read(self) -> Iterator[NumberedRow]:
        if self.source.startswith(HUB):
            return _hub_rows(self)
        path = Path(self.source)
        if path.is_dir():
            return _folder_rows(path, self.split)
        read = READERS.get(suffix_of(path))
        if read is None:
            raise UserError(
                f"{path}: found the file type {suffix_of(path) or 'without a name'}; known are "
                f"{', '.join(READERS)}, a save_to_disk folder and {HUB}<name>"
            )
        return read(path)


def suffix_of(path: Path) -> str:
    """Return the file type in lower case, such as ``.csv`` or ``.csv.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix == GZIP else suffix


def _opened(path: Path, newline: str | None = None) -> IO[str]:
    try:
        if suffix_of(path).endswith(GZIP):
            return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
        return path.open(encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def _json_lines(path: Path) -> Iterator[NumberedRow]:
    with _opened(path, "\n") as file:
        for number, line in enumerate(_decoded_lines(file, path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON: {one_line(error)}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected an object, found {type(row).__name__}")
            yield number, row


def _json_list(path: Path) -> Iterator[NumberedRow]:
    yield from numbered_rows(path)


def _decoded_lines(file: Iterable[str], path: Path) -> Iterator[str]:
    """Yield the lines of a text file.

    :raises UserError: naming the line that is not UTF-8, or at which the file is damaged.
    """
    number = 0
    try:
        for line in file:
            number += 1
            yield line
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: damaged after line {number}: {one_line(error)}") from error
    except UnicodeDecodeError as error:
        found = f"{error.object[error.start]:#04x}"
        raise UserError(
            f"{path}: not UTF-8 after line {number} ({found}); save it as UTF-8"
        ) from error


def _separated(delimiters: str) -> Callable[[Path], Iterator[NumberedRow]]:
    """Return a reader of text with a header; the first delimiter in the header separates fields."""

    def read(path: Path) -> Iterator[NumberedRow]:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a conversation may be a field
        with _opened(path, "") as file:
            lines = _decoded_lines(file, path)
            first = next(lines, "")
            used = next((one for one in delimiters if one in first), delimiters[0])
            header = _one_record(first, used, path)
            rows = csv.reader(lines, delimiter=used, strict=True)
            yield from _checked_records(rows, header, path)

    return read


def _one_record(line: str, delimiter: str, path: Path) -> list[str]:
    try:
        header = next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise UserError(f"{path}:1: not a header: {error}") from error
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not all(names):
        found = f"twice {', '.join(twice)}" if twice else "a column without a name"
        raise UserError(f"{path}:1: the header has {found}; each column needs its own name")
    return names


def _checked_records(rows: Any, header: list[str], path: Path) -> Iterator[NumberedRow]:
    start = 2
    try:
        for fields in rows:
            number, start = start, rows.line_num + 2
            if not fields:
                continue
            if len(fields) != len(header):
                raise UserError(
                    f"{path}:{number}: found {len(fields)} fields; the header has {len(header)}: "
                    f"{', '.join(header)}; quote fields with delimiters or line breaks"
                )
            yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{start}: {error}; quote fields with delimiters") from error


def _parquet(path: Path) -> Iterator[NumberedRow]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise HostError(f"{path}: reading Parquet needs {INSTALL_DATASETS}") from error
    number = 0
    try:
        for row in _parquet_rows(parquet.ParquetFile(path)):
            number += 1
            yield number, _without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not Parquet after row {number}: {one_line(error)}") from error


def _parquet_rows(file: Any) -> Iterator[Fields]:
    with file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _separated(",;"),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}


READERS |= {suffix + GZIP: READERS[suffix] for suffix in (".jsonl", ".ndjson", ".csv", ".tsv")}


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise HostError(f"{source}: reading it needs {INSTALL_DATASETS}") from error
    return datasets


def _folder_rows(path: Path, split: str) -> Iterator[NumberedRow]:
    datasets = _datasets(str(path))
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{path}: not a folder of save_to_disk: {one_line(error)}; name a file in it instead"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"{path}: found no split {split}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    for number, row in enumerate(loaded.with_format(None), start=1):
        yield number, _without_nulls(row)


def _hub_rows(table: Table) -> Iterator[NumberedRow]:
    datasets = _datasets(table.source)
    name = table.source.removeprefix(HUB)
    try:
        loaded = datasets.load_dataset(
            name, table.subset, split=table.split, revision=table.revision, streaming=True
        )
        for number, row in enumerate(loaded, start=1):
            yield number, _without_nulls(row)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{table.source}: can't be read ({type(error).__name__}: {one_line(error)}); a local "
            "file needs no hub"
        ) from error


def _without_nulls(value: Any) -> Any:
    """Remove null fields: Arrow gives every object of a column the fields of all objects."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value

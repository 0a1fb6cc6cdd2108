"""A GGUF file in llama.cpp, as deployed or in float32 throughout.

llama.cpp rounds activations to 8 bits where weights are in blocks. What is compared with torch is
therefore the same numbers written as float32, in a file that lasts as long as it takes to load it.
"""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sqft_export.errors import UserError
from sqft_export.packed.gguf_file import read_gguf
from sqft_export.packed.loaders import dense_gguf
from sqft_export.run.host import allowed_processors
from sqft_export.run.threads import map_in_order
from sqft_export.targets import Session, last_columns
from sqft_export.targets.devices import find_device
from sqft_export.targets.folder import ADAPTER_FOLDER
from sqft_export.targets.gguf.bindings import PASS, SEQUENCES, Opened, Token, open_model

logging.getLogger("gguf").setLevel(logging.WARNING)  # else it tells of every file
_FIRST_CELLS = 2048  # tokens that a cache holds at first
ADAPTER_FILE = "adapter.gguf"


class GgufSession(Session):
    """A model of llama.cpp; its cache keeps rows as sequences of their own.

    Rows are filled up on the right, and what fills them is left out.
    """

    padding = "right"
    all_logits = False
    fills_up = False
    most_rows = SEQUENCES

    def __init__(self, model: Opened, exact: bool, threads: int | None):
        self.model, self.exact = model, exact
        self.threads = threads or allowed_processors()
        self.vocabulary = model.vocabulary
        self.cells = _FIRST_CELLS
        self.cache = model.cache(self.cells, self.threads, exact)
        self.reset()

    def reset(self) -> None:
        self.cache.clear()
        self.histories: list[list[int]] = []  # tokens of every row
        self.sequences: list[int] = []  # llama.cpp's number of every row

    def select(self, rows: np.ndarray) -> None:
        _check_rows(len(rows))
        kept = {self.sequences[row] for row in rows}
        for sequence in set(self.sequences) - kept:
            self.cache.forget(sequence)
        free = iter(sorted(set(range(SEQUENCES)) - kept))
        chosen, taken = [], set[int]()
        for row in rows:
            sequence = self.sequences[row]
            if sequence in taken:
                sequence = next(free)
                self.cache.copy(self.sequences[row], sequence)
            taken.add(sequence)
            chosen.append(sequence)
        self.histories = [list(self.histories[row]) for row in rows]
        self.sequences = chosen

    def forward(
        self, ids: np.ndarray, mask: np.ndarray | None = None, last: int | None = None
    ) -> np.ndarray:
        kept = np.ones(ids.shape, bool) if mask is None else mask[:, -ids.shape[1] :] == 1
        columns = last_columns(kept, last)
        wanted = np.zeros(ids.shape, bool)
        np.put_along_axis(wanted, columns, True, axis=1)
        logits = np.zeros((*columns.shape, self.vocabulary), np.float32)
        for places in self._passes(ids, kept, wanted):
            for index, (row, column) in enumerate(places):
                if wanted[row, column]:
                    logits[row, column - columns[row, 0]] = self.cache.logits(index)
        return logits

    def likeliest(self, ids: np.ndarray) -> np.ndarray:
        """As llama.cpp itself chooses."""
        chosen = np.zeros(len(ids), np.int64)
        wanted = np.zeros(ids.shape, bool)
        wanted[:, -1] = True
        for places in self._passes(ids, np.ones(ids.shape, bool), wanted):
            for index, (row, column) in enumerate(places):
                if wanted[row, column]:
                    chosen[row] = self.cache.likeliest(index)
        return chosen

    def _passes(
        self, ids: np.ndarray, kept: np.ndarray, wanted: np.ndarray
    ) -> Iterator[list[tuple[int, int]]]:
        """Continue every row; after each pass, which row and column of ``ids`` was where in it.

        :param kept: bool, the shape of ``ids``: False where it is filled up.
        :param wanted: of the same shape: where logits are asked for.
        """
        if not self.sequences:
            self.sequences = list(range(len(ids)))
            self.histories = [[] for _ in ids]
        _check_rows(len(self.sequences))
        self._make_room(int(kept.sum()))
        places = [(int(row), int(column)) for row, column in np.argwhere(kept)]
        for start in range(0, len(places), PASS):
            part = places[start : start + PASS]
            tokens = []
            for row, column in part:
                token, history = int(ids[row, column]), self.histories[row]
                asked = bool(wanted[row, column])
                tokens.append(Token(token, len(history), self.sequences[row], asked))
                history.append(token)
            self._decode(tokens)
            yield part

    def _decode(self, tokens: list[Token]) -> None:
        if failed := self.cache.decode(tokens):
            raise UserError(f"llama.cpp can't continue: llama_decode says {failed}")

    def _make_room(self, more: int) -> None:
        """A cache that holds what will follow, and as much again: what was in the last one is read
        anew, which takes as long as it did."""
        needed = sum(map(len, self.histories)) + more
        if needed <= self.cells:
            return
        while self.cells < 2 * needed:
            self.cells *= 2
        self.cache.close()
        self.cache = self.model.cache(self.cells, self.threads, self.exact)
        known = [
            Token(token, place, sequence, False)
            for history, sequence in zip(self.histories, self.sequences, strict=True)
            for place, token in enumerate(history)
        ]
        for start in range(0, len(known), PASS):
            self._decode(known[start : start + PASS])


def _check_rows(count: int) -> None:
    if count > SEQUENCES:
        raise UserError(f"llama.cpp: found a batch of {count} rows; at most {SEQUENCES} fit")


def open_session(
    folder: Path, exact: bool, threads: int | None, device: str = "cpu"
) -> GgufSession:
    """A GGUF folder in llama.cpp, on the CPU.

    :param exact: the file's numbers in float32 throughout, to compare with torch; with the adapter
        beside it, if there is one.
    :raises UserError: if the device is another, or an adapter is to run as deployed: cyllama can't
        put it beside the products.
    """
    find_device("gguf", device)
    adapter = folder / ADAPTER_FOLDER / ADAPTER_FILE
    if adapter.is_file() and not exact:
        raise UserError(f"{adapter}: cyllama can't apply an adapter; llama-cli --lora does")
    with dense_gguf(folder) as file:
        if not exact:
            return GgufSession(open_model(file), exact, threads)
        with tempfile.TemporaryDirectory(prefix="sqft-") as scratch:
            floats = Path(scratch) / "float32.gguf"
            write_float32(file, floats, adapter if adapter.is_file() else None)
            return GgufSession(open_model(floats), exact, threads)


def write_float32(file: Path, out: Path, adapter: Path | None = None) -> None:
    """The same numbers as float32, as llama.cpp's own ``gguf`` package reads them.

    :param adapter: a LoRA file whose products are added to the weights.
    """
    import gguf

    reader = read_gguf(file)
    added = {t.name: t.data for t in read_gguf(adapter).tensors} if adapter else {}
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, inside = field.types[0], field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, inside)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.float32), int(np.prod(shape)) * 4, None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    def floats(tensor: Any) -> np.ndarray:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if f"{tensor.name}.lora_a" in added:
            values = values + added[f"{tensor.name}.lora_b"] @ added[f"{tensor.name}.lora_a"]
        return values

    for values in map_in_order(floats, reader.tensors):
        writer.write_tensor_data(values)
    writer.close()

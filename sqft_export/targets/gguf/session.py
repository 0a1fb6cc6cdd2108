"""Run a GGUF file in llama.cpp, in its default mode or in float32.

llama.cpp rounds activations to 8 bits if weights are quantized blocks. To compare with torch, the
weights are therefore written as float32 to a temporary file, which is deleted after loading.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sqft_export.errors import HostError, UserError, one_line
from sqft_export.kernels.choice import STOCK
from sqft_export.kernels.llama_plugin import set_exact_products, use_in_llama_cpp
from sqft_export.machine.host import LESS_MEMORY, allowed_processors
from sqft_export.machine.threads import map_in_order
from sqft_export.model.families import FAMILIES
from sqft_export.packed.gguf_file import read_gguf
from sqft_export.packed.loaders import dense_gguf
from sqft_export.targets import Session, last_columns
from sqft_export.targets.devices import find_device
from sqft_export.targets.faults import RUN_AGAIN
from sqft_export.targets.folder import ADAPTER_FOLDER
from sqft_export.targets.gguf.bindings import (
    MAX_SEQUENCES,
    PASS_TOKENS,
    RECURRENT_SEQUENCES,
    Opened,
    Token,
    open_model,
)
from sqft_export.targets.offload import OffloadDevice, find_offload
from sqft_export.textfiles import read_json

if TYPE_CHECKING:
    from gguf import ReaderTensor

_FIRST_CELLS = 2048  # initial cache size in tokens
ADAPTER_FILE = "adapter.gguf"
_KEPT_ON_CPU = "llama.cpp keeps the input embedding on the CPU"


class GgufSession(Session):
    """A session of a llama.cpp model. Each row is a separate sequence in the cache.

    Rows are padded on the right, and padding is not computed.
    """

    padding = "right"
    all_logits = False
    computes_padding = False

    def __init__(
        self,
        model: Opened,
        exact: bool,
        threads: int | None,
        max_rows: int = MAX_SEQUENCES,
        gpu: OffloadDevice | None = None,
    ):
        self.max_rows = max_rows
        self.model, self.exact = model, exact
        if gpu is not None:
            self.device = f"{gpu.name} ({gpu.description})"
            self.placement = f"all layers on {self.device}; {_KEPT_ON_CPU}"
        self.threads = threads or allowed_processors()
        self.vocabulary = model.vocabulary
        self.cells = _FIRST_CELLS
        self.cache = model.cache(self.cells, self.threads, exact, max_rows)
        self.reset()

    def reset(self) -> None:
        self.cache.clear()
        self.histories: list[list[int]] = []  # tokens per row
        self.sequences: list[int] = []  # llama.cpp's sequence number per row

    def select(self, rows: np.ndarray) -> None:
        self._check_rows(len(rows))
        kept = {self.sequences[row] for row in rows}
        for sequence in set(self.sequences) - kept:
            self.cache.forget(sequence)
        free = iter(sorted(set(range(self.max_rows)) - kept))
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

    def argmax_tokens(self, ids: np.ndarray) -> np.ndarray:
        """Return the tokens that llama.cpp's greedy sampler chooses, int64 ``[batch]``."""
        chosen = np.zeros(len(ids), np.int64)
        wanted = np.zeros(ids.shape, bool)
        wanted[:, -1] = True
        for places in self._passes(ids, np.ones(ids.shape, bool), wanted):
            for index, (row, column) in enumerate(places):
                if wanted[row, column]:
                    chosen[row] = self.cache.argmax(index)
        return chosen

    def _passes(
        self, ids: np.ndarray, kept: np.ndarray, wanted: np.ndarray
    ) -> Iterator[list[tuple[int, int]]]:
        """Continue every row. After each pass, yield (row, column) of ``ids`` for its tokens.

        :param kept: bool, shape of ``ids``, False at padding.
        :param wanted: bool, shape of ``ids``, True where logits are needed.
        """
        if not self.sequences:
            self.sequences = list(range(len(ids)))
            self.histories = [[] for _ in ids]
        self._check_rows(len(self.sequences))
        self._grow_cache(int(kept.sum()))
        places = [(int(row), int(column)) for row, column in np.argwhere(kept)]
        for start in range(0, len(places), PASS_TOKENS):
            part = places[start : start + PASS_TOKENS]
            tokens = []
            for row, column in part:
                token, history = int(ids[row, column]), self.histories[row]
                needs_logits = bool(wanted[row, column])
                tokens.append(Token(token, len(history), self.sequences[row], needs_logits))
                history.append(token)
            self._decode(tokens)
            yield part

    def _check_rows(self, count: int) -> None:
        """Check the number of rows of a batch.

        :raises UserError: if the cache does not have so many sequences.
        """
        if count > self.max_rows:
            raise UserError(
                f"llama.cpp: found a batch of {count} rows; at most {self.max_rows} fit"
            )

    def _decode(self, tokens: list[Token]) -> None:
        """Run a pass.

        :raises HostError: if it fails on a GPU; newer drivers return a status for a lost device,
            others end the process (``commands/supervising.py``).
        """
        try:
            status = self.cache.decode(tokens)
            failed = f"llama_decode returned {status}" if status else ""
        except (RuntimeError, ValueError) as error:  # cyllama's
            failed = one_line(error)
        if failed and self.device == "cpu":
            raise UserError(f"llama.cpp failed: {failed}")
        if failed:
            raise HostError(
                f"{self.device}: llama.cpp failed: {failed}; the device was lost or its memory is "
                f"exhausted: {RUN_AGAIN}, or {LESS_MEMORY}"
            )

    def _grow_cache(self, more: int) -> None:
        """Replace the cache by one of at least twice the needed size, if ``more`` tokens don't fit.

        The tokens of the old cache are computed again.
        """
        needed = sum(map(len, self.histories)) + more
        if needed <= self.cells:
            return
        while self.cells < 2 * needed:
            self.cells *= 2
        self.cache.close()
        self.cache = self.model.cache(self.cells, self.threads, self.exact, self.max_rows)
        known = [
            Token(token, place, sequence, False)
            for history, sequence in zip(self.histories, self.sequences, strict=True)
            for place, token in enumerate(history)
        ]
        for start in range(0, len(known), PASS_TOKENS):
            self._decode(known[start : start + PASS_TOKENS])


def open_session(
    folder: Path,
    exact: bool,
    threads: int | None,
    device: str = "cpu",
    float32_cache: bool = False,
    execution: str = STOCK,
) -> GgufSession:
    """Load a GGUF folder into a llama.cpp session.

    :param exact: compute in float32, to compare with torch; an unmerged adapter is added to the
        weights.
    :param threads: CPU threads.
    :param device: cpu, or the kind of a GPU that gets all layers: vulkan, cuda.
    :param float32_cache: float32 keys and values without flash attention, as in exact mode.
    :param execution: auto, sparse or dense: our kernels multiply. In exact mode they read the
        quantized weights of the file, and round no activations. stock: llama.cpp's own.
    :raises UserError: if the device is unavailable, if our kernels can't run, or if an unmerged
        adapter is to run in default mode, which cyllama does not support.
    """
    gpu = _find_gpu(device)
    adapter = folder / ADAPTER_FOLDER / ADAPTER_FILE
    if adapter.is_file() and not exact:
        raise UserError(f"{adapter}: cyllama can't apply an adapter; llama-cli --lora can")
    if execution != STOCK:
        use_in_llama_cpp(execution)
        set_exact_products(exact)
    rows = _max_rows(folder)
    with dense_gguf(folder) as file:
        if not exact or execution != STOCK:
            return GgufSession(open_model(file, gpu), exact or float32_cache, threads, rows, gpu)
        with tempfile.TemporaryDirectory(prefix="sqft-") as scratch:
            floats = Path(scratch) / "float32.gguf"
            write_float32(file, floats, adapter if adapter.is_file() else None)
            return GgufSession(open_model(floats, gpu), exact, threads, rows, gpu)


def _max_rows(folder: Path) -> int:
    """Return the largest batch of a deployment, by the config next to the file."""
    file = folder / "config.json"
    model_type = read_json(file).get("model_type") if file.is_file() else None
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return RECURRENT_SEQUENCES if family and family.recurrent else MAX_SEQUENCES


def _find_gpu(device: str) -> OffloadDevice | None:
    """Return the GPU of a device kind; None for the CPU.

    :raises UserError: with the reason, if it is unavailable.
    """
    find_device("gguf", device)
    found = None if device == "cpu" else find_offload(device)
    assert not isinstance(found, str)  # find_device refuses it
    return found


def write_float32(file: Path, out: Path, adapter: Path | None = None) -> None:
    """Write a copy of a GGUF file with float32 weights, dequantized by the ``gguf`` package.

    :param out: file to write.
    :param adapter: a LoRA file whose update ``B @ A`` is added to the weights.
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

    def floats(tensor: "ReaderTensor") -> np.ndarray:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if f"{tensor.name}.lora_a" in added:
            values = values + added[f"{tensor.name}.lora_b"] @ added[f"{tensor.name}.lora_a"]
        return values

    for values in map_in_order(floats, reader.tensors):
        writer.write_tensor_data(values)
    writer.close()

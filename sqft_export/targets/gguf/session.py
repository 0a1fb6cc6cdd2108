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
from sqft_export.packed.loaders import dense_gguf, gguf_model
from sqft_export.run.host import allowed_processors
from sqft_export.targets import Session
from sqft_export.targets.devices import find_device
from sqft_export.targets.folder import ADAPTER_FOLDER

logging.getLogger("gguf").setLevel(logging.WARNING)  # else it tells of every file
_FIRST_CELLS = 2048  # tokens that a cache holds at first
_SEQUENCES = 256  # sequences that llama.cpp keeps apart
_PASS = 512  # tokens that go through it at once
_FLOAT32 = 0  # ggml's number of the type
ADAPTER_FILE = "adapter.gguf"


class GgufSession(Session):
    """A model of llama.cpp; its cache keeps rows as sequences of their own.

    Rows are filled up on the right, and what fills them is left out.
    """

    padding = "right"
    all_logits = False

    def __init__(self, model: Any, exact: bool, threads: int | None):
        self.model, self.exact, self.threads = model, exact, threads
        self.vocabulary = model.n_vocab
        self.cells = _FIRST_CELLS
        self.context = self._new_context()
        self.reset()

    def _new_context(self) -> Any:
        from cyllama.llama import llama_cpp

        params = llama_cpp.LlamaContextParams()
        params.n_ctx, params.n_seq_max, params.kv_unified = self.cells, _SEQUENCES, True
        params.n_batch = params.n_ubatch = _PASS
        # Its own choice is four, which wait in a spin where there are fewer processors.
        params.n_threads = params.n_threads_batch = self.threads or allowed_processors()
        if self.exact:
            params.type_k = params.type_v = _FLOAT32
            params.flash_attn_type = 0
        return llama_cpp.LlamaContext(model=self.model, params=params)

    def reset(self) -> None:
        self.context.kv_cache_clear(False)
        self.histories: list[list[int]] = []  # tokens of every row
        self.sequences: list[int] = []  # llama.cpp's number of every row

    def select(self, rows: np.ndarray) -> None:
        free = iter(sorted(set(range(_SEQUENCES)) - set(self.sequences)))
        chosen, taken = [], set[int]()
        for row in rows:
            sequence = self.sequences[row]
            if sequence in taken:
                sequence = next(free)
                self.context.memory_seq_cp(self.sequences[row], sequence, -1, -1)
            taken.add(sequence)
            chosen.append(sequence)
        for sequence in set(self.sequences) - taken:
            self.context.memory_seq_rm(sequence, -1, -1)
        self.histories = [list(self.histories[row]) for row in rows]
        self.sequences = chosen

    def forward(
        self, ids: np.ndarray, mask: np.ndarray | None = None, last: int | None = None
    ) -> np.ndarray:
        batch, length = ids.shape
        kept = np.ones(ids.shape, bool) if mask is None else mask[:, -length:] == 1
        wanted = np.zeros(ids.shape, bool)
        wanted[:, length - (last or length) :] = True
        logits = np.zeros((batch, last or length, self.vocabulary), np.float32)
        for places in self._passes(ids, kept, wanted):
            for index, (row, column) in enumerate(places):
                if wanted[row, column]:
                    found = self.context.get_logits_ith(index)
                    logits[row, column - length] = found
        return logits

    def likeliest(self, ids: np.ndarray) -> np.ndarray:
        """As llama.cpp itself chooses: taking its logits out of it costs more than they do."""
        from cyllama.llama import llama_cpp

        sampler = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
        sampler.add_greedy()
        chosen = np.zeros(len(ids), np.int64)
        wanted = np.zeros(ids.shape, bool)
        wanted[:, -1] = True
        for places in self._passes(ids, np.ones(ids.shape, bool), wanted):
            for index, (row, column) in enumerate(places):
                if wanted[row, column]:
                    chosen[row] = sampler.sample(self.context, index)
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
        if len(self.sequences) > _SEQUENCES:
            raise UserError(
                f"llama.cpp keeps {_SEQUENCES} sequences apart; found {len(self.sequences)}"
            )
        self._make_room(int(kept.sum()))
        places = [(int(row), int(column)) for row, column in np.argwhere(kept)]
        for start in range(0, len(places), _PASS):
            part = places[start : start + _PASS]
            tokens = []
            for row, column in part:
                token, history = int(ids[row, column]), self.histories[row]
                tokens.append((token, len(history), self.sequences[row], bool(wanted[row, column])))
                history.append(token)
            self._decode(tokens)
            yield part

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """:param tokens: id, position, sequence, whether its logits are asked for."""
        from cyllama.llama import llama_cpp

        batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for token, position, sequence, asked in tokens:
            batch.add(token, position, [sequence], asked)
        if failed := self.context.decode(batch):
            raise UserError(f"llama.cpp can't continue: llama_decode says {failed}")

    def _make_room(self, more: int) -> None:
        """A cache that holds what will follow; what was in the last one is read again."""
        needed = sum(map(len, self.histories)) + more
        if needed <= self.cells:
            return
        while self.cells < needed:
            self.cells *= 2
        self.context.close()
        self.context = self._new_context()
        known = [
            (token, place, sequence, False)
            for history, sequence in zip(self.histories, self.sequences, strict=True)
            for place, token in enumerate(history)
        ]
        for start in range(0, len(known), _PASS):
            self._decode(known[start : start + _PASS])


def open_session(
    folder: Path, exact: bool, threads: int | None, device: str = "cpu"
) -> GgufSession:
    """A GGUF folder in llama.cpp, on the CPU.

    :param exact: the file's numbers in float32 throughout, to compare with torch; with the adapter
        beside it, if there is one.
    :raises UserError: if the device is another, or an adapter is to run as deployed: the binding
        can't put it beside the products.
    """
    find_device("gguf", device)
    adapter = folder / ADAPTER_FOLDER / ADAPTER_FILE
    if adapter.is_file() and not exact:
        raise UserError(f"{adapter}: cyllama can't apply an adapter; llama-cli --lora does")
    with dense_gguf(folder) as file:
        if not exact:
            return GgufSession(gguf_model(file), exact, threads)
        with tempfile.TemporaryDirectory(prefix="sqft-") as scratch:
            floats = Path(scratch) / "float32.gguf"
            write_float32(file, floats, adapter if adapter.is_file() else None)
            return GgufSession(gguf_model(floats), exact, threads)


def write_float32(file: Path, out: Path, adapter: Path | None = None) -> None:
    """The same numbers as float32, as llama.cpp's own ``gguf`` package reads them.

    :param adapter: a LoRA file whose products are added to the weights.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    added = {t.name: t.data for t in gguf.GGUFReader(adapter).tensors} if adapter else {}
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
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if f"{tensor.name}.lora_a" in added:
            values = values + added[f"{tensor.name}.lora_b"] @ added[f"{tensor.name}.lora_a"]
        writer.write_tensor_data(values)
    writer.close()

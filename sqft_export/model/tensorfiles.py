"""Read safetensors files (headers without torch, single tensors), and write them in shards."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from sqft_export.errors import UserError, one_line
from sqft_export.model.companions import file_in_folder
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_JSON_BYTES, open_regular, parse_json

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open
    from torch import Tensor


DTYPE_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
_STORED_INTEGERS = {"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8"}
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# torch's name of a dtype -> the name in a safetensors header
STORED_NAMES = {name: kind for kind, name in TORCH_NAMES.items()} | _STORED_INTEGERS
MAX_TENSOR_HEADER_BYTES = 100_000_000  # the format's limit
MAX_AXIS_LENGTH = 2**40
_SHARD_BYTES = 2 * 2**30


def index_name(stem: str) -> str:
    """Return the file name of the index of a sharded checkpoint."""
    return f"{stem}.safetensors.index.json"


class Slice(NamedTuple):
    """Every ``step``-th row from ``start`` to ``stop`` of one matrix of a stored tensor.

    The tensor has three axes; with two axes, a vector in place of the matrix.
    """

    matrix: int
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in the header of its file.

    key: name in that file. part: the matrix that is read; None: the complete tensor.
    transposed: the file has the matrix ``[in, out]`` of this ``shape``.
    scales: the tensor with the scales of codes in MXFP4; None: ``key`` has values. ``shape`` and
        ``dtype`` are those of the values.
    """

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    part: Slice | None = None
    transposed: bool = False
    scales: "TensorInfo | None" = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_headers(file: Path) -> dict[str, TensorInfo]:
    """Read names, shapes and dtypes from the header of one safetensors file.

    :raises UserError: naming the file and the tensor, if the file is cut or its header is wrong.
    """
    size = file.stat().st_size
    with open_regular(file) as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, MAX_TENSOR_HEADER_BYTES):
            raise UserError(f"{file}: not a complete safetensors file")
        header = stream.read(length)
    try:
        entries = parse_json(header, "header")
    except UserError as error:
        raise UserError(f"{file}: its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise UserError(f"{file}: its header is a {type(entries).__name__}, not an object")
    entries.pop("__metadata__", None)
    infos, pieces = {}, []
    for name, entry in entries.items():
        infos[name], (start, stop) = _parse_entry(file, name, entry)
        pieces.append((start, stop, name))
    _check_ranges(file, sorted(pieces), size - 8 - length)
    return infos


def _parse_entry(file: Path, name: str, entry: object) -> tuple[TensorInfo, tuple[int, int]]:
    """Parse the header entry of one tensor and return its description and byte range."""

    fields = entry if isinstance(entry, dict) else {}

    def numbers(key: str) -> list[int]:
        found = fields.get(key)
        whole = isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)
        shown = one_line(repr(found), 80)
        if found is None or not whole or max(found, default=0) > MAX_AXIS_LENGTH:
            raise UserError(f"{file}: {name}: {key}: found {shown}, expected a list of sizes")
        return found

    shape, offsets = numbers("shape"), numbers("data_offsets")
    if (dtype := fields.get("dtype")) not in DTYPE_BYTES:
        shown = one_line(repr(dtype), 80)
        raise UserError(
            f"{file}: {name}: dtype {shown} is not supported; supported are "
            f"{', '.join(TORCH_NAMES)}"
        )
    info = TensorInfo(file.name, name, dtype, tuple(shape))
    if len(offsets) != 2 or offsets[1] - offsets[0] != info.bytes:
        raise UserError(f"{file}: {name}: {offsets} are not the {info.bytes} bytes of its shape")
    return info, (offsets[0], offsets[1])


def _check_ranges(file: Path, pieces: list[tuple[int, int, str]], size: int) -> None:
    """Check that the byte ranges of tensors do not overlap and end within the file.

    :param pieces: start, stop and name of every tensor, sorted.
    :param size: bytes after the header.
    """
    end = 0
    for start, stop, name in pieces:
        if start < end:
            raise UserError(f"{file}: {name}: overlaps the tensor before it")
        end = stop
    if end > size:
        raise UserError(f"{file}: the header lists {end} bytes, the file has {size}")


class TensorFiles:
    """The tensors of ``<stem>.safetensors``, or of the shards that its index lists."""

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder, self.stem = folder, stem

    @property
    def exists(self) -> bool:
        names = (f"{self.stem}.safetensors", index_name(self.stem))
        return any((self.folder / name).is_file() for name in names)

    @cached_property
    def headers(self) -> dict[str, TensorInfo]:
        return self.stored

    @cached_property
    def stored(self) -> dict[str, TensorInfo]:
        """All tensors in the files, under their names in the files."""
        headers: dict[str, TensorInfo] = {}
        for name in self.shards:
            if not (self.folder / name).exists():
                raise UserError(
                    f"{self.folder / name}: is missing (only safetensors are supported)"
                )
            headers.update(read_headers(file_in_folder(self.folder, name)))
        if not headers:
            raise UserError(f"{self.folder}: its safetensors files contain no tensor")
        return headers

    @cached_property
    def shards(self) -> list[str]:
        """Names of the files: a single file, or the files of the index."""
        if not (self.folder / index_name(self.stem)).is_file():
            return [f"{self.stem}.safetensors"]
        index = file_in_folder(self.folder, index_name(self.stem))
        files = read_json(index, MAX_JSON_BYTES).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise UserError(f"{index}: weight_map: expected an object of tensor name: file name")
        return sorted(set(files.values()))

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, "Tensor"]]:
        """Yield the named tensors, one in memory at a time; each file is opened once."""
        from safetensors import safe_open

        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.headers[name].file, []).append(name)
        for file, wanted in by_file.items():
            with safe_open(self.folder / file, framework="pt") as shard:
                for name in wanted:
                    yield name, self._read(shard, self.headers[name])

    def _read(self, shard: "safe_open", info: TensorInfo) -> "Tensor":
        """Return a tensor of an open file; codes in MXFP4 are dequantized."""
        if info.scales is None:
            return _read_tensor(shard, info)
        from safetensors import safe_open

        from sqft_export.numerics.mxfp4 import dequantize_mxfp4

        codes = _read_tensor(shard, info)
        if info.scales.file == info.file:
            return dequantize_mxfp4(codes, _read_tensor(shard, info.scales))
        with safe_open(self.folder / info.scales.file, framework="pt") as other:
            return dequantize_mxfp4(codes, _read_tensor(other, info.scales))

    def dtype(self, name: str) -> "torch.dtype":
        """Return the dtype of a stored tensor."""
        import torch

        return getattr(torch, TORCH_NAMES[self.headers[name].dtype])

    def tensor(self, name: str) -> "Tensor":
        """Read one tensor."""
        return next(self.tensors([name]))[1]


def _read_tensor(shard: "safe_open", info: TensorInfo) -> "Tensor":
    """Return a tensor of an open file, or the part of it that ``info`` describes."""
    if info.part is None:
        tensor = shard.get_tensor(info.key)
        return tensor.T.contiguous() if info.transposed else tensor
    matrix, start, stop, step = info.part
    if step == 1 and not info.transposed:
        return shard.get_slice(info.key)[matrix, start:stop]
    found = shard.get_slice(info.key)[matrix, :]  # slices of a file have no step
    return (found.T if info.transposed else found)[start:stop:step].contiguous()


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a regular file."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_tensors(file: Path, tensors: "Mapping[str, Tensor]") -> str:
    """Write a safetensors file and return its SHA-256.

    The bytes of one tensor are copied at a time; ``save_file`` copies those of all tensors.
    """
    header, end = dict[str, dict](), 0
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # aligned
    for name in names:
        one = tensors[name]
        start, end = end, end + one.nbytes
        kind = STORED_NAMES[str(one.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, partial = hashlib.sha256(), file.with_suffix(".partial")
    with partial.open("wb") as stream:
        for part in (struct.pack("<Q", len(text)), text, *(tensors[name] for name in names)):
            content = part if isinstance(part, bytes) else _bytes_of(part)
            stream.write(content)
            digest.update(content)
    partial.rename(file)
    return digest.hexdigest()


def _bytes_of(tensor: "Tensor") -> memoryview:
    import torch

    return memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())


class WriterState(TypedDict):
    """The state of a :class:`TensorWriter`.

    shards: names of the tensors in each shard. digests: SHA-256 of each. total: bytes of all
    tensors, with those that it still holds.
    """

    shards: list[list[str]]
    digests: list[str]
    total: int


class TensorWriter:
    """Write tensors to one file, or to several shards and an index.

    Use it as a context manager. The index (or the single file's name) is written on exit, so an
    interrupted write leaves no readable checkpoint.

    :param shard_bytes: bytes that are buffered before a shard is written.
    :param active: False writes nothing, in a process next to the one that writes.
    :param is_transposed: whether the matrix of a name is stored as ``[in, out]``.
    """

    def __init__(
        self,
        folder: Path,
        stem: str = "model",
        shard_bytes: int = _SHARD_BYTES,
        active: bool = True,
        is_transposed: Callable[[str], bool] = lambda name: False,
    ):
        self.active, self.is_transposed = active, is_transposed
        if active:
            folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.stem, self.shard_bytes = folder, stem, shard_bytes
        self.held: dict[str, Tensor] = {}  # not yet in a shard
        self._shards: list[list[str]] = []
        self._digests: list[str] = []
        self._total = 0

    def add(self, name: str, tensor: "Tensor") -> None:
        """Buffer a tensor, and write a shard once the buffer is full."""
        if not self.active:
            return
        self.held[name] = (tensor.T if self.is_transposed(name) else tensor).contiguous()
        self._total += tensor.nbytes
        if sum(t.nbytes for t in self.held.values()) > self.shard_bytes:
            self._flush()

    def add_all(self, tensors: "Iterable[tuple[str, Tensor]]") -> None:
        """Buffer tensors, one in memory at a time."""
        for name, tensor in tensors:
            self.add(name, tensor)

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self.held:
            save_file(self.held, self._shard(len(self._shards)), metadata={"format": "pt"})
            self._shards.append(sorted(self.held))
            self.held = {}

    def _shard(self, number: int) -> Path:
        """Return the file of a shard until the index is written."""
        return self.folder / f"{self.stem}-{number}"

    def state(self) -> WriterState:
        """Return what :meth:`resume` needs in addition to the tensors that are still held."""
        for number in range(len(self._digests), len(self._shards)):
            self._digests.append(file_sha256(self._shard(number)))
        return {"shards": self._shards, "digests": self._digests, "total": self._total}

    def has_shards(self, state: WriterState) -> bool:
        """Return whether the folder has all shards of a state, unchanged."""
        self._reopen()
        files = [self._shard(number) for number in range(len(state["shards"]))]
        return all(file.is_file() for file in files) and state["digests"] == [
            *map(file_sha256, files)
        ]

    def resume(self, state: WriterState, held: "Mapping[str, Tensor]") -> None:
        """Continue a writer that was interrupted in this state."""
        self._shards, self._digests = [*state["shards"]], [*state["digests"]]
        self._total, self.held = state["total"], dict(held)

    def _reopen(self) -> None:
        """Undo the final names of shards, which a writer gives before it writes the index."""
        (self.folder / index_name(self.stem)).unlink(missing_ok=True)
        single = self.folder / f"{self.stem}.safetensors"
        if single.exists():
            single.rename(self._shard(0))
        for file in self.folder.glob(f"{self.stem}-*-of-*.safetensors"):
            number = file.name.removeprefix(f"{self.stem}-").partition("-")[0]
            file.rename(self._shard(int(number) - 1))

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, failure, *_: object) -> None:
        if failure is not None or not self.active:
            return
        self._flush()
        if len(self._shards) == 1:
            self._shard(0).rename(self.folder / f"{self.stem}.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"{self.stem}-{number + 1:05}-of-{len(self._shards):05}.safetensors"
            self._shard(number).rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.folder / index_name(self.stem)).write_text(text)

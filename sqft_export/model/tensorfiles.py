"""safetensors files on disk: headers without torch, tensors by name, shards as they come."""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft_export.errors import UserError, one_line
from sqft_export.model.companions import own_file
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_JSON_BYTES, open_regular, parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor


DTYPE_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
LARGEST_AXIS = 2**40
_SHARD_BYTES = 2 * 2**30


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its shard's header describes it; ``key`` is its name in that file."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_headers(file: Path) -> dict[str, TensorInfo]:
    """Names, shapes and dtypes of one safetensors file, from its first bytes.

    :raises UserError: naming the file, and the tensor, if it is cut short or its header is not one.
    """
    size = file.stat().st_size
    with open_regular(file) as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, LARGEST_HEADER):
            raise UserError(f"{file}: not a whole safetensors file")
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
        infos[name], (start, stop) = _info(file, name, entry)
        pieces.append((start, stop, name))
    _check_pieces(file, sorted(pieces), size - 8 - length)
    return infos


def _info(file: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """One tensor and the bytes it says it has."""

    def numbers(key: str) -> list[int]:
        found = entry.get(key) if isinstance(entry, dict) else None
        whole = isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)
        shown = one_line(repr(found), 80)
        if found is None or not whole or max(found, default=0) > LARGEST_AXIS:
            raise UserError(f"{file}: {name}: {key}: found {shown}, expected a list of sizes")
        return found

    shape, offsets = numbers("shape"), numbers("data_offsets")
    if (dtype := entry.get("dtype")) not in DTYPE_BYTES:
        shown = one_line(repr(dtype), 80)
        raise UserError(
            f"{file}: {name}: dtype {shown} is not known; read are {', '.join(TORCH_NAMES)}"
        )
    info = TensorInfo(file.name, name, dtype, tuple(shape))
    if len(offsets) != 2 or offsets[1] - offsets[0] != info.bytes:
        raise UserError(f"{file}: {name}: {offsets} are not the {info.bytes} bytes of its shape")
    return info, (offsets[0], offsets[1])


def _check_pieces(file: Path, pieces: list[tuple[int, int, str]], size: int) -> None:
    """Tensors lie one after the other, within the file."""
    end = 0
    for start, stop, name in pieces:
        if start < end:
            raise UserError(f"{file}: {name}: overlaps the tensor before it")
        end = stop
    if end > size:
        raise UserError(f"{file}: {end} bytes announced, {size} there")


class TensorFiles:
    """The tensors of ``<stem>.safetensors``, or of the shards that its index names."""

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
        """Every tensor in the files, by the name it has there."""
        headers: dict[str, TensorInfo] = {}
        for name in self.shards:
            if not (self.folder / name).exists():
                raise UserError(f"{self.folder / name}: is missing (only safetensors are read)")
            headers.update(read_headers(own_file(self.folder, name)))
        if not headers:
            raise UserError(f"{self.folder}: its safetensors hold no tensor")
        return headers

    @cached_property
    def shards(self) -> list[str]:
        """Names of the files: one, or those of the index."""
        if not (self.folder / index_name(self.stem)).is_file():
            return [f"{self.stem}.safetensors"]
        index = own_file(self.folder, index_name(self.stem))
        files = read_json(index, MAX_JSON_BYTES).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise UserError(f"{index}: weight_map: expected names of tensors and of their files")
        return sorted(set(files.values()))

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, "Tensor"]]:
        """The named tensors, each shard opened once; memory is that of one tensor at a time."""
        from safetensors import safe_open

        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.headers[name].file, []).append(name)
        for file, wanted in by_file.items():
            with safe_open(self.folder / file, framework="pt") as shard:
                for name in wanted:
                    yield name, shard.get_tensor(self.headers[name].key)

    def dtype(self, name: str) -> "torch.dtype":
        import torch

        return getattr(torch, TORCH_NAMES[self.headers[name].dtype])

    def tensor(self, name: str) -> "Tensor":
        return next(self.tensors([name]))[1]


class TensorWriter:
    """Write tensors as they come, one file if they fit in ``shard_bytes``, else shards of that.

    Use as a context manager: the index is written on leaving, so that a folder without it (or
    without the single file) holds nothing.

    :param shard_bytes: what is held in memory before it is written.
    """

    def __init__(self, folder: Path, stem: str = "model", shard_bytes: int = _SHARD_BYTES):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.stem, self.shard_bytes = folder, stem, shard_bytes
        self._held: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: "Tensor") -> None:
        self._held[name] = tensor.contiguous()
        self._total += tensor.nbytes
        if sum(t.nbytes for t in self._held.values()) > self.shard_bytes:
            self._flush()

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._held:
            file = self.folder / f"{self.stem}-{len(self._shards)}"
            save_file(self._held, file, metadata={"format": "pt"})
            self._shards.append(sorted(self._held))
            self._held = {}

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, failure, *_: object) -> None:
        if failure is not None:
            return
        self._flush()
        if len(self._shards) == 1:
            (self.folder / f"{self.stem}-0").rename(self.folder / f"{self.stem}.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"{self.stem}-{number + 1:05}-of-{len(self._shards):05}.safetensors"
            (self.folder / f"{self.stem}-{number}").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.folder / index_name(self.stem)).write_text(text)

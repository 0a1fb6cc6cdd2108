"""safetensors files on disk: headers without torch, tensors by name, shards as they come."""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from sqft_export.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1}
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
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

    :raises UserError: if the file is cut short or its header is not one.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise UserError(f"{file}: not a whole safetensors file")
        entries = json.loads(stream.read(length))
    entries.pop("__metadata__", None)
    end = max((e["data_offsets"][1] for e in entries.values()), default=0)
    if size < 8 + length + end:
        raise UserError(f"{file}: {8 + length + end} bytes announced, {size} there")
    return {
        name: TensorInfo(file.name, name, entry["dtype"], tuple(entry["shape"]))
        for name, entry in entries.items()
    }


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
        index = self.folder / index_name(self.stem)
        if index.is_file():
            files = set(json.loads(index.read_text())["weight_map"].values())
        else:
            files = {f"{self.stem}.safetensors"}
        headers: dict[str, TensorInfo] = {}
        for file in sorted(files):
            if not (self.folder / file).is_file():
                raise UserError(f"{self.folder / file}: is missing (only safetensors are read)")
            headers.update(read_headers(self.folder / file))
        return headers

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

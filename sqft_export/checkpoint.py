"""Hugging Face checkpoints on disk: headers without torch, weights streamed by name.

Only safetensors. The header of a shard names every tensor with its shape and dtype, which is all
that ``plan`` needs.
"""

import json
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft_export.errors import UserError
from sqft_export.families import Family, family_of

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "I8": 1}
SHARD_BYTES = 512 * 2**20  # what a writer holds in memory before it is flushed
# Everything that makes a folder loadable beside its weights: configs, tokenizer, chat template.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Header:
    """One tensor as its shard's header describes it; ``key`` is its name in that file."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_headers(file: Path) -> dict[str, Header]:
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
        name: Header(file.name, name, entry["dtype"], tuple(entry["shape"]))
        for name, entry in entries.items()
    }


class Checkpoint:
    """A Hugging Face model folder: config, tensor headers, tensors by name."""

    def __init__(self, folder: Path):
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json; a Hugging Face model folder is expected")
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())

    @cached_property
    def family(self) -> Family:
        return family_of(self.config, str(self.folder / "config.json"))

    @cached_property
    def headers(self) -> dict[str, Header]:
        if (self.folder / INDEX).is_file():
            files = set(json.loads((self.folder / INDEX).read_text())["weight_map"].values())
        else:
            files = {SINGLE}
        headers: dict[str, Header] = {}
        for file in sorted(files):
            if not (self.folder / file).is_file():
                raise UserError(f"{self.folder / file}: is missing (only safetensors are read)")
            headers.update(read_headers(self.folder / file))
        embedding, head = f"{self.family.embedding}.weight", f"{self.family.head}.weight"
        if self.tied and embedding not in headers and head in headers:
            headers[embedding] = headers.pop(head)  # one tensor, stored under either name
        return headers

    @property
    def packed(self) -> list[str]:
        """The Linears stored in the GPTQ layout."""
        suffix = ".qweight"
        return [name.removesuffix(suffix) for name in self.headers if name.endswith(suffix)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight and its shape; a packed Linear counts as its ``[out, in]`` weight."""
        inside = tuple(f"{name}." for name in self.packed)
        shapes = {n: h.shape for n, h in self.headers.items() if not n.startswith(inside)}
        for name in self.packed:
            outputs = self.headers[f"{name}.scales"].shape[1]
            shapes[f"{name}.weight"] = (outputs, self.headers[f"{name}.g_idx"].shape[0])
        return shapes

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every decoder Linear: name -> (outputs, inputs)."""
        return decoder_linears(self.shapes, self.family.blocks)

    @property
    def blocks(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings"))

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

    def block_names(self, block: int) -> list[str]:
        """Names of all tensors of one decoder block."""
        prefix = f"{self.family.blocks}.{block}."
        return [name for name in self.headers if name.startswith(prefix)]

    def outer_names(self) -> list[str]:
        """Names of all tensors outside the decoder blocks."""
        prefix = f"{self.family.blocks}."
        return [name for name in self.headers if not name.startswith(prefix)]


def decoder_linears(shapes: dict[str, tuple[int, ...]], blocks: str) -> dict[str, tuple[int, int]]:
    """Every Linear of the decoder blocks: module name -> (outputs, inputs)."""
    inside = re.compile(rf"^{re.escape(blocks)}\.\d+\..+\.weight$")
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if inside.match(name) and len(shape) == 2
    }


def copy_companions(source: Path, folder: Path) -> None:
    """Copy configs and tokenizer of a model folder, without its weights' index."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.name not in (INDEX, "manifest.json"):
                shutil.copyfile(file, folder / file.name)


class CheckpointWriter:
    """Write tensors as they come; shards of at most ``SHARD_BYTES``, one file if it fits.

    Use as a context manager: the index is written on leaving, so that a folder without it (or
    without the single file) is not a checkpoint.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._held: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: "Tensor") -> None:
        self._held[name] = tensor.contiguous()
        self._total += tensor.nbytes
        if sum(t.nbytes for t in self._held.values()) >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._held:
            file = self.folder / f"shard-{len(self._shards)}"
            save_file(self._held, file, metadata={"format": "pt"})
            self._shards.append(sorted(self._held))
            self._held = {}

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, failure, *_: object) -> None:
        if failure is not None:
            return
        self._flush()
        if len(self._shards) == 1:
            (self.folder / "shard-0").rename(self.folder / SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{len(self._shards):05}.safetensors"
            (self.folder / f"shard-{number}").rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def file_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

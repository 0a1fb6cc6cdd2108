"""Hugging Face checkpoints on disk. Headers alone are all that ``plan`` needs; no torch."""

import json
import re
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from sqft_export.errors import UserError
from sqft_export.model.architecture import family_of
from sqft_export.model.families import Family
from sqft_export.model.tensorfiles import TensorFiles, TensorInfo, index_name

# Everything that makes a folder loadable beside its weights: configs, tokenizer, chat template.
COMPANIONS = ("*.json", "*.model", "*.txt", "*.jinja")


class Checkpoint(TensorFiles):
    """A Hugging Face model folder: config, tensor headers, tensors by name."""

    def __init__(self, folder: Path):
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json; a Hugging Face model folder is expected")
        super().__init__(folder)
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())

    @cached_property
    def family(self) -> Family:
        return family_of(self.config, str(self.folder / "config.json"))

    @cached_property
    def headers(self) -> dict[str, TensorInfo]:
        headers = dict(super().headers)
        outer, _, _ = self.family.blocks.partition(".")
        if not any(name.startswith(f"{self.family.blocks}.") for name in headers):
            # Stored as the model without its head, as Bloom is.
            headers = {
                name if name.startswith(self.family.head) else f"{outer}.{name}": header
                for name, header in headers.items()
            }
        embedding, head = f"{self.family.embedding}.weight", f"{self.family.head}.weight"
        if self.tied and embedding not in headers and head in headers:
            headers[embedding] = headers.pop(head)  # one tensor, stored under either name
        return headers

    @property
    def gptq_linears(self) -> list[str]:
        """The Linears stored in the GPTQ layout."""
        suffix = ".qweight"
        return [name.removesuffix(suffix) for name in self.headers if name.endswith(suffix)]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every weight and its shape; a packed Linear counts as its ``[out, in]`` weight."""
        inside = tuple(f"{name}." for name in self.gptq_linears)
        shapes = {n: h.shape for n, h in self.headers.items() if not n.startswith(inside)}
        for name in self.gptq_linears:
            outputs = self.headers[f"{name}.scales"].shape[1]
            shapes[f"{name}.weight"] = (outputs, self.headers[f"{name}.g_idx"].shape[0])
        return shapes

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every decoder Linear: name -> (outputs, inputs)."""
        return decoder_linears(self.shapes, self.family.blocks)

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return count_blocks(self.headers, self.family.blocks)

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", self.family.tied))

    def stored_name(self, module: str) -> str:
        """Where a module's weight is: a tied head has the embedding's."""
        return self.family.embedding if self.tied and module == self.family.head else module

    def block_names(self, block: int) -> list[str]:
        """Names of all tensors of one decoder block."""
        prefix = f"{self.family.blocks}.{block}."
        return [name for name in self.headers if name.startswith(prefix)]

    def outer_names(self) -> list[str]:
        """Names of all tensors outside the decoder blocks."""
        prefix = f"{self.family.blocks}."
        return [name for name in self.headers if not name.startswith(prefix)]


def count_blocks(names: Iterable[str], blocks: str) -> int:
    """Number of decoder blocks that weights of such names are in."""
    start = f"{blocks}."
    inside = (name.removeprefix(start) for name in names if name.startswith(start))
    return 1 + max(int(name.partition(".")[0]) for name in inside)


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
            if file.name not in (index_name("model"), "manifest.json"):
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


def file_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

"""Read Hugging Face checkpoints from disk under the names that transformers gives the weights.

A tensor's data is read only on request; everything else comes from file headers. Stored tensors
that are not weights of the model are ignored: buffers that its class computes (rotary frequencies,
causal masks) and tensors of other parts.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sqft_export.errors import UserError
from sqft_export.model.architecture import family_of, shapes_of
from sqft_export.model.companions import file_in_folder
from sqft_export.model.config import ModelConfig
from sqft_export.model.existing import without_mxfp4
from sqft_export.model.expert_names import expert_tensors
from sqft_export.model.families import Family
from sqft_export.model.tensorfiles import TORCH_NAMES, TensorFiles, TensorInfo, TensorWriter
from sqft_export.model.wrappers import (
    has_wrapper_names,
    is_wrapper,
    text_config_of,
    text_tensors,
)
from sqft_export.textfiles import read_json

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Tensors of a quantized Linear in each layout; the first one holds the codes.
GPTQ = ("qweight", "qzeros", "scales", "g_idx")
PACK_QUANTIZED = ("weight_packed", "weight_scale", "weight_shape")
# Buffers that model classes compute and that some released checkpoints store anyway.
BUFFERS = re.compile(r"(inv_freq|masked_bias|attention\.bias|attn\.bias|rotary_emb\.\w+)$")


class Checkpoint(TensorFiles):
    """A Hugging Face model folder: config, tensor headers and tensors."""

    def __init__(self, folder: Path):
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json; a Hugging Face model folder is expected")
        super().__init__(folder)
        self.where = str(folder / "config.json")
        stored = read_json(file_in_folder(folder, "config.json"))
        # config.json of a multimodal wrapper; its text model is read. None for a text model.
        self.wrapper_config = stored if is_wrapper(stored) else None
        self.stored_config = without_mxfp4(text_config_of(cast(ModelConfig, stored), self.where))

    @cached_property
    def config(self) -> ModelConfig:
        """``config.json``; embedding and head become untied if their stored matrices differ.

        The text model of a wrapper is tied too if no head is stored.
        """
        if self.wrapper_config is not None and f"{self.family.head}.weight" not in self._named:
            return self.stored_config | {"tie_word_embeddings": True}
        tied = self.stored_config.get("tie_word_embeddings", self.family.tied)
        if tied and self._stored_head_differs:
            return self.stored_config | {"tie_word_embeddings": False}
        return self.stored_config

    @cached_property
    def family(self) -> Family:
        return family_of(self.stored_config, self.where)

    @cached_property
    def _named(self) -> dict[str, TensorInfo]:
        """Return all stored tensors by their names in the model class."""
        headers = self.stored
        if self.wrapper_config is not None or has_wrapper_names(headers):
            headers = text_tensors(headers, str(self.folder))
        if self.family.experts is not None:
            headers = expert_tensors(headers, self.family.blocks, self.family.experts)
        outer, _, _ = self.family.blocks.partition(".")
        if not any(name.startswith(f"{self.family.blocks}.") for name in headers):
            # The names lack the outer module if the model was saved without its head, as Bloom is.
            prefix = self.family.blocks.removeprefix(f"{outer}.")
            if any(name.startswith(f"{prefix}.") for name in headers):
                return {
                    name if name.startswith(self.family.head) else f"{outer}.{name}": header
                    for name, header in headers.items()
                }
        return dict(headers)

    @cached_property
    def headers(self) -> dict[str, TensorInfo]:
        headers = {
            name: replace(header, shape=header.shape[::-1], transposed=True)
            if self.family.is_transposed(name)
            else header
            for name, header in self._named.items()
            if self._module_tensor(name) in self.expected
        }
        embedding, head = f"{self.family.embedding}.weight", f"{self.family.head}.weight"
        if self.tied and head in self._named:
            # A tied tensor is stored under either name or both.
            headers.pop(head, None)
            headers.setdefault(embedding, self._named[head])
        return headers

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight that the model class has."""
        return shapes_of(self.config, self.where)

    @cached_property
    def _stored_head_differs(self) -> bool:
        """Return whether embedding and head are both stored and differ."""
        keys = [f"{self.family.embedding}.weight", f"{self.family.head}.weight"]
        if not all(key in self._named for key in keys):
            return False
        one, other = (TensorFiles(self.folder, self.stem).tensor(self._named[k].key) for k in keys)
        return one.shape != other.shape or not bool((one == other).all())

    @staticmethod
    def _module_tensor(name: str) -> str:
        """Return the weight that a tensor is a part of: a quantized Linear has several tensors."""
        module, _, part = name.rpartition(".")
        return f"{module}.weight" if part in (*GPTQ, *PACK_QUANTIZED) else name

    def writer(self, folder: Path, shard_bytes: int, active: bool = True) -> TensorWriter:
        """Return a writer of a Hugging Face folder of the same model.

        :param shard_bytes: bytes that are buffered before a shard is written.
        :param active: False writes nothing, in a process next to the one that writes.
        """
        return TensorWriter(
            folder,
            shard_bytes=shard_bytes,
            active=active,
            is_transposed=self.family.is_transposed,
        )

    def check(self) -> None:
        """Check the stored tensors against the config.

        :raises UserError: listing tensors that are missing, have a wrong shape or an unsupported
            dtype.
        """
        blocks = (
            f"{self.family.blocks}."  # also refuses an unknown model type before weights are read
        )
        if not any(name.startswith(blocks) for name in self._named):
            first = sorted(self._named)[0]
            raise UserError(
                f"{self.folder}: no tensor under {self.family.blocks}, the decoder's path by "
                f"{self.where}; stored names are such as {first}"
            )
        faults = [*self._shape_faults(), *self._dtype_faults()]
        if faults:
            more = f"\n... and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise UserError("\n".join(f"{self.folder}: {f}" for f in faults[:8]) + more)
        known = {self._module_tensor(name) for name in self.headers} | {self.family.head}
        ignored = [n for n in self._named if self._module_tensor(n) not in known]
        unknown = [n for n in ignored if not BUFFERS.search(n) and self.family.head not in n]
        if unknown:
            logger.warning(
                "%s: ignored, not a weight of a %s: %s",
                self.folder,
                self.stored_config["model_type"],
                ", ".join(sorted(unknown)[:8]),
            )

    def _shape_faults(self) -> Iterable[str]:
        shapes = self.shapes
        vocabulary = self.stored_config.get("vocab_size")
        for name, shape in self.expected.items():
            found = shapes.get(name)
            if found is None:
                yield f"{name} is not stored"
            elif found != shape and len(shape) == 2 and shape[0] == vocabulary:
                yield f"{name}: has {found[0]} rows of {found[1]}, vocab_size is {vocabulary}"
            elif found != shape:
                yield f"{name}: found shape {list(found)}, config.json says {list(shape)}"

    def _dtype_faults(self) -> Iterable[str]:
        parts = (*GPTQ, *PACK_QUANTIZED)
        for name, header in self.headers.items():
            if name.rpartition(".")[2] not in parts and header.dtype not in TORCH_NAMES:
                yield (
                    f"{header.file}: {name}: dtype {header.dtype} is not supported; supported are "
                    f"{', '.join(TORCH_NAMES)}"
                )

    @cached_property
    def quantized_linears(self) -> list[str]:
        """Names of the Linears that are stored as codes."""
        ends = (f".{GPTQ[0]}", f".{PACK_QUANTIZED[0]}")
        return [name.rpartition(".")[0] for name in self.headers if name.endswith(ends)]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight; a Linear that is stored as codes has ``(out, in)``."""
        parts = (*GPTQ, *PACK_QUANTIZED)
        shapes = {
            name: header.shape
            for name, header in self.headers.items()
            if name.rpartition(".")[2] not in parts
        }
        for name in self.quantized_linears:
            if f"{name}.scales" in self.headers:
                outputs = self.headers[f"{name}.scales"].shape[1]
                shapes[f"{name}.weight"] = (outputs, self._gptq_inputs(name))
            else:  # weight_shape is data, not header; a word holds eight or four codes
                outputs, words = self.headers[f"{name}.weight_packed"].shape
                inputs = self.expected.get(f"{name}.weight", (outputs, 8 * words))[1]
                shapes[f"{name}.weight"] = (outputs, inputs)
        return shapes

    def _gptq_inputs(self, name: str) -> int:
        """Return the number of inputs of a Linear in the GPTQ layout.

        Old checkpoints have no ``g_idx``; their columns are not reordered.
        """
        if order := self.headers.get(f"{name}.g_idx"):
            return order.shape[0]
        words = self.headers[f"{name}.qweight"].shape[0]
        bits = self.stored_config.get("quantization_config", {}).get("bits") or 4
        return self.expected.get(f"{name}.weight", (0, words * 32 // bits))[1]

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Decoder Linear -> (outputs, inputs)."""
        return decoder_linears(self.shapes, self.family)

    @cached_property
    def float_dtype(self) -> "torch.dtype":
        """Dtype of the embedding. All weights that are not quantized have the same dtype."""
        return self.dtype(f"{self.family.embedding}.weight")

    @cached_property
    def parameters(self) -> int:
        """Total number of weights; a matrix that embedding and head share counts once."""
        return sum(prod(shape) for shape in self.shapes.values())

    @cached_property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return count_blocks(self.headers, self.family.blocks)

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return bool(self.config.get("tie_word_embeddings", self.family.tied))

    def stored_name(self, module: str) -> str:
        """Return the module whose weight is stored; a tied head uses the embedding's."""
        return self.family.embedding if self.tied and module == self.family.head else module

    def block_names(self, block: int) -> list[str]:
        """Return the names of all tensors of one decoder block."""
        prefix = f"{self.family.blocks}.{block}."
        return [name for name in self.headers if name.startswith(prefix)]

    def outer_names(self) -> list[str]:
        """Return the names of all tensors outside the decoder blocks."""
        prefix = f"{self.family.blocks}."
        return [name for name in self.headers if not name.startswith(prefix)]


def count_blocks(names: Iterable[str], blocks: str) -> int:
    """Count the decoder blocks that weights of these names belong to.

    :param blocks: path of the list of decoder blocks.
    """
    start = f"{blocks}."
    inside = (name.removeprefix(start) for name in names if name.startswith(start))
    return 1 + max(int(name.partition(".")[0]) for name in inside)


def decoder_linears(
    shapes: dict[str, tuple[int, ...]], family: Family
) -> dict[str, tuple[int, int]]:
    """Return the Linears of the decoder blocks: module name -> (outputs, inputs).

    Those that stay in floats are left out: routers of experts, per-layer projections, gates of
    recurrent layers.
    """
    inside = re.compile(rf"^{re.escape(family.blocks)}\.\d+\..+\.weight$")
    return {
        module: (shape[0], shape[1])
        for name, shape in shapes.items()
        if inside.match(name)
        and len(shape) == 2
        and not family.stays_in_floats(module := name.removesuffix(".weight"))
    }


def file_bytes(folder: Path) -> int:
    """Return the total size of all files in a folder, in bytes."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

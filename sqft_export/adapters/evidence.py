"""What really trained, taken from the adapted model's own forward: operands, and logits.

While a model runs, every product inside an adapted Linear is watched. Of the weight that it really
multiplies with, whatever made it, one digest a row is kept, and how many pruned weights are not
zero; of all other parameters one digest a row. A merged model is later held against these, by code
that shares nothing with the forward.

    trained.safetensors    rows.<module>          int64 [out]: XXH3-64 of every row's bytes
                           ids                    int64 [sequences, length], -1 where there is none
                           logits                 float32 [tokens, vocabulary], sequence by sequence
    trained.json           dtypes: module -> dtype of the bytes; pruned: module -> [positions, those
                           that are not zero]
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sqft_export.adapters.files import PREFIX
from sqft_export.adapters.linear import CompressedLinear, ElasticLoraLinear
from sqft_export.model.storage import MASKS, load_mask
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_JSON_BYTES

EVIDENCE = "trained"  # stem of the files
CAPTURED = 8  # sequences that a model is run on
LOGIT_BYTES = 2**25
LENGTH = 48  # tokens of a sequence

MaskOf = Callable[[str, torch.Size], Tensor | None]  # bool, True = kept; None: nothing was pruned


def row_digests(weight: Tensor) -> np.ndarray:
    """XXH3-64 of the bytes of every row, int64 ``[rows]``; a vector is one row.

    The sign of a zero does not count: rounding to the grid leaves it, codes have none.
    """
    weight = weight.detach().cpu() + 0.0
    rows = weight.contiguous().reshape(len(weight) if weight.dim() > 1 else 1, -1)
    stored = rows.view(torch.uint8).numpy()
    return np.array([xxhash.xxh3_64_intdigest(row) for row in stored], np.uint64).view(np.int64)


@dataclass
class Evidence:
    """Digests by module (``<linear>``) or parameter (``model.norm.weight``); see above."""

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    pruned: dict[str, tuple[int, int]] = field(default_factory=dict)
    sequences: list[list[int]] = field(default_factory=list)
    logits: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def keep(self, name: str, weight: Tensor) -> None:
        self.rows[name] = row_digests(weight)
        self.dtypes[name] = str(weight.dtype).removeprefix("torch.")

    def write(self, folder: Path) -> None:
        longest = max(map(len, self.sequences))
        ids = np.full((len(self.sequences), longest), -1, np.int64)
        for row, sequence in zip(ids, self.sequences, strict=True):
            row[: len(sequence)] = sequence
        tensors = {f"rows.{name}": torch.from_numpy(found) for name, found in self.rows.items()}
        tensors |= {"ids": torch.from_numpy(ids), "logits": torch.from_numpy(self.logits)}
        save_file(tensors, folder / f"{EVIDENCE}.safetensors")
        document = {"dtypes": self.dtypes, "pruned": self.pruned}
        (folder / f"{EVIDENCE}.json").write_text(json.dumps(document, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Evidence":
        tensors = load_file(folder / f"{EVIDENCE}.safetensors")
        document = read_json(folder / f"{EVIDENCE}.json", MAX_JSON_BYTES)
        rows = {k.removeprefix("rows."): t.numpy() for k, t in tensors.items() if k[:5] == "rows."}
        sequences = [[i for i in row if i >= 0] for row in tensors["ids"].tolist()]
        pruned = {name: (positions, kept) for name, (positions, kept) in document["pruned"].items()}
        return cls(rows, document["dtypes"], pruned, sequences, tensors["logits"].numpy())


class _Watch(TorchFunctionMode):
    """Keeps what products of the layers at hand multiply with."""

    def __init__(self, evidence: Evidence, mask_of: MaskOf):
        super().__init__()
        self.evidence, self.mask_of = evidence, mask_of
        self.stack: list[tuple[str, nn.Module]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and self.stack:
            self._keep(*self.stack[-1], args[1])
        return func(*args, **(kwargs or {}))

    def _keep(self, name: str, module: nn.Module, operand: Tensor) -> None:
        if isinstance(module, ElasticLoraLinear) and module.get_base_layer().unmerged:
            # Two products beside the base: A, then B.
            part = "lora_B" if f"{name}.lora_A" in self.evidence.rows else "lora_A"
            self.evidence.keep(f"{name}.{part}", operand)
            return
        if name in self.evidence.rows:
            return
        elastic = isinstance(module, ElasticLoraLinear)
        base: Any = module.get_base_layer() if elastic else module  # type: ignore[operator]
        mask = self.mask_of(name, operand.shape)
        if mask is not None:
            dropped = ~mask.numpy()
            wrong = dropped & (operand.float().numpy() != 0)
            counts = int(np.count_nonzero(dropped)), int(np.count_nonzero(wrong))
            self.evidence.pruned[name] = counts
        # A float weight is stored in the base's dtype, codes stand for float32.
        stored = operand.float() if base.grid is not None else operand.to(base.weight.dtype)
        self.evidence.keep(name, stored)


@contextmanager
def _watched(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Tells the watch which layer is running."""

    def enter(name: str):
        return lambda module, _: watch.stack.append((name, module))

    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, CompressedLinear | ElasticLoraLinear):
            name = path.removeprefix(PREFIX).removesuffix(".base_layer")
            hooks.append(module.register_forward_pre_hook(enter(name)))
            hooks.append(module.register_forward_hook(lambda *_: watch.stack.pop() and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _masks_in(folder: Path | None) -> MaskOf:
    pruned = set(TensorFiles(folder, MASKS).headers) if folder else set()
    return lambda name, shape: load_mask(folder, name, shape) if name in pruned else None


@torch.no_grad()
def capture(model: nn.Module, sequences: list[list[int]], masks: Path | None) -> Evidence:
    """Run a model, at its active ranks where it was trained, and keep what it was.

    :param sequences: token ids; as many of them as ``LOGIT_BYTES`` of logits hold.
    :param masks: folder of the masks of what was pruned; None where nothing was.
    """
    evidence, kept = Evidence(), []
    watch = _Watch(evidence, _masks_in(masks))
    with _watched(model, watch), watch:
        for sequence in sequences:
            ids = sequence[:LENGTH]
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
            evidence.sequences.append(ids)
            kept.append(logits)
            if sum(found.nbytes for found in kept) + logits.nbytes > LOGIT_BYTES:
                break
    evidence.logits = np.concatenate(kept)
    _keep_parameters(model, evidence)
    return evidence


def _keep_parameters(model: nn.Module, evidence: Evidence) -> None:
    """Embeddings, norms, biases: all that is no Linear's weight."""
    for path, parameter in model.named_parameters():
        name = path.removeprefix(PREFIX).replace(".base_layer.", ".")
        module = name.rpartition(".")[0]
        if ".lora_" not in path and not (name.endswith(".weight") and module in evidence.rows):
            evidence.keep(name, parameter.float())

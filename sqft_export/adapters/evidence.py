"""Capture the operands and logits of a model's forward, to compare them with the merged model.

While the model runs, every matrix product in a decoder Linear is traced. For the weight operand of
the product this module keeps one digest per row, and counts the pruned weights that are not zero.
For every other parameter it keeps one digest per row. ``verify`` compares the merged model with
these digests, with code that it does not share with the forward.

    trained.safetensors    rows.<module>          int64 [out]: XXH3-64 of the bytes of each row
                           ids                    int64 [sequences, length], padded with -1
                           logits                 float32 [tokens, vocabulary], sequence by sequence
    trained.json           dtypes: module -> dtype of the bytes
                           pruned: module -> [pruned weights, pruned weights that are not zero]
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sqft_export.adapters.files import PREFIX
from sqft_export.adapters.linear import CompressedLinear, ElasticLoraLinear
from sqft_export.model.experts import compute_all_experts
from sqft_export.model.storage import MASKS, load_mask
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_JSON_BYTES

FILE_STEM = "trained"
CAPTURED_SEQUENCES = 8  # sequences that the model runs on
CAPTURED_TOKENS = 48  # longer sequences are truncated
CAPTURED_LOGIT_BYTES = 2**25

# (Linear, shape) -> mask: bool, True = kept; None for a Linear that was not pruned.
MaskOf = Callable[[str, torch.Size], Tensor | None]


def row_digests(weight: Tensor) -> np.ndarray:
    """Return the XXH3-64 digest of every row's bytes, int64 ``[rows]``; a vector is one row.

    Negative zeros count as zeros: fake quantization can produce them, but codes have no sign.
    """
    weight = weight.detach().cpu() + 0.0
    rows = weight.contiguous().reshape(len(weight) if weight.dim() > 1 else 1, -1)
    stored = rows.view(torch.uint8).numpy()
    return np.array([xxhash.xxh3_64_intdigest(row) for row in stored], np.uint64).view(np.int64)


@dataclass
class CapturedForward:
    """Digests and logits of one forward; the module's docstring describes the fields.

    rows, dtypes: by module (``<linear>``) or parameter (``model.norm.weight``).
    pruned: by Linear.
    sequences: token ids that the model ran on.
    """

    rows: dict[str, np.ndarray] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    pruned: dict[str, tuple[int, int]] = field(default_factory=dict)
    sequences: list[list[int]] = field(default_factory=list)
    logits: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def add(self, name: str, weight: Tensor) -> None:
        """Keep the row digests and the dtype of a weight."""
        self.rows[name] = row_digests(weight)
        self.dtypes[name] = str(weight.dtype).removeprefix("torch.")

    def write(self, folder: Path) -> None:
        """Write ``trained.safetensors`` and ``trained.json``."""
        longest = max(map(len, self.sequences))
        ids = np.full((len(self.sequences), longest), -1, np.int64)
        for row, sequence in zip(ids, self.sequences, strict=True):
            row[: len(sequence)] = sequence
        tensors = {f"rows.{name}": torch.from_numpy(rows) for name, rows in self.rows.items()}
        tensors |= {"ids": torch.from_numpy(ids), "logits": torch.from_numpy(self.logits)}
        save_file(tensors, folder / f"{FILE_STEM}.safetensors")
        document = {"dtypes": self.dtypes, "pruned": self.pruned}
        (folder / f"{FILE_STEM}.json").write_text(json.dumps(document, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "CapturedForward":
        """Read the files that :meth:`write` wrote."""
        tensors = load_file(folder / f"{FILE_STEM}.safetensors")
        document = read_json(folder / f"{FILE_STEM}.json", MAX_JSON_BYTES)
        rows = {k.removeprefix("rows."): t.numpy() for k, t in tensors.items() if k[:5] == "rows."}
        sequences = [[i for i in row if i >= 0] for row in tensors["ids"].tolist()]
        pruned = {name: (positions, kept) for name, (positions, kept) in document["pruned"].items()}
        return cls(rows, document["dtypes"], pruned, sequences, tensors["logits"].numpy())


class _OperandTracer(TorchFunctionMode):
    """Captures the weight operand of matrix products in the Linear that is running.

    stack: (name, module) of the running Linears, the innermost last.
    """

    def __init__(self, captured: CapturedForward, mask_of: MaskOf):
        super().__init__()
        self.captured, self.mask_of = captured, mask_of
        self.stack: list[tuple[str, nn.Module]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and self.stack:
            self._capture(*self.stack[-1], args[1])
        return func(*args, **(kwargs or {}))

    def _capture(self, name: str, module: nn.Module, operand: Tensor) -> None:
        if isinstance(module, ElasticLoraLinear) and module.get_base_layer().unmerged:
            # An unmerged adapter computes two more products: first with A, then with B.
            part = "lora_B" if f"{name}.lora_A" in self.captured.rows else "lora_A"
            self.captured.add(f"{name}.{part}", operand)
            return
        if name in self.captured.rows:
            return
        base = module.get_base_layer() if isinstance(module, ElasticLoraLinear) else module
        mask = self.mask_of(name, operand.shape)
        if mask is not None:
            dropped = ~mask.numpy()
            nonzero = dropped & (operand.float().numpy() != 0)
            counts = int(np.count_nonzero(dropped)), int(np.count_nonzero(nonzero))
            self.captured.pruned[name] = counts
        # Merge stores float weights in the base's dtype; codes are dequantized to float32.
        stored = operand.float() if base.grid is not None else operand.to(base.weight.dtype)
        self.captured.add(name, stored)


@contextmanager
def _tracked_linears(model: nn.Module, tracer: _OperandTracer) -> Iterator[None]:
    """Context manager that keeps the stack of running Linears in the tracer."""

    def enter(name: str):
        return lambda module, _: tracer.stack.append((name, module))

    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, CompressedLinear | ElasticLoraLinear):
            name = path.removeprefix(PREFIX).removesuffix(".base_layer")
            hooks.append(module.register_forward_pre_hook(enter(name)))
            hooks.append(module.register_forward_hook(lambda *_: tracer.stack.pop() and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _masks_in(folder: Path | None) -> MaskOf:
    """Return a function that loads the mask of a Linear from a folder."""
    pruned = set(TensorFiles(folder, MASKS).headers) if folder else set()
    return lambda name, shape: load_mask(folder, name, shape) if name in pruned else None


@torch.no_grad()
def capture(model: nn.Module, sequences: list[list[int]], masks: Path | None) -> CapturedForward:
    """Run a model at its active ranks and capture its operands, parameters and logits.

    :param sequences: token ids; the run stops before the logits exceed ``CAPTURED_LOGIT_BYTES``.
    :param masks: folder of the pruning masks; None if nothing was pruned.
    """
    captured, all_logits = CapturedForward(), []
    compute_all_experts(model)
    tracer = _OperandTracer(captured, _masks_in(masks))
    with _tracked_linears(model, tracer), tracer:
        for sequence in sequences:
            ids = sequence[:CAPTURED_TOKENS]
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()
            captured.sequences.append(ids)
            all_logits.append(logits)
            if sum(x.nbytes for x in all_logits) + logits.nbytes > CAPTURED_LOGIT_BYTES:
                break
    captured.logits = np.concatenate(all_logits)
    _add_parameters(model, captured)
    return captured


def _add_parameters(model: nn.Module, captured: CapturedForward) -> None:
    """Add the digests of embeddings, norms and biases."""
    for path, parameter in model.named_parameters():
        name = path.removeprefix(PREFIX).replace(".base_layer.", ".")
        module = name.rpartition(".")[0]
        if ".lora_" not in path and not (name.endswith(".weight") and module in captured.rows):
            captured.add(name, parameter.float())

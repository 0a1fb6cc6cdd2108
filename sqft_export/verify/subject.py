"""The subject of a certificate: folders to check, and the prompts and texts to check them with.

The prompts and texts are stored next to the certificate. It can be recomputed from files only.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.storage import MASKS, load_mask, quantized_names
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.packed.folders import SPARSE
from sqft_export.targets.text_api import ChatPrompt
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_JSON_BYTES

SUBJECT = "subject.json"
# Passes whose model is zero where the mask prunes.
MASKED_PASSES = ("sparsify", "reconstruct", "quantize")


@dataclass(frozen=True)
class Asked:
    """Inputs and limits of the checks.

    prompts: token ids.
    texts: each text with its ids from the base model's tokenizer.
    new_tokens: greedy tokens to generate after each prompt.
    tolerance: largest logit difference, in standard deviations.
    divergence: largest KL divergence of default modes, in nats per token.
    tokenizers_required: the tokenizers of the runtimes must give the same ids.
    readers_reported: runtimes whose tokenizers may still differ.
    chat: a test conversation up to its last answer, for models with a chat template.
    """

    prompts: list[list[int]]
    texts: list[tuple[str, list[int]]]
    new_tokens: int
    tolerance: float
    divergence: float
    tokenizers_required: bool
    readers_reported: list[str] = field(default_factory=list)
    chat: ChatPrompt | None = None

    def write(self, folder: Path) -> None:
        """Write ``subject.json``."""
        (folder / SUBJECT).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Asked":
        """Read ``subject.json``."""
        document = read_json(folder / SUBJECT, MAX_JSON_BYTES)
        document["texts"] = [(text, ids) for text, ids in document["texts"]]
        if chat := document.get("chat"):
            document["chat"] = ChatPrompt(**chat)
        return cls(**document)


@dataclass(frozen=True)
class Subject:
    """Artifacts of one run.

    passes: model folders of the recipe's ``MASKED_PASSES``.
    masks: artifact of sparsify; None if the recipe does not prune.
    captured: folder of the operands captured in the forward before merging. The artifact is that of
        search, or that of verify if nothing was trained.
    merge: artifact of merge.
    exports: target -> artifact.
    dense_update: a dense update was merged, so pruned positions are no longer zero.
    scratch: folder for temporary files.
    """

    asked: Asked
    passes: dict[str, Path]
    masks: Path | None
    captured: Path
    merge: Path
    exports: dict[str, Path]
    dense_update: bool = False
    scratch: Path = field(default_factory=Path)

    @cached_property
    def merged(self) -> Checkpoint:
        """The merged model."""
        return Checkpoint(self.merge / "model")

    @cached_property
    def quantized(self) -> list[str]:
        """Names of the quantized modules of the merged model."""
        return quantized_names(self.merged)

    def deployments(self, name: str) -> list[tuple[str, Path]]:
        """Return label and folder of each deployment of a target whose files differ."""
        folder, sparse = self.exports[name] / "model", self.exports[name] / SPARSE
        found = [(name, folder)]
        return [*found, (f"{name}, sparse execution", sparse)] if sparse.is_dir() else found

    @cached_property
    def origin(self) -> str:
        """Origin of the merged model: trained, or only compressed."""
        return "trained" if (self.captured / "adapter").is_dir() else "compressed"

    @cached_property
    def adapter(self) -> Path | None:
        """Folder of the adapter, if it was not merged."""
        folder = self.merge / "adapter"
        return folder if folder.is_dir() else None

    @cached_property
    def pruned(self) -> set[str]:
        """Names of the Linears that have pruned weights."""
        if self.masks is None:
            return set()
        masks = TensorFiles(self.masks, MASKS)
        kept = {n: int(np.bitwise_count(b.numpy()).sum()) for n, b in masks.tensors(masks.headers)}
        sizes = {name: rows * columns for name, (rows, columns) in self.merged.linears.items()}
        return {name for name, count in kept.items() if count < sizes[name]}

    def dropped(self, linear: str, shape: Sequence[int]) -> np.ndarray | None:
        """Return bool ``[out, in]``, True at pruned weights; None if the Linear has none."""
        if linear not in self.pruned:
            return None
        return ~load_mask(self.masks, linear, torch.Size(shape)).numpy()

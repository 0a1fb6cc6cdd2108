"""What a certificate is about: folders, and the prompts and texts they are tried with.

Written beside the certificate, so that it can be derived again from the files alone.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.storage import MASKS, load_mask, quantized_names
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.packed.folders import SPARSE
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_JSON_BYTES

SUBJECT = "subject.json"
BEFORE = ("sparsify", "reconstruct", "quantize")  # passes that write a model with the mask's zeros


@dataclass(frozen=True)
class Asked:
    """What is asked of the models.

    prompts: token ids. texts: text and the ids that the base's tokenizer makes of it.
    new_tokens: greedy ones after each prompt.
    tolerance: of logits, in standard deviations; divergence: of default modes, in nats a token.
    tokenizers_required: those of the runtimes must give the same ids.
    readers_reported: runtimes whose tokenizers may differ all the same.
    """

    prompts: list[list[int]]
    texts: list[tuple[str, list[int]]]
    new_tokens: int
    tolerance: float
    divergence: float
    tokenizers_required: bool
    readers_reported: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        (folder / SUBJECT).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Asked":
        document = read_json(folder / SUBJECT, MAX_JSON_BYTES)
        document["texts"] = [(text, ids) for text, ids in document["texts"]]
        return cls(**document)


@dataclass(frozen=True)
class Subject:
    """Artifacts of one run.

    passes: model folders of those of ``BEFORE`` that the recipe has.
    masks: artifact of sparsify, None without.
    watched: folder of what was kept of the forward before merging: of search, or, where nothing was
        trained, of verify. merge: artifact of merge.
    exports: target -> artifact.
    dense_update: pruned positions were given up by an update merged densely.
    """

    asked: Asked
    passes: dict[str, Path]
    masks: Path | None
    watched: Path
    merge: Path
    exports: dict[str, Path]
    dense_update: bool = False
    scratch: Path = field(default_factory=Path)

    @cached_property
    def merged(self) -> Checkpoint:
        return Checkpoint(self.merge / "model")

    @cached_property
    def quantized(self) -> list[str]:
        return quantized_names(self.merged)

    def deployments(self, name: str) -> list[tuple[str, Path]]:
        """Folders of a target whose files differ, by what a certificate calls them."""
        folder, sparse = self.exports[name] / "model", self.exports[name] / SPARSE
        found = [(name, folder)]
        return [*found, (f"{name}, sparse execution", sparse)] if sparse.is_dir() else found

    @cached_property
    def before(self) -> str:
        """What the model was that was merged: trained, or compressed alone."""
        return "trained" if (self.watched / "adapter").is_dir() else "compressed"

    @cached_property
    def adapter(self) -> Path | None:
        """The adapter that was not merged, if there is one."""
        folder = self.merge / "adapter"
        return folder if folder.is_dir() else None

    @cached_property
    def pruned(self) -> set[str]:
        """Linears of which something was pruned."""
        if self.masks is None:
            return set()
        masks = TensorFiles(self.masks, MASKS)
        kept = {n: int(np.bitwise_count(b.numpy()).sum()) for n, b in masks.tensors(masks.headers)}
        sizes = {name: rows * columns for name, (rows, columns) in self.merged.linears.items()}
        return {name for name, count in kept.items() if count < sizes[name]}

    def dropped(self, linear: str, shape: Any) -> np.ndarray | None:
        """bool ``[out, in]``, True where the Linear was pruned; None where it was not."""
        if linear not in self.pruned:
            return None
        return ~load_mask(self.masks, linear, torch.Size(shape)).numpy()

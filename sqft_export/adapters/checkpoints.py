"""Checkpoints that an interrupted training resumes from: safetensors and JSON, no pickle.

    adapter_model.safetensors      the adapter, by peft
    optimizer.safetensors, .json   moments by parameter and name; settings of the groups, schedule
    random-<process>.safetensors, .json   Python's, numpy's and torch's generators
    trainer_state.json             the Trainer's own

Under FSDP the optimizer is sharded over the processes and is saved by torch's distributed
checkpoints, which pickle their index. Only the run that wrote such a checkpoint reads it.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

OPTIMIZER = "optimizer"


def _write(folder: Path, stem: str, tensors: dict[str, torch.Tensor], document: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{stem}.safetensors")
    (folder / f"{stem}.json").write_text(json.dumps(document))


def _read(folder: Path, stem: str) -> tuple[dict[str, torch.Tensor], Any]:
    return load_file(folder / f"{stem}.safetensors"), json.loads(
        (folder / f"{stem}.json").read_text()
    )


class PlainCheckpointTrainer(Trainer):
    """A Trainer whose checkpoints contain no pickle."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if not self.args.should_save:
            return
        found = self.optimizer.state_dict()
        tensors = {
            f"{index}.{name}": torch.as_tensor(value)
            for index, state in found["state"].items()
            for name, value in state.items()
        }
        document = {"groups": found["param_groups"], "schedule": self.lr_scheduler.state_dict()}
        _write(Path(output_dir), OPTIMIZER, tensors, document)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if checkpoint is None:
            return
        tensors, document = _read(Path(checkpoint), OPTIMIZER)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": document["groups"]})
        self.lr_scheduler.load_state_dict(document["schedule"])

    def _random_stem(self) -> str:
        return f"random-{self.args.process_index}"

    def _save_rng_state(self, output_dir: str) -> None:
        tensors = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        kind, words, *rest = np.random.get_state()
        tensors["numpy"] = torch.from_numpy(np.asarray(words).astype(np.int64))
        document = {"python": random.getstate(), "numpy": [kind, *rest]}
        _write(Path(output_dir), self._random_stem(), tensors, document)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tensors, document = _read(Path(checkpoint), self._random_stem())
        version, words, gauss = document["python"]
        random.setstate((version, tuple(words), gauss))
        kind, *rest = document["numpy"]
        np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors:
            torch.cuda.set_rng_state(tensors["cuda"])

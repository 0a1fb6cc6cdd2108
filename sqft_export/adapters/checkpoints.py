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
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sqft_export.libraries.trainer import HookedTrainer

OPTIMIZER = "optimizer"


class OptimizerState(TypedDict):
    """``optimizer.json``: the state dicts of torch without their tensors."""

    groups: list[dict[str, object]]
    schedule: dict[str, object]


class RandomState(TypedDict):
    """``random-<process>.json``: the states of Python's and numpy's generators without words.

    numpy: kind, position, has_gauss, gauss.
    """

    python: tuple[int, list[int], float | None]
    numpy: tuple[str, int, int, float]


def _write(
    folder: Path, stem: str, tensors: dict[str, torch.Tensor], document: Mapping[str, object]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{stem}.safetensors")
    (folder / f"{stem}.json").write_text(json.dumps(document))


def _read(folder: Path, stem: str) -> tuple[dict[str, torch.Tensor], object]:
    tensors = load_file(folder / f"{stem}.safetensors")
    return tensors, json.loads((folder / f"{stem}.json").read_text())


class PlainCheckpointTrainer(HookedTrainer):
    """A Trainer whose checkpoints contain no pickle."""

    def save_weights(self, folder: Path, state: dict[str, torch.Tensor] | None) -> None:
        self.model.save_pretrained(str(folder), state_dict=state)

    def save_optimizer(self, folder: Path) -> None:
        found = self.optimizer.state_dict()
        tensors = {
            f"{index}.{name}": torch.as_tensor(value)
            for index, state in found["state"].items()
            for name, value in state.items()
        }
        document = {"groups": found["param_groups"], "schedule": self.lr_scheduler.state_dict()}
        _write(folder, OPTIMIZER, tensors, document)

    def load_optimizer(self, folder: Path) -> None:
        tensors, document = _read(folder, OPTIMIZER)
        stored = cast(OptimizerState, document)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": stored["groups"]})
        self.lr_scheduler.load_state_dict(stored["schedule"])

    def _random_stem(self) -> str:
        return f"random-{self.args.process_index}"

    def save_random_state(self, folder: Path) -> None:
        tensors = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        kind, words, *rest = np.random.get_state()
        tensors["numpy"] = torch.from_numpy(np.asarray(words).astype(np.int64))
        document = {"python": random.getstate(), "numpy": [kind, *rest]}
        _write(folder, self._random_stem(), tensors, document)

    def load_random_state(self, folder: Path) -> None:
        tensors, document = _read(folder, self._random_stem())
        stored = cast(RandomState, document)
        version, words, gauss = stored["python"]
        random.setstate((version, tuple(words), gauss))
        kind, *rest = stored["numpy"]
        np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors:
            torch.cuda.set_rng_state(tensors["cuda"])

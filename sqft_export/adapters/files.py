"""Folders that training reads and writes: its base, and an adapter in peft's format.

    adapter_config.json          alpha over the rank is the scaling; ``alpha_pattern`` and
                                 ``rank_pattern`` hold what differs in a Linear
    adapter_model.safetensors    base_model.model.<linear>.lora_A.weight   [rank, in]
                                 base_model.model.<linear>.lora_B.weight   [out, rank]

No torch is imported before a tensor is asked for.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.run.launcher import process_rank
from sqft_export.textfiles import read_json

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from sqft_export.adapters.linear import Update

PREFIX = "base_model.model."
TENSORS = "adapter_model"  # stem of the file
CONFIG = "adapter_config.json"
TRAINING_LOG = "training.jsonl"


@dataclass(frozen=True)
class Base:
    """What an adapter is trained on.

    folder: Hugging Face folder.
    masks, grids: folders with the masks that an update is kept in and the grids; None without.
    unmerged: the adapter stays beside the base instead of entering its weight.
    """

    folder: Path
    masks: Path | None = None
    grids: Path | None = None
    unmerged: bool = False


class AdapterFiles:
    """An adapter in peft's format, read one Linear at a time."""

    def __init__(self, folder: Path):
        self.tensors = TensorFiles(folder, TENSORS)
        self.config: dict[str, Any] = read_json(folder / CONFIG)

    @property
    def linears(self) -> list[str]:
        """Names, in the base model, of the Linears with an adapter."""
        end = ".lora_A.weight"
        keys = self.tensors.headers
        return [k.removeprefix(PREFIX).removesuffix(end) for k in keys if k.endswith(end)]

    def update(self, linear: str) -> "Update":
        """``A [rank, in]``, ``B [out, rank]`` and the scaling, alpha over the rank."""
        lora_a, lora_b = (self.tensors.tensor(f"{PREFIX}{linear}.lora_{x}.weight") for x in "AB")
        alpha = self.config["alpha_pattern"].get(linear, self.config["lora_alpha"])
        return lora_a, lora_b, alpha / len(lora_a)


def read_low_rank(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Linear -> ``A`` float32 ``[rank, in]`` and ``B`` ``[out, rank]``, the scaling within ``B``.

    :param folder: an adapter as peft stores it.
    """
    adapter = AdapterFiles(folder)
    updates = {name: adapter.update(name) for name in adapter.linears}
    return {
        name: (lora_a.float().numpy(), (lora_b.float() * scaling).numpy())
        for name, (lora_a, lora_b, scaling) in updates.items()
    }


def save_adapter(model: "PeftModel", folder: Path) -> None:
    """Write the super-adapter, from the first process of a launcher.

    To be called on all of them: parameters that FSDP (its second version) has spread over the
    processes are gathered here.
    """
    whole = {
        name: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if process_rank() == 0:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, state_dict=whole)
        config = model.peft_config[model.active_adapter]  # type: ignore[index]
        _write(folder, state, config.to_dict() | {"inference_mode": True})


def write_sub_adapter(config: dict[str, Any], updates: dict[str, "Update"], folder: Path) -> None:
    """Write an adapter whose ranks differ, as stock peft loads it.

    :param config: peft's, of the super-adapter.
    :param updates: by Linear, at the rank it is to have.
    """
    tensors, ranks, alphas = {}, {}, {}
    for name, (lora_a, lora_b, scaling) in updates.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora_a.detach().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_b.detach().contiguous()
        ranks[name], alphas[name] = len(lora_a), scaling * len(lora_a)
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas, "inference_mode": True}
    _write(folder, tensors, config | patterns)


def _write(folder: Path, tensors: dict[str, "Tensor"], config: dict[str, Any]) -> None:
    """The two files; the same adapter gives the same bytes, and no path of this machine."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / f"{TENSORS}.safetensors", metadata={"format": "pt"})
    config = config | {"base_model_name_or_path": None}
    config["target_modules"] = sorted(config["target_modules"])
    (folder / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n")


def write_training_log(folder: Path, log: list[dict[str, Any]]) -> None:
    (folder / TRAINING_LOG).write_text("".join(json.dumps(entry) + "\n" for entry in log))


def read_training_log(folder: Path) -> list[dict[str, Any]]:
    """Loss, learning rate and ranks of every step of a training."""
    return [json.loads(line) for line in (folder / TRAINING_LOG).read_text().splitlines()]

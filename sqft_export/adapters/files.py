"""Folders that training reads and writes: the base, and an adapter in peft's format.

    adapter_config.json          alpha / rank is the scaling; ``alpha_pattern`` and ``rank_pattern``
                                 have the values of Linears that differ from the default
    adapter_model.safetensors    base_model.model.<linear>.lora_A.weight   [rank, in]
                                 base_model.model.<linear>.lora_B.weight   [out, rank]

Importing this module does not import torch; reading a tensor does.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from sqft_export.machine.launcher import process_rank
from sqft_export.model.tensorfiles import TensorFiles
from sqft_export.numerics.codes import LowRank
from sqft_export.textfiles import read_json

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from sqft_export.adapters.linear import Update

PREFIX = "base_model.model."
TENSORS = "adapter_model"  # stem of the file
CONFIG = "adapter_config.json"
TRAINING_LOG = "training.jsonl"


class AdapterConfig(TypedDict, total=False):
    """``adapter_config.json``: the fields that this package reads or sets; peft has more.

    rank_pattern, alpha_pattern: Linear -> value that differs from the default.
    """

    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: list[str]
    target_parameters: list[str] | None
    inference_mode: bool
    base_model_name_or_path: str | None


class StepLog(TypedDict):
    """The log of a training step; ``padded`` counts the tokens with padding."""

    step: int
    loss: float
    learning_rate: float
    tokens: int
    padded: int


class RankedStepLog(StepLog):
    """The log of a training step with the rank of each group."""

    ranks: dict[str, int]


@dataclass(frozen=True)
class Base:
    """The base model of an adapter.

    folder: Hugging Face folder.
    masks: folder of the masks that are applied to the update; None without masks.
    grids: folder of the quantization grids; None without quantization.
    unmerged: True if the adapter is not merged into the weight.
    """

    folder: Path
    masks: Path | None = None
    grids: Path | None = None
    unmerged: bool = False


class AdapterFiles:
    """An adapter in peft's format, read one Linear at a time."""

    def __init__(self, folder: Path):
        self.tensors = TensorFiles(folder, TENSORS)
        self.config = cast(AdapterConfig, read_json(folder / CONFIG))

    @property
    def linears(self) -> list[str]:
        """Names of the adapted Linears in the base model."""
        suffix = ".lora_A.weight"
        keys = self.tensors.headers
        return [k.removeprefix(PREFIX).removesuffix(suffix) for k in keys if k.endswith(suffix)]

    def update(self, linear: str) -> "Update":
        """Return ``A [rank, in]``, ``B [out, rank]`` and the scaling, ``alpha / rank``."""
        lora_a, lora_b = (self.tensors.tensor(f"{PREFIX}{linear}.lora_{x}.weight") for x in "AB")
        alpha = self.config["alpha_pattern"].get(linear, self.config["lora_alpha"])
        return lora_a, lora_b, alpha / len(lora_a)


def read_low_rank(folder: Path) -> LowRank:
    """Return Linear -> ``A`` ``[rank, in]`` and ``B * scaling`` ``[out, rank]``, both float32.

    :param folder: adapter in peft's format.
    """
    adapter = AdapterFiles(folder)
    updates = {name: adapter.update(name) for name in adapter.linears}
    return {
        name: (lora_a.float().numpy(), (lora_b.float() * scaling).numpy())
        for name, (lora_a, lora_b, scaling) in updates.items()
    }


def save_adapter(model: "PeftModel", folder: Path) -> None:
    """Write the super-adapter from the first process of a launcher.

    All processes must call this function: it gathers the parameters that FSDP2 has sharded.
    """
    gathered = {
        name: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if process_rank() == 0:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, state_dict=gathered)
        config = model.peft_config[model.active_adapter]  # type: ignore[index]
        _write(folder, state, config.to_dict() | {"inference_mode": True})


def write_sub_adapter(config: AdapterConfig, updates: dict[str, "Update"], folder: Path) -> None:
    """Write an adapter with a separate rank per Linear, in the format of stock peft.

    :param config: peft's config of the super-adapter.
    :param updates: Linear -> its update at the chosen rank.
    """
    tensors, ranks, alphas = {}, {}, {}
    for name, (lora_a, lora_b, scaling) in updates.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora_a.detach().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora_b.detach().contiguous()
        ranks[name], alphas[name] = len(lora_a), scaling * len(lora_a)
    patterns = AdapterConfig(rank_pattern=ranks, alpha_pattern=alphas, inference_mode=True)
    _write(folder, tensors, config | patterns)


def _write(folder: Path, tensors: dict[str, "Tensor"], config: AdapterConfig) -> None:
    """Write the two files; the bytes depend only on the adapter, and contain no local path."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, folder / f"{TENSORS}.safetensors", metadata={"format": "pt"})
    config = config | {"base_model_name_or_path": None}
    config["target_modules"] = sorted(config["target_modules"])
    if (parameters := config.get("target_parameters")) is not None:
        config["target_parameters"] = sorted(parameters) or None  # peft sets it for experts
    (folder / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n")


def write_training_log(folder: Path, log: list[RankedStepLog]) -> None:
    """Write ``training.jsonl``, one line per step."""
    (folder / TRAINING_LOG).write_text("".join(json.dumps(entry) + "\n" for entry in log))


def read_training_log(folder: Path) -> list[RankedStepLog]:
    """Return loss, learning rate, tokens and ranks of every step of a training."""
    return [json.loads(line) for line in (folder / TRAINING_LOG).read_text().splitlines()]

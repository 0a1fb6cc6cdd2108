"""Runtimes a model is exported to and run on: openvino, onnx, torch.

Each offers ``open_session(folder, exact, threads, device) -> Session``; openvino and onnx also
``export(merged, folder, options)``, ``add_adapter(folder, adapter)`` for one that is not merged,
and ``read_back(folder)``.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from sqft_export.errors import UserError

# OpenVINO's converter and NNCF report their use over the network unless told not to; where the
# package that does so is missing, they go without. Nobody asked for network access here.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


ADAPTER = "adapter"  # folder inside a deployment whose adapter is not merged


def read_adapter(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Linear -> ``A`` float32 ``[rank, in]`` and ``B`` ``[out, rank]``, the scaling within ``B``.

    :param folder: an adapter as peft stores it.
    """
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, lora_a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        lora_b = tensors[key.replace(".lora_A.", ".lora_B.")]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        found[name] = lora_a, (lora_b * (alpha / len(lora_a))).astype(np.float32)
    return found


class Session(Protocol):
    """A loaded model with a key-value cache."""

    def reset(self) -> None:
        """Forget the cache."""

    def forward(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Continue the cache with int64 ``ids [batch, n]``: float32 logits ``[batch, n, vocab]``.

        The batch must stay the same between two resets.

        :param mask: int64 ``[batch, cached + n]``, 0 where a prompt is filled up on the left.
        """


def positions_of(mask: np.ndarray, length: int) -> np.ndarray:
    """int64 ``[batch, length]``: positions of the last ``length`` tokens, filling not counted."""
    return np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -length:]


GRAPHS = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}


def kind_of(folder: Path) -> str:
    """Which runtime a deployment is for; torch for a Hugging Face folder.

    :raises UserError: if the folder is none.
    """
    found = [name for name, graph in GRAPHS.items() if (folder / graph).is_file()]
    if not found and (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "torch"
    if len(found) != 1:
        raise UserError(
            f"{folder}: not a deployment; found {' and '.join(found) or 'no graph'}, expected "
            f"one of {', '.join(GRAPHS.values())}"
        )
    return found[0]


def target(name: str) -> Any:
    module: ModuleType = importlib.import_module(f"{__name__}.{name}")
    return module

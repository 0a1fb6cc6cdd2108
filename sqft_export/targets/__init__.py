"""Runtimes a model is exported to and run on: openvino, onnx, torch.

Each offers ``open_session(folder, exact, threads) -> Session``; openvino and onnx also
``export(merged, folder)`` and ``read_back(folder)``.
"""

import importlib
import sys
from types import ModuleType
from typing import Any, Protocol

import numpy as np

# OpenVINO's converter and NNCF report their use over the network unless told not to; where the
# package that does so is missing, they go without. Nobody asked for network access here.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class Session(Protocol):
    """A loaded model with a key-value cache."""

    def reset(self) -> None:
        """Forget the cache."""

    def forward(self, ids: np.ndarray) -> np.ndarray:
        """Continue the cache with int64 ``ids [batch, n]``: float32 logits ``[batch, n, vocab]``.

        The batch must stay the same between two resets.
        """


def target(name: str) -> Any:
    module: ModuleType = importlib.import_module(f"{__name__}.{name}")
    return module

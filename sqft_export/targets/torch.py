"""torch: the reference that the runtimes are compared with, in float32."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from sqft_export.compressed import load_float_model
from sqft_export.targets import positions_of


class TorchSession:
    """A Hugging Face causal LM and its cache."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.reset()

    def reset(self) -> None:
        self.cache = None

    @torch.no_grad()
    def forward(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        padded = {}
        if mask is not None:
            padded["attention_mask"] = torch.from_numpy(mask)
            padded["position_ids"] = torch.from_numpy(positions_of(mask, ids.shape[1]))
        output = self.model(
            input_ids=torch.from_numpy(ids), past_key_values=self.cache, use_cache=True, **padded
        )
        self.cache = output.past_key_values
        return output.logits.float().numpy()


def open_session(folder: Path, exact: bool, threads: int | None) -> TorchSession:
    """A merged or plain Hugging Face folder; always exact."""
    if threads:
        torch.set_num_threads(threads)
    return TorchSession(load_float_model(folder))

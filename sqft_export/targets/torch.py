"""torch: the reference that the runtimes are compared with, in float32."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from sqft_export.compressed import load_float_model


class TorchSession:
    """A Hugging Face causal LM and its cache."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.reset()

    def reset(self) -> None:
        self.cache = None

    @torch.no_grad()
    def forward(self, ids: np.ndarray) -> np.ndarray:
        output = self.model(
            input_ids=torch.from_numpy(ids), past_key_values=self.cache, use_cache=True
        )
        self.cache = output.past_key_values
        return output.logits.float().numpy()


def open_session(folder: Path, exact: bool, threads: int | None) -> TorchSession:
    """A merged or plain Hugging Face folder; always exact."""
    if threads:
        torch.set_num_threads(threads)
    return TorchSession(load_float_model(folder))

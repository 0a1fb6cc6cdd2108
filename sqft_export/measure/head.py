"""Measure the KL divergence that a Q8_0 output head of a GGUF file adds.

A head is rounded if that adds less than ``MAX_HEAD_DIVERGENCE`` at every measured token.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sqft_export.measure.likelihood import log_softmax
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import Reference
from sqft_export.targets.gguf.head import dequantize_head, float_head, quantize_head

MAX_HEAD_DIVERGENCE = 1e-3  # nats per token; the self-test allows as much in exact mode


@dataclass(frozen=True)
class HeadDivergence:
    """KL divergence of a model with a rounded head from the same model with its float head.

    mean, largest: in nats per token. positions: number of measured tokens.
    """

    mean: float
    largest: float
    positions: int


def measure_head(merged: Path, sequences: list[list[int]]) -> HeadDivergence | None:
    """Measure the KL divergence that rounding the head of a merged model adds on some texts.

    :param merged: Hugging Face folder.
    :return: None if the head can't be rounded.
    """
    head = float_head(Checkpoint(merged))
    if head is None:
        return None

    def round_weight(name: str, weight: Tensor) -> Tensor:
        if name != head:
            return weight
        return torch.from_numpy(dequantize_head(quantize_head(weight.numpy())))

    found = []
    references = Reference(merged), Reference(merged, edit=round_weight)
    for sequence in sequences:
        one, other = (log_softmax(each.logits([sequence])[0]) for each in references)
        found += (np.exp(one) * (one - other)).sum(axis=-1).tolist()
    return HeadDivergence(float(np.mean(found)), float(np.max(found)), len(found))

"""Decide whether the output head of a GGUF file is rounded to Q8_0, by the KL divergence it adds.

It is rounded if that adds less than ``MAX_HEAD_DIVERGENCE`` at every measured token.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sqft_export.measure.likelihood import log_softmax
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import Reference
from sqft_export.targets.gguf.architectures import uses_gelu_table
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


def choose_head(
    wanted: str, merged: Path, sequences: list[list[int]]
) -> tuple[str, HeadDivergence | None]:
    """Return the head of a GGUF file, ``float`` or ``q8_0``, and what rounding it adds.

    :param wanted: ``export.gguf_head`` of the recipe. ``auto`` also keeps a float head where
        llama.cpp reads GELU from a table: there the certificate could not tell that rounding from
        the head's.
    :param sequences: token ids of texts to measure on.
    :return: the second is None if it was not measured.
    """
    has_table = uses_gelu_table(Checkpoint(merged).config["model_type"])
    if wanted == "float" or (wanted == "auto" and has_table):
        return "float", None
    cost = measure_head(merged, sequences)
    if cost is None:
        return "float", None
    rounded = wanted == "q8_0" or cost.largest < MAX_HEAD_DIVERGENCE
    return ("q8_0" if rounded else "float"), cost


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

    # One batch, since the model is read from disk for every batch.
    exact = Reference(merged).logits(sequences)
    rounded = Reference(merged, edit=round_weight).logits(sequences)
    found = list[float]()
    for one, other in zip(map(log_softmax, exact), map(log_softmax, rounded), strict=True):
        found += (np.exp(one) * (one - other)).sum(axis=-1).tolist()
    return HeadDivergence(float(np.mean(found)), float(np.max(found)), len(found))

"""The merged model with the roundings of a GGUF deployment: GELU, and an output head as Q8_0.

GELU is that of ``gelu.py``. The head's rounding is computed here from llama.cpp's formula:
d = max |w| / 127 per 32 weights of a row, q = w / d rounded to the nearest whole number (halves
away from zero), d stored as float16.
"""

import numpy as np
import torch
from torch import Tensor

from sqft_export.measure.head import MAX_HEAD_DIVERGENCE
from sqft_export.measure.likelihood import log_softmax
from sqft_export.model.floats import Reference
from sqft_export.targets import gguf
from sqft_export.targets.gguf.architectures import uses_gelu_table
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.fidelity import load_reference
from sqft_export.verify.gelu import use_gelu_table
from sqft_export.verify.subject import Subject

_BLOCK, _LARGEST_CODE = 32, 127


def rounded_parameter(subject: Subject, name: str) -> str | None:
    """Return the name of the matrix that the deployments of a target store as Q8_0, or None."""
    if name != "gguf" or not gguf.rounded_head(subject.exports[name] / "model"):
        return None
    merged = subject.merged
    return f"{merged.stored_name(merged.family.head)}.weight"


def round_to_q8_0(weight: Tensor) -> Tensor:
    """Return the values that Q8_0 blocks of a matrix stand for, float32."""
    blocks = weight.float().reshape(-1, _BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True) / _LARGEST_CODE
    inverse = torch.where(scale == 0, 0, 1 / scale)
    scaled = blocks * inverse
    codes = torch.sign(scaled) * torch.floor(scaled.abs() + 0.5)
    return (codes * scale.half().float()).reshape(weight.shape)


def round_if(rounded: bool, weight: Tensor) -> Tensor:
    """Return a matrix as a file stores it: rounded to Q8_0, or unchanged."""
    return round_to_q8_0(weight) if rounded else weight


def reference_of(
    certificate: Certificate, subject: Subject, name: str, reference: Reference
) -> Reference:
    """Return the reference of a target: with the roundings that its runtime or its files have.

    These are GELU from llama.cpp's table, and a head as Q8_0. The divergence that each rounding
    adds is a check of the certificate.
    """
    if name != "gguf":
        return reference
    if uses_gelu_table(subject.merged.config["model_type"]):
        table = load_reference(subject, reference.device)
        use_gelu_table(table.model)
        _check_divergence(certificate, subject, "GELU table", reference, table)
        reference = table
    head = rounded_parameter(subject, name)
    if head is None:
        return reference

    def round_head(parameter: str, weight: Tensor) -> Tensor:
        return round_if(parameter == head, weight)

    rounded = load_reference(subject, reference.device, round_head)
    if uses_gelu_table(subject.merged.config["model_type"]):
        use_gelu_table(rounded.model)
    _check_divergence(certificate, subject, "Q8_0 head", reference, rounded)
    return rounded


def _check_divergence(
    certificate: Certificate, subject: Subject, what: str, reference: Reference, rounded: Reference
) -> None:
    """Check the mean KL divergence that a rounding adds on the prompts."""
    title = f"divergence of gguf by its {what}"
    check = certificate.start("compute", title, "nats per token", MAX_HEAD_DIVERGENCE)
    total, tokens = 0.0, 0
    for prompt in subject.asked.prompts:
        one, other = (log_softmax(each.logits([prompt])[0]) for each in (reference, rounded))
        total += float((np.exp(one) * (one - other)).sum())
        tokens += len(one)
    check.record_largest(total / tokens, tokens, "gguf")

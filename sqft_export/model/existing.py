"""Read the ``quantization_config`` of a model that is already quantized."""

from typing import NamedTuple

from sqft_export.model.config import ModelConfig, QuantizationConfig, WeightScheme
from sqft_export.model.families import FAMILIES

GPTQ_BITS = (4, 8)


def without_mxfp4(config: ModelConfig) -> ModelConfig:
    """Return a config without the settings of experts in MXFP4, which are read as bfloat16."""
    model_type, stored = config.get("model_type"), config.get("quantization_config")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    known = family is not None and family.experts is not None and family.experts.alternate
    if not known or not isinstance(stored, dict) or stored.get("quant_method") != "mxfp4":
        return config
    plain = config.copy()
    del plain["quantization_config"]
    return plain


class StoredGrid(NamedTuple):
    """Grid of a quantized checkpoint.

    bits: bits per code.
    group_size: inputs per scale; -1: one scale per row.
    symmetric: whether the zero point is the middle of the codes.
    refused: why the checkpoint is not supported; None if it is.
    """

    bits: int
    group_size: int
    symmetric: bool
    refused: str | None = None


def stored_grid(config: QuantizationConfig) -> StoredGrid:
    """Return the grid of a GPTQ or compressed-tensors config."""
    method = config.get("quant_method")
    if method == "gptq":
        layout = config.get("checkpoint_format", "gptq")
        refused = None
        if config.get("desc_act"):
            refused = "desc_act is true: reordered columns are not supported"
        elif layout not in ("gptq", "gptq_v2"):
            refused = f"checkpoint_format {layout!r}; supported are gptq and gptq_v2"
        elif config.get("bits") not in GPTQ_BITS:
            refused = f"a GPTQ checkpoint of {config.get('bits')} bits; supported are 4 and 8 bits"
        sizes = config.get("bits", 0), config.get("group_size", 0), config.get("sym", True)
        return StoredGrid(*sizes, refused)
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    return StoredGrid(
        0,
        0,
        True,
        f"quantized by {method!r}; only the gptq layout and "
        "compressed-tensors' pack-quantized are supported",
    )


def _compressed_tensors(config: QuantizationConfig) -> StoredGrid:
    groups = list((config.get("config_groups") or {}).values())
    weights: WeightScheme = (groups[0].get("weights") or {}) if len(groups) == 1 else {}
    bits, symmetric = weights.get("num_bits", 0), weights.get("symmetric", True)
    whole = weights.get("strategy") == "channel"
    size = -1 if whole else weights.get("group_size") or 0
    refused = None
    if config.get("format") != "pack-quantized" or len(groups) != 1:
        refused = f"format {config.get('format')!r}; supported is pack-quantized with one group"
    elif groups[0].get("input_activations") or weights.get("type") != "int" or not symmetric:
        refused = (
            "only symmetric integer weights with float activations (W4A16, W8A16) are supported"
        )
    elif bits not in (4, 8) or weights.get("actorder"):
        refused = (
            f"num_bits {bits}, actorder {weights.get('actorder')!r}; supported are 4 and 8 "
            "without actorder"
        )
    return StoredGrid(bits, size, symmetric, refused)

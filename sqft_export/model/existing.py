"""What a ``quantization_config`` says of a model that is quantized already."""

from typing import Any, NamedTuple

GPTQ_BITS = (4, 8)


class StoredGrid(NamedTuple):
    """bits, group_size (-1: a whole row), symmetry; refused: why it is not taken, else None."""

    bits: int
    group_size: int
    symmetric: bool
    refused: str | None = None


def stored_grid(config: dict[str, Any]) -> StoredGrid:
    """The grid of a GPTQ or compressed-tensors config."""
    method = config.get("quant_method")
    if method == "gptq":
        layout = config.get("checkpoint_format", "gptq")
        refused = None
        if config.get("desc_act"):
            refused = "desc_act is true: its columns are out of order and are not taken"
        elif layout not in ("gptq", "gptq_v2"):
            refused = f"checkpoint_format {layout!r}; gptq and gptq_v2 are taken"
        elif config.get("bits") not in GPTQ_BITS:
            refused = f"a GPTQ checkpoint of {config.get('bits')} bits; 4 and 8 bits are taken"
        sizes = config.get("bits", 0), config.get("group_size", 0), config.get("sym", True)
        return StoredGrid(*sizes, refused)
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    return StoredGrid(
        0,
        0,
        True,
        f"quantized by {method!r}; only the gptq layout and "
        "compressed-tensors' pack-quantized are taken",
    )


def _compressed_tensors(config: dict[str, Any]) -> StoredGrid:
    groups = list((config.get("config_groups") or {}).values())
    weights = (groups[0].get("weights") or {}) if len(groups) == 1 else {}
    bits, symmetric = weights.get("num_bits", 0), weights.get("symmetric", True)
    whole = weights.get("strategy") == "channel"
    size = -1 if whole else weights.get("group_size") or 0
    refused = None
    if config.get("format") != "pack-quantized" or len(groups) != 1:
        refused = f"format {config.get('format')!r}; pack-quantized in one group is taken"
    elif groups[0].get("input_activations") or weights.get("type") != "int" or not symmetric:
        refused = "only symmetric integer weights with float activations (W4A16, W8A16) are taken"
    elif bits not in (4, 8) or weights.get("actorder"):
        refused = (
            f"num_bits {bits}, actorder {weights.get('actorder')!r}; 4 and 8 without are taken"
        )
    return StoredGrid(bits, size, symmetric, refused)

"""Context, windows and rotary scalings of a config.

A config is that of transformers' class, as a dict, with what ``config.json`` leaves to it.
"""

from typing import Any

from sqft_export.model.families import rope_type

_ROPE = "rope_parameters"


def context_length(config: dict[str, Any]) -> int | None:
    """The most tokens that the config says a model is for; None where it does not say."""
    for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        if isinstance(found := config.get(name), int):
            return found
    return None


def deployed_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config that graphs are made from, with the same results up to the deployed context.

    Dynamic NTK changes its frequencies with every token beyond ``max_position_embeddings``. A graph
    has constants. Up to that length they are those of an unscaled model.
    """
    if rope_type(config) != "dynamic":
        return config
    return config | {_ROPE: config[_ROPE] | {"rope_type": "default"}}


def partial_rotary(config: dict[str, Any]) -> float:
    """The share of a head's columns that positions turn; that of full attention, where layers
    differ."""
    rope = config.get(_ROPE) or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def window_layers(config: dict[str, Any]) -> list[int]:
    """Sizes of the sliding window of every layer; 0 for full attention."""
    window, layers = config.get("sliding_window"), config.get("num_hidden_layers") or 0
    if not window or config.get("use_sliding_window") is False:
        return [0] * layers
    kinds = config.get("layer_types") or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else 0 for kind in kinds]

"""Read the settings of a config that depend on text length: context, windows, rope scaling.

A config here is a dict of transformers' config class, which includes its defaults.
"""

from sqft_export.model.config import ModelConfig, RopeParameters
from sqft_export.model.families import rope_type


def context_length(config: ModelConfig) -> int | None:
    """Return the maximum number of tokens of a model; None if the config has no such field."""
    fields = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
    found = (config.get(field) for field in fields)
    return next((length for length in found if isinstance(length, int)), None)


def deployed_config(config: ModelConfig) -> ModelConfig:
    """Return the config to build graphs from, with the same results up to the deployed context.

    Dynamic NTK changes its frequencies with every token beyond ``max_position_embeddings``, but the
    frequencies of a graph are constant. Up to that length they equal those of an unscaled model, or
    of a model with a larger base if the config has an ``alpha`` (Hunyuan).
    """
    rope = config.get("rope_parameters")
    if not rope or rope_type(config) != "dynamic":
        return config
    deployed: RopeParameters = {**rope, "rope_type": "default"}
    if alpha := rope.get("alpha"):
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        deployed["rope_theta"] = rope["rope_theta"] * alpha ** (size / (size - 2))
    return config | {"rope_parameters": deployed}


def cached_heads(config: ModelConfig) -> int | None:
    """Return the number of heads in the key-value cache; None if it is that of the queries.

    Falcon has one head, or with its new blocks as many as queries.
    """
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    return config.get("num_key_value_heads")


def lfm2_inner_width(config: ModelConfig) -> int:
    """Return the inner width of LFM2's MLPs, which its class derives from the config's.

    It is two thirds of ``intermediate_size``, times a factor, rounded up to a multiple.
    """
    width = config["intermediate_size"] or 0
    if not config["block_auto_adjust_ff_dim"]:
        return width
    scaled = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3))
    multiple = config["block_multiple_of"]
    return -(-scaled // multiple) * multiple


def partial_rotary(config: ModelConfig) -> float:
    """Return the share of a head's columns that rotate with positions.

    If layers differ, it is the share of full attention.
    """
    rope: RopeParameters = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def window_layers(config: ModelConfig) -> list[int]:
    """Return the size of the sliding window of every layer; 0 for full attention."""
    window, layers = config.get("sliding_window"), config.get("num_hidden_layers") or 0
    if not window or config.get("use_sliding_window") is False:
        return [0] * layers
    kinds = config.get("layer_types") or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else 0 for kind in kinds]

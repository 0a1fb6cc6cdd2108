"""Read the settings of a config that depend on text length: context, windows, rope scaling.

A config here is a dict of transformers' config class, which includes its defaults.
"""

from typing import TYPE_CHECKING, cast

from sqft_export.model.config import ModelConfig, RopeParameters
from sqft_export.model.families import rope_type

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Fields with the number of positions of a model; the second one is GPT-2's, the third one MPT's.
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")
UNLIMITED_CONTEXT = 2048  # tokens; of a deployment if the config has no limit


def context_length(config: ModelConfig) -> int | None:
    """Return the maximum number of tokens of a model; None if the config has no such field."""
    found = (config.get(field) for field in (*POSITION_FIELDS, "seq_length"))
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


def named_config(config: "PretrainedConfig") -> ModelConfig:
    """Return a config as a dict, with the sizes also by the names that most families have."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    found = {name: getattr(config, name, None) for name in names}
    sizes = {name: size for name, size in found.items() if size is not None}
    return cast(ModelConfig, config.to_dict() | sizes)


def cache_sizes(config: ModelConfig) -> list[tuple[int, int]]:
    """Return heads and head size of each layer's part of the key-value cache.

    The last layers of Gemma 4 read the cache of earlier ones and have no part. Its layers with full
    attention have another head size than those with a window, and may have another number of heads.

    :param config: of :func:`named_config`.
    """
    queries = config["num_attention_heads"]
    heads = cached_heads(config) or queries
    size = config.get("head_dim") or config["hidden_size"] // queries
    layers = config["num_hidden_layers"] - (config.get("num_kv_shared_layers") or 0)
    keys_are_values = config.get("attention_k_eq_v")
    full = (
        (keys_are_values and config.get("num_global_key_value_heads")) or heads,
        config.get("global_head_dim") or size,
    )
    kinds = (config.get("layer_types") or [""] * layers)[:layers]
    return [full if kind == "full_attention" else (heads, size) for kind in kinds]


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

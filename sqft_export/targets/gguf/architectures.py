"""llama.cpp's names for the tensors and config keys of each family.

Names are those of llama.cpp's ``gguf`` package. llama.cpp expects rotary pairs in neighbouring rows
for some families, and all rows of q before those of k and v. Rows are permuted; no value changes.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from sqft_export.model.config import ModelConfig, RopeParameters
from sqft_export.model.contexts import (
    UNLIMITED_CONTEXT,
    cache_sizes,
    cached_heads,
    context_length,
    deployed_config,
    lfm2_inner_width,
)
from sqft_export.model.families import FAMILIES, FULL_ATTENTION
from sqft_export.packed.blocks import BLOCK

if TYPE_CHECKING:
    from gguf import GGUFWriter

_EXPERT = re.compile(r"(\.experts\.)(\d+)(\.)")  # in the path of a module
_NO_ROTATION = 1e30  # divisor of a frequency; llama.cpp's own converter writes it too
SILU, GELU_TANH = ("silu",), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")


@dataclass(frozen=True)
class Architecture:
    """A family in llama.cpp.

    name: llama.cpp's name of the architecture.
    blocks: tensor of a decoder block -> module in the block; ``*`` stands for the number of an
        expert. The matrices of all experts are one tensor.
    outer: tensor outside the blocks -> module.
    parameters: tensor of a decoder block that is no weight or bias of a module -> its path.
    pairs: Linears whose rotary pairs are neighbouring rows in llama.cpp -> config key of the heads.
    joined: Linears with q, k and v per head, where llama.cpp has all rows of q first.
    head_always: llama.cpp expects an output matrix even if it equals the embedding.
    activations: supported values of ``hidden_act``; llama.cpp has one function per family.
    ropes: rotary scalings that llama.cpp computes in the same way.
    epsilon: config key of the norms' epsilon; a LayerNorm's, unless it is in ``_RMS_EPSILONS``.
    numbers: config key -> llama.cpp's key of a float.
    window_period: every nth block has full attention, the others the sliding window; None if
        llama.cpp has no windows for the family.
    values: config key -> the only value that llama.cpp computes with.
    parts: module in a block -> tensors that have equal shares of its rows, in order.
    two_norms: ``blocks`` of models with one norm before attention and another before the MLP
        (Falcon-40B); empty if the family has no such models.
    since: first version of llama.cpp that reads the architecture; empty if all of 2025 do.
    recurrent: value of ``layer_types`` of the layers that have no key and value heads.
    """

    name: str
    blocks: dict[str, str]
    outer: dict[str, str]
    parameters: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, str] = field(default_factory=dict)
    joined: tuple[str, ...] = ()
    head_always: bool = False
    activations: tuple[str, ...] = SILU
    ropes: tuple[str, ...] = ("default", "linear")
    epsilon: str = "rms_norm_eps"
    numbers: dict[str, str] = field(default_factory=dict)
    window_period: int | None = None
    values: dict[str, object] = field(default_factory=dict)
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    two_norms: dict[str, str] = field(default_factory=dict)
    since: str = ""
    recurrent: str | None = None


# Sizes of a delta rule -> llama.cpp's key.
DELTA_FIELDS = {
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "linear_key_head_dim": "ssm.state_size",
}
# Modules and parameters of a delta rule whose rows belong to value heads; in the second ones, the
# rows of queries and keys come first.
_AFTER_KEYS = ("in_proj_qkv", "conv1d")
_VALUE_ROWS = (*_AFTER_KEYS, "in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias")
_VALUE_COLUMNS = ".linear_attn.out_proj"
_MROPE_SECTION = [11, 11, 10]  # transformers' default
_RMS_EPSILONS = ("rms_norm_eps", "norm_eps")
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORM = {"ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA = Architecture(
    "llama",
    _ATTENTION | _MLP | _NORM,
    _OUTER,
    pairs={"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"},
    ropes=("default", "linear", "llama3"),
)


def _joined(attention: str) -> dict[str, str]:
    """Return the tensors of a block whose q, k and v are one Linear.

    :param attention: module that has this Linear.
    """
    return {
        "attn_qkv": f"{attention}.query_key_value",
        "attn_output": f"{attention}.dense",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }


_NORMS_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OLMO2 = Architecture(
    "olmo2",
    {
        **{name: module for name, module in _ATTENTION.items() if name != "attn_norm"},
        **_MLP,
        **_HEAD_NORMS,
        **_NORMS_AFTER,
    },
    _OUTER,
    head_always=True,
    values={"attention_bias": False},
)
_GRANITE_NUMBERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


_GRANITE = replace(_LLAMA, name="granite", ropes=("default",), numbers=_GRANITE_NUMBERS)


def _experts(router: str, experts: str, gate: str, up: str, down: str) -> dict[str, str]:
    """Return the tensors of a block's router and experts.

    :param router, experts: modules in the block. gate, up, down: Linears of an expert.
    """
    return {
        "ffn_gate_inp": router,
        "ffn_gate_exps": f"{experts}.*.{gate}",
        "ffn_up_exps": f"{experts}.*.{up}",
        "ffn_down_exps": f"{experts}.*.{down}",
    }


_NAMED_EXPERTS = _experts("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj")
_LFM2 = Architecture(
    "lfm2",
    {
        **_ATTENTION,
        "attn_output": "self_attn.out_proj",
        "attn_norm": "operator_norm",
        "attn_q_norm": "self_attn.q_layernorm",
        "attn_k_norm": "self_attn.k_layernorm",
        "shortconv.conv": "conv.conv",
        "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj",
        "ffn_norm": "ffn_norm",
        "ffn_gate": "feed_forward.w1",
        "ffn_up": "feed_forward.w3",
        "ffn_down": "feed_forward.w2",
    },
    # llama.cpp names the last norm so.
    {
        "token_embd": "model.embed_tokens",
        "token_embd_norm": "model.embedding_norm",
        "output": "lm_head",
    },
    ropes=("default",),
    epsilon="norm_eps",
    values={"conv_bias": False},
    recurrent="conv",
)
ARCHITECTURES = {
    "qwen3_moe": Architecture(
        "qwen3moe",
        _ATTENTION | _NORM | _HEAD_NORMS | _NAMED_EXPERTS,
        _OUTER,
        values={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "olmoe": Architecture(
        "olmoe",
        _ATTENTION | _NORM | _HEAD_NORMS | _NAMED_EXPERTS,
        _OUTER,
        values={"norm_topk_prob": False, "clip_qkv": None},
    ),
    "mixtral": replace(
        _LLAMA,
        blocks=_ATTENTION | _NORM | _experts("mlp.gate", "mlp.experts", "w1", "w3", "w2"),
    ),
    "granitemoe": replace(
        _LLAMA,
        name="granitemoe",
        blocks=_ATTENTION
        | _NORM
        | _experts(
            *("block_sparse_moe.router.layer", "block_sparse_moe.experts"),
            *("gate_proj", "up_proj", "down_proj"),
        ),
        ropes=("default", "linear"),
    ),
    "gpt_oss": Architecture(
        "gpt-oss",
        _ATTENTION
        | {"post_attention_norm": "post_attention_layernorm"}
        | _experts("mlp.router", "mlp.experts", "gate_proj", "up_proj", "down_proj"),
        _OUTER,
        parameters={"attn_sinks.weight": "self_attn.sinks"},
        head_always=True,
        ropes=("default", "yarn"),
        window_period=2,
        since="b6096 (August 2025)",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", _ATTENTION | _MLP | _NORM, _OUTER),
    "qwen3": Architecture("qwen3", _ATTENTION | _MLP | _NORM | _HEAD_NORMS, _OUTER),
    "phi3": Architecture(
        "phi3",
        {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "attn_norm": "input_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            **_NORM,
        },
        _OUTER,
        # no longrope: llama.cpp chooses its factors by context length, transformers by text length
        ropes=("default",),
    ),
    "gemma2": Architecture(
        "gemma2", _ATTENTION | _MLP | _FOUR_NORMS, _OUTER, activations=GELU_TANH, window_period=2
    ),
    "gemma3_text": Architecture(
        "gemma3",
        _ATTENTION | _MLP | _FOUR_NORMS | _HEAD_NORMS,
        _OUTER,
        activations=GELU_TANH,
        window_period=6,
    ),
    "gemma4_text": Architecture(
        "gemma4",
        {
            **_ATTENTION,
            **_MLP,
            **_FOUR_NORMS,
            **_HEAD_NORMS,
            "layer_output_scale": "layer_scalar",
            "inp_gate": "per_layer_input_gate",
            "proj": "per_layer_projection",
            "post_norm": "post_per_layer_input_norm",
        },
        _OUTER
        | {
            "per_layer_token_embd": "model.embed_tokens_per_layer",
            "per_layer_model_proj": "model.per_layer_model_projection",
            "per_layer_proj_norm": "model.per_layer_projection_norm",
        },
        activations=GELU_TANH,
        ropes=("proportional",),
        values={"attention_bias": False},
        since="b8639 (April 2026)",
    ),
    "bloom": Architecture(
        "bloom",
        _joined("self_attention"),
        {
            "token_embd": "transformer.word_embeddings",
            "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        joined=("query_key_value",),
        activations=(),
        epsilon="layer_norm_epsilon",
    ),
    "gpt_neox": Architecture(
        "gptneox",
        _joined("attention"),
        {
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
        joined=("query_key_value",),
        head_always=True,
        activations=("gelu", *GELU_TANH),
        epsilon="layer_norm_eps",
    ),
    "smollm3": replace(_LLAMA, name="smollm3", values={"no_rope_layer_interval": 4}),
    "ministral3": replace(
        _LLAMA, name="mistral3", ropes=("yarn",), since="pull request 17644 (December 2025)"
    ),
    "granite": _GRANITE,
    # Without experts and recurrent layers it is Granite, with one Linear for gate and up.
    "granitemoehybrid": replace(
        _GRANITE,
        blocks=_ATTENTION | _NORM | {"ffn_down": "shared_mlp.output_linear"},
        parts={"shared_mlp.input_linear": ("ffn_gate", "ffn_up")},
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, ropes=("default",), window_period=4),
    "cohere2": Architecture(
        "cohere2",
        _ATTENTION | _MLP,
        _OUTER,
        epsilon="layer_norm_eps",
        numbers={"logit_scale": "logit_scale"},
        window_period=4,
        values={"tie_word_embeddings": True, "attention_bias": False},
    ),
    "glm4": Architecture(
        "glm4",
        {
            **_ATTENTION,
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        _OUTER,
        head_always=True,
        ropes=("default",),
    ),
    "stablelm": Architecture(
        "stablelm",
        _ATTENTION | _MLP | _NORM,
        _OUTER,
        head_always=True,
        epsilon="layer_norm_eps",
        values={"qk_layernorm": False},
    ),
    "hunyuan_v1_dense": Architecture(
        "hunyuan-dense",
        {
            **_ATTENTION,
            **_MLP,
            **_NORM,
            "attn_q_norm": "self_attn.query_layernorm",
            "attn_k_norm": "self_attn.key_layernorm",
        },
        _OUTER,
        ropes=("default",),
    ),
    "exaone4": Architecture(
        "exaone4",
        {
            **{name: module for name, module in _ATTENTION.items() if name != "attn_norm"},
            **_MLP,
            **_HEAD_NORMS,
            **_NORMS_AFTER,
        },
        _OUTER,
        ropes=("default", "linear", "llama3"),
        window_period=4,
    ),
    "phi": Architecture(
        "phi2",
        {
            **_ATTENTION,
            "attn_output": "self_attn.dense",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        },
        _OUTER | {"output_norm": "model.final_layernorm"},
        head_always=True,
        activations=GELU_TANH,
        epsilon="layer_norm_eps",
        values={"qk_layernorm": False},
    ),
    "falcon": Architecture(
        "falcon",
        {
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
            "attn_norm": "input_layernorm",
        },
        {
            "token_embd": "transformer.word_embeddings",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        joined=("query_key_value",),
        head_always=True,
        activations=("gelu", *GELU_TANH),
        epsilon="layer_norm_epsilon",
        values={"alibi": False, "parallel_attn": True, "bias": False},
        two_norms={
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
            "attn_norm": "ln_mlp",
            "attn_norm_2": "ln_attn",
        },
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
            "attn_norm": "ln_1",
            "ffn_norm": "ln_2",
        },
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        activations=("gelu", *GELU_TANH),
        epsilon="layer_norm_epsilon",
        values={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    ),
    "lfm2": _LFM2,
    "lfm2_moe": replace(
        _LFM2,
        name="lfm2moe",
        blocks=_LFM2.blocks
        | _experts("feed_forward.gate", "feed_forward.experts", "w1", "w3", "w2"),
        parameters={"exp_probs_b.bias": "feed_forward.expert_bias"},
        values={
            **{"conv_bias": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
            "use_expert_bias": True,
        },
    ),
    "qwen3_5_text": Architecture(
        "qwen35",
        {
            **_ATTENTION,
            **_HEAD_NORMS,
            **_MLP,
            "post_attention_norm": "post_attention_layernorm",
            "attn_qkv": "linear_attn.in_proj_qkv",
            "attn_gate": "linear_attn.in_proj_z",
            "ssm_beta": "linear_attn.in_proj_b",
            "ssm_alpha": "linear_attn.in_proj_a",
            "ssm_conv1d": "linear_attn.conv1d",
            "ssm_norm": "linear_attn.norm",
            "ssm_out": "linear_attn.out_proj",
        },
        _OUTER,
        parameters={"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"},
        ropes=("default",),
        values={"attention_bias": False},
    ),
    "starcoder2": Architecture(
        "starcoder2",
        {**_ATTENTION, **_NORM, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        _OUTER,
        activations=GELU_TANH,
        epsilon="norm_epsilon",
    ),
}


_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # defaults of YaRN, in rotations over the first context
_EXAONE_LAYERS = 64  # llama.cpp recognizes the 32B model by it
# Model types that llama.cpp does not support.
WITHOUT_ARCHITECTURE = ("opt",)
# Model types that llama.cpp computes differently -> the difference.
_COMPUTED_DIFFERENTLY = {
    "phimoe": "llama.cpp weights the experts of phimoe by a softmax, not by sparsemixer",
}
# The only values that llama.cpp supports, in every family.
# Numbers that llama.cpp's graph always uses; it has defaults where the file has none.
_GEMMA_NUMBERS = {
    "gemma2": ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": ("sliding_window",),
}
_REQUIRED_VALUES = {"use_sliding_window": False, "apply_residual_connection_post_layernorm": False}


def rope_of(config: ModelConfig) -> RopeParameters:
    """Return the rotary parameters; those of full attention if they differ per kind of layer.

    Dynamic scaling with an ``alpha`` (Hunyuan) is a larger base, which llama.cpp has.
    """
    parameters = config.get("rope_parameters") or RopeParameters(rope_type="default")
    if parameters.get("alpha"):
        parameters = deployed_config(config)["rope_parameters"] or parameters
    return parameters.get("full_attention", parameters)


def architecture_lacks(config: ModelConfig) -> str | None:
    """Return why GGUF can't represent a model; None if it can.

    :param config: the transformers config as a dict, with the defaults of its class.
    """
    model_type = config["model_type"]
    known = ARCHITECTURES.get(model_type)
    if model_type in _COMPUTED_DIFFERENTLY:
        return _COMPUTED_DIFFERENTLY[model_type]
    if known is None and model_type in WITHOUT_ARCHITECTURE:
        return f"llama.cpp has no architecture for {model_type}"
    if known is None:
        written = ", ".join(ARCHITECTURES)
        return f"this package can't write {model_type} as GGUF yet; it writes {written}"
    activation = config.get("hidden_act") or config.get("hidden_activation")
    activation = activation or config.get("activation_function")
    if known.activations and activation and activation not in known.activations:
        return f"llama.cpp computes {known.activations[0]} for {model_type}, not {activation}"
    rope = rope_of(config)["rope_type"]
    if rope not in known.ropes:
        return f"llama.cpp's {known.name} is not written with rope_type {rope}"
    for key, only in (_REQUIRED_VALUES | known.values).items():
        if (found := config.get(key)) is not None and found != only:
            return f"llama.cpp's {known.name} has {key} {only}, not {found}"
    if lacks := _pattern_lacks(config, known):
        return lacks
    if model_type == "olmoe" and config["num_key_value_heads"] != config["num_attention_heads"]:
        return "llama.cpp's olmoe has as many key and value heads as query heads"
    if model_type == "gpt_neox" and not config.get("attention_bias", True):
        return "llama.cpp's gptneox requires attention biases"
    if model_type == "gemma4_text":
        return _gemma4_lacks(config)
    if model_type == "ministral3":
        return _yarn_lacks(rope_of(config))
    if model_type == "gpt_oss":
        return _gpt_oss_lacks(config)
    if model_type.startswith("gemma"):
        return _gemma_lacks(config)
    return _qwen3_5_lacks(config) if model_type == "qwen3_5_text" else None


def first_version(config: ModelConfig) -> str:
    """Return the first llama.cpp that reads the files of a model; empty if all of 2025 do."""
    known = ARCHITECTURES.get(config["model_type"])
    return known.since if known else ""


def _gemma_lacks(config: ModelConfig) -> str | None:
    """Return which constant of llama.cpp's Gemma graphs differs from the config; None if none."""
    scalar, size = config.get("query_pre_attn_scalar", 256), config.get("head_dim", 256)
    if scalar != size:
        return f"llama.cpp takes query_pre_attn_scalar to be head_dim ({size}), not {scalar}"
    for key in _GEMMA_NUMBERS[config["model_type"]]:
        if not config.get(key):
            return f"llama.cpp requires {key} for {config['model_type']}"
    if config["model_type"] != "gemma2" and config.get("final_logit_softcapping"):
        return "llama.cpp's gemma3 does not cap logits"
    return None


def _yarn_lacks(rope: RopeParameters) -> str | None:
    """Return which parameter of YaRN llama.cpp requires or computes differently; None if none."""
    for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "llama_4_scaling_beta"):
        if not rope.get(key):
            return f"llama.cpp's mistral3 requires {key} in rope_parameters"
    if rope["mscale"] != rope["mscale_all_dim"]:
        return "llama.cpp's mistral3 takes mscale to be mscale_all_dim"
    return None


def _gpt_oss_lacks(config: ModelConfig) -> str | None:
    """Return what llama.cpp's graph of gpt-oss computes differently; None if nothing."""
    if not config.get("sliding_window"):
        return "llama.cpp requires sliding_window for gpt_oss"
    rope = rope_of(config)
    if rope["rope_type"] != "yarn":
        return None
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(key):
            return f"llama.cpp's gpt-oss has no {key} in rope_parameters"
    low, high = _yarn_borders(rope, _rotary_size(config))
    if rope.get("truncate", True) or (low == int(low) and high == int(high)):
        return None
    return (
        "llama.cpp rounds the borders of YaRN to whole columns "
        f"({math.floor(low)} and {math.ceil(high)}), and the model has {low:.2f} and {high:.2f} "
        "(truncate: false), so that angles differ and texts of thousands of tokens are computed "
        "differently"
    )


def _yarn_borders(rope: RopeParameters, size: int) -> tuple[float, float]:
    """Return the columns between which YaRN mixes its frequencies.

    :param size: rotated columns of a head.
    """
    length, base = rope["original_max_position_embeddings"], rope["rope_theta"]
    turns = rope.get("beta_fast") or _BETA_FAST, rope.get("beta_slow") or _BETA_SLOW
    low, high = (
        size * math.log(length / (count * 2 * math.pi)) / (2 * math.log(base)) for count in turns
    )
    return max(low, 0.0), min(high, size - 1.0)


def _gemma4_lacks(config: ModelConfig) -> str | None:
    """Return which part of Gemma 4 llama.cpp computes differently; None if none.

    Its last layers read the cache of the two layers before them: the last one if they have full
    attention, else the one before it.
    """
    if not config.get("sliding_window"):
        return "llama.cpp requires sliding_window for gemma4_text"
    rope: RopeParameters = config.get("rope_parameters") or {}
    if (found := rope.get("sliding_attention", {}).get("rope_type", "default")) != "default":
        return f"llama.cpp's gemma4 has no rope_type {found} in windowed layers"
    owners = (config.get("layer_types") or [])[: len(cache_sizes(config))]
    shared = config.get("num_kv_shared_layers") or 0
    if shared and owners[-2:] != ["sliding_attention", "full_attention"]:
        return (
            "llama.cpp's gemma4 shares keys and values of a layer with a window and of the next "
            f"one with full attention; the last two with their own are {', '.join(owners[-2:])}"
        )
    return None


def _pattern_lacks(config: ModelConfig, known: Architecture) -> str | None:
    """Return which windows or rotations per block differ from llama.cpp's; None if none."""
    if config.get("no_rope_layers"):
        wanted = [int((index + 1) % 4 != 0) for index in range(config["num_hidden_layers"])]
        if config["no_rope_layers"] != wanted:
            return f"llama.cpp's {known.name} rotates all but every 4th block"
    period, kinds = known.window_period, config.get("layer_types") or []
    if period is None:
        return None
    if config["model_type"] == "exaone4":
        if not config.get("sliding_window"):
            return None
        if (layers := config["num_hidden_layers"]) != _EXAONE_LAYERS:
            return (
                f"llama.cpp's exaone4 has windows with {_EXAONE_LAYERS} blocks only, not {layers}"
            )
    full = [(index + 1) % period == 0 for index in range(len(kinds))]
    has_period = config.get("sliding_window_pattern", period) == period
    if [kind == "full_attention" for kind in kinds] != full or not has_period:
        return f"llama.cpp has full attention in every {period}th block of {config['model_type']}"
    return None


def uses_gelu_table(model_type: str) -> bool:
    """Return whether llama.cpp reads the activation from a float16 table, as it does for GELU."""
    return ARCHITECTURES[model_type].activations != SILU


@dataclass(frozen=True)
class Names:
    """Map modules to llama.cpp's tensors, and back, for one model.

    heads: ``num_attention_heads`` and ``num_key_value_heads``; of a delta rule also the fields in
        ``DELTA_FIELDS``.
    two_norms: the blocks are those of ``Architecture.two_norms``.
    """

    model_type: str
    heads: dict[str, int]
    two_norms: bool = False

    @property
    def architecture(self) -> Architecture:
        """llama.cpp's architecture of the model type."""
        return ARCHITECTURES[self.model_type]

    @property
    def _blocks(self) -> str:
        return FAMILIES[self.model_type].blocks

    @property
    def _modules(self) -> dict[str, str]:
        """Return tensor -> module of a block."""
        known = self.architecture
        parts = ((tensor, module) for module, names in known.parts.items() for tensor in names)
        return (known.two_norms if self.two_norms else known.blocks) | dict(parts)

    def tensors_of(self, module: str, rows: int) -> list[tuple[str, slice]]:
        """Return the tensors of a module, each with its rows of all ``rows``.

        Names have no ``.weight`` or ``.bias``. Most modules have one tensor.

        :raises KeyError: if llama.cpp has no name for it.
        """
        if not module.startswith(f"{self._blocks}."):
            return [({m: t for t, m in self.architecture.outer.items()}[module], slice(None))]
        block, _, path = module.removeprefix(f"{self._blocks}.").partition(".")
        if names := self.architecture.parts.get(path):
            share = rows // len(names)
            starts = range(0, rows, share)
            return [
                (f"blk.{block}.{name}", slice(start, start + share))
                for name, start in zip(names, starts, strict=True)
            ]
        path = _EXPERT.sub(r"\1*\3", path)
        tensor = {m: t for t, m in self._modules.items()}[path]
        return [(f"blk.{block}.{tensor}", slice(None))]

    def part_of(self, tensor: str) -> tuple[int, int]:
        """Return which of how many tensors of its module a tensor is."""
        name = tensor.split(".", 2)[-1]
        names = next((n for n in self.architecture.parts.values() if name in n), (name,))
        return names.index(name), len(names)

    def tensor_of_parameter(self, key: str) -> str | None:
        """Return the tensor of a parameter in ``parameters``; None for other parameters."""
        block, _, path = key.removeprefix(f"{self._blocks}.").partition(".")
        found = {parameter: tensor for tensor, parameter in self.architecture.parameters.items()}
        return f"blk.{block}.{found[path]}" if path in found else None

    def key_of(self, tensor: str) -> str | None:
        """Return the parameter of a tensor in ``parameters``; None for other tensors."""
        block, _, name = tensor.removeprefix("blk.").partition(".")
        path = self.architecture.parameters.get(name)
        return f"{self._blocks}.{block}.{path}" if path else None

    def module_of(self, tensor: str) -> str | None:
        """Return the module of a tensor; None if it belongs to no module.

        In the name of an expert's module, ``*`` stands for the expert's number.
        """
        if not tensor.startswith("blk."):
            return self.architecture.outer.get(tensor)
        _, block, name = [*tensor.split(".", 2), ""][:3]
        path = self._modules.get(name)
        return f"{self._blocks}.{block}.{path}" if path else None

    def parameter_of(self, module: str, part: str) -> str:
        """Return the name of a parameter in the model class: a scalar has no module."""
        path = module.removeprefix(f"{self._blocks}.").partition(".")[2]
        is_scalar = path in FAMILIES[self.model_type].buffers
        return module if is_scalar else f"{module}.{part}"

    def order(self, module: str, rows: int) -> np.ndarray | None:
        """Return the checkpoint's row for each row in llama.cpp, int64 ``[rows]``.

        None means the same order. For rotary pairs, rows ``0, 1, 2, ...`` of a head of size d are
        ``0, d/2, 1, d/2 + 1, ...`` of the checkpoint.
        """
        last = module.rpartition(".")[2]
        if key := self.architecture.pairs.get(last):
            halves = np.arange(rows).reshape(self.heads[key], 2, -1)
            return halves.swapaxes(1, 2).reshape(-1)
        if last in self.architecture.joined:
            groups = self.heads["num_key_value_heads"]
            heads = self.heads["num_attention_heads"] // groups + 2  # of a group: q, ..., q, k, v
            grouped = np.arange(rows).reshape(groups, heads, -1)
            parts = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
            return np.concatenate([part.reshape(-1) for part in parts])
        if (moved := self._value_head_order()) is not None and last in _VALUE_ROWS:
            first = 2 * self.heads["linear_num_key_heads"] * self.heads["linear_key_head_dim"]
            first = first if last in _AFTER_KEYS else 0
            values = np.arange(first, rows).reshape(len(moved), -1)[moved]
            return np.concatenate([np.arange(first), values.reshape(-1)])
        return None

    def _value_head_order(self) -> np.ndarray | None:
        """Return the checkpoint's value head for each of llama.cpp's; None if they are the same.

        A checkpoint groups the value heads of a delta rule by their key head. llama.cpp has the
        first value head of every key head, then the second of every one.
        """
        keys, values = (self.heads.get(f"linear_num_{kind}_heads", 0) for kind in ("key", "value"))
        if keys == values:
            return None
        return np.arange(values).reshape(keys, -1).T.reshape(-1)

    def moves_columns(self, module: str) -> bool:
        """Return whether llama.cpp has the columns of a module in another order."""
        return module.endswith(_VALUE_COLUMNS) and self._value_head_order() is not None

    def permute_columns(self, module: str, array: np.ndarray) -> np.ndarray:
        """Return the columns in llama.cpp's order.

        :param array: ``[rows, inputs]`` or ``[rows, groups]``; groups divide a value head.
        """
        order = self._value_head_order()
        if order is None or not self.moves_columns(module):
            return array
        return array.reshape(len(array), len(order), -1)[:, order].reshape(array.shape)

    def restore_columns(self, module: str, array: np.ndarray) -> np.ndarray:
        """Return columns in llama.cpp's order in the checkpoint's order."""
        order = self._value_head_order()
        if order is None or not self.moves_columns(module):
            return array
        return array.reshape(len(array), len(order), -1)[:, order.argsort()].reshape(array.shape)

    def permute_rows(self, module: str, array: np.ndarray) -> np.ndarray:
        """Return the rows in llama.cpp's order."""
        order = self.order(module, len(array))
        return array if order is None else array[order]

    def restore_rows(self, module: str, array: np.ndarray) -> np.ndarray:
        """Return rows in llama.cpp's order in the checkpoint's order."""
        order = self.order(module, len(array))
        if order is None:
            return array
        restored = np.empty_like(array)
        restored[order] = array
        return restored


def split_parameter(key: str) -> tuple[str, str]:
    """Return module and ``weight`` or ``bias``; a scalar without a module is its own."""
    module, _, part = key.rpartition(".")
    return (module, part) if part in ("weight", "bias") else (key, "weight")


def expert_number(module: str) -> int | None:
    """Return the number of the expert that a module belongs to; None for other modules."""
    found = _EXPERT.search(module)
    return int(found.group(2)) if found else None


def naming_of(config: ModelConfig) -> Names:
    """Return the tensor names of a model.

    :param config: content of ``config.json``.
    """
    heads = config.get("num_attention_heads") or config["n_head"]
    key_value_heads = cached_heads(config) or heads
    if config.get("new_decoder_architecture"):  # the model class caches copies for all queries
        key_value_heads = config["num_kv_heads"]
    counts = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads}
    sizes = cast(Mapping[str, int], config)
    counts |= {name: sizes[name] for name in DELTA_FIELDS if name in sizes}
    has_two = config.get("new_decoder_architecture") and config.get("num_ln_in_parallel_attn") != 1
    return Names(config["model_type"], counts, bool(has_two))


def rotary_factors(config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tensors of divisors of the rotary frequencies: name and float32 ``[size / 2]``."""
    rope = rope_of(config)
    if rope["rope_type"] == "llama3":
        yield "rope_freqs", _llama3_factors(rope, _rotary_size(config))
    elif rope["rope_type"] == "proportional":
        yield "rope_freqs", _proportional_factors(rope, _full_size(config))


def _llama3_factors(rope: RopeParameters, size: int) -> np.ndarray:
    """Return the divisors of Llama 3.1, float32 ``[size / 2]``.

    Low frequencies are divided by ``factor``, high ones by 1. Those between are interpolated.
    """
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size)
    lengths = 2 * np.pi / frequencies
    original_length = rope["original_max_position_embeddings"]
    slow, fast = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((original_length / lengths - slow) / (fast - slow), 0, 1)
    return (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)


def _proportional_factors(rope: RopeParameters, size: int) -> np.ndarray:
    """Return the divisors of a rotation of a head's first columns, float32 ``[size / 2]``.

    Their frequencies are those of the complete head. The other columns do not rotate.
    """
    factors = np.full(size // 2, _NO_ROTATION, np.float32)
    factors[: int(rope.get("partial_rotary_factor", 1.0) * size // 2)] = rope.get("factor", 1.0)
    return factors


def write_keys(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Write the config keys of a model.

    :param writer: writer of the architecture.
    :param config: the transformers config as a dict, with the defaults of its class.
    """
    model_type = config["model_type"]
    _write_sizes(writer, config)
    if model_type == "granitemoehybrid" and config.get("position_embedding_type") != "rope":
        writer.add_rope_scaling_finetuned(False)  # llama.cpp's switch for Granite's rotation
    known, values = ARCHITECTURES[model_type], cast(Mapping[str, float], config)
    if known.epsilon in _RMS_EPSILONS:
        writer.add_layer_norm_rms_eps(values[known.epsilon])
    else:
        writer.add_layer_norm_eps(values[known.epsilon])
    if model_type in ("gpt_neox", "stablelm"):
        writer.add_parallel_residual(config["use_parallel_residual"])
    if config.get("rope_parameters"):
        _write_rope(writer, config)
    if model_type == "gemma4_text":
        _write_gemma4(writer, config)
    elif model_type.startswith("gemma"):
        _write_gemma(writer, config)
    elif known.window_period and (window := config.get("sliding_window")):
        writer.add_sliding_window(window)
    for key, name in known.numbers.items():
        writer.add_float32(f"{known.name}.{name}", values[key])
    _write_hybrid(writer, config)
    _write_experts(writer, config)


def _write_sizes(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Write widths, and numbers of blocks, heads and tokens."""
    writer.add_context_length(context_of_file(config))
    writer.add_embedding_length(_width(config))
    writer.add_block_count(config.get("num_hidden_layers") or config["n_layer"])
    writer.add_feed_forward_length(_feed_forward(config))
    writer.add_head_count(naming_of(config).heads["num_attention_heads"])
    writer.add_head_count_kv(_key_value_heads(config))
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] not in ("bloom", "gpt_neox"):
        writer.add_key_length(_full_size(config))
        writer.add_value_length(_full_size(config))


def _feed_forward(config: ModelConfig) -> int | list[int]:
    """Return the inner width of the MLP, per layer if it differs."""
    if config["model_type"] == "lfm2":
        return lfm2_inner_width(config)
    found = config.get("ffn_hidden_size") or config.get("n_inner")
    found = found or config.get("shared_intermediate_size")
    if config["model_type"] not in ("bloom", "gpt2"):  # which have no such field
        found = found or config.get("intermediate_size")
    if found and config.get("use_double_wide_mlp"):
        layers, shared = config["num_hidden_layers"], config["num_kv_shared_layers"]
        return [found * (2 if layers - index <= shared else 1) for index in range(layers)]
    return found or 4 * _width(config)


def _key_value_heads(config: ModelConfig) -> int | list[int]:
    """Return the number of heads of keys and values, per layer if it differs."""
    count = naming_of(config).heads["num_key_value_heads"]
    recurrent = ARCHITECTURES[config["model_type"]].recurrent
    full = (config.get("attention_k_eq_v") and config.get("num_global_key_value_heads")) or count
    if recurrent is None and full == count:
        return count
    counts = {recurrent: 0, FULL_ATTENTION: full}
    return [counts.get(kind, count) for kind in config.get("layer_types") or []]


def _write_hybrid(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Write the sizes of recurrent layers."""
    if config["model_type"] in ("lfm2", "lfm2_moe"):
        writer.add_shortconv_l_cache(config["conv_L_cache"])
    if config["model_type"] != "qwen3_5_text":
        return
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    writer.add_ssm_inner_size(config["linear_num_value_heads"] * config["linear_value_head_dim"])
    writer.add_full_attention_interval(_attention_interval(config))
    sections = rope_of(config).get("mrope_section") or _MROPE_SECTION
    writer.add_rope_dimension_sections([*sections, 0])


def _attention_interval(config: ModelConfig) -> int:
    """Return n if every nth layer has full attention and the others have none; 0 otherwise."""
    kinds = config.get("layer_types") or []
    interval = kinds.index(FULL_ATTENTION) + 1 if FULL_ATTENTION in kinds else 0
    full = [index % interval == interval - 1 for index in range(len(kinds))] if interval else []
    return interval if full == [kind == FULL_ATTENTION for kind in kinds] else 0


def _qwen3_5_lacks(config: ModelConfig) -> str | None:
    """Return what llama.cpp's graph of Qwen3.5 computes differently; None if nothing."""
    if not _attention_interval(config):
        return "llama.cpp's qwen35 has full attention in every nth block, n the same throughout"
    keys, values = config["linear_key_head_dim"], config["linear_value_head_dim"]
    if keys != values:
        return f"llama.cpp's qwen35 has square states, not {keys} by {values}"
    heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if heads[0] != heads[1] and values % BLOCK:
        return f"its blocks of {BLOCK} do not divide value heads of {values}, which it reorders"
    return None


def _write_experts(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Write the numbers of experts, and Granite's four multipliers."""
    import gguf

    count = config.get("num_local_experts") or config.get("num_experts")
    if not count:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    inner = config.get("moe_intermediate_size")
    if config["model_type"] == "gpt_oss":
        inner = config["intermediate_size"]
    if inner:
        writer.add_expert_feed_forward_length(inner)
    if config["model_type"] == "lfm2_moe":
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if config["model_type"] == "granitemoe":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])


def context_of_file(config: ModelConfig) -> int:
    """Return the context length in which llama.cpp computes the same attention as the model.

    llama.cpp has no sliding window for most families. The context then ends at the window.
    """
    length = context_length(config) or UNLIMITED_CONTEXT
    known = ARCHITECTURES[config["model_type"]]
    window = None if known.window_period else config.get("sliding_window")
    return min(length, window) if window and "use_sliding_window" not in config else length


def _head_size(config: ModelConfig) -> int:
    heads = naming_of(config).heads["num_attention_heads"]
    return config.get("head_dim") or _width(config) // heads


def _full_size(config: ModelConfig) -> int:
    """Return the head size of layers with full attention."""
    return config.get("global_head_dim") or _head_size(config)


def _width(config: ModelConfig) -> int:
    return config.get("hidden_size") or config["n_embd"]


def _rotary_size(config: ModelConfig) -> int:
    return int(_head_size(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def _write_rope(writer: "GGUFWriter", config: ModelConfig) -> None:
    import gguf

    rope = rope_of(config)
    if rope["rope_type"] == "proportional":  # columns that do not rotate have a huge divisor
        writer.add_rope_dimension_count(_full_size(config))
    else:
        writer.add_rope_dimension_count(_rotary_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        _write_yarn(writer, rope)


def _write_yarn(writer: "GGUFWriter", rope: RopeParameters) -> None:
    """Write a YaRN scaling, and the growth of queries with the position if the model has one."""
    import gguf

    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or _BETA_FAST)
    writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or _BETA_SLOW)
    if "llama_4_scaling_beta" in rope:
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _write_gemma(writer: "GGUFWriter", config: ModelConfig) -> None:
    window = config.get("sliding_window")
    assert window  # see _gemma_lacks
    writer.add_sliding_window(window)
    if config["model_type"] == "gemma2":
        attention, final = config["attn_logit_softcapping"], config["final_logit_softcapping"]
        assert attention and final
        writer.add_attn_logit_softcapping(attention)
        writer.add_final_logit_softcapping(final)
    else:
        rope: RopeParameters = config.get("rope_parameters") or {}
        local: RopeParameters = rope.get("sliding_attention", {})
        base = local.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0
        writer.add_float32("gemma3.rope.freq_base_swa", base)


def _write_gemma4(writer: "GGUFWriter", config: ModelConfig) -> None:
    """Write two head sizes and two rotations, layers without keys, and per-layer embeddings."""
    window, rope = config["sliding_window"], config["rope_parameters"]
    assert window and rope  # see _gemma4_lacks
    kinds, size = config["layer_types"] or [], _head_size(config)
    writer.add_sliding_window(window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
    writer.add_key_length_swa(size)
    writer.add_value_length_swa(size)
    writer.add_rope_dimension_count_swa(size)
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    # Without the key, llama.cpp caps logits at 30; zero means no cap.
    writer.add_final_logit_softcapping(config.get("final_logit_softcapping") or 0.0)

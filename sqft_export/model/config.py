"""Types of ``config.json``: the fields that this package reads.

A config is untrusted JSON. ``transformers_config`` checks its types; code that runs before it
checks the values that it reads.
"""

from typing import TypedDict


class RopeParameters(TypedDict, total=False):
    """Parameters of rotary positions.

    If layers differ, the two kinds of attention have separate parameters.
    """

    rope_type: str
    rope_theta: float
    factor: float
    partial_rotary_factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float
    alpha: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float
    mscale: float
    mscale_all_dim: float
    llama_4_scaling_beta: float
    mrope_section: list[int]
    full_attention: "RopeParameters"
    sliding_attention: "RopeParameters"


class WeightScheme(TypedDict, total=False):
    """The format of the weights of a group, as compressed-tensors describes it."""

    num_bits: int
    group_size: int | None
    symmetric: bool
    strategy: str
    type: str
    actorder: str | None


class QuantizedGroup(TypedDict, total=False):
    """Modules that compressed-tensors stores in the same format."""

    weights: WeightScheme
    input_activations: object


class QuantizationConfig(TypedDict, total=False):
    """``quantization_config`` of a GPTQ or compressed-tensors checkpoint."""

    quant_method: str
    checkpoint_format: str
    format: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    lm_head: bool
    dynamic: dict[str, dict[str, int | bool]]
    config_groups: dict[str, QuantizedGroup] | None


class ModelConfig(TypedDict, total=False):
    """``config.json``, or a dict of transformers' config class, which includes its defaults."""

    model_type: str
    dtype: str
    vocab_size: int
    hidden_size: int
    n_embd: int
    n_inner: int | None
    shared_intermediate_size: int
    intermediate_size: int | None
    ffn_hidden_size: int | None
    num_hidden_layers: int
    n_layer: int
    num_attention_heads: int
    n_head: int
    num_key_value_heads: int | None
    multi_query: bool
    num_kv_heads: int
    num_ln_in_parallel_attn: int | None
    position_embedding_type: str | None
    new_decoder_architecture: bool
    head_dim: int | None
    global_head_dim: int
    num_global_key_value_heads: int | None
    num_kv_shared_layers: int
    attention_k_eq_v: bool
    use_double_wide_mlp: bool
    hidden_size_per_layer_input: int
    hidden_act: str
    hidden_activation: str
    activation_function: str
    attention_bias: bool
    tie_word_embeddings: bool
    use_parallel_residual: bool
    layer_norm_eps: float
    layer_norm_epsilon: float
    norm_epsilon: float
    rms_norm_eps: float
    max_position_embeddings: int
    n_positions: int
    seq_length: int
    max_seq_len: int
    rope_parameters: RopeParameters | None
    rope_local_base_freq: float | None
    partial_rotary_factor: float | None
    sliding_window: int | None
    sliding_window_pattern: int
    use_sliding_window: bool
    layer_types: list[str] | None
    no_rope_layers: list[int] | None
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    bos_token_id: int | list[int] | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | list[int] | None
    num_experts: int
    num_local_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_dense_layers: int
    attention_multiplier: float
    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    conv_L_cache: int
    linear_conv_kernel_dim: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    block_auto_adjust_ff_dim: bool
    block_ffn_dim_multiplier: float
    block_multiple_of: int
    quantization_config: QuantizationConfig

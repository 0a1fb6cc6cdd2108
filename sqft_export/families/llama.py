"""Llama and Mistral: grouped-query attention, SwiGLU, RMSNorm, rotary positions."""

from dataclasses import replace

from sqft_export.families import Family

LLAMA = Family(
    model_types=("llama",),
    blocks="model.layers",
    projections={
        "self_attn.q_proj": ("queries", "hidden"),
        "self_attn.k_proj": ("keys", "hidden"),
        "self_attn.v_proj": ("keys", "hidden"),
        "self_attn.o_proj": ("hidden", "queries"),
        "mlp.gate_proj": ("intermediate", "hidden"),
        "mlp.up_proj": ("intermediate", "hidden"),
        "mlp.down_proj": ("hidden", "intermediate"),
    },
    vectors={"input_layernorm.weight": "hidden", "post_attention_layernorm.weight": "hidden"},
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    builder="LlamaModel",
)
FAMILIES = (LLAMA, replace(LLAMA, model_types=("mistral",), builder="MistralModel"))

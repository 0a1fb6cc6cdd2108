"""Llama and Mistral: grouped-query attention, SwiGLU, RMSNorm, rotary positions."""

from sqft_export.families import Family

FAMILY = Family(
    model_types=("llama", "mistral"),
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
    vectors={"input_layernorm": "hidden", "post_attention_layernorm": "hidden"},
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
)

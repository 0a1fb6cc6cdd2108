"""Phi-3: Llama's block with q, k, v in one Linear and gate, up in another."""

from dataclasses import replace

from sqft_export.families.llama import LLAMA

FAMILIES = (
    replace(
        LLAMA,
        model_types=("phi3",),
        projections={
            "self_attn.qkv_proj": ("queries_keys_values", "hidden"),
            "self_attn.o_proj": ("hidden", "queries"),
            "mlp.gate_up_proj": ("gate_and_up", "hidden"),
            "mlp.down_proj": ("hidden", "intermediate"),
        },
        builder="Phi3MiniModel",
        halves={"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
    ),
)

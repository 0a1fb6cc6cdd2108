"""Qwen2 and Qwen2.5: Llama's block with biases on q, k, v. Qwen3: norms of queries and keys."""

from dataclasses import replace

from sqft_export.families.llama import LLAMA

FAMILIES = (
    replace(
        LLAMA,
        model_types=("qwen2",),
        vectors={
            **LLAMA.vectors,
            "self_attn.q_proj.bias": "queries",
            "self_attn.k_proj.bias": "keys",
            "self_attn.v_proj.bias": "keys",
        },
        builder="QwenModel",
    ),
    replace(
        LLAMA,
        model_types=("qwen3",),
        vectors={
            **LLAMA.vectors,
            "self_attn.q_norm.weight": "head",
            "self_attn.k_norm.weight": "head",
        },
        builder="Qwen3Model",
    ),
)

"""Llama, Mistral, Phi-3, Qwen2.5, Qwen3: the same block with small differences."""

from dataclasses import replace

from sqft_export.model.families import Family

LLAMA = Family(
    model_types=("llama",),
    blocks="model.layers",
    embedding="model.embed_tokens",
    head="lm_head",
    targets=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    groups=(("q_proj", "k_proj", "v_proj"),),
    builder="LlamaModel",
    builder_ropes=("default", "llama3"),
)
FAMILIES = (
    LLAMA,
    replace(LLAMA, model_types=("mistral",), builder="MistralModel", builder_ropes=("default",)),
    replace(LLAMA, model_types=("qwen2",), builder="QwenModel", builder_ropes=("default",)),
    replace(LLAMA, model_types=("qwen3",), builder="Qwen3Model", builder_ropes=("default",)),
    # One Linear for q, k, v and one for gate, up.
    replace(
        LLAMA,
        model_types=("phi3",),
        targets=("qkv_proj",),
        groups=(("qkv_proj",),),
        builder="Phi3MiniModel",
        builder_ropes=("default", "longrope"),
        rope_builders={"longrope": "Phi3MiniLongRoPEModel"},
        joined={"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
    ),
)

"""Hybrids: blocks with attention alternate with recurrent blocks, which have a fixed state.

The weights of the short convolutions have two dimensions per channel and stay in floats. They are a
thousandth of a block, and INT4 would cost ten times as much per weight there as anywhere else
(``benchmarks/layer_kinds.py``).
"""

from dataclasses import replace

from sqft_export.model.families import Experts
from sqft_export.model.families.llama import LLAMA

_GATE = "its output per head scales {} at every token; INT4 would save a thousandth of the bytes"
FAMILIES = (
    # Gated short convolutions. ``in_proj`` makes two gates and the convolved input, and computes as
    # many products as attention's four Linears, so that it is rounded too.
    replace(
        LLAMA,
        model_types=("lfm2",),
        targets=("q_proj", "k_proj", "v_proj", "in_proj", "w3", "w2"),
        tied=True,
        builder="LFM2Model",
        builder_ropes=("default",),
        joined={
            "self_attn.out_proj": ("self_attn.o_proj",),
            "feed_forward.w1": ("mlp.gate_proj",),
            "feed_forward.w3": ("mlp.up_proj",),
            "feed_forward.w2": ("mlp.down_proj",),
        },
        recurrent=("conv",),
    ),
    # The same with routed experts after the first blocks; adapters are only on attention.
    replace(
        LLAMA,
        model_types=("lfm2_moe",),
        targets=("q_proj", "k_proj", "v_proj"),
        tied=True,
        builder=None,
        experts=Experts(
            ("w1", "w3", "w2"),
            routers=("feed_forward.gate",),
            batched=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
            stored_buffers=("expert_bias",),
        ),
        recurrent=("conv",),
    ),
    # Gated delta rules, and attention whose output is gated; ``q_proj`` makes both.
    replace(
        LLAMA,
        model_types=("qwen3_5_text",),
        targets=("q_proj", "k_proj", "v_proj", "in_proj_qkv", "in_proj_z", "up_proj", "down_proj"),
        groups=(("q_proj", "k_proj", "v_proj"), ("in_proj_qkv", "in_proj_z")),
        builder="Qwen35TextModel",
        builder_ropes=("default",),
        genai_type="qwen3_5_text",
        norm_offset=1.0,
        plain_norms=("linear_attn.norm",),
        joined={
            "linear_attn.in_proj_qkv": ("linear_attn.qkv_proj",),
            "linear_attn.in_proj_z": ("linear_attn.z_proj",),
            "linear_attn.in_proj_b": ("linear_attn.b_proj",),
            "linear_attn.in_proj_a": ("linear_attn.a_proj",),
        },
        recurrent=("linear_attention",),
        floats={
            "linear_attn.in_proj_b": _GATE.format("the update of the state"),
            "linear_attn.in_proj_a": _GATE.format("the decay of the state"),
        },
    ),
)

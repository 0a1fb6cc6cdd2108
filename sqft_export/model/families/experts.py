"""Families with routed experts, which are compressed without training.

Adapters are only on attention. ``w1``, ``w3`` and ``w2`` are gate, up and down.
"""

from dataclasses import replace

from sqft_export.model.families import Experts
from sqft_export.model.families.llama import LLAMA

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_NUMBERED = ("w1", "w3", "w2")
_MOE = replace(LLAMA, targets=_ATTENTION, builder=None, experts=Experts())
FAMILIES = (
    replace(_MOE, model_types=("qwen3_moe", "olmoe")),
    replace(
        _MOE,
        model_types=("mixtral",),
        experts=Experts(_NUMBERED, renamed={".block_sparse_moe.": ".mlp."}),
    ),
    replace(
        _MOE,
        model_types=("phimoe",),
        experts=Experts(
            _NUMBERED,
            routers=("mlp.router",),
            renamed={".block_sparse_moe.gate.": ".mlp.router.", ".block_sparse_moe.": ".mlp."},
        ),
    ),
    replace(
        _MOE,
        model_types=("granitemoe",),
        tied=False,
        experts=Experts(
            routers=("block_sparse_moe.router.layer",),
            batched=(
                "block_sparse_moe.input_linear.weight",
                "block_sparse_moe.output_linear.weight",
            ),
        ),
    ),
    # Biases everywhere, clamped gates, a sink per head, windows in every other layer.
    replace(
        _MOE,
        model_types=("gpt_oss",),
        experts=Experts(routers=("mlp.router",), biases=True, alternate=True),
    ),
)

"""Gemma 2, text models of Gemma 3 and 4: Llama's names, plus norms after attention and MLP."""

from dataclasses import replace

from sqft_export.model.families.llama import LLAMA

FAMILIES = (
    replace(
        LLAMA, model_types=("gemma2",), attention="eager", tied=True, builder=None, norm_offset=1.0
    ),
    replace(LLAMA, model_types=("gemma3_text",), tied=True, builder=None, norm_offset=1.0),
    # Every layer adds its own embedding of the token (E2B, E4B). The builder has no such input.
    replace(
        LLAMA,
        model_types=("gemma4_text",),
        tied=True,
        builder=None,
        floats=dict.fromkeys(
            ("per_layer_input_gate", "per_layer_projection"),
            "2 % of the decoder's weights; every later block reads the result",
        ),
        buffers=("layer_scalar",),
        tables={"model.embed_tokens_per_layer": "hidden_size_per_layer_input"},
    ),
)

"""Gemma 2 and the text models of Gemma 3: Llama's names, plus norms after attention and MLP."""

from dataclasses import replace

from sqft_export.model.families.llama import LLAMA

FAMILIES = (
    replace(
        LLAMA, model_types=("gemma2",), attention="eager", tied=True, builder=None, norm_offset=1.0
    ),
    replace(LLAMA, model_types=("gemma3_text",), tied=True, builder=None, norm_offset=1.0),
)

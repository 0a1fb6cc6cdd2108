"""GPT-2: learned positions, LayerNorm, biases; its Linears are stored transposed, as Conv1D."""

from sqft_export.model.families import Family

FAMILIES = (
    Family(
        model_types=("gpt2",),
        blocks="transformer.h",
        embedding="transformer.wte",
        head="lm_head",
        targets=("c_attn", "c_fc", "c_proj"),
        groups=(("c_attn",),),
        tied=True,
        learned_positions=True,
        transposed=("c_attn", "c_fc", "c_proj"),
    ),
)

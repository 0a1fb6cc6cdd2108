"""OPT: learned positions, LayerNorm, ReLU, biases in all Linears."""

from sqft_export.model.families import Family

FAMILIES = (
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        embedding="model.decoder.embed_tokens",
        head="lm_head",
        targets=("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
        groups=(("q_proj", "k_proj", "v_proj"),),
        tied=True,
        query_scaled=True,
        learned_positions=True,
    ),
)

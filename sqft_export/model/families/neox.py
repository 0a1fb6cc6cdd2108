"""GPT-NeoX (Pythia), Bloom and Falcon: one Linear for q, k, v, and the same names in the MLP."""

from dataclasses import replace

from sqft_export.model.families import Family

NEOX = Family(
    model_types=("gpt_neox",),
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    head="embed_out",
    targets=("query_key_value", "dense_h_to_4h", "dense_4h_to_h"),
    groups=(("query_key_value",),),
)
FAMILIES = (
    NEOX,
    replace(
        NEOX,
        model_types=("bloom", "falcon"),
        blocks="transformer.h",
        embedding="transformer.word_embeddings",
        head="lm_head",
        tied=True,
    ),
)

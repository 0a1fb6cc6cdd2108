"""Model types that are not listed families: accepted by structure, or refused with a reason."""

import pytest

from sqft_export.errors import UserError
from sqft_export.model.architecture import family_of, shapes_of
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.families import adapted

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def test_an_unlisted_model_is_taken_by_its_blocks_with_a_notice(caplog):
    config = {"model_type": "olmo2", **SIZES}
    family = family_of(config, "here")
    assert (family.blocks, family.embedding, family.head) == (
        "model.layers",
        "model.embed_tokens",
        "lm_head",
    )
    assert "here: model_type olmo2 is not one of the tested ones" in caplog.text
    assert set(family.targets) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert shapes_of(config, "here")["model.layers.2.mlp.down_proj.weight"] == (64, 96)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "qwen2_moe", "num_experts": 60}, "qwen2_moe is a mixture of experts"),
        ({"model_type": "dbrx_like", "num_experts": 8}, "found 'dbrx_like'"),
        ({"model_type": "gemma3", "vision_config": {"hidden_size": 8}}, "gemma3 is multimodal"),
        ({"model_type": "t5"}, "found 't5', which is not a causal language model"),
        ({"model_type": "minimax"}, "minimax is a mixture of experts"),
        ({"model_type": "gpt2", "n_layer": 2}, "gpt2 has no list of blocks with Linears"),
        ({"model_type": "gpt5"}, "found 'gpt5', which is not a causal language model"),
    ],
)
def test_what_cannot_be_compressed_is_refused_by_name(config, reason):
    with pytest.raises(UserError, match=f"here: model_type: {reason}"):
        family_of(SIZES | config, "here")


def test_adapters_go_where_the_recipe_says_else_where_the_family_does():
    family = family_of({"model_type": "llama"}, "here")
    assert adapted(family, None, None) == (family.targets, (("q_proj", "k_proj", "v_proj"),))
    assert adapted(family, ("q_proj", "up_proj"), None) == (("q_proj", "up_proj"), (("q_proj",),))
    assert adapted(family, ("up_proj",), None) == (("up_proj",), ())
    assert adapted(family, ("q_proj",), ()) == (("q_proj",), ())


def test_headers_of_a_checkpoint_are_gone_through_once(random_llama):
    """What is derived from them is the same object each time; a pass asks for it in loops."""
    checkpoint = Checkpoint(random_llama)
    for name in ("quantized_linears", "shapes", "linears", "parameters", "blocks"):
        assert getattr(checkpoint, name) is getattr(checkpoint, name), name

"""Model types that are not listed families: accepted by structure, or refused with a reason."""

import pytest
import torch

from sqft_export.errors import UserError
from sqft_export.model.architecture import family_of, shapes_of, transformers_config
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.empty import empty_model
from sqft_export.model.families import adapted
from sqft_export.model.structure import family_of_model, list_linears

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def test_an_unlisted_model_is_taken_by_its_blocks_with_a_notice(caplog):
    config = {"model_type": "olmo", **SIZES}
    family = family_of(config, "here")
    assert (family.blocks, family.embedding, family.head) == (
        "model.layers",
        "model.embed_tokens",
        "lm_head",
    )
    assert "here: model_type olmo is not one of the tested ones" in caplog.text
    assert "model.layers has blocks 0-2: self_attn.q_proj, self_attn.k_proj" in caplog.text
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
        ({"model_type": "openai-gpt", "n_layer": 2}, "openai-gpt has no list of blocks with"),
        (
            {"model_type": "xlm", "emb_dim": 64, "n_layers": 2, "n_heads": 4},
            "xlm has several lists of Linears, transformer.attentions and transformer.ffns, in",
        ),
        ({"model_type": "mamba"}, r"mamba: backbone.layers.0.mixer belongs to a recurrent block"),
        ({"model_type": "bert"}, "bert lets tokens see later ones"),
        (
            {"model_type": "bart", "d_model": 64, "decoder_layers": 2},
            "bart does not compute model.decoder.layers.0.encoder_attn.k_proj for text alone",
        ),
        ({"model_type": "gpt5"}, "found 'gpt5', which is not a causal language model"),
    ],
)
def test_what_cannot_be_compressed_is_refused_by_name(config, reason):
    with pytest.raises(UserError, match=f"here: model_type: {reason}"):
        family_of(SIZES | config, "here")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2", "n_layer": 1, "add_cross_attention": True}, "add_cross_attention"),
        (
            {"model_type": "gemma4_text", "enable_moe_block": True, "num_experts": 4},
            "gemma4_text is a mixture of experts",
        ),
        ({"model_type": "gemma4_text", "use_bidirectional_attention": "all"}, "later ones"),
    ],
)
def test_variants_of_a_listed_family_that_it_lacks_are_refused(config, reason):
    with pytest.raises(UserError, match=reason):
        shapes_of(SIZES | {"hidden_size_per_layer_input": 8} | config, "here")


def test_linears_of_every_block_get_an_adapter():
    """The first block of a hybrid may have no attention."""
    model = empty_model(transformers_config({"model_type": "llama", **SIZES}, "here"))
    model.model.layers[0].self_attn = torch.nn.Identity()
    family = family_of_model(model, "hybrid", "here")
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert family.targets == (*mlp, "q_proj", "k_proj", "v_proj", "o_proj")
    first, later = list_linears(model, family.blocks)
    assert first == "block 0: mlp.gate_proj, mlp.up_proj, mlp.down_proj"
    assert later.startswith("blocks 1-2: self_attn.q_proj, self_attn.k_proj")


def _add_convolution(block):
    block.mixer = torch.nn.Module()
    block.mixer.conv = torch.nn.Conv1d(4, 4, 3)


def _add_gate(block):
    block.mixer = torch.nn.Module()
    block.mixer.A_log = torch.nn.Parameter(torch.zeros(4))


def _add_expert_list(block):
    block.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))


def _add_stacked_experts(block):
    block.experts = torch.nn.Module()
    block.experts.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 4, 4))


def _add_table(block):
    block.bias = torch.nn.Embedding(4, 4)


def _add_buffer(block):
    block.register_buffer("scalar", torch.ones(1))


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (_add_buffer, "model.layers.2.scalar is a buffer that checkpoints store"),
        (_add_convolution, "model.layers.2.mixer.conv belongs to a recurrent block"),
        (_add_gate, "model.layers.2.mixer belongs to a recurrent block"),
        (_add_expert_list, "model.layers.2.experts is a mixture of experts"),
        (_add_stacked_experts, "model.layers.2.experts is a mixture of experts"),
        (_add_table, "model.layers.2.bias has a matrix that is no Linear"),
    ],
)
def test_a_later_block_that_cannot_be_compressed_is_refused(add, reason):
    model = empty_model(transformers_config({"model_type": "llama", **SIZES}, "here"))
    add(model.model.layers[2])
    with pytest.raises(UserError, match=f"here: model_type: llama: {reason}"):
        family_of_model(model, "unknown", "here")


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

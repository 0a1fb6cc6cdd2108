"""Model folders as people have them: what transformers loads we load; others are refused."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import TINY, random_model, small_recipe
from sqft_export.artifacts.store import sha256_of
from sqft_export.errors import UserError
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.companions import companions
from sqft_export.model.floats import load_model
from sqft_export.model.storage import read_quantized
from sqft_export.numerics.gptq_layout import from_gptq, to_gptq
from sqft_export.plan.checks import check_recipe
from sqft_export.run.digests import model_digest


@pytest.fixture
def model(random_llama, tmp_path):
    """A private copy to change."""
    return shutil.copytree(random_llama, tmp_path / "model")


def edit(model, change) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def configure(model, **settings) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | settings))


def plan(model):
    return check_recipe(small_recipe("adapt.ranks=[8, 4]", model_path=model), model)


def test_a_dtype_that_is_not_read_is_named(model):
    def narrow(tensors):
        key = "model.layers.0.mlp.up_proj.weight"
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)

    edit(model, narrow)
    with pytest.raises(
        UserError, match=r"up_proj.weight: dtype F8_E4M3 is not supported; supported are"
    ):
        plan(model)


@pytest.mark.parametrize("rows", [+3, -3])
def test_an_embedding_of_other_rows_than_the_config_says_is_named(model, rows):
    def resize(tensors):
        table = tensors["model.embed_tokens.weight"]
        more = torch.zeros(3, table.shape[1])
        tensors["model.embed_tokens.weight"] = torch.cat([table, more]) if rows > 0 else table[:-3]

    edit(model, resize)
    with pytest.raises(UserError, match=r"model.embed_tokens.weight: has \d+ rows of 64, vocab_si"):
        plan(model)


def test_sizes_that_the_tensors_do_not_have_are_named(model):
    configure(model, intermediate_size=128)
    with pytest.raises(UserError, match=r"found shape \[172, 64\], config.json says \[128, 64\]"):
        plan(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": -64}, "hidden_size: found -64; allowed are 1 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000; allowed"),
        ({"vocab_size": "many"}, "vocab_size: found 'many'"),
        ({"num_attention_heads": 0}, "num_attention_heads: found 0"),
        ({"model_type": None}, "model_type: found None"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "nope"}, "can't build its model|rejects it"),
    ],
)
def test_a_config_that_no_model_has_is_named_at_once(model, settings, message):
    configure(model, **settings)
    with pytest.raises(UserError, match=message):
        plan(model)


@pytest.mark.parametrize("content", ["{", "[]", "null", '"x"', "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_what_is_no_json_object_is_named(model, name, content):
    (model / name).write_text(content)
    with pytest.raises(UserError, match=name):
        plan(model)


def test_names_with_a_prefix_are_told(model):
    def prefix(tensors):
        for name in list(tensors):
            tensors[f"_orig_mod.{name}"] = tensors.pop(name)

    edit(model, prefix)
    with pytest.raises(UserError, match=r"no tensor under model.layers.*such as _orig_mod"):
        plan(model)


def test_buffers_and_strangers_are_left_out_with_a_notice(model, caplog):
    def more(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.layers.0.self_attn.bias"] = torch.ones(4, 4, dtype=torch.bool)
        tensors["model.vision_projector.weight"] = torch.ones(4, 4)

    edit(model, more)
    plan(model)
    assert "model.vision_projector.weight" in caplog.text and "inv_freq" not in caplog.text
    names = Checkpoint(model).headers
    assert not [n for n in names if "inv_freq" in n or "vision" in n or n.endswith("attn.bias")]
    load_model(Checkpoint(model))


def test_a_head_that_is_stored_and_differs_is_kept(tmp_path):
    model = random_model(tmp_path / "model", tie_word_embeddings=True)
    head = torch.randn(load_file(model / "model.safetensors")["model.embed_tokens.weight"].shape)
    edit(model, lambda tensors: tensors.update({"lm_head.weight": head}))
    checkpoint = Checkpoint(model)
    assert not checkpoint.tied and checkpoint.config["tie_word_embeddings"] is False
    ids = torch.arange(12).reshape(1, 12)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    assert torch.equal(stock.lm_head.weight, head)  # so does transformers
    with torch.no_grad():
        torch.testing.assert_close(load_model(checkpoint)(ids).logits, stock(ids).logits)
    edit(model, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert Checkpoint(model).tied


def test_an_adapter_left_behind_is_not_copied_and_not_followed(model):
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "adapter_config.json" not in {file.name for file in companions(model)}
    load_model(Checkpoint(model))


def test_what_lies_about_does_not_change_the_key(model):
    before = model_digest(model, sha256_of)
    (model / ".cache" / "huggingface").mkdir(parents=True)
    (model / ".cache" / "huggingface" / "metadata").write_text("1")
    (model / "README.md").write_text("changed")
    assert model_digest(model, sha256_of) == before
    configure(model, rms_norm_eps=1e-5)
    assert model_digest(model, sha256_of) != before


@pytest.mark.parametrize("name", ["special.json", "vocab.txt", "model.safetensors"])
def test_nothing_outside_the_folder_is_read(model, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(UserError, match=r"is a link to .*secret, outside the folder"):
        plan(model)


def test_devices_and_pipes_are_no_files(model):
    (model / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="outside the folder"):
        plan(model)
    (model / "zero.json").unlink()
    os.mkfifo(model / "pipe.json")
    with pytest.raises(UserError, match="is no regular file"):
        plan(model)


def test_an_index_that_leads_out_is_refused(model):
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    (model.parent / "x.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"names '../x.safetensors'"):
        plan(model)


def header(entries, length=None) -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text) if length is None else length) + text


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a complete safetensors file"),
        (header({}, 2**60), "not a complete safetensors file"),
        (header(b"{nope"), "its header is not JSON"),
        (header(b"[]"), "its header is a list"),
        (header({}), "contain no tensor"),
        (header({"a": ONE}), "the header lists 8 bytes, the file has 0"),
        (header({"a": ONE | {"dtype": "F31"}}) + bytes(8), "a: dtype 'F31' is not supported"),
        (header({"a": ONE | {"shape": [-1]}}) + bytes(8), "a: shape: found"),
        (header({"a": ONE | {"shape": [3]}}) + bytes(8), "are not the 12 bytes of its shape"),
        (header({"a": ONE | {"shape": None}}) + bytes(8), "a: shape: found None"),
        (header({"a": 5}) + bytes(8), "a: shape"),
        (header({"a": ONE, "b": ONE}) + bytes(8), "b: overlaps the tensor before it"),
    ],
)
def test_a_damaged_safetensors_file_is_named(model, content, message):
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        plan(model)


def test_text_that_does_not_survive_its_tokenizer_is_refused(model):
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    for key in ("auto_map", "backend"):
        config.pop(key, None)
    config["tokenizer_class"] = "LlamaTokenizerFast"
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"its tokenizer changes text: .* is a Llama"):
        plan(model)


def test_a_sentencepiece_model_alone_is_refused_with_the_way_out(model):
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"only tokenizer.model, which needs sentencepiece"):
        plan(model)


def test_version_two_of_the_gptq_layout_stores_zero_points_themselves(tiny_run):
    merged = Checkpoint(tiny_run["merge"].path / "model")
    weight = read_quantized(merged, merged.quantized_linears[0])
    codes, grid = weight
    first = to_gptq(weight)
    second = first | {"qzeros": torch.full_like(first["qzeros"], 0x88888888 - 2**32)}
    for stored, minus in ((first, 1), (second, 0)):
        again, found = from_gptq(stored, 4, grid.group_size, minus)
        assert torch.equal(again, codes) and torch.equal(found.zero_point, grid.zero_point)


def as_second_version(source, folder):
    shutil.copytree(source, folder)

    def change(tensors):
        for name in tensors:
            if name.endswith(".qzeros"):
                tensors[name] = torch.full_like(tensors[name], 0x88888888 - 2**32)

    edit(folder, change)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


GIVEN = ("sparsify={method: existing}", "quantize.method=existing")


def test_a_version_that_the_config_does_not_say_is_found_by_its_zero_points(tiny_run, tmp_path):
    folder = as_second_version(tiny_run["merge"].path / "model", tmp_path / "model")
    check_recipe(small_recipe(*GIVEN, model_path=folder), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"has a zero point of 9 instead of 8"):
        check_recipe(small_recipe(*GIVEN, model_path=folder), folder)


def test_pack_quantized_is_taken_with_its_codes(tiny_run, tmp_path):
    """compressed-tensors' W4A16: codes with eight added, the lowest nibble the first input."""
    source = Checkpoint(tiny_run["merge"].path / "model")
    folder = shutil.copytree(source.folder, tmp_path / "model")
    parts = {name: read_quantized(source, name) for name in source.quantized_linears}

    def change(tensors):
        for name, (codes, grid) in parts.items():
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                del tensors[f"{name}.{part}"]
            words = codes.reshape(len(codes), -1, 8).to(torch.int64) << torch.arange(0, 32, 4)
            packed = words.sum(dim=2)
            packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
            tensors[f"{name}.weight_packed"] = packed
            tensors[f"{name}.weight_scale"] = grid.scale
            tensors[f"{name}.weight_shape"] = torch.tensor(codes.shape)

    edit(folder, change)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": weights | {"group_size": 64}}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    configure(folder, quantization_config=quantization | {"config_groups": {"group_0": group}})
    check_recipe(small_recipe(*GIVEN, model_path=folder), folder)
    read = Checkpoint(folder)
    for name, (codes, grid) in parts.items():
        ours, found = read_quantized(read, name)
        assert torch.equal(ours, codes) and torch.equal(found.scale, grid.scale)
    group["weights"]["symmetric"] = False
    configure(folder, quantization_config=quantization | {"config_groups": {"group_0": group}})
    with pytest.raises(UserError, match="only symmetric integer weights"):
        check_recipe(small_recipe(*GIVEN, model_path=folder), folder)


def test_rotary_scalings_that_the_builder_leaves_out_take_the_standard_graph(model):
    configure(model, rope_scaling={"rope_type": "yarn", "factor": 2.0})
    plan(model)
    recipe = small_recipe("export.onnx_graph=fused", "adapt.ranks=[8, 4]", model_path=model)
    with pytest.raises(UserError, match="does not compute rope_type yarn as the model does"):
        check_recipe(recipe, model)


def test_a_token_beyond_the_embedding_is_named(model):
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    configure(model, eos_token_id=rows + 3)
    (model / "generation_config.json").unlink()
    with pytest.raises(UserError, match=rf"has id {rows + 3}; the embedding has {rows} rows"):
        plan(model)


def test_a_misspelt_elastic_group_is_named(model):
    recipe = small_recipe(
        "adapt.target_modules=null", "adapt.elastic_groups=[[q_prj]]", model_path=model
    )
    with pytest.raises(UserError, match=r"adapt.elastic_groups: found q_prj, which get no adapter"):
        check_recipe(recipe, model)

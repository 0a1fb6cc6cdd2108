"""GGUF: every family in the real llama.cpp, bit for bit and by its logits."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openvino as ov
import openvino_genai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

import sqft_export
from conftest import exact_pipeline, random_model, small_recipe
from sqft_export.errors import UserError
from sqft_export.machine.device import CPU
from sqft_export.measure.decode import generate
from sqft_export.measure.likelihood import log_likelihoods
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.families import FAMILIES
from sqft_export.numerics.affine import dequantize, fit_grid, quantize
from sqft_export.numerics.codes import QuantizedWeight
from sqft_export.plan.checks import check_recipe
from sqft_export.recipe.schema import GGUF_SCALE_BITS, Export
from sqft_export.run.pipeline import run_recipe
from sqft_export.run.preview import preview
from sqft_export.stages.verify import _skipped_checks
from sqft_export.targets import target
from sqft_export.targets.gguf.architectures import ARCHITECTURES, Names, uses_gelu_table
from sqft_export.targets.gguf.bindings import CyllamaModel, LlamaCppModel, _c_functions
from sqft_export.targets.gguf.blocks import block_type, from_blocks, to_blocks
from sqft_export.targets.gguf.session import GgufSession
from sqft_export.targets.gguf.tokenizer import NotExpressible, read_vocabulary
from sqft_export.targets.tokenizers import read_ids
from sqft_export.verify.certificate import Certificate
from sqft_export.verify.compute import check_compute
from sqft_export.verify.fidelity import load_reference
from sqft_export.verify.heads import reference_of
from sqft_export.verify.storage import check_storage
from sqft_export.verify.subject import Asked, Subject

# In whole blocks of 32; gemma's constants as llama.cpp has them.
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
WINDOWED_AND_FULL = ["sliding_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True},
    "mistral": {"head_dim": 32, "dtype": "bfloat16", "sliding_window": None},
    "phi3": {"original_max_position_embeddings": 256},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"num_hidden_layers": 6},
    "gemma4_text": {
        **{"head_dim": 16, "global_head_dim": 32, "sliding_window": 16, "num_hidden_layers": 5},
        **{"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 416},
        **{"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
        "layer_types": ["sliding_attention"] * 2 + ["full_attention", *WINDOWED_AND_FULL],
        "final_logit_softcapping": 30.0,
    },
    "bloom": {},
    "gpt_neox": {"rotary_pct": 0.25},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    "cohere2": {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 16},
}
# Each takes some seconds: `make test-slow`.
LONG_TAIL: dict[str, dict[str, Any]] = {
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 4},
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 16},
    "glm4": {"head_dim": 16},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "hunyuan_v1_dense": {
        "head_dim": 16,
        "rope_parameters": {
            **{"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0},
            "alpha": 1000.0,
        },
    },
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "phi": {"partial_rotary_factor": 0.5},
    "falcon": {"multi_query": True, "ffn_hidden_size": 256},
    "starcoder2": {"sliding_window": None},
    "ministral3": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            **{"original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0},
            **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
    },
    "granitemoehybrid": {
        **{"embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
        **{"logits_scaling": 4.0, "num_local_experts": 0, "shared_intermediate_size": 192},
        **{"layer_types": ["attention"] * 2, "position_embedding_type": "rope"},
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
}
GGUF = (
    "adapt=none",
    "sparsify.method=magnitude",
    "quantize={method: rtn, bits: 4, group_size: 32}",
    "export={targets: [gguf]}",
    "benchmark.baselines=[]",
    "verify.prompts=4",
)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [1.5] * 8}
# Other rotary scalings, by their names in transformers.
ROPES = {
    "llama3": ("llama", {"rope_theta": 500.0, **LLAMA3}),
    "linear": ("llama", {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}),
}


# Other forms of a family, by a name for each.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-40b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 256},
    ),
    "falcon2": (
        "falcon",
        {
            **{"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 256},
            "num_ln_in_parallel_attn": 1,
        },
    ),
    "exaone4-windows": (
        "exaone4",
        {
            **{"num_hidden_layers": 64, "sliding_window": 16, "sliding_window_pattern": 4},
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
        },
    ),
    "granite4-without-rotation": ("granitemoehybrid", {"position_embedding_type": None}),
    "gemma4-keys-are-values": (
        "gemma4_text",
        {
            **{"num_hidden_layers": 2, "layer_types": WINDOWED_AND_FULL},
            **{"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
            **{"attention_k_eq_v": True, "num_global_key_value_heads": 1},
            "final_logit_softcapping": None,  # llama.cpp's default is 30
        },
    ),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in (*LONG_TAIL, *FORMS)]


@pytest.fixture(scope="module", params=[*MODELS, *ROPES, *SLOW])
def family_run(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    model_type, rope = ROPES.get(request.param, (request.param, None))
    model_type, form = FORMS.get(model_type, (model_type, {}))
    config = (MODELS | LONG_TAIL)[model_type] | form
    config |= {"rope_parameters": rope} if rope else {}
    model = random_model(root / "model", model_type=model_type, intermediate_size=192, **config)
    return run_recipe(small_recipe(*GGUF, model_path=model), root / "runs", ("verify",))


def test_every_architecture_has_its_case():
    without = {"opt"}
    # Cases of their own: test_experts.py and tests/model/test_hybrids.py.
    others = {name for name, family in FAMILIES.items() if family.experts or family.recurrent}
    dense = set(MODELS | LONG_TAIL)
    assert dense == set(ARCHITECTURES) - others == set(FAMILIES) - others - without


def test_a_family_is_the_same_in_llama_cpp(family_run):
    checks = {check["name"]: check for check in family_run["verify"].metrics["checks"]}
    assert all(check["passed"] for check in checks.values())
    for name in (
        "codes, scales, zero points: merged and gguf",
        "pruned positions zero in gguf",
        "float weights: merged and gguf",
        "token ids: base and llama.cpp",
        "logits: merged in torch and gguf",
        "greedy tokens: merged in torch and gguf",
        "divergence of gguf in its default mode",
    ):
        assert checks[name]["compared"]
    model_type = Checkpoint(family_run["merge"].path / "model").config["model_type"]
    assert ("divergence of gguf by its GELU table" in checks) == uses_gelu_table(model_type)


SHAPES = st.sampled_from([(1, 32, 32), (3, 64, 32), (5, 192, 64), (2, 256, 256), (7, 128, 128)])


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, bits=st.sampled_from([4, 8]), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_blocks_are_the_grid_bit_for_bit(shape, bits, symmetric, seed):
    """By ggml's own formula, as its ``gguf`` package has it."""
    rows, inputs, group = shape
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)) * 0.1
    grid = fit_grid(weight, bits, group, symmetric, 11 if symmetric else GGUF_SCALE_BITS)
    kind = block_type(bits, symmetric)
    if kind is None:
        assert (bits, symmetric) == (8, False)
        return
    codes = quantize(weight, grid)
    quantized = QuantizedWeight(codes, grid).numpy()
    stored = to_blocks(quantized, kind)
    values = gguf.dequantize(stored, gguf.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(values, dequantize(codes, grid).numpy())
    back, ours = from_blocks(stored, kind), quantized.in_groups(inputs // 32)
    np.testing.assert_array_equal(back.codes, ours.codes)
    np.testing.assert_array_equal(back.scale, ours.scale)
    np.testing.assert_array_equal(back.zero_point, ours.zero_point)
    assert (back.bits, back.grid.group_size) == (bits, 32)


def test_asymmetric_scales_have_room_for_their_zero_points():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) + 0.3
    for bits, exact in ((11, False), (GGUF_SCALE_BITS, True)):
        grid = fit_grid(weight, 4, 64, False, bits)
        product = grid.scale.float() * torch.arange(16.0)[:, None, None]
        assert bool((product.half().float() == product).all()) is exact


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_rows_go_and_come_back(name):
    names = Names("llama", {"num_attention_heads": 4, "num_key_value_heads": 2})
    module, rows = f"model.layers.0.self_attn.{name}", np.arange(64)
    order = names.order(module, 64)
    assert (order is None) == (name == "v_proj")
    if order is not None:
        np.testing.assert_array_equal(names.restore_rows(module, rows[order]), rows)
        # llama.cpp turns rows 0 and 1 together, transformers rows 0 and half a head further.
        half = 64 // names.heads[names.architecture.pairs[name]] // 2
        assert order[1] - order[0] == half


LLAMA = {"intermediate_size": 192}
REFUSED = [
    ("opt", {"ffn_dim": 192}, (), "llama.cpp has no architecture for opt"),
    ("olmo", LLAMA, (), "can't write olmo as GGUF yet"),
    ("smollm3", LLAMA | {"no_rope_layer_interval": 2}, (), "no_rope_layer_interval 4, not 2"),
    ("exaone4", LLAMA | {"sliding_window": 16}, (), "windows with 64 blocks only, not 2"),
    ("olmo3", LLAMA | {"layer_types": ["full_attention"] * 2}, (), "every 4th block of olmo3"),
    ("falcon", {"alibi": True}, (), "alibi False, not True"),
    ("llama", {}, (), r"mlp.down_proj has 172 inputs, which blocks of 32 do not divide"),
    (
        "llama",
        LLAMA,
        ("quantize.group_size=16",),
        "has groups of 16.*set quantize.group_size to 32",
    ),
    ("llama", LLAMA, ("quantize.bits=8", "quantize.symmetric=false"), "no asymmetric INT8"),
    ("llama", LLAMA, ("quantize.symmetric=false", "quantize.embedding_bits=8"), "asymmetric INT8"),
    ("llama", LLAMA, ("quantize={method: nncf, symmetric: false}",), "scales of nncf"),
    ("llama", LLAMA, ("quantize={method: nncf, nncf: {int4_ratio: 0.5}}",), "int4_ratio"),
    ("gemma2", GEMMA | {"query_pre_attn_scalar": 24}, (), "query_pre_attn_scalar to be head_dim"),
    ("gemma3_text", GEMMA | {"layer_types": ["full_attention"] * 2}, (), "every 6th block"),
    ("gemma3_text", GEMMA | {"final_logit_softcapping": 30.0}, (), "gemma3 does not cap logits"),
    ("gpt_neox", LLAMA | {"attention_bias": False}, (), "requires attention biases"),
    ("gpt2", {"n_embd": 64, "scale_attn_by_inverse_layer_idx": True}, (), "layer_idx False"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, (), "post_layernorm False"),
    ("phi3", LLAMA | {"rope_parameters": LONG}, (), "rope_type longrope"),
    ("llama", LLAMA | {"hidden_act": "gelu"}, (), "computes silu for llama, not gelu"),
    (
        "qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 8},
        (),
        "use_sliding_window False, not True",
    ),
    (
        "llama",
        LLAMA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        (),
        "rope_type dynamic",
    ),
]


@pytest.mark.parametrize(("model_type", "config", "settings", "said"), REFUSED)
def test_what_llama_cpp_lacks_is_refused_in_plan(tmp_path, model_type, config, settings, said):
    model = random_model(tmp_path / "model", model_type=model_type, **config)
    recipe = small_recipe("export.targets=[gguf]", *settings, model_path=model)
    with pytest.raises(UserError, match=rf"export.targets: found gguf, but .*{said}"):
        check_recipe(recipe, model)


def edited(folder: Path, change) -> Path:
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer is Whitespace"),
        ("normalizer", {"type": "Lowercase"}, "normalizer is Lowercase"),
    ],
)
def test_tokenizers_that_llama_cpp_has_no_words_for_are_refused(tmp_path, field, value, said):
    model = random_model(tmp_path / "model", **LLAMA)
    edited(model, lambda document: document.update({field: value}))
    with pytest.raises(NotExpressible, match=said):
        read_vocabulary(model, 416)


def test_another_way_to_cut_a_text_is_refused(tmp_path):
    model = random_model(tmp_path / "model", **LLAMA)

    def shorten(document):
        document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+|\s+"

    edited(model, shorten)
    recipe = small_recipe("export.targets=[gguf]", model_path=model)
    with pytest.raises(UserError, match=r"texts are cut by .* llama.cpp has no name for"):
        check_recipe(recipe, model)


def sentencepiece(folder: Path, prepend: bool) -> Any:
    """A tokenizer of SentencePiece's kind, as transformers makes of such a model."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["\u2581", *"abcdefghiklmnoprstuvwy"]
    words = [
        "\u2581t",
        "\u2581th",
        "\u2581the",
        "an",
        "\u2581an",
        "in",
        "ing",
        "\u2581s",
        "\u2581si",
    ]
    words += ["\u2581sin", "\u2581sing", "th", "the", "he"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *letters, *words])}
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    made = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps = [normalizers.Replace(" ", "\u2581")]
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), *steps][not prepend :])
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    whole.save_pretrained(folder)
    return whole


@pytest.mark.parametrize("prepend", [True, False])
def test_pieces_are_merged_in_llama_cpp_as_in_transformers(tmp_path, prepend):
    model = random_model(tmp_path / "model", vocab_size=320, **LLAMA)
    for file in model.glob("tokenizer*"):
        file.unlink()
    tokenizer = sentencepiece(model, prepend)
    (tmp_path / "out").mkdir()
    target("gguf").export(model, tmp_path / "out", Export())
    [(_, ids_of)] = read_ids("gguf", tmp_path / "out")
    for text in ("the thing", "sing  in the rain", "ans\u00fcng\n\tthe", "", "Q: an anthem?"):
        assert ids_of(text) == tokenizer(text)["input_ids"], text


@pytest.fixture(scope="module")
def exported(tiny_run) -> Path:
    return tiny_run["export-gguf"].path / "model"


@pytest.fixture
def reference(tiny_run):
    return target("torch").open_session(tiny_run["merge"].path / "model", True, None)


PROMPTS = [list(range(5, 5 + count)) for count in (3, 11, 7, 20)]


def test_rows_of_unequal_length_say_what_each_says_alone(exported, reference, monkeypatch):
    """Also where the cache has to grow in between."""
    monkeypatch.setattr("sqft_export.targets.gguf.session._FIRST_CELLS", 16)
    session = target("gguf").open_session(exported, True, 2)
    together = generate(session, PROMPTS, 12, stop=[])
    assert session.cells > 64
    assert together == generate(reference, PROMPTS, 12, stop=[])
    # Rows leave the batch as they end.
    stop = [together[0][2], together[2][5]]
    assert generate(session, PROMPTS, 12, stop) == generate(reference, PROMPTS, 12, stop)


def test_choices_share_the_pass_over_their_prompt(exported, reference):
    session = target("gguf").open_session(exported, True, 2)
    prompts = [PROMPTS[1]] * 3 + [PROMPTS[0]] * 2
    targets = [[20, 21, 22], [20, 30], [40, 41, 42, 43], [50, 51], [60, 61, 62]]
    together, torch_scores = (log_likelihoods(s, prompts, targets) for s in (session, reference))
    alone = [log_likelihoods(session, [p], [t])[0] for p, t in zip(prompts, targets, strict=True)]
    np.testing.assert_allclose([s for s, _ in together], [s for s, _ in alone], atol=1e-3)
    # The file has its head in Q8_0.
    np.testing.assert_allclose([s for s, _ in together], [s for s, _ in torch_scores], rtol=3e-3)


def test_llama_cpp_chooses_the_likeliest_itself(exported):
    session = target("gguf").open_session(exported, False, 2)
    ids = np.array([PROMPTS[3], PROMPTS[3][::-1]])
    expected = session.forward(ids, None, 1)[:, -1].argmax(axis=-1)
    session.reset()
    np.testing.assert_array_equal(session.argmax_tokens(ids), expected)


def test_logits_of_a_token_are_an_array_as_long_as_the_vocabulary(exported):
    session = target("gguf").open_session(exported, False, 1)
    logits = session.forward(np.array([PROMPTS[3]]), None, 1)[0, 0]
    found = session.cache.logits(len(PROMPTS[3]) - 1)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    assert np.array_equal(found, logits) and len(found) == session.vocabulary


def test_a_packed_file_is_loaded_as_it_was(tiny_run, exported):
    packed = tiny_run["export-gguf"].path / "packed"
    assert (packed / "model.gguf.sqft").stat().st_size < (exported / "model.gguf").stat().st_size
    ids = np.array([PROMPTS[3]])
    dense, inflated = (target("gguf").open_session(f, False, 2) for f in (exported, packed))
    np.testing.assert_array_equal(dense.forward(ids), inflated.forward(ids))
    assert sqft_export.load_gguf(packed).n_layer == 4


def test_openvino_genai_reads_the_file(exported, reference):
    pipe = exact_pipeline(exported / "model.gguf")
    ids = np.array([PROMPTS[3]])
    inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    config = openvino_genai.GenerationConfig(
        max_new_tokens=8, do_sample=False, ignore_eos=True, apply_chat_template=False
    )
    assert (
        list(pipe.generate(inputs, config).tokens[0])
        == generate(reference, [PROMPTS[3]], 8, stop=[])[0]
    )


def test_the_file_says_what_it_is(tiny_run, exported):
    says = target("gguf").metadata(exported)
    theirs = target("openvino").metadata(tiny_run["export-openvino"].path / "model")
    assert says == theirs and float(says["sparsity"]) > 0.5


@pytest.mark.parametrize("pipeline", ["sqft", "shears"])
def test_an_adapter_that_stays_apart_is_a_lora_file(tmp_path, pipeline):
    settings = (f"adapt.pipeline={pipeline}", "export.targets=[gguf]", "export.sparse_files=false")
    none = ("quantize={method: none}",) if pipeline == "shears" else ()
    model = random_model(tmp_path / "model", vocab_size=416, **LLAMA)
    run = run_recipe(
        small_recipe(
            *("adapt.steps=2", "adapt.ranks=[8, 4]", "verify.prompts=4"),
            *(*settings, *none, "quantize.group_size=32" if not none else "seed=1"),
            model_path=model,
        ),
        tmp_path / "runs",
        ("verify",),
    )
    checks = {check["name"]: check for check in run["verify"].metrics["checks"]}
    # The adapter's rows are in llama.cpp's order: its products are in these logits.
    assert checks["logits: merged in torch and gguf"]["passed"]
    assert "divergence of gguf in its default mode" not in checks
    assert any("llama-cli --lora" in warning for warning in run["verify"].metrics["warnings"])
    folder = run["export-gguf"].path / "model"
    adapter = folder / "adapter" / "adapter.gguf"
    base = sqft_export.load_gguf(folder)
    assert base.lora_adapter_init(str(adapter)) is not None, "llama.cpp finds every tensor"
    with pytest.raises(UserError, match="cyllama can't apply an adapter"):
        target("gguf").open_session(folder, False, None)


@pytest.mark.parametrize("quantize", ["{method: rtn, bits: 4, group_size: 64, symmetric: false}",
                                      "{method: rtn, bits: 8, group_size: null, embedding_bits: 8}",
                                      "{method: gptq, bits: 3, group_size: 32}",
                                      "{method: none}"])  # fmt: skip
def test_every_grid_reaches_llama_cpp_bit_for_bit(tmp_path, quantize):
    model = random_model(tmp_path / "model", vocab_size=416, **LLAMA)
    settings = [s for s in GGUF if not s.startswith("quantize")]
    recipe = small_recipe(*settings, f"quantize={quantize}", model_path=model)
    checks = run_recipe(recipe, tmp_path / "runs", ("verify",))["verify"].metrics["checks"]
    assert all(check["passed"] for check in checks)


def test_plan_says_what_is_stored_otherwise_and_what_is_not_compared(tmp_path, monkeypatch):
    model = random_model(tmp_path / "model", **LLAMA)
    recipe = small_recipe(
        "export.targets=[gguf]", "quantize.symmetric=false", "quantize.group_size=32",
        model_path=model,
    )  # fmt: skip
    monkeypatch.setattr(
        "sqft_export.targets.devices.installed", lambda name: name not in ("cyllama", "llama_cpp")
    )
    said = preview(recipe, tmp_path / "runs").gguf
    assert "scales have 7 significant bits" in said and "llama.cpp is not installed" in said


def test_without_llama_cpp_the_file_is_written_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sqft_export.targets.devices.installed", lambda name: name not in ("cyllama", "llama_cpp")
    )
    monkeypatch.setattr("sqft_export.targets.tokenizers.installed", lambda name: False)
    model = random_model(tmp_path / "model", vocab_size=416, **LLAMA)
    recipe = small_recipe(*GGUF, "benchmark.baselines=[dense]", model_path=model)
    run = run_recipe(recipe, tmp_path / "runs", ("verify",))
    names = {check["name"] for check in run["verify"].metrics["checks"]}
    assert "codes, scales, zero points: merged and gguf" in names
    assert not any("logits" in name and "gguf" in name for name in names)
    assert "llama.cpp is not installed" in run["verify"].metrics["warnings"][0]


def test_both_bindings_say_the_same(tmp_path):
    """llama-cpp-python's functions, where it was compiled, or those of xllamacpp's wheel."""
    functions = _c_functions()
    if functions is None:
        pytest.skip("only cyllama is installed")
    model = random_model(tmp_path / "model", **LLAMA)
    (tmp_path / "out").mkdir()
    target("gguf").export(model, tmp_path / "out", Export())
    file = tmp_path / "out" / "model.gguf"
    ours, theirs = CyllamaModel(file), LlamaCppModel(file, functions)
    assert ours.tokenize("It's 12") == theirs.tokenize("It's 12")
    sessions = [GgufSession(opened, True, 1) for opened in (ours, theirs)]
    logits = [session.forward(np.array([PROMPTS[3]])) for session in sessions]
    assert np.abs(logits[0] - logits[1]).max() < 1e-4 * logits[0].std()
    said = [generate(session, PROMPTS, 12, stop=[]) for session in sessions]
    assert said[0] == said[1]
    forked = [log_likelihoods(s, [PROMPTS[1]] * 2, [[20, 21], [30, 31]]) for s in sessions]
    np.testing.assert_allclose(*forked, atol=1e-3)
    for session in sessions:
        session.reset()
    one, other = (session.argmax_tokens(np.array(PROMPTS[:1])) for session in sessions)
    assert one == other


@pytest.fixture
def subject(tiny_run, tmp_path) -> Subject:
    """A copy of the GGUF deployment, to break."""
    copy = shutil.copytree(tiny_run["export-gguf"].path / "model", tmp_path / "gguf" / "model")
    (tmp_path / "scratch").mkdir()
    return Subject(
        Asked.read(tiny_run["verify"].path),
        {},
        tiny_run["sparsify"].path,
        tiny_run["search"].path,
        tiny_run["merge"].path,
        {"gguf": copy.parent},
        scratch=tmp_path / "scratch",
    )


def failed(subject: Subject) -> set[str]:
    certificate = Certificate()
    check_storage(certificate, subject, "gguf")
    reference = reference_of(certificate, subject, "gguf", load_reference(subject, CPU))
    check_compute(certificate, subject, "gguf", reference)
    return {check.name for check in certificate.checks if not check.passed}


CODES = "codes, scales, zero points: merged and gguf"
ZEROS = "pruned positions zero in gguf"
FLOATS = "float weights: merged and gguf"
IDS = "token ids: base and llama.cpp"
LOGITS = "logits: merged in torch and gguf"


def change_byte(place: int):
    def change(reader: Any, name: str) -> None:
        tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
        tensor.data.reshape(-1).view(np.uint8)[place] ^= 17

    return change


def swap_rows(reader: Any, name: str) -> None:
    tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
    tensor.data[[0, 1]] = tensor.data[[1, 0]]


def swap_entries(reader: Any, name: str) -> None:
    """Two of a list's that are of one length."""
    field = reader.fields[name]
    one = field.parts[field.data[70]]
    other = next(field.parts[i] for i in field.data[71:] if len(field.parts[i]) == len(one))
    one[:], other[:] = other.copy(), one.copy()


def change_number(reader: Any, name: str) -> None:
    reader.fields[name].parts[-1][0] = 500.0


def test_nothing_is_named_where_nothing_is_broken(subject):
    assert failed(subject) == set()


@pytest.mark.parametrize(
    ("change", "name", "lines"),
    [
        (change_byte(5), "blk.1.ffn_up.weight", {CODES}),
        (change_byte(0), "blk.1.ffn_down.weight", {CODES}),
        (change_byte(2), "blk.0.attn_norm.weight", {FLOATS}),
        (change_byte(9), "token_embd.weight", {FLOATS}),
        (change_byte(9), "output.weight", {FLOATS}),
        (swap_rows, "blk.2.attn_q.weight", {CODES, ZEROS, LOGITS}),
        (swap_entries, "tokenizer.ggml.tokens", {IDS}),
        (change_number, "llama.rope.freq_base", {LOGITS}),
    ],
)
def test_what_is_broken_in_the_file_is_named(subject, change, name, lines):
    file = subject.exports["gguf"] / "model" / "model.gguf"
    reader = gguf.GGUFReader(file, "r+")
    change(reader, name)
    reader.data.flush()
    del reader
    assert lines <= failed(subject)


def test_a_model_too_large_for_float32_is_compared_as_deployed(subject, monkeypatch):
    monkeypatch.setattr("sqft_export.machine.host.FLOAT32_MEMORY_SHARE", 0.0)
    certificate = Certificate()
    reference = reference_of(certificate, subject, "gguf", load_reference(subject, CPU))
    check_compute(certificate, subject, "gguf", reference)
    names = {check.name for check in certificate.checks}
    assert LOGITS not in names and "divergence of gguf in its default mode" in names
    certificate.require()
    [said] = _skipped_checks(subject, "gguf")
    assert "as float32 do not fit this machine's free memory" in said


def test_a_default_mode_that_is_too_far_away_is_named(subject, monkeypatch):
    monkeypatch.setattr("sqft_export.verify.compute.GGUF_DIVERGENCE", 1e-9)
    assert failed(subject) == {"divergence of gguf in its default mode"}

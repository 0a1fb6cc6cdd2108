"""Every family, with its peculiarities: all passes, both runtimes, both ONNX graphs."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from test_experts import EXPERTS
from transformers import AutoTokenizer

from conftest import exact_onnx, exact_pipeline, random_model, said_by_onnx_genai, small_recipe
from sqft_export.measure.decode import generate
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.families import FAMILIES
from sqft_export.plan.exporters import WITHOUT_PAGED_WINDOWS
from sqft_export.recipe.schema import Export
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import openvino as openvino_target
from sqft_export.targets import target
from sqft_export.targets.gguf.architectures import ARCHITECTURES

NEW_TOKENS = 12
README = Path(__file__).parents[2] / "README.md"
PAGE = README.parent / "docs" / "reference" / "families.md"
MULTIPLIERS = {
    **{"embedding_multiplier": 6.0, "attention_multiplier": 0.2},
    **{"residual_multiplier": 0.5, "logits_scaling": 4.0},
}
# model_type, settings that bring out what is peculiar, what that is
MODELS = [
    (
        "llama",
        {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True},
        "tied embeddings, biases",
    ),
    ("llama", {"num_key_value_heads": 4, "dtype": "bfloat16"}, "bfloat16"),
    ("mistral", {"sliding_window": 16, "head_dim": 16}, "grouped queries, sliding window"),
    ("phi3", {"original_max_position_embeddings": 256}, "joined qkv and gate_up"),
    ("qwen2", {"tie_word_embeddings": True}, "biases on q, k, v"),
    ("qwen3", {"head_dim": 32}, "norms of queries and keys"),
    (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16},
        "alternating windows, capped logits, four norms",
    ),
    (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "alternating windows, two rotary bases, norms of queries and keys, a token without a row",
    ),
    ("opt", {"ffn_dim": 172, "init_std": 0.2}, "learned positions, biases, ReLU"),
]
# Each takes a minute or two: `make test-slow`. tests/targets/test_gguf.py runs the first four.
LONG_TAIL = [
    ("bloom", {}, "ALiBi, norm after the embedding, joined qkv"),
    ("gpt_neox", {"rotary_pct": 0.25}, "attention next to the MLP, partly rotary, joined qkv"),
    ("granite", MULTIPLIERS, "four multipliers"),
    (
        "cohere2",
        {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 16, "logit_scale": 0.5},
        "attention next to the MLP, windows in 3 of 4 layers, the 4th without rotation",
    ),
    (
        "smollm3",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 4, "tie_word_embeddings": True},
        "every 4th layer without rotation",
    ),
    (
        "granitemoehybrid",
        {
            **MULTIPLIERS,
            "num_local_experts": 0,
            "layer_types": ["attention", "attention"],
            "shared_intermediate_size": 172,
            "position_embedding_type": "rope",
        },
        "no experts, no recurrent layers",
    ),
    ("olmo2", {}, "norms after attention and MLP, norms of all queries and keys"),
    ("olmo3", {"num_hidden_layers": 4, "sliding_window": 16}, "the same, windows in 3 of 4 layers"),
    ("glm4", {"head_dim": 16}, "four norms, partly rotary, joined gate_up"),
    ("stablelm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}, "partly rotary, biases"),
    (
        "hunyuan_v1_dense",
        {
            "head_dim": 16,
            "rope_parameters": {
                **{"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0},
                "alpha": 1000.0,
            },
        },
        "NTK alpha, norms of queries and keys after the rotation",
    ),
    (
        "exaone4",
        {"num_hidden_layers": 4, "sliding_window": 16, "sliding_window_pattern": 4},
        "windows in 3 of 4 layers, the 4th without rotation, norms after attention and MLP",
    ),
    ("phi", {"partial_rotary_factor": 0.5}, "attention next to the MLP, partly rotary, biases"),
    ("falcon", {"multi_query": True, "ffn_hidden_size": 256}, "one head of keys and values"),
    (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 256},
        "two norms, grouped qkv",
    ),
    (
        "gemma4_text",
        {
            **{"head_dim": 16, "global_head_dim": 32, "sliding_window": 16},
            **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 416},
            **{"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "num_hidden_layers": 4},
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "final_logit_softcapping": 30.0,
        },
        "an embedding per layer, keys and values of earlier layers, two head sizes, wide MLPs",
    ),
    (
        "gemma4_text",
        {
            **{"head_dim": 16, "global_head_dim": 32, "sliding_window": 16},
            **{"hidden_size_per_layer_input": 0, "num_key_value_heads": 2},
            **{"attention_k_eq_v": True, "num_global_key_value_heads": 1},
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "keys that are values too, in half as many heads",
    ),
    ("starcoder2", {"sliding_window": None}, "biases, no gate"),
    (
        "ministral3",
        {
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
                **{"original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0},
                **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
            },
        },
        "YaRN, queries that grow with the position",
    ),
    (
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "Conv1D, joined qkv, learned positions, biases",
    ),
    (
        "lfm2",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
        "gated short convolutions in 2 of 3 layers, norms of queries and keys",
    ),
    (
        "qwen3_5_text",
        {
            **{"num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2},
            **{"linear_num_value_heads": 4, "linear_key_head_dim": 32},
            "linear_value_head_dim": 32,
        },
        "gated delta rules in 3 of 4 layers, gated attention, partly rotary, offset norms",
    ),
]
# Not listed as a family, taken by its structure.
UNLISTED = ("olmo", {}, "")


def add_token_beyond_embedding(model: Path) -> None:
    """Add one token more than the embedding has rows, as in Gemma 3's published tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(model)


def ids_of(case) -> str:
    return f"{case[0]}-{'-'.join(case[1])}"


SLOW = [pytest.param(case, marks=pytest.mark.slow, id=ids_of(case)) for case in LONG_TAIL]


@pytest.fixture(scope="module", params=[*MODELS, UNLISTED, *SLOW], ids=ids_of)
def family_run(request, tmp_path_factory):
    model_type, config, _ = request.param
    root = tmp_path_factory.mktemp(model_type)
    model = random_model(root / "model", model_type=model_type, **config)
    if model_type == "gemma3_text":
        add_token_beyond_embedding(model)
    recipe = small_recipe(
        "adapt.steps=2",
        "adapt.ranks=[8, 4]",
        "adapt.target_modules=null",
        "benchmark.baselines=[]",
        "export.sparse_files=false",
        "verify.prompts=8",
        "adapt.elastic_groups=null",
        model_path=model,
    )
    return run_recipe(recipe, root / "runs", ("verify",))


def test_every_model_type_has_its_case():
    dense = {name for name, family in FAMILIES.items() if family.experts is None}
    assert {case[0] for case in (*MODELS, *LONG_TAIL)} == dense  # experts: test_experts.py
    assert UNLISTED[0] not in FAMILIES


def _runtimes_of(model_type: str) -> tuple[str, str, str]:
    """Return the cells of a family: OpenVINO, ONNX Runtime, llama.cpp."""
    family = FAMILIES[model_type]
    if family.experts:
        targets = next(targets for name, _, targets in EXPERTS if name == model_type)
        words = {"openvino": "yes", "onnx": "`standard`", "gguf": "yes"}
        found = [word if target in targets else "no" for target, word in words.items()]
        return found[0], found[1], f"{found[2]}; without training"
    graphs = "`fused`, `standard`" if family.builder else "`standard`"
    graphs = "`fused`" if family.recurrent else graphs
    return "yes", graphs, "yes" if model_type in ARCHITECTURES else "no"


def test_the_readme_says_which_family_runs_where():
    """One row per combination of runtimes, from the families and what is tested here."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for model_type in dict.fromkeys(case[0] for case in (*MODELS, *LONG_TAIL, *EXPERTS)):
        rows.setdefault(_runtimes_of(model_type), []).append(f"`{model_type}`")
    lines = [
        "| `model_type` | OpenVINO, its GenAI | ONNX Runtime, its GenAI | llama.cpp |",
        "| --- | --- | --- | --- |",
        *(f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in rows.items()),
    ]
    assert "\n".join(lines) in README.read_text(), "\n".join(["README.md needs", *lines])


def test_the_page_of_families_says_what_each_is_tested_with():
    """A new family is pasted from this failure."""
    tested: dict[str, list[str]] = {}
    for model_type, _, peculiar in (*MODELS, *LONG_TAIL):
        tested.setdefault(model_type, []).append(peculiar)
    lines = [
        "| `model_type` | tested with | run by | adapters on |",
        "| --- | --- | --- | --- |",
    ]
    always = {case[0] for case in MODELS}
    for model_type, peculiar in tested.items():
        run_by = "`make test`" if model_type in always else "`make test-slow`"
        adapters = ", ".join(f"`{name}`" for name in FAMILIES[model_type].targets)
        lines.append(f"| `{model_type}` | {'; '.join(peculiar)} | {run_by} | {adapters} |")
    assert "\n".join(lines) in PAGE.read_text(), "\n".join(["families.md needs", *lines])


def test_every_check_passes_in_both_runtimes(family_run):
    checks = family_run["verify"].metrics["checks"]
    assert all(check["passed"] for check in checks)
    names = {check["name"] for check in checks}
    for runtime in ("openvino", "onnx"):
        assert f"greedy tokens: merged in torch and {runtime}" in names
        assert f"codes, scales, zero points: merged and {runtime}" in names


def test_the_graph_agrees_and_a_standard_one_is_standard(family_run):
    """The same logits; of families without a fused graph, onnx.checker in full and OpenVINO too."""
    merged = family_run["merge"].path / "model"
    deployed = family_run["export-onnx"].path / "model"
    _agrees(merged, deployed)
    if not _is_fused(deployed):
        _is_standard(merged, deployed)


@pytest.mark.slow
def test_fused_families_have_a_standard_graph_too(family_run, tmp_path):
    """The same codes and logits in it."""
    merged = family_run["merge"].path / "model"
    deployed = family_run["export-onnx"].path / "model"
    if not _is_fused(deployed) or Checkpoint(merged).family.recurrent:
        pytest.skip("it has one graph only")
    target("onnx").export(merged, tmp_path, Export(onnx_graph="standard"))
    fused, standard = (dict(target("onnx").read_back(f)) for f in (deployed, tmp_path))
    assert standard.keys() == fused.keys()
    for name, arrays in fused.items():
        for ours, theirs in zip(arrays, standard[name], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    _agrees(merged, tmp_path)
    _is_standard(merged, tmp_path)


IDS = np.random.RandomState(0).randint(5, 400, (4, 40))


def _agrees(merged: Path, folder: Path) -> None:
    reference = target("torch").open_session(merged, True, None)
    session = target("onnx").open_session(folder, True, None)
    for part in (IDS[:, :38], IDS[:, 38:39], IDS[:, 39:]):
        ours, theirs = reference.forward(part), session.forward(part)
        assert np.abs(ours - theirs).max() / ours.std() < 1e-4


def _is_standard(merged: Path, folder: Path) -> None:
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    domains = {n.domain for n in onnx.load(folder / "model.onnx").graph.node}
    assert domains == {"", "com.microsoft"}
    _openvino_reads(folder, IDS, target("torch").open_session(merged, True, None))


def test_both_genai_runtimes_say_what_torch_says(family_run, tmp_path):
    import onnxruntime_genai as og

    merged = family_run["merge"].path / "model"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    prompt = tokenizer.encode("Question: 3 + 4\nAnswer:")
    reference, stop = target("torch").open_session(merged, True, None), [tokenizer.eos_token_id]
    [expected] = generate(reference, [prompt], NEW_TOKENS, stop)
    needs_sdpa = Checkpoint(merged).config["model_type"] in WITHOUT_PAGED_WINDOWS
    properties = {"ATTENTION_BACKEND": "SDPA"} if needs_sdpa else {}
    pipe = exact_pipeline(family_run["export-openvino"].path / "model", **properties)
    ids = openvino_target.ov.Tensor(np.array([prompt]))
    said = pipe.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False).tokens[0]
    assert [token for token in said if token not in stop] == expected
    folder = exact_onnx(family_run["export-onnx"].path / "model", tmp_path / "exact")
    said = said_by_onnx_genai(og.Model(str(folder)), prompt, NEW_TOKENS)
    assert [token for token in said if token not in stop] == expected


def _is_fused(folder: Path) -> bool:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return any(node.op_type == "GroupQueryAttention" for node in graph.node)


def _openvino_reads(folder, ids, reference):
    compiled = openvino_target.ov.Core().compile_model(
        str(folder / "model.onnx"), "CPU", openvino_target.EXACT
    )
    batch, length = ids.shape
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, length), np.int64),
        "position_ids": np.tile(np.arange(length), (batch, 1)),
    }
    for port in compiled.inputs:
        name = port.get_any_name()
        if name.startswith("past_"):
            _, heads, _, size = port.get_partial_shape()
            feeds[name] = np.zeros((batch, heads.get_length(), 0, size.get_length()), np.float32)
    names = {port.get_any_name() for port in compiled.inputs}
    found = compiled({k: v for k, v in feeds.items() if k in names})["logits"]
    reference.reset()
    ours = reference.forward(ids)
    assert np.abs(ours - found).max() / ours.std() < 1e-4

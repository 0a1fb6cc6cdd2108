"""Exported folders in the runtimes' own hands."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from conftest import (
    ROOT,
    SHARED,
    exact_onnx,
    exact_pipeline,
    random_model,
    said_by_onnx_genai,
    small_recipe,
    test_prompts,
)
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.floats import load_model
from sqft_export.model.storage import read_quantized
from sqft_export.numerics.affine import dequantize
from sqft_export.recipe.schema import Export
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import target

PROMPTS = test_prompts(4)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def expected(tiny_run) -> list[list[int]]:
    """Greedy ids of the merged model in torch."""
    folder = tiny_run["merge"].path / "model"
    model, tokenizer = load_model(Checkpoint(folder)), AutoTokenizer.from_pretrained(folder)
    return [
        _generate(model, tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
        for prompt in PROMPTS
    ]


def _generate(model, inputs) -> list[int]:
    out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_optimum_intel_loads_and_generates(tiny_run, expected):
    from optimum.intel import OVModelForCausalLM

    folder = tiny_run["export-openvino"].path / "model"
    exact = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
    }
    model = OVModelForCausalLM.from_pretrained(folder, ov_config=exact)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        assert _generate(model, inputs) == ids


def test_openvino_genai_loads_tokenizes_and_generates(tiny_run, expected):
    folder = tiny_run["export-openvino"].path / "model"
    pipe = exact_pipeline(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        said = pipe.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert said == tokenizer.decode(ids, skip_special_tokens=True)


def test_onnxruntime_genai_loads_tokenizes_and_generates(tiny_run, expected, tmp_path):
    import onnxruntime_genai as og

    deployed = tiny_run["export-onnx"].path / "model"
    og.Model(str(deployed))
    # As deployed, activations are rounded to int8 and a token may differ from torch's.
    folder = exact_onnx(deployed, tmp_path / "exact")
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    tokenizer.update_options(add_special_tokens="true")
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        tokens = tokenizer.encode(prompt)
        assert tokens.tolist() == AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]
        assert said_by_onnx_genai(model, tokens, NEW_TOKENS) == ids


def test_genai_config_is_what_the_graph_has(tiny_run):
    import onnx

    folder = tiny_run["export-onnx"].path / "model"
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    graph = onnx.load(folder / decoder["filename"], load_external_data=False).graph
    inputs = {i.name for i in graph.input}
    for layer in range(decoder["num_hidden_layers"]):
        assert decoder["inputs"]["past_key_names"] % layer in inputs
    assert (folder / "model.onnx.data").stat().st_size > 1e6


GRIDS = {
    "int4-symmetric": "method: gptq, bits: 4, group_size: 64",
    "int4-asymmetric": "method: rtn, bits: 4, group_size: 32, symmetric: false",
    "int8-symmetric": "method: gptq, bits: 8, group_size: 64, embedding_bits: 8",
    "int8-asymmetric": "method: gptq, bits: 8, group_size: 32, symmetric: false",
    "int4-per-channel": "method: gptq, bits: 4, group_size: null, symmetric: false",
    "nncf-int4": "method: nncf, bits: 4, group_size: 32",
    "nncf-int4-int8": "method: nncf, bits: 4, group_size: 32, symmetric: false, "
    "embedding_bits: 8, nncf: {gptq: true, int4_ratio: 0.6}",
    "nncf-int8": "method: nncf, bits: 8, group_size: null, symmetric: false",
}


# Combinations of what other cases have: `make test-slow`.
RARE_GRIDS = {("int8-asymmetric", False), ("nncf-int4", False), ("nncf-int4-int8", True)}
CASES = [
    pytest.param(kind, tied, marks=[pytest.mark.slow] if (kind, tied) in RARE_GRIDS else [])
    for kind, grid in GRIDS.items()
    for tied in ((False, True) if "embedding_bits" in grid else (False,))
]


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_every_grid_reaches_both_runtimes_bit_for_bit(tmp_path, kind, tied):
    """Rows of 172 inputs fall back to one group; `verify` raises on any difference."""
    model = random_model(tmp_path / "model", tie_word_embeddings=tied)
    recipe = small_recipe(
        f"quantize={{{GRIDS[kind]}}}",
        "adapt.steps=2",
        "adapt.ranks=[8, 4]",
        model_path=model,
    )
    artifacts = run_recipe(recipe, tmp_path / "runs", ("verify",))
    checks = artifacts["verify"].metrics["checks"]
    assert all(check["passed"] for check in checks)
    kernels = [c for c in checks if c["name"].startswith("layers on compressed kernels")]
    outer = 0 if recipe.quantize.embedding_bits is None else 1 if tied else 2
    # OpenVINO, the same on our kernels, ONNX Runtime
    assert [c["compared"] for c in kernels] == [14 + outer] * 3
    bits = set(artifacts["quantize"].metrics["bits"].values())
    mixed = "int4_ratio" in GRIDS[kind] or kind == "nncf-int4"  # NNCF: 172 inputs get INT8
    assert bits == ({4, 8} if mixed else {recipe.quantize.bits})


def test_a_tied_embedding_in_int8_is_stored_once(tmp_path):
    """576 columns are no power of two: blocks of 64 with the row's scale, and no filling."""
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = random_model(tmp_path / "model", tie_word_embeddings=True, **sizes)
    settings = (
        "adapt=none",
        "quantize.embedding_bits=8",
        "verify.prompts=2",
        "verify.divergence=1",
        "verify.tolerance=3e-4",  # random weights of this width amplify rounding
    )
    run = run_recipe(small_recipe(*settings, model_path=model), tmp_path / "runs", ("verify",))
    codes = Checkpoint(model).shapes["model.embed_tokens.weight"][0] * 576
    decoder = sum(rows * columns for rows, columns in Checkpoint(model).linears.values())
    for name, weights in (("openvino", "openvino_model.bin"), ("onnx", "model.onnx.data")):
        stored = (run[f"export-{name}"].path / "model" / weights).stat().st_size
        assert codes + decoder / 2 < stored < 1.2 * (codes + decoder / 2), name


def test_float_results_reach_both_runtimes_with_their_zeros(tmp_path):
    model = random_model(tmp_path / "model")
    recipe = small_recipe(
        "quantize.method=none",
        "adapt.pipeline=sparsepeft",
        "adapt.steps=2",
        "adapt.ranks=[8, 4]",
        model_path=model,
    )
    artifacts = run_recipe(recipe, tmp_path / "runs", ("verify",))
    names = {c["name"] for c in artifacts["verify"].metrics["checks"] if c["passed"]}
    assert "logits: merged in torch and openvino" in names
    assert "logits: merged in torch and onnx" in names
    assert artifacts["merge"].metrics["sparsity"]["all"] == pytest.approx(0.5, abs=0.01)


def test_prompts_longer_than_a_block_and_batches_agree_after_the_cache_is_used(tiny_run):
    merged = target("torch").open_session(tiny_run["merge"].path / "model", True, None)
    ids = np.random.RandomState(0).randint(5, 400, (4, 150))
    for name in ("openvino", "onnx"):
        session = target(name).open_session(tiny_run[f"export-{name}"].path / "model", True, None)
        merged.reset()
        for part in (ids[:, :147], ids[:, 147:148], ids[:, 148:149]):
            ours, theirs = merged.forward(part), session.forward(part)
            assert (
                np.abs(ours - theirs).max() / ours.std() < 3e-4
            )  # three times as long as what verify compares


def _padded(prompts: list[list[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask ``[batch, longest]``, prompts padded on one side."""
    longest = max(map(len, prompts))
    ids, mask = (np.zeros((len(prompts), longest), np.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


# tests/measure/test_batches.py has padded batches of a standard graph.
STANDARD = pytest.param("standard", marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["openvino", STANDARD, "fused"])
def test_a_padded_batch_says_what_each_prompt_says_alone(tiny_run, tmp_path, kind):
    """On the left; on the right for the fused graph, whose attention knows no other."""
    merged = tiny_run["merge"].path / "model"
    runtime = "openvino" if kind == "openvino" else "onnx"
    folder = tiny_run[f"export-{runtime}"].path / "model"
    if kind == "standard":
        folder = tmp_path
        target("onnx").export(merged, folder, Export(onnx_graph="standard"))
    session = target(runtime).open_session(folder, True, None)
    alone = target("torch").open_session(merged, True, None)
    random = np.random.RandomState(0)
    prompts = [random.randint(5, 400, n).tolist() for n in (5, 70, 12, 3)]
    following = random.randint(5, 400, (4, 1))
    left = kind != "fused"
    ids, mask = _padded(prompts, left)
    ends = [-1 if left else len(p) - 1 for p in prompts]
    first = session.forward(ids, mask)[range(4), ends]
    grown = np.ones((4, 1), np.int64)
    # Right-padded, the kernel takes the number of ones alone.
    second = session.forward(following, np.concatenate([mask, grown] if left else [grown, mask], 1))
    for row, prompt in enumerate(prompts):
        alone.reset()
        for ours, theirs in (
            (alone.forward(np.array([prompt]))[0, -1], first[row]),
            (alone.forward(following[row : row + 1])[0, -1], second[row, -1]),
        ):
            assert np.abs(ours - theirs).max() / ours.std() < 1e-4


def test_onnxruntime_genai_answers_a_batch_as_it_answers_each(tiny_run, tmp_path):
    import onnxruntime_genai as og

    folder = exact_onnx(tiny_run["export-onnx"].path / "model", tmp_path / "exact")
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)

    def generate(tokens, batch: int) -> list[list[int]]:
        params = og.GeneratorParams(model)
        length = tokens.shape[-1] + NEW_TOKENS
        params.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=batch
        )
        generator = og.Generator(model, params)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
        return [list(generator.get_sequence(i))[-NEW_TOKENS:] for i in range(batch)]

    together = generate(tokenizer.encode_batch(PROMPTS).as_numpy(), 4)
    assert together == [generate(tokenizer.encode(p), 1)[0] for p in PROMPTS]


def test_the_merged_folder_says_what_it_is(tiny_run):
    checkpoint = Checkpoint(tiny_run["merge"].path / "model")
    quantization = checkpoint.config["quantization_config"]
    assert quantization["quant_method"] == "gptq"
    assert (quantization["bits"], quantization["group_size"]) == (4, 64)
    assert quantization["sym"] is True and quantization["desc_act"] is False
    assert len(checkpoint.quantized_linears) == 28
    codes, grid = read_quantized(checkpoint, "model.layers.0.mlp.down_proj")
    assert codes.shape == (256, 640) and grid.scale.dtype == torch.float16


STORIES = ROOT / "tests" / "checkpoints" / "stories260K"
# May not be in this repository. Its tokenizer joins letters across blanks, which ONNX Runtime
# GenAI's never does.
ACROSS_WORDS = SHARED / "checkpoints" / "tinystories-656K"
absent = pytest.mark.skipif(not ACROSS_WORDS.is_dir(), reason=f"needs {ACROSS_WORDS.name}")


@pytest.mark.parametrize(
    "checkpoint", [STORIES, pytest.param(ACROSS_WORDS, marks=absent)], ids=lambda path: path.name
)
def test_models_nobody_here_made_pass_every_check(tmp_path, checkpoint):
    recipe = small_recipe(
        "benchmark.baselines=[]",
        "benchmark.items=4",
        f"verify.tokenizers={'reported' if checkpoint == ACROSS_WORDS else 'required'}",
        name="stories",
        model_path=checkpoint,
    )
    artifacts = run_recipe(recipe, tmp_path)
    assert all(check["passed"] for check in artifacts["verify"].metrics["checks"])
    report = json.loads((artifacts["report"].path / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["OpenVINO", "ONNX Runtime"]
    assert report["measure"] == "tokens predicted right"


def test_exporting_reports_nothing_over_the_network():
    code = (
        "import sys, sqft_export.telemetry\n"
        "sqft_export.telemetry.disable_telemetry()\n"
        "import sqft_export.targets.openvino\n"
        "import optimum.exporters.openvino, nncf, openvino.tools.ovc\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "assert 'openvino_telemetry.main' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gptqmodel_reads_the_weights_we_mean(tiny_run):
    """Through transformers, as a user of the merged folder would; only where it is installed."""
    pytest.importorskip("gptqmodel")
    from transformers import AutoModelForCausalLM

    folder = tiny_run["merge"].path / "model"
    checkpoint = Checkpoint(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    for name in checkpoint.quantized_linears:
        theirs = loaded.get_submodule(name).dequantize_weight().T
        ours = dequantize(*read_quantized(checkpoint, name))
        assert torch.equal(theirs, ours.to(theirs.dtype)), name  # GPTQModel computes in float16

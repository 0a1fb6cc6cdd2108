"""Mixtures of experts: each expert is compressed on its own tokens, without training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import ROOT, random_model, small_recipe
from sqft_export.errors import UserError
from sqft_export.model.blocks import Inputs, walk
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.experts import RoutedExperts, compute_all_experts
from sqft_export.model.families import FAMILIES
from sqft_export.model.floats import load_model
from sqft_export.model.storage import load_grids, load_mask, read_quantized
from sqft_export.numerics.affine import quantize
from sqft_export.plan.checks import check_recipe
from sqft_export.plan.experts import find_computed_experts
from sqft_export.plan.exporters import unsupported_targets
from sqft_export.plan.layout import layout_of
from sqft_export.plan.memory import predict_memory
from sqft_export.plan.workload import workload_of
from sqft_export.quantizers import rtn
from sqft_export.recipe.schema import Recipe
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets.gguf.architectures import architecture_lacks

IDS = torch.randint(5, 400, (2, 40), generator=torch.Generator().manual_seed(0))
RUNTIMES = ("openvino", "onnx", "gguf")
ALL = f"[{', '.join(RUNTIMES)}]"
PAGE = ROOT / "docs" / "how-to" / "multimodal-and-experts.md"
SIZES = {"intermediate_size": 64, "num_experts_per_tok": 2}
# model_type, settings, runtimes that compute it
EXPERTS: list[tuple[str, dict, str]] = [
    (
        "qwen3_moe",
        {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16, "norm_topk_prob": True},
        "[openvino, onnx, gguf]",
    ),
    ("mixtral", {"num_local_experts": 4}, "[openvino, onnx, gguf]"),
    (
        "granitemoe",
        {
            "num_local_experts": 4,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        "[openvino, onnx, gguf]",
    ),
    ("phimoe", {"num_local_experts": 4}, "[openvino, onnx]"),
    ("olmoe", {"num_experts": 4, "num_key_value_heads": 4}, "[onnx, gguf]"),
    (
        "gpt_oss",
        {
            **{"num_local_experts": 4, "head_dim": 16, "sliding_window": 16},
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0},
                **{"original_max_position_embeddings": 64, "truncate": True},
            },
        },
        "[openvino, onnx, gguf]",
    ),
    (
        "lfm2_moe",
        {
            **{"num_experts": 4, "moe_intermediate_size": 64, "num_hidden_layers": 3},
            **{"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
            "initializer_range": 0.1,  # with 0.2, rounded activations choose other experts
        },
        "[openvino, gguf]",
    ),
]
BY_TYPE = {name: (settings, targets) for name, settings, targets in EXPERTS}
EXPERT = "model.layers.1.mlp.experts.2"


def write_model(folder: Path, name: str = "qwen3_moe", **settings) -> Path:
    return random_model(folder, model_type=name, **(SIZES | BY_TYPE[name][0] | settings))


def recipe_of(folder: Path, *settings: str) -> Recipe:
    untrained = (
        "adapt=none",
        "verify.prompts=4",
        "quantize.group_size=32",
        "export.targets=[gguf]",
    )
    small = ("benchmark.baselines=[]", "export.sparse_files=false")
    return small_recipe(*untrained, *small, *settings, model_path=folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("experts"))


def test_every_family_of_experts_has_its_case():
    assert {name for name, *_ in EXPERTS} == {n for n, f in FAMILIES.items() if f.experts}


@pytest.mark.parametrize("name", BY_TYPE)
def test_separate_experts_compute_what_the_batched_ones_compute(name, tmp_path):
    """Both with the chosen experts only and with all experts, as traced graphs do."""
    checkpoint = Checkpoint(write_model(tmp_path, name))
    checkpoint.check()
    batched = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    separate = load_model(checkpoint)
    with torch.no_grad():
        expected = batched(input_ids=IDS).logits
        torch.testing.assert_close(separate(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
        compute_all_experts(separate)
        torch.testing.assert_close(separate(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)


def write_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Replace the experts of a gpt-oss folder by random codes in MXFP4, as published ones are.

    :return: the batched matrices by transformers' conversion, ``[experts, in, out]``.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, expected = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        shape = (count, outputs, inputs // 32)
        scales = torch.randint(120, 126, shape, generator=generator, dtype=torch.uint8)
        codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(codes, scales)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def test_experts_in_mxfp4_are_read_as_bfloat16(tmp_path):
    """A matrix at a time, with the values that transformers converts them to."""
    expected = write_mxfp4(write_model(tmp_path, "gpt_oss"))
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check()
    assert "quantization_config" not in checkpoint.config
    for name, batched in expected.items():
        path = name.rpartition(".")[0]
        parts = ["gate_proj", "up_proj"] if "gate_up" in name else ["down_proj"]
        for number, matrix in enumerate(batched):
            for index, part in enumerate(parts):
                found = checkpoint.tensor(f"{path}.{number}.{part}.weight")
                assert found.dtype == torch.bfloat16
                assert torch.equal(found, matrix[:, index :: len(parts)].T)
    recipe = recipe_of(tmp_path, "export.targets=[]", "benchmark.baselines=[merged]")
    run = run_recipe(recipe, tmp_path / "runs", ("merge",))
    merged = Checkpoint(run["merge"].path / "model")
    assert read_quantized(merged, "model.layers.0.mlp.experts.3.up_proj").bits == 4


def test_mxfp4_of_other_families_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantized by 'mxfp4'"):
        check_recipe(recipe_of(tmp_path / "model"), tmp_path / "model")


def test_llama_cpp_is_refused_if_it_rounds_the_borders_of_yarn():
    """The published gpt-oss does not round them."""
    published = AutoConfig.for_model("gpt_oss").to_dict()
    assert "(8 and 18), and the model has 8.09 and 17.40" in architecture_lacks(published)
    rounded = published["rope_parameters"] | {"truncate": True}
    assert architecture_lacks(published | {"rope_parameters": rounded}) is None


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe"])
def test_one_expert_is_in_memory_at_a_time_and_blocks_replay_their_outputs(name, tmp_path):
    checkpoint = Checkpoint(write_model(tmp_path, name))
    parts = []
    for part in walk(checkpoint, [*IDS], lambda *_: None):
        parts.append(part.routed_tokens)
        experts = [m for m in part.module.modules() if isinstance(m, RoutedExperts)]
        assert not any(not p.is_meta for e in experts for p in e.parameters())
        if part.routed_tokens is not None:
            assert len(part.linears) == 3 and not any(p.is_meta for p in part.module.parameters())
        last = part
    assert [count is None for count in parts] == [True, *[False] * 4] * 2
    chosen = 2 * IDS.numel()
    assert sum(parts[1:5]) == sum(parts[6:]) == chosen
    del last


def test_inputs_of_blocks_are_those_of_the_model(base):
    """The walk through a block and its experts gives the hidden states of transformers."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        hidden = model(input_ids=IDS[:1], output_hidden_states=True).hidden_states
    walked = [p.calls[0][0].clone() for p in walk(Checkpoint(base), [IDS[0]], None) if p.calls]
    blocks = [one for one in walked if one.dim() == 3]
    for ours, theirs in zip(blocks, hidden, strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_an_expert_is_calibrated_on_its_own_tokens(base):
    inputs, seen = Inputs("norms"), {}
    samples = [torch.randint(5, 400, (200,)) for _ in range(4)]
    for part in walk(Checkpoint(base), samples, inputs.collector):
        few = inputs.has_too_few(part)
        for name in part.linears:
            norms = None if few else inputs.take(name)
            if not few and name.endswith(f"{EXPERT}.gate_proj"):
                seen[name] = norms
                expected = torch.cat([x for x, _ in part.calls]).square().sum(0).sqrt()
                torch.testing.assert_close(norms, expected)
    assert seen


def test_experts_with_few_tokens_are_named_and_rounded_without_gptq(base, tmp_path):
    few = ("calibration.samples=2", "calibration.sequence_length=16")
    recipe = recipe_of(base, *few)
    run = run_recipe(recipe, tmp_path, ("quantize",))
    for name, done in (("sparsify", "pruned by magnitude"), ("quantize", "rounded without GPTQ")):
        metrics = run[name].metrics
        assert len(metrics["uncalibrated_experts"]) == 2 * 4 * 3
        [said] = [one for one in metrics["warnings"] if "experts saw" in one]
        assert f"8 of 8 experts saw fewer than 128 tokens and were {done}" in said
    name = f"{EXPERT}.up_proj"
    pruned = Checkpoint(run["sparsify"].path / "model").tensor(f"{name}.weight").float()
    mask = load_mask(run["sparsify"].path, name, tuple(pruned.shape))
    grid = load_grids(run["quantize"].path)[name]
    settings = grid.bits, grid.group_size, grid.symmetric, None, recipe.scale_bits
    weight, expected = rtn.compress(pruned, mask, *settings)
    made = Checkpoint(run["quantize"].path / "model").tensor(f"{name}.weight").float()
    assert torch.equal(quantize(made, grid), quantize(weight, expected))
    assert torch.equal(grid.scale, expected.scale)


def test_routers_and_norms_stay_in_floats(base):
    checkpoint = Checkpoint(base)
    assert "model.layers.0.mlp.gate.weight" in checkpoint.shapes
    assert "model.layers.0.mlp.gate" not in checkpoint.linears


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("quantize.reconstruct={}",), "quantize.reconstruct: not allowed for a mixture"),
        (("quantize.method=nncf",), "quantize.method: found nncf, which traces complete blocks"),
        (
            ("adapt={target_modules: [q_proj, up_proj], ranks: [8], steps: 2}",),
            "found up_proj, which are Linears of experts; adapters are only on attention",
        ),
    ],
)
def test_settings_that_do_not_fit_experts_are_refused(base, settings, message):
    with pytest.raises(UserError, match=message):
        check_recipe(recipe_of(base, *settings), base)


def test_the_page_says_where_each_family_runs_and_why_not(tmp_path):
    """The reasons are those that `plan` prints."""
    lines = [
        "| `model_type` | OpenVINO | ONNX Runtime | llama.cpp |",
        "| --- | --- | --- | --- |",
    ]
    for name, _, targets in EXPERTS:
        recipe = recipe_of(folder := write_model(tmp_path / name, name), "export.targets=" + ALL)
        reasons = unsupported_targets(recipe, layout_of(recipe, folder))
        assert {runtime for runtime in RUNTIMES if runtime not in targets} == set(reasons)
        cells = (f"no: {reasons[r]}" if r in reasons else "yes" for r in RUNTIMES)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    assert "\n".join(lines) in PAGE.read_text(), "\n".join([f"{PAGE.name} needs", *lines])


def test_plan_says_which_graphs_compute_all_experts(base):
    recipe = recipe_of(base, "export.targets=[onnx, gguf]")
    [found] = find_computed_experts(recipe, layout_of(recipe, base))
    assert "the graphs of ONNX compute all experts" in found


def test_predicted_memory_does_not_grow_with_the_number_of_experts(tmp_path):
    peaks = []
    for count in (4, 16):
        folder = write_model(tmp_path / str(count), num_experts=count)
        recipe = recipe_of(folder)
        layout = layout_of(recipe, folder)
        peaks.append(predict_memory(recipe, layout, workload_of(recipe, folder))["quantize"])
    assert peaks[0] == pytest.approx(peaks[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_TYPE)
def test_experts_go_through_all_passes(name, tmp_path):
    folder, (_, targets) = write_model(tmp_path / "model", name), BY_TYPE[name]
    recipe = recipe_of(folder, f"export.targets={targets}", "benchmark.items=2")
    run = run_recipe(recipe, tmp_path / "runs" / "tiny", ("verify",))
    assert all(check["passed"] for check in run["verify"].metrics["checks"])
    assert {f"export-{one}" for one in targets.strip("[]").split(", ")} <= set(run)
    merged = Checkpoint(run["merge"].path / "model")
    quantized = read_quantized(merged, next(n for n in merged.linears if ".experts.3." in n))
    assert quantized.bits == 4


@pytest.mark.slow
def test_attention_of_a_mixture_of_experts_is_adapted(base, tmp_path):
    trained = ("adapt={ranks: [8, 4], steps: 2, batch: 2}",)
    run = run_recipe(recipe_of(base, *trained), tmp_path / "runs" / "tiny", ("verify",))
    assert all(check["passed"] for check in run["verify"].metrics["checks"])

"""The four pipelines of the paper, from adapter to both runtimes."""

import json

import numpy as np
import pytest
import torch

from conftest import random_model, small_recipe
from conftest import test_prompts as prompts
from sqft_export.errors import UserError
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.storage import load_grids, read_quantized
from sqft_export.recipe.load import load_recipe
from sqft_export.run.pipeline import run_recipe
from sqft_export.targets import target

COMMON = (
    "benchmark.baselines=[]",
    "adapt.ranks=[8, 4]",
    "adapt.steps=6",
    "adapt.learning_rate=2e-2",
)
PIPELINES = {
    "shears": ("quantize.method=none", "adapt.pipeline=shears"),
    "shears, merged": (
        "quantize.method=none",
        "adapt={pipeline: shears, merge_dense: true, steps: 6}",
    ),
    "sqft": ("quantize.group_size=32", "adapt.pipeline=sqft", "export.onnx_graph=standard"),
    "sqft, some targets": (
        "quantize.group_size=32",
        "adapt={pipeline: sqft, target_modules: [q_proj, v_proj, up_proj], steps: 6}",
        "adapt.elastic_groups=[[q_proj, v_proj]]",
    ),
    "three bits": ("quantize={method: gptq, bits: 3, group_size: 32}", "export.sparse_files=true"),
    "scales": ("quantize.group_size=32", "adapt.trainable_scales=true", "adapt.elastic=false"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory):
    """Each pipeline run once, to verify."""
    done = {}

    def run(name: str) -> dict:
        if name not in done:
            recipe = small_recipe(*COMMON, *PIPELINES[name], *COMMON, model_path=model)
            done[name] = run_recipe(recipe, tmp_path_factory.mktemp("runs"), ("verify",))
        return done[name]

    return run


# As "sqft", with fewer targets: `make test-slow`.
SOME_TARGETS = pytest.param("sqft, some targets", marks=pytest.mark.slow)
NAMES = [SOME_TARGETS if name == "sqft, some targets" else name for name in PIPELINES]


@pytest.mark.parametrize("name", NAMES)
def test_every_pipeline_passes_every_check(runs, name):
    checks = {c["name"]: c for c in runs(name)["verify"].metrics["checks"]}
    assert all(check["passed"] for check in checks.values())
    for runtime in ("openvino", "onnx"):
        assert checks[f"logits: merged in torch and {runtime}"]["compared"] > 0


@pytest.mark.parametrize("name", ["shears", "sqft", SOME_TARGETS])
def test_an_adapter_kept_apart_changes_what_the_runtimes_say(runs, name):
    """What verify compared was the adapted model, not twice the base."""
    ids = np.arange(5, 25).reshape(1, 20)
    for runtime in ("openvino", "onnx"):
        folder = runs(name)[f"export-{runtime}"].path / "model"
        with_adapter = target(runtime).open_session(folder, True, None).forward(ids)
        aside = folder / "adapter"
        aside.rename(folder / "hidden")
        try:
            without = target(runtime).open_session(folder, True, None).forward(ids)
        finally:
            (folder / "hidden").rename(aside)
        assert np.abs(with_adapter - without).max() > 0.01 * without.std()


def test_openvino_genai_loads_the_adapter(runs):
    import openvino_genai

    folder = runs("sqft")["export-openvino"].path / "model"
    file = folder / "adapter" / "adapter_model.safetensors"
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    exact["KV_CACHE_PRECISION"] = "f32"
    adapters = openvino_genai.AdapterConfig(openvino_genai.Adapter(str(file)))
    pipe = openvino_genai.LLMPipeline(str(folder), "CPU", adapters=adapters, **exact)
    session = target("openvino").open_session(folder, True, None)
    differ = []
    for prompt in prompts(4):
        ids = pipe.get_tokenizer().encode(prompt).input_ids.data.copy()
        config = openvino_genai.GenerationConfig(max_new_tokens=6, ignore_eos=True)
        # Explicitly, since options of a call stay for the next one.
        said = pipe.generate(ids_tensor(ids), config, adapters=adapters).tokens[0]
        session.reset()
        expected, step = [], ids
        for _ in range(6):
            expected.append(int(session.forward(step)[0, -1].argmax()))
            step = np.array([[expected[-1]]])
        assert list(said) == expected
        bare = pipe.generate(ids_tensor(ids), config, adapters=openvino_genai.AdapterConfig())
        differ.append(list(bare.tokens[0]) != expected)
    assert any(differ)  # the adapter causes this answer


def ids_tensor(ids):
    import openvino as ov
    import openvino_genai

    return openvino_genai.TokenizedInputs(
        ov.Tensor(np.ascontiguousarray(ids)), ov.Tensor(np.ones_like(ids))
    )


def test_onnxruntime_genai_loads_the_adapter(runs):
    import onnxruntime_genai as og

    folder = runs("sqft")["export-onnx"].path / "model"
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    adapters.load(str(folder / "adapter" / "adapter.onnx_adapter"), "tuned")
    session = target("onnx").open_session(folder, False, None)
    ids = np.arange(5, 25).reshape(1, 20)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=21, do_sample=False)
    said = {}
    for name in ("tuned", None):
        generator = og.Generator(model, parameters)
        if name:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(ids[0].astype(np.int32))
        said[name] = generator.get_logits()[0, -1]
    expected = session.forward(ids)[0, -1]
    np.testing.assert_allclose(said["tuned"], expected, atol=1e-3 * expected.std())
    assert np.abs(said[None] - expected).max() > 0.01 * expected.std()


def test_three_bits_are_eight_levels_of_the_four_bit_codes(runs):
    artifacts = runs("three bits")
    folder = artifacts["merge"].path / "model"
    assert Checkpoint(folder).config["quantization_config"]["bits"] == 4
    seen = set()
    for name in Checkpoint(folder).quantized_linears:
        codes, grid = read_quantized(Checkpoint(folder), name)
        assert grid.symmetric
        seen |= set(codes.unique().tolist())
    assert seen <= set(range(4, 12)) and len(seen) > 5
    assert set(artifacts["quantize"].metrics["bits"].values()) == {3}


def test_a_dense_merge_says_what_sparsity_is_left(runs):
    merged = runs("shears, merged")["merge"]
    (warning,) = merged.metrics["warnings"]
    assert "50.0% were zero before" in warning
    assert merged.metrics["sparsity"]["all"] < 0.3


def test_trained_scales_are_the_ones_that_are_stored(runs):
    done = runs("scales")
    before, after = (load_grids(done[name].path) for name in ("quantize", "search"))
    trained = [n for n in before if not torch.equal(before[n].scale, after[n].scale)]
    ends = {name.rsplit(".", 1)[1] for name in trained}
    assert ends == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert all(torch.equal(before[n].zero_point, after[n].zero_point) for n in before)
    # Not elastic: every step of the log is at the highest rank.
    lines = (done["adapt"].path / "training.jsonl").read_text().splitlines()
    assert all(json.loads(line)["ranks"] == {} for line in lines)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("adapt.pipeline=shears",), "sparsepeft and shears need quantize.method: none"),
        (("adapt.pipeline=sqft", "quantize.method=none"), "sqft need a quantized base"),
        (("adapt.merge_dense=true",), "merge_dense is for shears, found qa-sparsepeft"),
        (("adapt.pipeline=sqft", "adapt.trainable_scales=true"), "is for qa-sparsepeft"),
        (("search.strategy=configured",), "configuration and strategy configured go together"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    from conftest import ROOT

    with pytest.raises(UserError, match=message):
        load_recipe(ROOT / "recipes" / "tiny.yaml", settings)

"""Runtimes and devices: what is here is listed, what is not is refused with the reason."""

import json
import subprocess

import numpy as np
import pytest
import torch
from benchmark_rows import NAMES
from transformers import AutoModelForCausalLM

from conftest import SQFT, small_recipe
from sqft_export.errors import UserError
from sqft_export.measure.rows import Row
from sqft_export.numerics.affine import dequantize
from sqft_export.numerics.codes import Grid, QuantizedWeight
from sqft_export.plan.checks import check_recipe
from sqft_export.stages.benchmark import on_devices
from sqft_export.targets import devices, target
from sqft_export.targets.torch import Int4Linear, StoredLinear, TorchSession, load_int4_model

NO_GPU = [p for p in devices.devices() if p.kind == "gpu" and p.missing is None] == []


def test_every_runtime_tells_of_its_devices():
    done = subprocess.run([SQFT, "list", "targets", "--json"], capture_output=True, check=True)
    found = {(p["runtime"], p["kind"]): p["missing"] for p in json.loads(done.stdout)}
    assert set(found) == {
        *[("openvino", device) for device in ("cpu", "gpu", "npu")],
        *[("gguf", device) for device in ("vulkan", "cuda")],
        ("onnx", "webgpu"),
        ("web", "cpu"),
        *[(runtime, device) for runtime in ("onnx", "torch") for device in ("cpu", "gpu")],
        ("gguf", "cpu"),
        ("openvino", "kernels"),
    }
    assert found["openvino", "kernels"] == "here"
    states = {(p["runtime"], p["kind"]): p["state"] for p in json.loads(done.stdout)}
    assert all(states.values()) and states["openvino", "npu"] == "from documentation only"
    assert all(found[runtime, "cpu"] == "here" for runtime in ("openvino", "onnx", "gguf", "torch"))


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU here")
def test_a_target_that_is_not_here_is_refused_by_plan():
    recipe = small_recipe("benchmark.targets=[cpu, gpu]")
    with pytest.raises(UserError, match=r"benchmark.targets: found gpu, .*onnxruntime-gpu.*auto"):
        check_recipe(recipe, recipe.resolve("builtin:tiny"))
    check_recipe(small_recipe("benchmark.targets=[auto]"), recipe.resolve("builtin:tiny"))


def test_made_models_are_measured_on_what_is_here(tmp_path, monkeypatch):
    def rows_on(*targets):
        ids = ("dense", "merged", "openvino", "onnx")
        table = [Row(id, *NAMES[id], tmp_path, (), 0.0) for id in ids]
        return [(row.name, row.device) for row in on_devices(table, targets)]

    here = [devices.Device("openvino", d, d.upper(), None) for d in ("gpu", "npu")]
    away = [devices.Device("onnx", "gpu", "CUDAExecutionProvider", "no")]
    monkeypatch.setattr("sqft_export.stages.benchmark.devices", lambda: here + away)
    assert len(rows_on("cpu")) == 4
    assert rows_on("auto")[4:] == [("OpenVINO, GPU", "gpu"), ("OpenVINO, NPU", "npu")]
    assert rows_on("gpu") == [("dense base", "cpu"), ("OpenVINO, GPU", "gpu")]


def test_packed_products_are_the_dequantized_ones(tiny_run):
    """torch's INT4 layout on the CPU: the codes that were trained, nothing else."""
    folder = tiny_run["merge"].path / "model"
    packed = load_int4_model(folder, "cpu", torch.float32)
    assert sum(isinstance(m, Int4Linear) for m in packed.modules()) >= 20
    ids = np.random.RandomState(0).randint(5, 400, (2, 12))
    expected = target("torch").open_session(folder, True, 2).forward(ids)
    found = TorchSession(packed).forward(ids)
    assert np.abs(found - expected).max() < 1e-3 * expected.std()


@pytest.mark.parametrize("stage", ["merge", "sparsify"])
def test_a_model_too_large_for_float32_runs_from_its_stored_weights(tiny_run, monkeypatch, stage):
    folder = tiny_run[stage].path / "model"
    expected = target("torch").open_session(folder, True, 2)
    monkeypatch.setattr("sqft_export.machine.host.FLOAT32_MEMORY_SHARE", 0.0)
    monkeypatch.setattr("sqft_export.targets.torch.fast_in_bfloat16", lambda device: False)
    lean = target("torch").open_session(folder, False, 2)
    linears = [m for m in lean.model.modules() if isinstance(m, StoredLinear | Int4Linear)]
    assert len(linears) == 29, "all Linears and the head"
    ids = np.random.RandomState(0).randint(5, 400, (2, 12))
    ours, theirs = lean.forward(ids), expected.forward(ids)
    assert np.abs(ours - theirs).max() < 1e-3 * theirs.std()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embedding", [torch.float32, torch.float16])
@pytest.mark.parametrize("fast", [True, False])
def test_a_model_of_16_bits_is_scored_in_them_whatever_holds_its_embedding(
    tiny_run, tmp_path, monkeypatch, stored, embedding, fast
):
    """A merged model's INT8 embedding is float32 points of its grid."""
    model = AutoModelForCausalLM.from_pretrained(tiny_run["sparsify"].path / "model", dtype=stored)
    model.get_input_embeddings().to(embedding)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("sqft_export.targets.torch.fast_in_bfloat16", lambda device: fast)
    session = target("torch").open_session(tmp_path, False, 2)
    narrow = stored == torch.bfloat16 and fast
    assert next(session.model.parameters()).dtype == (torch.bfloat16 if narrow else torch.float32)
    assert session.forward(np.arange(5, 9)[None]).shape[:2] == (1, 4)


def test_codes_that_torch_has_no_layout_for_are_dequantized_as_they_are_used():
    codes = torch.randint(0, 256, (8, 20), dtype=torch.uint8)
    grid = Grid(torch.rand(8, 1).half(), torch.full((8, 1), 128, dtype=torch.uint8), 8, 20)
    x, bias = torch.randn(3, 20), torch.randn(8)
    found = StoredLinear(lambda: dequantize(codes, grid), bias)(x)
    torch.testing.assert_close(found, x @ dequantize(codes, grid).T + bias)


def test_packed_products_know_zero_points():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 64), generator=generator, dtype=torch.uint8)
    scale = torch.rand(32, 2, generator=generator).to(torch.float16)
    zero = torch.randint(0, 16, (32, 2), generator=generator, dtype=torch.uint8)
    grid = Grid(scale=scale, zero_point=zero, bits=4, group_size=32)
    x, bias = torch.randn(3, 64, generator=generator), torch.randn(32, generator=generator)
    found = Int4Linear(QuantizedWeight(codes, grid), bias, "cpu", torch.float32)(x)
    torch.testing.assert_close(found, x @ dequantize(codes, grid).T + bias, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_says_what_the_cpu_says(tiny_run):
    folder = tiny_run["merge"].path / "model"
    ids = np.random.RandomState(0).randint(5, 400, (2, 12))
    cpu = target("torch").open_session(folder, True, None).forward(ids)
    gpu = target("torch").open_session(folder, False, None, "gpu").forward(ids)
    assert np.abs(cpu - gpu).mean() < 0.05 * cpu.std()  # bfloat16

"""ONNX Runtime on WebGPU, with SwiftShader, a driver that computes on the CPU."""

import json
import subprocess

import pytest
from software_gpu import onnx_environment

from conftest import SQFT, test_prompts


def sqft(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([SQFT, *arguments], env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def deployment(tiny_run) -> str:
    return str(tiny_run["export-onnx"].path / "model")


def test_what_swiftshader_computes_wrongly_is_named_with_what_helps(deployment, tmp_path):
    """Its prompts of several tokens are wrong in the fused attention; token by token is right."""
    env = onnx_environment(tmp_path)
    done = sqft(env, "verify", deployment, "--device", "webgpu", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 5, done.stderr
    for mode in found["modes"]:
        assert "nodes on WebGpuExecutionProvider" in mode["placement"]
    assert any("prompts token by token" in cause for cause in found["causes"])


def test_no_adapter_is_refused_instead_of_computing_on_the_cpu(deployment, tmp_path):
    env = onnx_environment(tmp_path, "missing.json")
    (prompt,) = test_prompts(1)
    done = sqft(env, "generate", deployment, "-p", prompt, "--device", "webgpu")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "WebGpuExecutionProvider could not be started" in done.stderr


def test_a_build_without_the_provider_names_the_package(tiny_run, sqft_here):
    folder = str(tiny_run["export-onnx"].path / "model")
    done = sqft_here("generate", folder, "-p", "1", "--device", "webgpu")
    assert done.returncode == 2
    assert "pip install onnxruntime-ep-webgpu" in done.stderr

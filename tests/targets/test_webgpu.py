"""ONNX Runtime on WebGPU, with SwiftShader, a driver that computes on the CPU."""

import json
import re
import subprocess

import pytest
from software_gpu import onnx_environment

from conftest import SQFT, test_prompts


def sqft(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([SQFT, *arguments], env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def deployment(tiny_run) -> str:
    return str(tiny_run["export-onnx"].path / "model")


@pytest.mark.slow
def test_prompt_and_decode_pass_the_self_test_and_the_nodes_on_the_cpu_are_counted(
    deployment, tmp_path
):
    """Prompts run in one pass and continuations token by token, so both paths are compared.

    On some processors (an AMD Zen 4), SwiftShader computes prompts wrongly; the self-test names it.
    """
    env = onnx_environment(tmp_path)
    done = sqft(env, "verify", deployment, "--device", "webgpu", "--json")
    found = json.loads(done.stdout)
    right = all(mode["passed"] for mode in found["modes"])
    assert done.returncode == (0 if right else 5), done.stderr
    for cause in found["causes"]:
        assert cause.startswith(
            "prompts of several tokens in one pass: with prompts token by token"
        )
    for mode in found["modes"]:
        assert mode["positions"] > 0 and (mode["passed"] or found["causes"])
        assert mode["placement"].startswith("WebGpuExecutionProvider; ")
        left, total = re.search(r"(\d+) of (\d+) nodes stay", mode["placement"]).groups()
        assert int(left) < int(total) / 4  # only the arithmetic of the attention mask
        assert "MatMulNBits" not in mode["placement"]


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

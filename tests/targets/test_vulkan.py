"""llama.cpp on Vulkan, with a driver that computes on the CPU; faults are one line each."""

import json
import subprocess
from pathlib import Path

import pytest
from software_gpu import SWIFTSHADER, llama_environment, require

from conftest import SQFT, test_prompts
from sqft_export.errors import HostError
from sqft_export.targets.offload import OffloadDevice, require_device_memory


def sqft(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([SQFT, *arguments], env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def deployment(tiny_run) -> str:
    return str(tiny_run["export-gguf"].path / "model")


@pytest.mark.slow
def test_the_self_test_passes_on_vulkan_in_both_modes(deployment):
    done = sqft(llama_environment(), "verify", deployment, "--device", "vulkan", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for mode in found["modes"]:
        assert mode["positions"] > 0 and mode["passed"]
        assert "all layers on Vulkan0 (llvmpipe" in mode["placement"]


def test_generate_says_where_the_layers_are_and_answers_as_on_the_cpu(deployment):
    (prompt,) = test_prompts(1)
    arguments = ("generate", deployment, "-p", prompt, "--max-new-tokens", "4")
    env = llama_environment()
    on_gpu = sqft(env, *arguments, "--device", "vulkan")
    on_cpu = sqft(env, *arguments)
    assert on_gpu.returncode == on_cpu.returncode == 0, on_gpu.stderr
    assert on_gpu.stdout == on_cpu.stdout
    assert "all layers on Vulkan0" in on_gpu.stderr and "Vulkan0" not in on_cpu.stderr


@pytest.mark.slow
def test_benchmark_notes_the_device(deployment):
    quick = ("--rounds", "1", "--prompt-tokens", "8", "--new-tokens", "2", "--batch", "1")
    done = sqft(
        llama_environment(), "benchmark", deployment, "--device", "vulkan", *quick, "--json"
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["folders"].values()
    assert any("all layers on Vulkan0" in note for note in row["notes"])


@pytest.mark.parametrize(
    ("driver", "changes", "message"),
    [
        ("missing.json", {}, "no Vulkan driver offers a GPU"),
        (SWIFTSHADER, {}, "device Vulkan0 does not support 16-bit storage"),
        (None, {"GGML_VK_VISIBLE_DEVICES": "7"}, "Invalid device index 7"),
        (None, {"GGML_VK_VISIBLE_DEVICES": ""}, "is used only if GGML_VK_VISIBLE_DEVICES=0"),
        (None, {"LD_LIBRARY_PATH": ""}, "the library libvulkan.so.1 is missing"),
    ],
)
def test_a_machine_without_a_usable_gpu_is_one_line(deployment, driver, changes, message):
    env = llama_environment(driver) if driver else llama_environment()
    if driver is SWIFTSHADER:
        require("Debian's package chromium", SWIFTSHADER)
    if "LD_LIBRARY_PATH" in changes and Path("/usr/lib/x86_64-linux-gnu/libvulkan.so.1").exists():
        pytest.skip("the system has a Vulkan loader")
    env = {name: value for name, value in (env | changes).items() if value}
    done = sqft(env, "generate", deployment, "-p", "1", "--device", "vulkan")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr


@pytest.mark.parametrize("device", ["vulkan", "cuda"])
def test_a_llama_cpp_for_the_cpu_is_refused_with_the_package_to_install(
    tiny_run, sqft_here, device
):
    folder = str(tiny_run["export-gguf"].path / "model")
    done = sqft_here("generate", folder, "-p", "1", "--device", device)
    assert done.returncode == 2
    assert f"pip install cyllama-{device}" in done.stderr


def test_weights_that_do_not_fit_the_device_are_refused_before_loading():
    device = OffloadDevice(0, "Vulkan0", "a GPU", 2**30)
    require_device_memory(Path("model.gguf"), 2**30, device)
    with pytest.raises(HostError, match=r"do not fit Vulkan0 .* 1\.0 GiB free.*--device cpu"):
        require_device_memory(Path("model.gguf"), 2**30 + 1, device)

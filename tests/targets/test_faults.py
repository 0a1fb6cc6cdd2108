"""Devices that are lost or run out of memory during a computation: one line, exit code 3."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from software_gpu import failing_vulkan, llama_environment, onnx_environment

from conftest import SQFT, test_prompts
from sqft_export.commands.supervising import DEVICES, needs_supervision
from sqft_export.errors import HostError
from sqft_export.measure.jobs import MeasuredModel
from sqft_export.measure.worker import failure_of
from sqft_export.targets import target
from sqft_export.targets.faults import device_fault, ended_by_signal
from sqft_export.targets.offload import BACKENDS

LOST = {
    "torch": torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
    "onnx": ort_errors.Fail("Non-zero status code returned while running Div node: Device is lost"),
    "openvino": RuntimeError("[GPU] clFlush, error code: -5 CL_OUT_OF_RESOURCES"),
    "gguf": RuntimeError("vk::Queue::submit: ErrorDeviceLost"),
}
EXHAUSTED = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "onnx": ort_errors.RuntimeException("BFCArena: Failed to allocate memory for requested buffer"),
    "webgpu": ort_errors.Fail("WebGPU device error(2): Out of memory"),
    "openvino": RuntimeError("[GPU] Exceeded max size of memory object allocation: 5 bytes"),
    "gguf": RuntimeError("vk::Device::allocateMemory: ErrorOutOfDeviceMemory"),
}


@pytest.mark.parametrize("runtime", LOST)
def test_a_lost_device_is_one_line_that_says_what_helps(runtime):
    fault = device_fault("gpu", LOST[runtime])
    assert fault is not None and fault.code == 3 and "\n" not in str(fault)
    assert str(fault).startswith("gpu was lost during the computation: ")
    assert "run the command again" in str(fault) and "--device cpu" in str(fault)


@pytest.mark.parametrize("runtime", EXHAUSTED)
def test_device_memory_that_is_used_up_is_one_line_that_says_what_helps(runtime):
    fault = device_fault("gpu", EXHAUSTED[runtime])
    assert fault is not None and fault.code == 3
    assert str(fault).startswith("gpu: out of memory: ") and "quantize.bits" in str(fault)


def test_other_errors_keep_their_class():
    assert device_fault("gpu", RuntimeError("Non-zero status code: shape mismatch")) is None


@pytest.mark.parametrize("runtime", ["onnx", "openvino", "torch", "gguf"])
def test_a_device_that_is_lost_in_a_session_is_named(tiny_run, monkeypatch, runtime):
    """The runtime's call raises its own error after the first pass."""
    stage = "merge" if runtime == "torch" else f"export-{runtime}"
    session = target(runtime).open_session(tiny_run[stage].path / "model", False, 1)
    ids = np.array([[5, 6, 7]], np.int64)
    session.reset()
    session.forward(ids)

    class Lost:
        def __getattr__(self, name: str):
            raise LOST[runtime]

    part = {"onnx": "session", "openvino": "request", "torch": "model", "gguf": "cache"}[runtime]
    broken = Lost()
    monkeypatch.setattr(session, part, (lambda **_: broken.call) if runtime == "torch" else broken)
    with pytest.raises(type(LOST[runtime]) if runtime != "gguf" else Exception) as on_cpu:
        session.forward(ids[:, :1])
    assert not isinstance(on_cpu.value, HostError)
    session.device = "meta"  # a device of torch without hardware
    with pytest.raises(HostError, match=r"meta.*lost.*run the command again"):
        session.forward(ids[:, :1])


def test_a_worker_whose_device_is_lost_names_it_once():
    model = MeasuredModel(kind="onnx", folder=Path("deployed"), threads=None, device="webgpu")
    for message in (str(LOST["onnx"]), str(device_fault("WebGpu", LOST["onnx"]))):
        error = failure_of(model, message)
        assert isinstance(error, HostError) and str(error).count("was lost") == 1
        assert str(error).startswith("deployed: webgpu")


NATIVE = {
    "terminate called after throwing an instance of 'vk::DeviceLostError'\n"
    "  what():  vk::Queue::submit: ErrorDeviceLost\n": "vk::Queue::submit: ErrorDeviceLost",
    "ggml_cuda_compute_forward: MUL_MAT failed\nCUDA error: an illegal memory access was "
    "encountered\n  current device: 0, in function ...\n": "CUDA error: an illegal memory access",
    "ggml_vulkan: Device memory allocation of size 9 failed.\n": "Device memory allocation of size",
    "": "the machine may be out of memory",
}


@pytest.mark.parametrize("messages", NATIVE)
def test_the_last_message_of_a_driver_that_ends_the_process_is_quoted(messages):
    text = ended_by_signal(6, messages)
    assert text.startswith("ended by signal 6") and NATIVE[messages] in text


def test_commands_on_a_gpu_of_llama_cpp_run_supervised():
    assert set(DEVICES) == set(BACKENDS)
    assert needs_supervision(["verify", "model", "--device=vulkan"])
    assert not needs_supervision(["verify", "vulkan", "--device", "webgpu"])


@pytest.fixture(scope="module")
def gguf(tiny_run) -> str:
    return str(tiny_run["export-gguf"].path / "model")


def generate(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    (prompt,) = test_prompts(1)
    command = [SQFT, "generate", *arguments, "-p", prompt, "--max-new-tokens", "16"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("vkQueueSubmit 40 -4", "was lost during the computation: .*ErrorDeviceLost"),
        ("vkAllocateMemory 2 -2", "out of memory"),
    ],
)
def test_a_vulkan_device_that_fails_is_one_line(gguf, tmp_path, calls, message):
    """The real backend on the real driver; one function of the Vulkan loader fails."""
    environment = llama_environment() | failing_vulkan(tmp_path, calls)
    done = generate(environment, gguf, "--device", "vulkan")
    assert done.returncode == 3, done.stderr
    errors = [line for line in done.stderr.splitlines() if "layers on Vulkan0" not in line]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert re.search(message, errors[0])


def test_an_interrupt_ends_a_supervised_command(gguf):
    """Ctrl-C of a terminal reaches both processes; here only the supervisor gets SIGTERM."""
    command = [SQFT, "chat", gguf, "--device", "vulkan"]
    process = subprocess.Popen(
        command,
        env=llama_environment(),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stderr.readline()
    process.terminate()
    assert process.wait(60) == 143


@pytest.mark.slow
def test_a_webgpu_device_that_is_lost_is_one_line(tiny_run, tmp_path):
    folder = str(tiny_run["export-onnx"].path / "model")
    environment = onnx_environment(tmp_path) | failing_vulkan(tmp_path, "vkQueueSubmit 12 -4")
    done = generate(environment, folder, "--device", "webgpu")
    assert done.returncode == 3, done.stderr
    assert "was lost during the computation" in done.stderr and "Traceback" not in done.stderr

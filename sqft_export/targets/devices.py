"""Detect which devices of this machine each runtime can use, and why others are unavailable."""

import importlib.metadata
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sqft_export.errors import UserError
from sqft_export.machine.host import float32_fits, installed
from sqft_export.targets.offload import BACKENDS, find_offload
from sqft_export.targets.webgpu import WEBGPU_PROVIDER, why_no_webgpu

DEVICE_KINDS = ("cpu", "gpu", "npu", "vulkan", "cuda", "webgpu")
OPENVINO_NEEDS = {
    "gpu": "an Intel GPU and its compute runtime",
    "npu": "an Intel NPU and its driver",
}
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "gpu": ("CUDAExecutionProvider", "DmlExecutionProvider"),
}
PROVIDER_NEEDS = {
    "CUDAExecutionProvider": "onnxruntime-gpu",
    "DmlExecutionProvider": "onnxruntime-directml, on Windows",
}


@dataclass(frozen=True)
class Device:
    """A device of one runtime.

    kind: one of ``DEVICE_KINDS``.
    name: the runtime's name for the device.
    missing: reason why the device is unavailable; None if it is available.
    """

    runtime: str
    kind: str
    name: str
    missing: str | None


def devices() -> list[Device]:
    """Return every device of every runtime, available or not."""
    return [device for probe in PROBES.values() for device in probe()]


def find_device(runtime: str, kind: str) -> Device:
    """Return the device of a runtime by its kind, without loading other runtimes.

    :raises UserError: with the reason, if the device is unavailable.
    """
    found = []
    for device in PROBES[runtime]():  # lazily: some kinds start a process
        if device.kind == kind:
            if device.missing is None:
                return device
            found.append(device)
    reasons = "; ".join(f"{d.name}: {d.missing}" for d in found) or "it has no such device"
    raise UserError(f"device: found {kind}, which {runtime} can't use on this machine ({reasons})")


def llama_cpp_here() -> bool:
    """Return whether a Python binding of llama.cpp is installed."""
    return installed("cyllama") or installed("llama_cpp")


def why_not_exact(runtime: str, weights: int) -> str | None:
    """Return why a deployment can't run here in float32, to compare it with torch; None if it can.

    llama.cpp then loads the weights as float32.

    :param weights: parameters of the model.
    """
    if runtime == "gguf" and llama_cpp_here() and not float32_fits(weights):
        return f"{weights:,} weights as float32 do not fit this machine's free memory"
    return why_not_run(runtime, False)


def why_not_run(runtime: str, unmerged: bool) -> str | None:
    """Return why a deployment can't run here in its default mode; None if it can.

    openvino and onnx need no other packages to run than to export.

    :param unmerged: the deployment has an unmerged adapter.
    """
    if runtime != "gguf":
        return None
    missing = next(device.missing for device in _gguf())
    adapter = "cyllama can't apply an unmerged adapter; llama-cli --lora can"
    return missing or (adapter if unmerged else None)


def _openvino() -> Iterator[Device]:
    available: list[str] = []
    if installed("openvino"):
        import openvino as ov

        available = [name.partition(".")[0] for name in ov.Core().available_devices]
    for kind in ("cpu", *OPENVINO_NEEDS):
        missing = None
        if not installed("openvino"):
            missing = "openvino is not installed"
        elif kind.upper() not in available:
            missing = f"OpenVINO sees {', '.join(available)}; this needs {OPENVINO_NEEDS[kind]}"
        yield Device("openvino", kind, kind.upper(), missing)


def _onnx() -> Iterator[Device]:
    available: list[str] = []
    if installed("onnxruntime"):
        import onnxruntime as ort

        available = ort.get_available_providers()
    for kind, names in PROVIDERS.items():
        for name in names:
            missing = None
            if not installed("onnxruntime"):
                missing = "onnxruntime is not installed"
            elif name not in available:
                missing = f"not in this build of ONNX Runtime; it is in {PROVIDER_NEEDS[name]}"
            elif name.startswith("CUDA") and shutil.which("nvidia-smi") is None:
                missing = "no NVIDIA driver"
            yield Device("onnx", kind, name, missing)
    missing = why_no_webgpu() if installed("onnxruntime") else "onnxruntime is not installed"
    yield Device("onnx", "webgpu", WEBGPU_PROVIDER, missing)


def _torch() -> Iterator[Device]:
    if not installed("torch"):
        for kind, name in (("cpu", "cpu"), ("gpu", "cuda")):
            yield Device("torch", kind, name, "torch is not installed")
        return
    yield Device("torch", "cpu", "cpu", None)
    version = importlib.metadata.version("torch")
    name = "cuda"
    missing: str | None = f"torch {version} is a build without CUDA"
    if "+cpu" not in version:  # importing torch takes seconds; its version is enough here
        import torch

        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else name
        missing = None if found else f"torch {version} sees no accelerator"
    yield Device("torch", "gpu", name, missing)


def _web() -> Iterator[Device]:
    """Yield ONNX Runtime on the CPU, which stands in for the browser."""
    for device in _onnx():
        if device.kind == "cpu":
            yield replace(device, runtime="web")


def _gguf() -> Iterator[Device]:
    missing = "llama.cpp is not installed; pip install 'sqft-export[gguf-runtime]'"
    yield Device("gguf", "cpu", "llama.cpp", None if llama_cpp_here() else missing)
    for kind, backend in BACKENDS.items():
        found = find_offload(kind)
        if isinstance(found, str):
            yield Device("gguf", kind, backend.name, found)
        else:
            yield Device("gguf", kind, f"{found.name} ({found.description})", None)


PROBES = {"openvino": _openvino, "onnx": _onnx, "gguf": _gguf, "web": _web, "torch": _torch}
